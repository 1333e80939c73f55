"""Fine-tune on your own data: `uhr-bat train --config FILE`, a recipe of `training/recipes` or one of your own.

The data is checked before the model is loaded. A run that was cut off goes on from its last whole checkpoint when the
same command is given again. `output_dir` becomes a model folder, or the folder of an adapter.
"""

import json
import os
import shutil
import sys
from hashlib import blake2b
from pathlib import Path

from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..common.budgets import scale_budgets
from ..common.commands import tells_errors
from ..common.digests import folder_digest
from ..common.extras import require
from ..common.loading import host_settings, is_host, keep_settings, load_model, load_processor, trained_settings
from ..common.models import base_of, find_model, is_tiny, model_name
from ..common.outputs import MODEL_FILES, Output, check_outputs
from ..common.runs import check_same_settings
from ..hosts.settings import over
from .collator import UHRBatDataCollator, answer_of
from .data import load_samples
from .grouping import hold_out
from .options import read_options
from .parts import add_adapter, check_host, continue_adapter, freeze_parts, quantization
from .scores import check_scores
from .trainer import KeptPictures, RunFacts, UHRBatTrainer

logger = logging.get_logger(__name__)


def read_data(data, processor, seed):
    """(training samples, held-out samples or None) of [`DataOptions`]."""
    settings = {
        "budgets": scale_budgets(processor.default_budgets, data.budget_range[1]),
        "max_length": data.max_length,
        "image_folder": data.image_folder,
        "regions": data.regions,
        "bad_samples": data.bad_samples,
        "num_proc": data.dataset_num_proc,
        "sample_per": data.sample_per,
        "budget_factor": data.budget_range[1],
        "seed": seed,
    }
    samples = load_samples(data.train_data, processor, split=data.train_split, **settings)
    if data.eval_data:
        return samples, load_samples(data.eval_data, processor, split=data.eval_split, **settings)
    if data.eval_share:
        return tuple(map(samples.select, hold_out(samples["images"], data.eval_share, seed)))
    return samples, None


def prepare_model(options, budgets, bf16=False):
    """(the model of [`ModelOptions`] that is trained, its parts frozen or with an adapter; the [`HostModel`] around it, None where
    it is none). A model that is saved in float16 is trained in bfloat16 where the run computes in it (`bf16`), else in
    float32."""
    import torch

    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    base = base_of(options.model_name_or_path)
    place, changes = base or options.model_name_or_path, options.model_settings or {}
    if is_host(place):
        changes = over(host_settings(options.model_name_or_path, base), changes)
    elif base is not None:
        changes = over(trained_settings(options.model_name_or_path), changes)
    _, model = load_model(place, dtype, None, quantization(options), **changes)
    halves = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype == torch.float16]
    if halves:
        dtype = torch.bfloat16 if bf16 else torch.float32
        for tensor in halves:
            tensor.data = tensor.data.to(dtype)
        logger.warning(
            f"{options.model_name_or_path} is saved in float16, whose range training leaves: its weights are trained in "
            f"{str(dtype).removeprefix('torch.')} (`dtype: bfloat16` or `float32` says which)."
        )
    model.config.budgets = budgets
    asker = model if is_host(place) else None
    trained = model if asker is None else model.host
    if base is None and not options.use_peft:
        freeze_parts(model, options.freeze)
        return model, None
    adapted = add_adapter(trained, options) if base is None else continue_adapter(trained, options.model_name_or_path)
    return adapted if asker is not None else keep_settings(adapted, changes), asker


def last_whole_checkpoint(folder: str) -> str | None:
    """The last checkpoint in a folder that was written to its end: its state, which comes last, can be read.

    What a run left that was killed while it wrote is named, and moved out of the way.
    """
    while Path(folder).is_dir() and (last := get_last_checkpoint(folder)):
        try:
            json.loads(Path(last, "trainer_state.json").read_text(encoding="utf-8"))
            return last
        except (OSError, ValueError):
            logger.warning(f"{last}: was not written to its end. The run goes on from the checkpoint before it.")
            aside = Path(last).with_name(f"incomplete-{Path(last).name}")
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed at the same step before
            os.replace(last, aside)
    return None


def check_kind(checkpoint: str | None, use_peft: bool):
    """Raises `ValueError` where a run would go on from a checkpoint of an adapter with whole weights, or the other way round."""
    if checkpoint is None:
        return
    kinds = ("the whole model", "an adapter")
    was = any(Path(checkpoint).glob("adapter_*"))
    if was != use_peft:
        raise ValueError(
            f"{checkpoint} is of a run that trains {kinds[was]}, and this one trains {kinds[use_peft]}. Give another --output_dir."
        )


def facts_of(options, data, samples, budgets) -> dict:
    """What a run is of: the model that it begins with, a digest of what is learnt, and the options that say which parts are
    trained, and on which visual tokens."""
    digest = blake2b(digest_size=16)
    for batch in samples.select_columns(["messages", "options"]).iter(1000):
        digest.update(repr(batch).encode("utf-8", "surrogatepass"))
    parts = {name: value for name, value in vars(options).items() if name not in ("model_name_or_path", "dtype")}
    tokens = {name: getattr(data, name) for name in ("budget_range", "image_options", "regions", "max_length")}
    return {
        "model": model_name(options.model_name_or_path), "weights": folder_digest(options.model_name_or_path),
        "samples": len(samples), "data": digest.hexdigest(), **parts, "budgets": budgets, **tokens,
    }  # fmt: skip


def check_facts(checkpoint: str | None, facts: dict, mend: str):
    """Raises `ValueError` where a run would go on as another one than that of its checkpoint."""
    if checkpoint is None:
        return
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
    if kept := (state.get("stateful_callbacks") or {}).get("RunFacts"):
        check_same_settings(
            Path(checkpoint), facts | kept["args"]["facts"], facts, mend
        )  # of an earlier release it has less


def tell_spaces(folder, samples):
    """A warning where rows for UHR-BAT-Tiny do not begin their answers with a space, as it does."""
    if not is_tiny(folder):
        return
    bare = sum(not answer_of({"messages": messages}).startswith(" ") for messages in samples["messages"])
    if bare:
        logger.warning(
            f'{bare} of {len(samples)} answers do not begin with a space, and those of UHR-BAT-Tiny do: write " Three.", or it learns '
            "first to leave the space out."
        )


def train(options, data, training) -> UHRBatTrainer:
    """Train by a recipe, see [`read_options`]. Raises whatever is wrong with the data before the model is loaded."""
    require("train", "datasets", "peft")
    reads = [options.model_name_or_path, *data.train_data, *(data.eval_data or ())]
    check_outputs(reads, Output("--output_dir", training.output_dir, names=MODEL_FILES))
    if data.eval_pictures:
        require("pictures", "matplotlib")
    options.model_name_or_path = str(find_model(options.model_name_or_path))
    base = base_of(options.model_name_or_path)
    if base is not None:
        options.use_peft = True
    if is_host(base or options.model_name_or_path):
        check_host(options)
    quantization(options)
    named = training.resume_from_checkpoint
    checkpoint = named if named and str(named).lower() != "true" else last_whole_checkpoint(training.output_dir)
    check_kind(checkpoint, options.use_peft)
    budgets = {} if data.budgets is None else {"default_budgets": data.budgets}
    processor = load_processor(options.model_name_or_path, options.model_settings, **budgets)
    samples, held_out = read_data(data, processor, training.data_seed or training.seed)
    facts = facts_of(options, data, samples, processor.default_budgets)
    mend = "Leave --resume_from_checkpoint out" if checkpoint == named else "Give another --output_dir"
    check_facts(checkpoint, facts, mend)
    tell_spaces(base or options.model_name_or_path, samples)
    collator = UHRBatDataCollator(
        processor,
        budget_range=data.budget_range,
        image_options=data.image_options,
        bad_images=data.bad_samples,
    )
    if held_out is not None and data.eval_max_new_tokens:
        check_scores(data.eval_scores, [answer_of(sample) for sample in held_out.select_columns("messages")])
    set_seed(training.seed)  # an adapter's first weights are drawn before the Trainer sets it
    model, asker = prepare_model(options, processor.default_budgets, training.bf16)
    trainer = UHRBatTrainer(
        model=model,
        asker=asker,
        args=training,
        train_dataset=samples,
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=processor,
        eval_max_new_tokens=data.eval_max_new_tokens,
        eval_scores=data.eval_scores,
    )
    trainer.add_callback(RunFacts(facts))
    if training.early_stopping_patience is not None:
        patience = training.early_stopping_patience, training.early_stopping_threshold
        trainer.add_callback(EarlyStoppingCallback(*patience))
    if data.eval_pictures and held_out is not None:
        trainer.add_callback(
            KeptPictures(collator, [held_out[i] for i in range(min(data.eval_pictures, len(held_out)))], asker)
        )
    if training.process_index == 0:
        first = samples[0]
        shown = collator.writer.show(first["messages"], first["answers"] == "all")
        print(f"What bears loss, between >>> and <<<, of {first['name']}:\n{shown}", flush=True)
    if checkpoint and trainer.load_finished(checkpoint):
        logger.warning(
            f"{checkpoint}: the run has made its {trainer.state.global_step} steps. Nothing more is trained."
        )
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if collator.num_skipped:
        logger.warning(f"{collator.num_skipped} samples were skipped, as an image of theirs could not be read.")
    if training.push_to_hub:
        trainer.push_to_hub()
    return trainer


@tells_errors
def main(arguments=None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are forked
    train(*read_options(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
