"""A host's prompts, written by UHR-BAT's processor. The chat template is the host's own; a filter around it puts the words
beside each placeholder that its family has around the tokens of an image."""

import copy
import inspect
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import transformers
from transformers import AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from ..image_processing_uhr_bat import UHRBatImageProcessor
from ..processing_uhr_bat import UHRBatProcessor
from .settings import FAMILIES, SETTINGS_FILE, Prompts, write_settings

# Files of a host's folder that are a processor's, and those of these names that are none.
OWN = ("*.json", "*.jinja", "*.model", "*.txt")
OTHERS = ("config.json", "generation_config.json", "adapter_config.json", "*.index.json", "trainer_state.json",
          "requirements.txt", SETTINGS_FILE)  # fmt: skip


class HostProcessor(UHRBatProcessor):
    """[`UHRBatProcessor`] with a host's tokenizer, chat template and tiles. Pixels stay 8-bit numbers: the host's own image
    processor normalises them, tile by tile, in the model."""

    prompts = Prompts()

    def save_pretrained(self, save_directory, *args, **kwargs):
        """The host's own files as they are, and the settings that it is asked by, which [`load_model`] reads, not the library."""
        own, to, copied = Path(self.folder), Path(save_directory), []
        to.mkdir(parents=True, exist_ok=True)
        for path in sorted(own.iterdir()) if not own.samefile(to) else ():
            if any(map(path.match, OWN)) and not any(map(path.match, OTHERS)):
                copied.append(shutil.copyfile(path, to / path.name))
        settings = asdict(self.settings) | self.rules | {"budgets": self.default_budgets}
        del settings["max_tiles"]  # how many tiles a question takes is no matter of what was learnt
        write_settings(to, settings)
        return copied

    def empty_prompt(self):
        """long[M]: a question without words about one image, which is all that the chat template writes. Raises `ValueError`
        where that is no image."""
        content = [{"type": "image"}, {"type": "text", "text": ""}]
        text = self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        if text.count(self.image_token) != 1:
            raise ValueError(f"An empty question has no place for its image in the chat template: {text!r}.")
        added = self.adds_special_tokens(text)
        return self.tokenizer(text, add_special_tokens=added, return_tensors="pt")["input_ids"][0]

    def _process_images(self, images, *args, **kwargs):
        """An image of one tile that is kept whole is written as the family writes one, with the ends of its rows."""
        inputs, texts = super()._process_images(images, *args, **kwargs)
        p = self.image_processor.crop_size["height"] // self.image_processor.patch_size
        if self.prompts.row_end and len(kwargs.get("scales") or self.image_processor.scales) == 1:
            rows = self.prompts.row_end.join([self.image_token * p] * p)
            texts = [rows if text == self.image_token * p * p else text for text in texts]
        return inputs, texts


class Parts(ProcessorMixin):
    """The base of a whole processor without the parts that a prompt does not need, as one of videos, which needs torchvision."""

    def __init__(self, *args, image_processor=None, tokenizer=None, **kwargs):
        self.image_processor, self.tokenizer = image_processor, tokenizer


def find_prompts(config, reader, tokenizer, stated) -> Prompts:
    """What stands around an image's tokens, of a family that is not in the table: what its own processor writes for a tile."""
    kind = getattr(transformers, PROCESSOR_MAPPING_NAMES[config.model_type])
    parameters = inspect.signature(kind.__init__).parameters.values()
    parts = {one.name: None for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD}
    parts |= {one.name: stated[one.name] for one in parameters if one.name in stated}
    parts |= {"image_processor": reader.image_processor, "tokenizer": copy.deepcopy(tokenizer)}
    parts.pop("self", None)
    processor = type(kind.__name__, (kind, Parts), {})(**parts)
    processor.image_processor, processor.tokenizer = reader.image_processor, parts["tokenizer"]
    token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    before, _, rest = processor.replace_image_token(reader.inputs(reader.blank(1)), 0).partition(token)
    return Prompts(processor.image_token, before, rest.rpartition(token)[2])


def prompts_of(config, reader, tokenizer, stated) -> Prompts:
    """Those of the family, spelt out: by the tokenizer's attributes, or the configuration's ids. `stated`: by the file of the
    whole processor."""
    if config.model_type not in FAMILIES:
        return find_prompts(config, reader, tokenizer, stated)
    names = {}
    for name in ("boi_token", "eoi_token"):
        idx = getattr(config, f"{name}_id", getattr(config, f"{name}_index", None))
        named = None if idx is None or idx >= len(tokenizer) else tokenizer.convert_ids_to_tokens(idx)
        names[name] = getattr(tokenizer, name, None) or named or ""
    return Prompts(*(part.format(**names) for part in FAMILIES[config.model_type].prompts))


def filtered(template: str, image_token: str, prompts: Prompts) -> str:
    """A chat template that writes `before` + placeholder + `after` where the host's writes its marker."""
    steps = [(prompts.marker or image_token, image_token), (image_token, prompts.before + image_token + prompts.after)]
    calls = "|".join(f"replace({json.dumps(old)}, {json.dumps(new)})" for old, new in steps)
    return f"{{% filter {calls} %}}{template.removesuffix(chr(10))}{{% endfilter %}}"


def make_processor(parts, p: int) -> HostProcessor:
    """The processor of a host, of what is read of it before its weights, and the rows a side of its tiles."""
    tokenizer = AutoTokenizer.from_pretrained(parts.folder, trust_remote_code=False)
    tokenizer.padding_side, side, config = "left", parts.reader.side, parts.config
    stated, _ = ProcessorMixin.get_processor_dict(parts.folder)
    prompts = prompts_of(config, parts.reader, tokenizer, stated)
    image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    template = stated.get("chat_template") or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default", next(iter(template.values())))
    options = {"scales": parts.scales, "max_tiles": parts.settings.max_tiles}
    made = HostProcessor(
        UHRBatImageProcessor(do_rescale=False, do_normalize=False, crop_size=side, patch_size=side // p, **options),
        tokenizer,
        chat_template=template and filtered(template, image_token, prompts),
        default_budgets=parts.settings.budgets,
        image_token=image_token,
    )
    made.prompts, made.folder, made.settings = prompts, parts.folder, parts.settings
    made.rules = parts.rules
    return made
