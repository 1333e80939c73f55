# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT pipeline: `pipeline("image-text-to-text")` whose images reach the processor unopened, and whose answers may have objects.

The library's own decodes what stands in `images=` with Pillow before the processor sees it: rasters then come out wrong,
and Pillow's limit holds. Chats it hands on as they are.
"""

import os
from importlib import import_module
from types import SimpleNamespace

from transformers import ImageTextToTextPipeline

from .image_processing_uhr_bat import part_reading
from .image_reading_uhr_bat import flatten_images

# Where a part of a chat says which image it is, the first of them that it has, as in the library.
SOURCES = ("image", "url", "path", "base64")


class UHRBatPipeline(ImageTextToTextPipeline):
    """The library's pipeline, but `images` may be whatever the processor takes (`read_image`), rasters of any size too.

    With `objects=True` every result of a prompt about one image, or with `dates=True` two dates of it, has an entry "objects", as the answers of `uhr-bat serve` have
    it: {"image_size": [height, width], "objects": [...], "refused", "note", "ground_error"}, each object with its box or point in
    pixels of the image and, where that has a CRS, on the ground. It takes the package: `pip install "uhr-bat[geo]"`.

    `pipeline` takes it for a model that is named, with `trust_remote_code=True`; to a model in memory it is given as
    `pipeline_class`.
    """

    def check_model_type(self, supported_models):
        if not hasattr(self.model, "host"):  # whose class the library cannot know
            super().check_model_type(supported_models)

    def _sanitize_parameters(self, objects=None, **kwargs):
        steps = super()._sanitize_parameters(**kwargs)
        if objects is not None:
            for options in steps:
                options["objects"] = objects
        return steps

    def preprocess(
        self, inputs=None, timeout=None, continue_final_message=None, processor_kwargs=None, objects=False, **kwargs
    ):
        given, seen = inputs, None
        if objects:
            reading, both = {}, any((options or {}).get("dates") for options in (kwargs, processor_kwargs))
            kwargs = _without_reading(kwargs, reading)
            processor_kwargs = processor_kwargs and _without_reading(processor_kwargs, reading)
            inputs, seen = self._open(inputs, reading, 2 if both else 1)
            if _goes_on(given, continue_final_message):
                seen[0].begun = _texts(given.messages[-1]["content"])
        if not isinstance(inputs, dict):
            if processor_kwargs is not None:
                kwargs["processor_kwargs"] = processor_kwargs
            model_inputs = super().preprocess(inputs, timeout, continue_final_message, **kwargs)
        else:
            images, text = inputs["images"], inputs["text"]
            options = kwargs | (processor_kwargs or {})
            if isinstance(text, (list, tuple)) and len(text) > 1:
                options.setdefault("padding", True)
            model_inputs = self.processor(images=images, text=text, return_tensors="pt", **options).to(dtype=self.dtype)
            model_inputs["text"] = text
        if objects:
            model_inputs["text"] = given["text"] if isinstance(given, dict) else given
            model_inputs["seen"] = seen
        return model_inputs

    def _open(self, inputs, reading, number):
        """Inputs whose images are open, and what was seen of the last one of each prompt, which has `number`."""
        if isinstance(inputs, dict):
            texts = [inputs["text"]] if isinstance(inputs["text"], str) else inputs["text"]
            seen = [self._see(source, reading) for source in flatten_images(inputs["images"])]
            _check_images(len(seen), len(texts), number)
            return {**inputs, "images": [one.image for one in seen]}, seen[number - 1 :: number]
        seen = []

        def opened(part):
            if not (isinstance(part, dict) and part.get("type") == "image"):
                return part
            name = next((name for name in SOURCES if name in part), None)
            if name is None:
                return part
            seen.append(self._see(part[name], reading, is_path=name != "base64"))
            return {"type": "image", "image": seen[-1].image}

        messages = [
            {**message, "content": [opened(part) for part in message["content"]]}
            if isinstance(message["content"], (list, tuple))
            else message
            for message in getattr(inputs, "messages", [])
        ]
        _check_images(len(seen), 1, number)
        return type(inputs)(messages), seen[number - 1 :: number]

    def _see(self, source, reading, is_path=True):
        geo = _of_package("geo")
        image = self.processor.image_processor.open_image(source, **reading)
        path = (
            _of_package("common.images").local_path(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else ""
        )
        place = geo.Georeference.of(image, path if is_path and os.path.isfile(path) else None)
        return SimpleNamespace(image=image, size=(image.height, image.width), place=place, begun="")

    def _forward(self, model_inputs, generate_kwargs=None, objects=False):
        if not objects:
            return super()._forward(model_inputs, generate_kwargs)
        asking, geo, options = _of_package("common.asking"), _of_package("geo"), dict(generate_kwargs or {})
        seen, text = _flat(model_inputs.pop("seen")), model_inputs.pop("text")
        compressed = asking.compress(self.model, model_inputs, options.pop("rules", None))
        prompt = {name: model_inputs[name] for name in asking.PROMPT}
        inputs = prompt | self.model.visual_inputs(**prompt, compressed=compressed)
        outputs = super()._forward({**inputs, "text": text}, options)
        sequences = outputs["generated_sequence"]
        ids = (sequences.flatten(0, 1) if sequences.ndim == 3 else sequences)[:, outputs["input_ids"].shape[1] :]
        of_each = len(ids) // len(seen)
        asked = [one for one in seen for _ in range(of_each)]
        texts = [one.begun + answer for one, answer in zip(asked, asking.answer_texts(self.processor, ids))]
        found = asking.objects_of_answers(self.model, texts, compressed, [one.size for one in seen], ids=ids)
        members = [geo.object_members(of_answer, one.size, one.place) for of_answer, one in zip(found, asked)]
        return {**outputs, "objects": [members[first : first + of_each] for first in range(0, len(members), of_each)]}

    def postprocess(self, model_outputs, *args, objects=False, **kwargs):
        found = _flat(model_outputs.pop("objects", []))
        records = super().postprocess(model_outputs, *args, **kwargs)
        return [record | {"objects": of_answer} for record, of_answer in zip(records, found)] if objects else records


def _goes_on(inputs, continue_final_message) -> bool:
    """Whether an answer goes on with the last turn of a chat."""
    messages = getattr(inputs, "messages", None)
    if not messages or continue_final_message is not None:
        return bool(messages and continue_final_message)
    return messages[-1]["role"] == "assistant"


def _texts(content) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _without_reading(options, reading) -> dict:
    """The options less those of opening an image, which `reading` gets; the limit of an image in memory stays, too."""
    own, left = part_reading(options)
    reading |= own
    if "images_kwargs" in left:
        left["images_kwargs"] = _without_reading(left["images_kwargs"], reading)
    return left


def _check_images(num_images, num_prompts, number):
    if num_images != number * num_prompts:
        raise ValueError(
            f"`objects` lie in one image, or with `dates` in the later one of two, and no answer says in which of several. Got "
            f"{num_images} images of {num_prompts} prompts."
        )


def _flat(values) -> list:
    """What a batch of the pipeline nests once more."""
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def _of_package(name):
    try:
        return import_module(f"uhr_bat.{name}")
    except ModuleNotFoundError as error:
        if error.name != "uhr_bat":
            raise
        raise ImportError('`objects=True` of a pipeline needs the package: pip install "uhr-bat[geo]".') from error


__all__ = ["UHRBatPipeline"]
