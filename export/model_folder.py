"""All that a model folder holds besides its weights: code, configuration, tokenizer, processors and chat template;
and the names of the weights in it.

    uhr-bat export 7b-config [--output DIR]      writes the configuration files of the 7B model
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AddedToken, AutoTokenizer
from uhr_bat.common.commands import tells_errors
from uhr_bat.common.files import write_json
from uhr_bat.common.loading import ROOT
from uhr_bat.common.outputs import MODEL_FILES, Output, check_outputs
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.image_processing_uhr_bat import UHRBatImageProcessor
from uhr_bat.image_raster_files_uhr_bat import reason
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration

from .chat_forms import chat_template
from .checkpoint_files import CheckpointError, read_json

EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = "chat_template.jinja"
SENTENCEPIECE = "tokenizer.model"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    SENTENCEPIECE,
)
# A table gets rows so many at a time: multiples of it are fast.
ROWS_TOGETHER = 64
# Where transformers read a tokenizer, code that a checkpoint names, and a template, which is a file of its own here.
LEFT_OUT = ("name_or_path", "is_local", "local_files_only", "auto_map", "chat_template")
# A `model_max_length` from here on says that nobody set one.
UNBOUNDED = 10**9
AUTO_MAP = {
    "AutoConfig": "configuration_uhr_bat.UHRBatConfig",
    "AutoModel": "modeling_uhr_bat.UHRBatModel",
    "AutoModelForCausalLM": "modeling_uhr_bat.UHRBatForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_uhr_bat.UHRBatForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_uhr_bat.UHRBatForConditionalGeneration",
}
PROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": "image_processing_uhr_bat.UHRBatImageProcessor",
    "AutoProcessor": "processing_uhr_bat.UHRBatProcessor",
}


def meta_model(config: UHRBatConfig) -> UHRBatForConditionalGeneration:
    """The model without its weights: names and shapes."""
    with torch.device("meta"):
        return UHRBatForConditionalGeneration(config)


def write_code(output: Path):
    """The files that `trust_remote_code` runs, and their licence."""
    for path in [*sorted(ROOT.glob("*_uhr_bat.py")), ROOT / "LICENSE"]:
        shutil.copyfile(path, output / path.name)


def write_processing(output: Path, source: Path, config: UHRBatConfig, is_released: bool, budgets=None) -> bool:
    """Tokenizer, processors, chat template and generation config; whether there is a tokenizer.

    What the checkpoint's folder `source` states is kept, as far as the layout means the same: a released checkpoint has
    neither budgets nor a token for images, and its settings of generation are those of its base model. `budgets` go
    before the folder's. `config` gets the id of the image token.
    """
    settings = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    tokenizer = write_tokenizer(output, source, config, None if is_released else config.image_token_index,
                                settings.get("tokenizer_model_max_length"))  # fmt: skip
    stated, generation = None, None
    if not is_released:
        stated = read_chat_template(source)
        if (source / "generation_config.json").is_file():
            generation = read_json(source / "generation_config.json")
        if (source / "processor_config.json").is_file():
            budgets = budgets or read_json(source / "processor_config.json").get("default_budgets")
    ends = []
    if tokenizer is None:
        print(f"tokenizer: none in {source}, so none here; `image_token_index` is {config.image_token_index}")
    else:
        config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        print(f"tokenizer: {len(tokenizer)} entries, {IMAGE_TOKEN!r} is {config.image_token_index}")
    template, end = chat_template(tokenizer, stated, settings, IMAGE_TOKEN)
    (output / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    if tokenizer is not None:
        ends = [tokenizer.eos_token_id] if end is None or is_released else []
        ends = [end, *ends]
    write_generation_config(output, config, ends, generation)
    write_processor_configs(output, config, read_image_settings(source), budgets)
    return tokenizer is not None


def write_tokenizer(output: Path, source: Path, config: UHRBatConfig, image_token_index=None, model_max_length=None):
    """The checkpoint's tokenizer, with "<image>" as one token of its own; None if it has none.

    Args:
        output, source: the model folder and the checkpoint's.
        config: gives the rows of the embedding table, which every id must have.
        image_token_index: the id that "<image>" must have; None: the one that it has or gets.
        model_max_length: the longest prompt in tokens; None: what the tokenizer says, or the context window.

    Raises:
        CheckpointError: files that are no tokenizer, or an id of "<image>" that the model does not have.
    """
    tokenizer = _copy_tokenizer(output, source)
    if tokenizer is None:
        return None
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        tokenizer.save_pretrained(output)
    path = output / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    stated = settings.get("model_max_length")
    if not isinstance(stated, (int, float)) or stated >= UNBOUNDED:
        stated = config.text_config.max_position_embeddings
    settings = {key: value for key, value in settings.items() if key not in LEFT_OUT}
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CheckpointError(
                f"{source}: the tokenizer has neither a padding token, which batches need, nor an end token, that could "
                "be one. Name one in tokenizer_config.json, as `pad_token`."
            )
        settings["pad_token"] = tokenizer.eos_token
        print(f"tokenizer: no padding token, so its end token {tokenizer.eos_token!r} is it")
    settings |= {
        "processor_class": "UHRBatProcessor",
        "image_token": IMAGE_TOKEN,
        "model_max_length": model_max_length or stated,
        # transformers does not write this one, and batches need it.
        "padding_side": "left",
    }
    write_json(path, settings)

    tokenizer = _load_tokenizer(output, source)
    ids, num_rows = tokenizer(IMAGE_TOKEN, add_special_tokens=False).input_ids, config.text_config.vocab_size
    last, last_id = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last != IMAGE_TOKEN and last_id >= num_rows:
        raise CheckpointError(
            f"{source}: the tokenizer has ids up to {last_id} ({last!r}), but the embedding table has {num_rows} rows. "
            f"Give the checkpoint more rows (`model.resize_token_embeddings({last_id + 1})`), or take the tokens out of "
            "the tokenizer."
        )
    if len(ids) != 1 or ids[0] >= num_rows or image_token_index not in (None, ids[0]):
        wanted = f"one id below {num_rows}, the rows of the embedding table"
        if image_token_index is not None:
            wanted = f"[{image_token_index}], the `image_token_index` of the configuration"
        raise CheckpointError(f"{source}: the tokenizer makes {ids} of {IMAGE_TOKEN!r}. It must be {wanted}.")
    return tokenizer


def rows_for_image_token(source: Path, config: UHRBatConfig) -> int:
    """Rows of the embedding table, with those for an "<image>" that a tokenizer without a free row will get."""
    rows = config.text_config.vocab_size
    with tempfile.TemporaryDirectory() as place:
        tokenizer = _copy_tokenizer(Path(place), source)
    if tokenizer is None or IMAGE_TOKEN in tokenizer.get_vocab() or max(tokenizer.get_vocab().values()) != rows - 1:
        return rows
    return rows // ROWS_TOGETHER * ROWS_TOGETHER + ROWS_TOGETHER


def _copy_tokenizer(output, source):
    """A checkpoint's tokenizer, in the files that stand for it in a model folder; None if it has none."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not {"tokenizer.json", "vocab.json", SENTENCEPIECE} & set(names):
        return None
    for name in names:
        shutil.copyfile(source / name, output / name)
    tokenizer = _load_tokenizer(output, source)
    if not {"tokenizer.json", "vocab.json"} & set(names):  # Llama's own file, which needs another library to be read
        tokenizer.save_pretrained(output)
        (output / SENTENCEPIECE).unlink()
    return tokenizer


def _load_tokenizer(folder, source):
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken file makes of it
        alone = (folder / SENTENCEPIECE).is_file() and not (folder / "tokenizer.json").is_file()
        mend = f" {SENTENCEPIECE} alone needs: pip install sentencepiece protobuf" if alone else ""
        raise CheckpointError(f"{source}: the tokenizer cannot be loaded ({reason(error)}).{mend}") from error


def write_generation_config(output: Path, config: UHRBatConfig, ends=(), settings: dict | None = None):
    """generation_config.json. Greedy: the same input gives the same answer.

    Args:
        output: the model folder.
        config: names ids that end an answer, and the padding.
        ends: more ids that end an answer.
        settings: a checkpoint's own, which are kept and get `ends`.
    """
    text = config.text_config
    stated = text.eos_token_id if settings is None else settings.get("eos_token_id")
    stated = stated if isinstance(stated, list) else [stated]
    ends = [end for end in dict.fromkeys([*stated, *ends]) if end is not None]
    if settings is not None:
        if ends and ends != stated:  # no longer what the library made of the model's configuration
            settings = {name: value for name, value in settings.items() if name != "_from_model_config"}
            settings["eos_token_id"] = ends
        write_json(output / "generation_config.json", settings)
        return
    pad = ends[0] if text.pad_token_id is None and ends else text.pad_token_id
    settings = {"do_sample": False, "eos_token_id": ends, "pad_token_id": pad}
    write_json(output / "generation_config.json", {k: v for k, v in settings.items() if v not in (None, [])})


def write_processor_configs(output: Path, config: UHRBatConfig, image_settings=None, budgets=None):
    """preprocessor_config.json and processor_config.json.

    Args:
        output: the model folder.
        config: the model's configuration; the image processor's scales, tile and patch are its own.
        image_settings: mean, deviation and other settings of the checkpoint's image processor; its tower's otherwise.
        budgets: of the processor; those of the configuration otherwise.
    """
    known = set(UHRBatImageProcessor.valid_kwargs.__annotations__) - {"size"}  # which follows the tile
    settings = {key: value for key, value in (image_settings or {}).items() if key in known}
    if config.vision_config.model_type == "siglip_vision_model":  # what files of other code do not say
        settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} | settings
    processor = UHRBatImageProcessor(**settings | {
        "crop_size": {"height": config.tile_size, "width": config.tile_size},
        "patch_size": config.patch_size,
        "scales": config.scales,
        "mask_padding": config.mask_padding,
    })  # fmt: skip
    # CLIP's keys are all there, so that one gets CLIP's processor with the right tile without `trust_remote_code`.
    settings = {**processor.to_dict(), "default_to_square": False, "auto_map": PROCESSOR_AUTO_MAP}
    write_json(output / "preprocessor_config.json", dict(sorted(settings.items())))
    write_json(
        output / "processor_config.json",
        {
            "processor_class": "UHRBatProcessor",
            "auto_map": {"AutoProcessor": PROCESSOR_AUTO_MAP["AutoProcessor"]},
            "default_budgets": budgets or config.budgets,
        },
    )


def write_config(output: Path, config: UHRBatConfig):
    """config.json, the last file of a folder: what lacks it does not load."""
    config.architectures = ["UHRBatForConditionalGeneration"]
    config.auto_map = AUTO_MAP
    config.save_pretrained(output)


def read_chat_template(folder: Path) -> str | None:
    """A folder's chat template: a file of its own, now or as older releases wrote it, or an entry of the tokenizer's."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(template, str):
            return template
    return None


def read_image_settings(folder: Path) -> dict:
    """Settings of a checkpoint's image processor: nested in its processor's file or in a file of their own; or {}."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            settings = read_json(folder / name)
            settings = settings.get("image_processor", {}) if name == "processor_config.json" else settings
            if settings:
                return settings
    return {}


def write_7b(output: Path):
    """The paper's model: the defaults, and the special tokens of Qwen2-7B-Instruct."""
    endoftext, im_end = 151643, 151645
    config = UHRBatConfig(dtype="bfloat16")
    config.text_config.bos_token_id = config.text_config.pad_token_id = endoftext
    config.text_config.eos_token_id = im_end
    output.mkdir(exist_ok=True, parents=True)
    write_generation_config(output, config, ends=[endoftext])
    write_processor_configs(output, config)
    write_config(output, config)


@tells_errors
def main(arguments=None):
    parser = argparse.ArgumentParser(prog="uhr-bat export 7b-config", description="The configuration of the 7B model.")
    parser.add_argument("--output", type=Path, default=Path("uhr_bat_7b"), metavar="DIR", help="default: uhr_bat_7b")
    output = parser.parse_args(arguments).output
    check_outputs((), Output("--output", output, names=MODEL_FILES))
    write_7b(output)


if __name__ == "__main__":
    raise SystemExit(main())
