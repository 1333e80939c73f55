# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT pipeline: `pipeline("image-text-to-text")` whose images reach the processor unopened.

The library's own decodes what stands in `images=` with Pillow before the processor sees it: rasters then come out wrong,
and Pillow's limit holds. Chats it hands on as they are.
"""

from transformers import ImageTextToTextPipeline


class UHRBatPipeline(ImageTextToTextPipeline):
    """The library's pipeline, but `images` may be whatever the processor takes (`read_image`), rasters of any size too.

    `pipeline` takes it for a model that is named, with `trust_remote_code=True`; to a model in memory it is given as
    `pipeline_class`.
    """

    def preprocess(self, inputs=None, timeout=None, continue_final_message=None, processor_kwargs=None, **kwargs):
        if not isinstance(inputs, dict):
            if processor_kwargs is not None:
                kwargs["processor_kwargs"] = processor_kwargs
            return super().preprocess(inputs, timeout, continue_final_message, **kwargs)
        images, text = inputs["images"], inputs["text"]
        options = dict(kwargs if processor_kwargs is None else processor_kwargs)
        if isinstance(text, (list, tuple)) and len(text) > 1:
            options.setdefault("padding", True)
        model_inputs = self.processor(images=images, text=text, return_tensors="pt", **options).to(dtype=self.dtype)
        model_inputs["text"] = text
        return model_inputs


__all__ = ["UHRBatPipeline"]
