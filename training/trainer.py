"""The library's Trainer with a second learning rate, with answers to held-out questions, and with pictures."""

import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import BatchFeature, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import ExportableState, TrainerState

from ..common import asking
from ..common.chats import as_parts
from ..pictures.pages import kept_picture
from .collator import UHRBatDataCollator, as_image
from .grouping import EncodedImages, GroupedByImage
from .parts import is_visual
from .scores import score


@contextmanager
def tells_what_was_not_written(folder):
    """Raises `OSError` with the folder, the room on its disk and what to do, for whatever error PyTorch, safetensors or the
    system has where a file cannot be written to its end."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if str(folder) in str(error):  # told already
            raise
        room = next(place for place in (Path(folder).absolute(), *Path(folder).absolute().parents) if place.exists())
        raise OSError(
            f"{folder}: it cannot be written to its end ({error}). {shutil.disk_usage(room).free / 1e6:,.0f} MB are free there. "
            "Make room (`save_total_limit` keeps fewer checkpoints), and give the same command again: it goes on from the last "
            "whole checkpoint."
        ) from error


class SeededDraws(TrainerCallback):
    """What a collator draws follows from the run's seed and the epoch."""

    def __init__(self, collator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        seed = args.seed if args.data_seed is None else args.data_seed
        self.collator.seed_draws(seed, int((state.epoch or 0) + 1e-6))

    on_train_begin = on_epoch_begin  # an evaluation comes before the first step


class RunFacts(TrainerCallback, ExportableState):
    """What a run is of, kept in the state of each checkpoint: whoever goes on from one can tell that it is another run."""

    def __init__(self, facts: dict):
        self.facts = facts

    def state(self) -> dict:
        return {"args": {"facts": self.facts}, "attributes": {}}


class UHRBatTrainer(Trainer):
    """Trainer for [`UHRBatDataCollator`], with [`UHRBatTrainingArguments`].

    `visual_learning_rate` is the rate of what stands before the decoder. With `group_by_image` an image is encoded once for
    the questions about it ([`EncodedImages`]). An evaluation answers the last turn of every
    held-out sample too, with at most `eval_max_new_tokens` tokens, greedily: `eval_accuracy` and the like are what the
    answers are worth by `eval_scores`, names of `scores.SCORES`. `asker` is the [`HostModel`] around a model of another family,
    which is trained itself: it compresses for each step, and answers.
    """

    def __init__(self, *args, eval_max_new_tokens: int = 32, eval_scores=("accuracy",), asker=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.asker = asker
        self.eval_max_new_tokens, self.eval_scores = eval_max_new_tokens, tuple(eval_scores)
        self.encoded = None
        if self.label_smoother is not None:  # the library shifts labels for models that it knows by name alone
            self.label_smoother = partial(self.label_smoother, shift_labels=True)
        if isinstance(self.data_collator, UHRBatDataCollator):
            self.add_callback(SeededDraws(self.data_collator))

    def train(self, *args, **kwargs):
        """As the library's. Raises `ValueError` where processes that share a model's weights would wait for each other."""
        if self.shares_weights:
            if self.asker is not None:
                raise ValueError(
                    "FSDP2 and ZeRO-3 share a model's weights, and a model of another family looks and encodes outside of their "
                    "step. Take the engine zero2 or ddp."
                )
            if self.args.group_by_image:
                raise ValueError(
                    "FSDP2 and ZeRO-3 gather weights whenever a process calls a layer, so all have to call them as often; "
                    "with `group_by_image` each encodes as many images as its batch has. Take the engine zero2 or ddp."
                )
            numbers = sorted({len(images) for images in self.train_dataset["images"]})
            if len(numbers) != 1:
                raise ValueError(
                    f"FSDP2 and ZeRO-3 gather weights whenever a process calls a layer, so all have to call them as often; "
                    f"the samples have {', '.join(map(str, numbers))} images. Give each the same number, or take the engine "
                    "zero2 or ddp."
                )
        return super().train(*args, **kwargs)

    def load_finished(self, checkpoint: str) -> bool:
        """Whether a checkpoint has made all of `max_steps`; its model and state, or the best one's, are then loaded. The library
        would make a step more."""
        state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
        if not 0 < self.args.max_steps <= state.global_step or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best if best and Path(best).is_dir() else checkpoint)
        self.state = state
        return True

    @property
    def shares_weights(self) -> bool:
        """Whether a process holds a part of the weights only."""
        return self.args.world_size > 1 and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled())

    def save_model(self, output_dir=None, _internal_call=False):
        """As the library's. Checkpoints of FSDP are in parts; a model that is asked for is whole."""
        if self.is_fsdp_enabled and not _internal_call:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        with tells_what_was_not_written(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        """As the library's. A checkpoint that cannot be written to its end is removed."""
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        for callback in self.callback_handler.callbacks:  # the library looks for those that its checkpoint did not have
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        try:
            with tells_what_was_not_written(folder):
                super()._save_checkpoint(model, trial)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _get_train_sampler(self, train_dataset=None):
        if not self.args.group_by_image:
            return super()._get_train_sampler(train_dataset)
        samples = self.train_dataset if train_dataset is None else train_dataset
        return GroupedByImage(samples["images"], self.args.data_seed or self.args.seed)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.args.group_by_image and "pixel_values" in inputs:
            if self.encoded is None:
                whole = self.asker or self.accelerator.unwrap_model(model)
                self.encoded = EncodedImages(getattr(whole, "get_base_model", lambda: whole)().model)
            inputs = self.encoded(inputs)
        if self.asker is not None:
            with self.accelerator.autocast():
                inputs = self.asker.prepare(**inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        made = self.optimizer is None
        super().create_optimizer(*args, **kwargs)
        if made:
            visual = {name: weight for name, weight in self.model.named_parameters() if is_visual(name)}
            tower = {id(weight) for name, weight in visual.items() if is_visual(name, ("vision_tower",))}
            rest = {id(weight) for weight in visual.values()} - tower
            for own, rate in ((tower, self.args.vision_tower_learning_rate), (rest, self.args.projector_learning_rate)):
                rate = self.args.visual_learning_rate if rate is None else rate
                if rate is not None:
                    self.split_groups(self.optimizer, own, rate)
        return self.optimizer

    def split_groups(self, optimizer, own, learning_rate):
        """Give some parameters, by their ids, groups with a rate of their own."""
        for group in list(optimizer.param_groups):
            moved = [parameter for parameter in group["params"] if id(parameter) in own]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            if moved:
                optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.eval_max_new_tokens:
            for name, value in self.measure_scores(dataloader.dataset).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    @torch.no_grad()
    def measure_scores(self, samples) -> dict[str, float]:
        """What the model's answers in place of the last turns are worth: by each score the mean over those that have it.
        Processes share the samples."""
        model = self.asker or self.accelerator.unwrap_model(self.model)
        # Where weights are shared, each process has to answer as many: where there is none left, the last one again, which
        # does not count.
        number, world = len(samples), self.args.world_size
        own = range(self.args.process_index, world * -(-number // world), world)
        counted = iter([idx < number for idx in own])
        loader = DataLoader(
            Subset(samples, [min(idx, number - 1) for idx in own]),
            self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=self.data_collator.ask,
        )
        sums = torch.zeros(2, len(self.eval_scores), device=self.args.device)  # of worth, of answers that have it
        for batch in tqdm(loader, desc="Answering", disable=self.args.disable_tqdm, leave=False):
            inputs = self._prepare_inputs(batch["inputs"])
            with self.accelerator.autocast():
                options = {"max_new_tokens": self.eval_max_new_tokens, "synced_gpus": self.shares_weights}
                ids = asking.generate(model, inputs, **options)
            answers = asking.answer_texts(self.processing_class, ids)
            for pair in zip(answers, batch["answers"]):
                worth = [score(name, *pair) for name in self.eval_scores] if next(counted) else []
                for column, value in enumerate(worth):
                    if value is not None:
                        sums[:, column] += torch.tensor([value, 1.0], device=sums.device)
        worth, numbers = self.accelerator.reduce(sums).tolist()
        return {name: worth[idx] / numbers[idx] for idx, name in enumerate(self.eval_scores) if numbers[idx]}


class KeptPictures(TrainerCallback):
    """At every checkpoint, what the model kept of some samples' images, as `kept/*.jpg` in its folder."""

    def __init__(self, collator, samples, asker=None):
        self.collator, self.samples, self.asker = collator, samples, asker

    def on_save(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}", "kept")
        folder.mkdir(parents=True, exist_ok=True)
        for number, sample in enumerate(self.samples):
            self.draw(self.asker or model, sample, folder / f"{number}.jpg")

    @torch.no_grad()
    def draw(self, model, sample, path):
        """The first image of a sample, as the selection leaves it for the last question."""
        if not sample["images"]:
            return
        processor = self.collator.processor
        inputs = self.collator.ask([sample])["inputs"]
        training = model.training
        inputs = BatchFeature(inputs).to(model.device)
        compressed = asking.compress(model.eval(), inputs)
        model.train(training)
        image = processor.image_processor.process_image(as_image(sample["images"][0]), **self.collator.image_options)
        question = " ".join(part["text"] for part in as_parts(sample["messages"][-2]) if part["type"] == "text")
        kept_picture(compressed, image, question).save(path)
