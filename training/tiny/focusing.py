"""LRS-VQA's system on UHR-BAT-Tiny: the region focus module learns from the decoder where to look, and the decoder to answer
from what the module finds.

    uhr-bat tiny focus --model . --output runs/taught --freeze-decoder --steps 400
    uhr-bat tiny focus --model runs/taught --output runs/focus --steps 400

    uhr-bat tiny focus --model . --output runs/lrs_tower --painted runs/lrs --minutes 15
    uhr-bat tiny focus --model runs/lrs_tower --output runs/lrs --painted runs/lrs --minutes 30

The last two make a model of that system's own form (`descending.py`): first the tower, then the decoder, whose first layers become
the module. Of the first two:

The module begins as the decoder's own layers (`--layers`), or as that of the model. A step takes some scenes, ordinary ones and ones with objects of a
few native pixels, and asks four questions about each. From thumbnail and first level the module's attention is drawn to the
decoder's (distillation, eq. 4-6 of arXiv 2503.07588); the decoder learns to answer from what Algorithm 1 keeps, unless it is frozen.
Tower and projector stay as they are.

Letters: H heads, n tokens of an image in the sequence.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import Trainer

from ...common.asking import expand_placeholder, write_prompt
from ...common.commands import tells_errors
from ...common.loading import load_model, save_model
from ...configuration_uhr_bat import UHRBatConfig
from ...modeling_layers_uhr_bat import last_token_logits
from ...modeling_outputs_uhr_bat import UHRBatCompressionOutput
from ...scenes.evidence import site_cells
from ...scenes.layout import FINETUNING_SEED, VALIDATION_SEEDS, make_scene
from ...scenes.native import native_scene, picture_of
from ...scenes.painting import paint
from ...scenes.questions import draw_question
from ..collator import IGNORED
from .descending import TILE, encode_scenes, paint_scenes, train_descents, train_tower
from .encoding import freeze_vision
from .stages import add_minutes, make_parser, read_arguments, train
from .zooming import NATIVE_SEED

QUESTIONS = 4  # about a scene
ANSWERED_FROM = (40, 220)  # visual tokens, drawn log-uniformly
# Weights of the divergence and the squared difference over the first level's tokens (`lambda_hr`, `lambda_mse`), beside the
# divergence over all of the image's (`lambda_kl` 1), and the temperature of the two.
LEVEL_DIVERGENCE, LEVEL_DIFFERENCE, TEMPERATURE = 2.0, 1.0, 2.0


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, is_level: torch.Tensor) -> torch.Tensor:
    """Eq. 4-6 for a pair of layers: how far the module's attention is from the decoder's, mean over heads.

    Args:
        student, teacher: float[H, n], products of queries and keys before the softmax; the teacher's without gradients.
        is_level: bool[n], the tokens of the first level, of all of the image's.
    """
    teacher = teacher.detach()

    def divergence(chosen, temperature):
        learnt, taught = (logits[:, chosen].float() / temperature for logits in (student, teacher))
        learnt, taught = learnt.log_softmax(-1), taught.log_softmax(-1)
        return F.kl_div(learnt, taught, log_target=True, reduction="batchmean")

    level = (student[:, is_level] - teacher[:, is_level]).float() / TEMPERATURE
    return (
        divergence(torch.ones_like(is_level), 1.0)
        + LEVEL_DIVERGENCE * divergence(is_level, TEMPERATURE)
        + LEVEL_DIFFERENCE * level.square().mean()
    )


def pairs_of(layers) -> list[tuple[int, int]]:
    """(layer of the module, layer of the decoder) whose attention is compared: the first after the module's first, and the
    last."""
    last = len(layers) - 1
    return [(own, layers[own]) for own in sorted({min(1, last), last})]


class FocusScenes(Dataset):
    """(scene, its image, questions about it) by their number: native ones as often as `share` says."""

    def __init__(self, number, share, seed):
        self.number, self.share, self.seed = number, share, seed

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, index])
        if rng.random() < self.share:
            scene = native_scene(NATIVE_SEED + 5000 + index)
            image = picture_of(scene)
        else:
            scene = make_scene(FINETUNING_SEED + 20_000 + index, 1.0)
            image = paint(scene)
        return scene, image, [draw_question(scene, rng) for _ in range(QUESTIONS)]


class Sight:
    """What the module and the decoder see of an image's first level, for questions about it."""

    def __init__(self, model, processor, image):
        self.model, self.inner, self.processor = model, model.model, processor
        with torch.no_grad():
            (self.features,) = model.encode_image(**processor.image_processor(image, dynamic_pyramid=True))
            level = self.features.pyramid.levels[0]
            self.found = self.inner.level_tokens(self.features, 1, list(range(int(np.prod(level.tiles)))))
        self.level = level

    def prompt(self, text):
        """input_ids long[1, M], and the embeddings before and after the image."""
        ids = write_prompt(self.processor, text)["input_ids"].to(self.model.device)
        place = int((ids[0] == self.model.config.image_token_id).nonzero()[0])
        embeds = self.model.get_input_embeddings()(ids[0])
        return ids, embeds[:place], embeds[place + 1 :]

    def logits(self, before, after):
        """[(module's, decoder's)] float[H, n] of the pairs of layers, and bool[n] which tokens are of the first level."""
        inner, focus = self.inner, self.model.config.focus
        separator = torch.tensor([focus.separator_token_id], device=self.model.device)
        separator = self.model.get_input_embeddings()(separator)
        image = torch.cat((self.features.thumbnail, separator, self.found.tokens)).to(before)
        sequence = torch.cat((before, image, after)).detach()[None]
        stop = len(before) + len(image)
        pairs = pairs_of(focus.layers)
        student = inner.read_layers(inner.region_focus.layers, sequence, last_token_logits, [own for own, _ in pairs])
        with torch.no_grad():
            teacher = inner.read_layers(
                inner.language_model.layers, sequence, last_token_logits, [layer for _, layer in pairs]
            )
        is_level = torch.arange(len(image), device=sequence.device) > len(self.features.thumbnail)
        both = [tuple(rows[:, len(before) : stop] for rows in pair) for pair in zip(student, teacher)]
        return both, is_level


class FocusTrainer(Trainer):
    """Trainer of the two losses, one scene after the other."""

    def __init__(self, *args, processor, **kwargs):
        super().__init__(*args, **kwargs)
        self.processor = processor

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inner, losses = self.accelerator.unwrap_model(model), []
        for _, image, questions in inputs["scenes"]:
            sight = Sight(inner, self.processor, image)
            for question in questions:
                ids, before, after = sight.prompt(question.text)
                pairs, is_level = sight.logits(before, after)
                losses += [distillation_loss(*pair, is_level) / len(pairs) for pair in pairs]
                if inner.lm_head.weight.requires_grad:
                    losses.append(self.loss_of_answer(model, inner, sight, ids, before, after, question.answer))
        loss = torch.stack(losses).sum() / sum(len(questions) for _, _, questions in inputs["scenes"])
        return (loss, None) if return_outputs else loss

    def loss_of_answer(self, model, inner, sight, ids, before, after, answer):
        """Of the answer to a question, read from what Algorithm 1 keeps for it."""
        low, high = ANSWERED_FROM
        budget = round(low * (high / low) ** float(torch.rand(())))
        with torch.no_grad():
            tokens = torch.cat(inner.model.focus_image(before, after, sight.features, budget)[0])
        start = expand_placeholder(ids[0], inner.config.image_token_id, len(tokens))
        said = self.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        said = torch.tensor([*said, self.processor.tokenizer.eos_token_id], device=start.device)
        labels = torch.cat((torch.full_like(start, IGNORED), said))[None]
        image = UHRBatCompressionOutput(pooler_output=[tokens], images_per_prompt=[1])
        ids = torch.cat((start, said))[None]
        return model(input_ids=ids, labels=labels, **inner.visual_inputs(ids, None, image)).loss


@torch.no_grad()
def agreement(model, processor, number: int) -> dict[str, float]:
    """On validation scenes, by a question about each: the divergence of the module's attention over the first level from the
    decoder's, the share of the decoder's top quarter that is among the module's, and how much of the attention of both lies
    on the site that is asked about (0..1), against the part of the level that it takes."""
    alpha = model.config.focus.alpha_select
    parts = {name: [] for name in ("divergence", "overlap", "mass", "teacher", "area")}
    for seed in VALIDATION_SEEDS[:number]:
        scene = make_scene(seed, 1.0)
        question = draw_question(scene, np.random.default_rng([seed, 1]))
        sight = Sight(model, processor, paint(scene))
        _, before, after = sight.prompt(question.text)
        pairs, is_level = sight.logits(before, after)
        cells = ~sight.found.is_newline
        own, teacher = (logits[:, is_level].float().softmax(-1).mean(0)[cells].cpu() for logits in pairs[-1])
        own, teacher = own / own.sum(), teacher / teacher.sum()
        inside = torch.from_numpy(site_cells(scene, question.sites, sight.level.grid) > 0)
        top = [set(paid.topk(max(1, int(alpha * len(paid)))).indices.tolist()) for paid in (own, teacher)]
        parts["divergence"].append(float((teacher * (teacher / own).log()).sum()))
        parts["overlap"].append(len(top[0] & top[1]) / len(top[1]))
        parts["mass"].append(float(own[inside].sum()))
        parts["teacher"].append(float(teacher[inside].sum()))
        parts["area"].append(float(inside.float().mean()))
    return {name: float(np.mean(values)) for name, values in parts.items()}


def show(measured) -> str:
    return (
        "divergence {divergence:.3f}, overlap of the top quarters {overlap:.1%}, attention on the site {mass:.1%} "
        "(decoder {teacher:.1%}, its area {area:.1%})".format(**measured)
    )


@tells_errors
def main(arguments=None):
    parser = make_parser("tiny focus", __doc__, steps=250, batch_size=2, learning_rate=3e-4)
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        help="of the decoder, which those of a new module begin as: 0 2, or 0 1 2 with --painted",
    )
    parser.add_argument("--freeze-decoder", action="store_true", help="the module alone learns")
    parser.add_argument("--native", type=float, default=0.5, help="share of scenes with objects of a few native pixels")
    parser.add_argument("--measured", type=int, default=100, help="validation scenes that agreement is measured on")
    parser.add_argument(
        "--painted", type=Path, metavar="DIR",
        help="LRS-VQA's own form, from scenes that DIR keeps: the tower of a model with other tiles, else decoder and module",
    )  # fmt: skip
    parser.add_argument(
        "--scenes", type=int, default=300, help="with --painted: native ones; ordinary ones are half as many"
    )
    add_minutes(parser)
    args = read_arguments(parser, arguments)
    args.layers = args.layers or ([0, 2] if args.painted is None else [0, 1, 2])
    config = UHRBatConfig.from_pretrained(args.model)
    if args.painted is not None:
        painted = paint_scenes(args.painted, {"native": args.scenes, "fixed": args.scenes // 2}, args.workers)
        if config.tile_size != TILE:
            processor, model = train_tower(args, painted)
        else:
            processor, model = load_model(args.model, torch.float32, None)
            encoded = encode_scenes(model, painted, args.output / "encoded")
            train_descents(args, model, processor, encoded)
        save_model(model, processor, args.output)
        return
    if config.region_focus is None:
        processor, model = load_model(args.model, torch.float32, None, region_focus={"layers": args.layers})
        model.config.region_focus["separator_token_id"] = processor.tokenizer.convert_tokens_to_ids(":")
        model.model.region_focus.start_from(model.model.language_model, args.layers)
        torch.nn.init.zeros_(model.model.image_newline)
    else:
        processor, model = load_model(args.model, torch.float32, None)
    if args.freeze_decoder:
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
        model.model.image_newline.requires_grad_(False)
    freeze_vision(model)
    print(f"Before: {show(agreement(model.eval(), processor, args.measured))}", flush=True)
    dataset = FocusScenes(args.steps * args.batch_size * args.accumulation, args.native, args.seed)
    train(
        FocusTrainer, model, dataset, args, {"bf16": False},
        data_collator=lambda scenes: {"scenes": scenes}, processor=processor,
    )  # fmt: skip
    print(f"After: {show(agreement(model.eval(), processor, args.measured))}", flush=True)
    save_model(model, processor, args.output)


if __name__ == "__main__":
    raise SystemExit(main())
