"""What a recipe says: the options of `uhr-bat train`, beside those of transformers' TrainingArguments."""

# ruff: noqa: RUF009  (HfArg makes a field)

import argparse
import json
from dataclasses import dataclass, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg

from ..common.loading import ROOT
from ..common.models import check_names
from .parts import LORA_TARGETS
from .scores import SCORES

DTYPES = ("auto", "float32", "bfloat16")
RECIPES = ROOT / "training" / "recipes"


@dataclass
class ModelOptions:
    """Names are those of TRL's ModelConfig where it has one."""

    model_name_or_path: str = HfArg(
        default=str(ROOT), help="Model to start from: a folder, or a name on the Hub, as org/name."
    )
    model_settings: dict | str | None = HfArg(
        default=None,
        help="Other values for settings of the model, as JSON: those that other commands take as --set NAME=VALUE.",
    )
    dtype: str = HfArg(default="auto", help="Of the weights in memory: auto, float32, bfloat16.")
    freeze: list[str] = HfArg(
        default_factory=lambda: ["vision_tower"],
        help="Parts that are not trained, by their names in the model; or none.",
    )
    use_peft: bool = HfArg(default=False, help="Train a LoRA adapter.")
    lora_r: int = HfArg(default=16, help="Rank of the adapter.")
    lora_alpha: int = HfArg(default=32, help="The adapter is scaled by alpha / r.")
    lora_dropout: float = HfArg(default=0.05, help="Before the adapter.")
    lora_target_modules: str = HfArg(default=LORA_TARGETS, help="Regular expression of the layers that get an adapter.")
    use_rslora: bool = HfArg(default=False, help="The adapter is scaled by alpha / sqrt(r).")
    use_dora: bool = HfArg(default=False, help="The adapter has magnitudes of its own (DoRA).")
    lora_modules_to_save: list[str] | None = HfArg(
        default=None, help="Parts that are trained whole and saved beside the adapter."
    )
    load_in_4bit: bool = HfArg(default=False, help="QLoRA: the decoder's linear layers in NF4 (bitsandbytes).")

    def __post_init__(self):
        if isinstance(self.model_settings, str):
            self.model_settings = json.loads(self.model_settings)
        if not isinstance(self.model_settings, dict | None):
            raise ValueError(
                f'`model_settings` are an object of JSON, as {{"levels": 3}}. Got {self.model_settings!r}.'
            )
        check_names(self.model_settings or {})
        self.freeze = [] if self.freeze in (None, ["none"]) else self.freeze
        if not self.use_peft and (self.use_rslora or self.use_dora):
            raise ValueError("`use_rslora` and `use_dora` are of an adapter. Train one: `use_peft: true`.")
        if self.dtype not in DTYPES:
            raise ValueError(
                f"`dtype` is one of {', '.join(DTYPES)}. Got {self.dtype!r}: training leaves the range of other types, such as "
                "float16."
            )


@dataclass
class DataOptions:
    train_data: list[str] = HfArg(
        default_factory=list,
        help="Files (JSON, JSON lines, CSV, TSV, parquet), folders of save_to_disk or data sets of the Hub. b.csv:0.5 takes a half "
        "of its samples, at random, b.csv:2 each twice.",
    )
    eval_data: list[str] | None = HfArg(default=None, help="The same, held out.")
    eval_share: float = HfArg(
        default=0.0,
        help="Share of the training data that is held out, where there is no eval_data, by its images: what is asked about one "
        "is either learnt or held out.",
    )
    train_split: str = HfArg(default="train", help="Of data sets of the Hub.")
    eval_split: str = HfArg(default="validation", help="Of data sets of the Hub.")
    image_folder: str | None = HfArg(
        default=None, help="What paths of images start from; the folder of their file if not given."
    )
    regions: str | None = HfArg(
        default=None, help="Folder of label maps (uhr-bat regions); without, the model makes its own regions."
    )
    image_options: dict | str | None = HfArg(default=None, help="More arguments of the image processor, as JSON.")
    max_length: int | None = HfArg(default=None, help="Tokens of the longest sample; the context window if not given.")
    bad_samples: str = HfArg(
        default="error", help="error, or skip: what cannot be read or does not fit is left out, and counted."
    )
    sample_per: str = HfArg(
        default="question",
        help="question: every answered question of a conversation is a sample, with its own visual tokens; chat: a conversation "
        "is one, and all of its answers are learnt from the visual tokens that its first question needs.",
    )
    dataset_num_proc: int | None = HfArg(default=None, help="Processes that check the data.")
    budgets: list[int] | None = HfArg(
        default=None, help="Visual tokens of each scale, or one number for all; the model's if not given."
    )
    budget_range: list[float] = HfArg(
        default_factory=lambda: [1.0, 1.0], help="Factors between which the budgets of a batch are drawn."
    )
    eval_max_new_tokens: int = HfArg(default=32, help="Tokens of an answer to a held-out question; 0: none is asked.")
    eval_scores: list[str] = HfArg(
        default_factory=lambda: ["accuracy"],
        help="Of these answers: accuracy (equal but for case and a full stop), words (and for articles, punctuation, units), "
        "letter (of an option), number, iou (of boxes); each over the held-out answers that have it.",
    )
    eval_pictures: int = HfArg(
        default=0, help="Held-out samples of which is drawn, at every checkpoint, what was kept."
    )

    def __post_init__(self):
        if not 0 <= self.eval_share < 1:
            raise ValueError(
                f"`eval_share` is a share of the samples, 0 or more and less than 1. Got {self.eval_share}."
            )
        if isinstance(self.image_options, str):
            self.image_options = json.loads(self.image_options)
        if isinstance(self.budgets, list) and len(self.budgets) == 1:
            self.budgets = self.budgets[0]
        if unknown := sorted(set(self.eval_scores) - set(SCORES)):
            raise ValueError(f"`eval_scores` are {', '.join(SCORES)}. Got {', '.join(unknown)}.")
        if len(self.budget_range) != 2:
            raise ValueError(f"`budget_range` is two factors. Got {self.budget_range}.")
        if not self.train_data:
            raise ValueError("`train_data` is missing: name a file of samples, or a data set.")


@dataclass
class UHRBatTrainingArguments(TrainingArguments):
    """TrainingArguments with a second learning rate, with batches by image, and with columns left for the collator to read."""

    remove_unused_columns: bool = HfArg(default=False, help="The collator reads columns that no model does.")
    visual_learning_rate: float | None = HfArg(
        default=None, help="Of what stands before the decoder; learning_rate if not given."
    )
    vision_tower_learning_rate: float | None = HfArg(
        default=None, help="Of the vision tower; visual_learning_rate if not given."
    )
    projector_learning_rate: float | None = HfArg(
        default=None, help="Of what stands between the tower and the decoder; visual_learning_rate if not given."
    )
    early_stopping_patience: int | None = HfArg(
        default=None,
        help="Evaluations without a better metric_for_best_model (eval_loss if not given) after which the run ends, with the "
        "weights of the best one.",
    )
    early_stopping_threshold: float = HfArg(default=0.0, help="By how much it has to be better.")
    group_by_image: bool = HfArg(
        default=False,
        help="Questions about an image follow one another, so that it is read and encoded once for those of a batch; for all "
        "of them where nothing before the decoder is trained.",
    )

    def __post_init__(self):
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise ValueError(
                    f"`early_stopping_patience` is at least 1 evaluation. Got {self.early_stopping_patience}."
                )
            if str(self.eval_strategy).endswith("no"):
                raise ValueError("`early_stopping_patience` needs evaluations: set `eval_strategy` to epoch or steps.")
            self.load_best_model_at_end = True
        super().__post_init__()


KINDS = (ModelOptions, DataOptions, UHRBatTrainingArguments)


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = HfArgumentParser(KINDS, prog=prog, description="Fine-tune on your own data.", allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe (YAML), or the name of one of ours")
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
        if not config.suffix:
            config = RECIPES / f"{config}.yaml"
        try:
            recipe = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{config}: this is no YAML ({error}).") from error
        known = {option.name for kind in KINDS for option in fields(kind)}
        if unknown := sorted(set(recipe) - known):
            raise ValueError(f"{config}: there is no option {', '.join(unknown)}.")
        for name in (
            "train_data",
            "eval_data",
            "freeze",
            "budgets",
            "eval_scores",
        ):  # a list of one may be written without brackets
            if name in recipe and not isinstance(recipe[name], (list, type(None))):
                recipe[name] = [recipe[name]]
        parser.set_defaults(**recipe)
    model, data, training, _ = parser.parse_args_into_dataclasses(arguments)
    return model, data, training
