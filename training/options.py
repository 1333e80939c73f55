"""What a recipe says: the options of `uhr-bat train`, beside those of transformers' TrainingArguments."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..common.loading import ROOT
from .parts import LORA_TARGETS


def _option(help, default=None, **settings):
    kind = {"default_factory": default} if callable(default) else {"default": default}
    return field(**kind, metadata={"help": help, **settings})


@dataclass
class ModelOptions:
    """Names are those of TRL's ModelConfig where it has one."""

    model_name_or_path: str = _option("Model folder or repository to start from.", str(ROOT))
    dtype: str = _option("Of the weights in memory: auto, float32, bfloat16.", "auto")
    freeze: list[str] = _option("Parts that are not trained, by their names in the model.", lambda: ["vision_tower"])
    use_peft: bool = _option("Train a LoRA adapter.", False)
    lora_r: int = _option("Rank of the adapter.", 16)
    lora_alpha: int = _option("The adapter is scaled by alpha / r.", 32)
    lora_dropout: float = _option("Before the adapter.", 0.05)
    lora_target_modules: str = _option("Regular expression of the layers that get an adapter.", LORA_TARGETS)
    lora_modules_to_save: list[str] | None = _option("Parts that are trained whole and saved beside the adapter.")
    load_in_4bit: bool = _option("QLoRA: the decoder's linear layers in NF4 (bitsandbytes).", False)


@dataclass
class DataOptions:
    train_data: list[str] = _option("Files (JSON, JSON lines, parquet, CSV) or data sets of the Hub.", list)
    eval_data: list[str] | None = _option("The same, held out.")
    eval_share: float = _option("Share of the training data that is held out, where there is no eval_data.", 0.0)
    train_split: str = _option("Of data sets of the Hub.", "train")
    eval_split: str = _option("Of data sets of the Hub.", "validation")
    image_folder: str | None = _option("What paths of images start from; the folder of their file if not given.")
    regions: str | None = _option("Folder of label maps (uhr-bat regions); without, the model makes its own regions.")
    image_options: dict | str | None = _option("More arguments of the image processor, as JSON.")
    max_length: int | None = _option("Tokens of the longest sample; the context window if not given.")
    bad_samples: str = _option("error, or skip: what cannot be read or does not fit is left out, and counted.", "error")
    dataset_num_proc: int | None = _option("Processes that check the data.")
    budgets: list[int] | None = _option("Visual tokens of each scale, or one number for all; the model's if not given.")
    budget_range: list[float] = _option("Factors between which the budgets of a batch are drawn.", lambda: [1.0, 1.0])
    eval_max_new_tokens: int = _option("Tokens of an answer to a held-out question; 0: none is asked.", 32)
    eval_pictures: int = _option("Held-out samples of which is drawn, at every checkpoint, what was kept.", 0)

    def __post_init__(self):
        if isinstance(self.image_options, str):
            self.image_options = json.loads(self.image_options)
        if isinstance(self.budgets, list) and len(self.budgets) == 1:
            self.budgets = self.budgets[0]
        if len(self.budget_range) != 2:
            raise ValueError(f"`budget_range` is two factors. Got {self.budget_range}.")
        if not self.train_data:
            raise ValueError("`train_data` is missing: name a file of samples, or a data set.")


@dataclass
class UHRBatTrainingArguments(TrainingArguments):
    """TrainingArguments with a second learning rate, and with columns left for the collator to read."""

    remove_unused_columns: bool = _option("The collator reads columns that no model does.", False)
    visual_learning_rate: float | None = _option("Of what stands before the decoder; learning_rate if not given.")


def make_parser(prog: str) -> argparse.ArgumentParser:
    kinds = (ModelOptions, DataOptions, UHRBatTrainingArguments)
    parser = HfArgumentParser(kinds, prog=prog, description="Fine-tune on your own data.", allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe (YAML): values of the options below")
    return parser


def read_options(arguments, prog="uhr-bat train") -> tuple[ModelOptions, DataOptions, UHRBatTrainingArguments]:
    """The options of a command: those of its recipe, and those that the command line changes.

    Raises:
        OSError: the recipe cannot be read.
        ValueError: an option of the recipe that there is not, or a wrong value.
    """
    parser = make_parser(prog)
    config = parser.parse_known_args(arguments)[0].config
    if config is not None:
        recipe = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        known = {action.dest for action in parser._actions}
        if unknown := sorted(set(recipe) - known):
            raise ValueError(f"{config}: there is no option {', '.join(unknown)}.")
        for name in ("train_data", "eval_data", "freeze", "budgets"):  # a list of one may be written without brackets
            if name in recipe and not isinstance(recipe[name], (list, type(None))):
                recipe[name] = [recipe[name]]
        parser.set_defaults(**recipe)
    model, data, training, _ = parser.parse_args_into_dataclasses(arguments)
    return model, data, training
