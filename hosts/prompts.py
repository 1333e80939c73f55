"""A host's prompts, written by UHR-BAT's processor: the words that its family puts around the tokens of an image.

The chat template is the host's own. A filter around it puts `before` and `after` beside each placeholder, which the
processor then repeats for every visual token.
"""

import copy
import inspect
import json

import transformers
from transformers import AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from ..image_processing_uhr_bat import UHRBatImageProcessor
from ..processing_uhr_bat import UHRBatProcessor
from .settings import FAMILIES, Prompts, family_of


class HostProcessor(UHRBatProcessor):
    """[`UHRBatProcessor`] with a host's tokenizer, chat template and tiles. Pixels stay 8-bit numbers: the host's own image
    processor normalises them, tile by tile, in the model."""

    row_end = ""

    def _process_images(self, images, *args, **kwargs):
        """An image of one tile that is kept whole is written as the family writes one, with the ends of its rows."""
        inputs, texts = super()._process_images(images, *args, **kwargs)
        p = self.image_processor.crop_size["height"] // self.image_processor.patch_size
        whole = self.image_token * p * p
        if (
            self.row_end
            and inputs["token_counts"].shape[1] == 1
            and len(kwargs.get("scales") or self.image_processor.scales) == 1
        ):
            rows = self.row_end.join([self.image_token * p] * p)
            texts = [rows if text == whole else text for text in texts]
        return inputs, texts


class Parts(ProcessorMixin):
    """A whole processor's base that takes what there is: a family's class asks for parts that a prompt does not need, as
    one of videos, which needs torchvision."""

    def __init__(self, *args, image_processor=None, tokenizer=None, **kwargs):
        self.image_processor, self.tokenizer = image_processor, tokenizer


def find_prompts(config, image_processor, tokenizer, tile_inputs) -> Prompts:
    """What stands around an image's tokens, of a family that is not in the table: what its own processor writes for a tile.

    Args:
        tile_inputs: what the image processor makes of one tile.
    """
    kind = getattr(transformers, PROCESSOR_MAPPING_NAMES[config.model_type])
    parameters = inspect.signature(kind.__init__).parameters.values()
    parts = {one.name: None for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD}
    parts.pop("self", None)
    parts |= {"image_processor": image_processor, "tokenizer": copy.deepcopy(tokenizer)}
    processor = type(kind.__name__, (kind, Parts), {})(**parts)
    processor.image_processor, processor.tokenizer = image_processor, parts["tokenizer"]
    written = processor.replace_image_token(tile_inputs, 0)
    token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    before, _, rest = written.partition(token)
    return Prompts(processor.image_token, before, rest.rpartition(token)[2])


def prompts_of(config, image_processor, tokenizer, tile_inputs) -> Prompts:
    """Those of the family, spelt out."""
    prompts = family_of(config.model_type).prompts
    if config.model_type not in FAMILIES:
        try:
            return find_prompts(config, image_processor, tokenizer, tile_inputs)
        except Exception as error:  # of a class of which nothing is known
            raise ValueError(
                f"How a model of the type {config.model_type!r} writes an image into a prompt could not be found out "
                f"({type(error).__name__}: {error})."
            ) from error
    named = {**getattr(tokenizer, "special_tokens_map", {}), **_Attributes(tokenizer)}
    return Prompts(
        *(part.format_map(named) for part in (prompts.marker, prompts.before, prompts.after, prompts.row_end))
    )


class _Attributes(dict):
    """Attributes of a tokenizer as a dictionary, for those of SmolVLM with the defaults of its processor."""

    def __init__(self, tokenizer):
        defaults = {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
        names = ("boi_token", "eoi_token", "start_image_token", "end_image_token", *defaults)
        super().__init__({name: getattr(tokenizer, name, defaults.get(name, "")) for name in names})


def filtered(template: str, image_token: str, prompts: Prompts) -> str:
    """A chat template that writes `before` + placeholder + `after` where the host's writes its marker."""
    steps = [(prompts.marker, image_token)] if prompts.marker not in ("", image_token) else []
    steps += [(image_token, prompts.before + image_token + prompts.after)] if prompts.before + prompts.after else []
    if not steps:
        return template
    calls = "|".join(f"replace({json.dumps(old)}, {json.dumps(new)})" for old, new in steps)
    return f"{{% filter {calls} %}}{template.removesuffix(chr(10))}{{% endfilter %}}"


def make_processor(folder, config, image_processor, settings, side, p, scales, tile_inputs) -> HostProcessor:
    """The processor of a host.

    Args:
        folder: of the host, or its name on the Hub.
        side, p: pixels and rows a side of a tile.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    prompts = prompts_of(config, image_processor, tokenizer, tile_inputs)
    image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    template = ProcessorMixin.get_processor_dict(folder)[0].get("chat_template") or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default", next(iter(template.values())))
    budgets = settings.budgets if isinstance(settings.budgets, int) else list(settings.budgets)
    made = HostProcessor(
        UHRBatImageProcessor(
            do_rescale=False, do_normalize=False, crop_size=side, patch_size=side // p, scales=scales,
            max_tiles=settings.max_tiles,
        ),
        tokenizer,
        chat_template=None if template is None else filtered(template, image_token, prompts),
        default_budgets=budgets,
        image_token=image_token,
    )  # fmt: skip
    made.row_end, made.prompts = prompts.row_end, prompts
    return made
