"""UHR-BAT planning: what a question about an image will cost, and the largest budgets that stay below a limit.

FLOPs and memory are formulas (`costs.py`); seconds are these FLOPs at the rates of a device (`rates.py`).

Letters: S scales.
"""

import math
import re
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..budgets_uhr_bat import budgets_of_total
from ..configuration_uhr_bat import UHRBatConfig
from ..image_processing_uhr_bat import UHRBatImageProcessor
from ..image_reading_uhr_bat import check_image_size
from ..token_rules_uhr_bat import tell_idle_share
from .costs import (
    NF4_BYTES,
    Formulas,
    Question,
    candidates_of,
    host_bytes,
    layer_weights,
    question_bytes,
    question_flops,
    question_of,
    reading_layer,
    tiles_of,
)
from .counting import HostCosts, count_host
from .rates import Rates, check_device, free_bytes, is_here, rates_of

# In the order in which they run.
STAGES = (
    "preprocess", "encode", "importance", "refinement", "regions", "selection", "prefill", "pointing", "answer",
)  # fmt: skip
UNITS = {
    "TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "s": 1,
}  # fmt: skip
# In any case; a letter alone is of two to the tenth, as in "24g".
_UNITS = {name.lower(): number for name, number in UNITS.items()} | {
    name[0].lower(): n for name, n in UNITS.items() if name[1:] == "iB"
}
LIMIT = re.compile(rf"\s*(\d+\.?\d*|\.\d+)\s*({'|'.join(_UNITS)})\s*", re.IGNORECASE)
FREE = "free"
NO_SECONDS = "Seconds are not predicted for models of other families: their rates are not measured."


def parse_limit(text: str) -> tuple[float, str]:
    """(bytes, "memory") from "24GiB", "24 gb" or "24g", (5.0, "seconds") from "5s".

    Raises:
        ValueError: anything else.
    """
    match = LIMIT.fullmatch(text)
    if match is None or not float(match[1]):
        raise ValueError(
            f'A limit is memory, as "24GiB", or a time, as "5s", over 0, or "{FREE}": what the device has left now. Units: '
            f"{', '.join(UNITS)}. Got {text!r}."
        )
    unit = match[2].lower()
    return float(match[1]) * _UNITS[unit], "seconds" if unit == "s" else "memory"


def show_bytes(number) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**29 else f"{number / 2**20:.0f} MiB"


@dataclass(frozen=True)
class UHRBatPlan:
    """What a question about an image costs.

    Attributes:
        question: sizes of the image, the prompt and the answer, with the `budgets`.
        flops: {stage: FLOPs}.
        memory: {stage: {term: bytes}} of the device that the model is on.
        host: bytes of the machine beside a GPU; 0 where the model is on a CPU.
        seconds: {stage: seconds}, or None where the device was not measured.
        load: of the machine when it was measured, see [`Rates`].
        note: what else is to be known.
    """

    question: Question
    flops: dict[str, int]
    memory: dict[str, dict[str, int]]
    host: int
    seconds: dict[str, float] | None
    load: float = 0.0
    note: str = ""

    @property
    def budgets(self) -> list[int] | int:
        """As the processor takes them."""
        return self.question.budgets

    @property
    def peak_stage(self) -> str:
        """The stage that takes the most memory."""
        return max(self.memory, key=lambda stage: sum(self.memory[stage].values()))

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory[self.peak_stage].values())

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def __str__(self):
        question, stages = (
            self.question,
            [name for name in STAGES if name in {**(self.seconds or {}), **self.flops, **self.memory}],
        )
        spent = f"{sum(question.counts):,} of {sum(question.available):,} visual tokens"
        lines = [f"budgets {self.budgets}: {spent}; {sum(question.tiles)} tiles pass the tower", ""]
        row = "{:>12} {:>10} {:>10} {:>12}".format
        lines.append(row("stage", "TFLOPs", "seconds", "memory"))
        for stage in stages:
            lines.append(
                row(
                    stage,
                    f"{self.flops[stage] / 1e12:.4g}" if stage in self.flops else "",
                    f"{self.seconds[stage]:.2f}" if self.seconds and stage in self.seconds else "",
                    show_bytes(sum(self.memory[stage].values())) if stage in self.memory else "",
                )
            )
        total = f"{self.total_seconds:.2f}" if self.seconds else "?"
        lines += [row("all", f"{sum(self.flops.values()) / 1e12:.4g}", total, show_bytes(self.peak_bytes)), ""]
        terms = sorted(self.memory[self.peak_stage].items(), key=lambda term: -term[1])
        terms = ", ".join(f"{name} {show_bytes(number)}" for name, number in terms if number)
        lines.append(f"Peak of memory, in {self.peak_stage}: {terms}.")
        if self.seconds and self.load > 1:
            lines.append(
                f"Seconds were measured on a busy machine, with {self.load:.1f} processes for each processor: they are likely too many."
            )
        if question.num_questions > 1 or question.num_images > 1:
            lines.append(f"{question.num_questions} questions at once, about {question.num_images} images.")
        if self.host:
            lines.append(f"Beside the GPU, the machine holds {show_bytes(self.host)} of image and tiles.")
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


@dataclass
class UHRBatPlanner:
    """All of a model that its plans need: cheap to keep, to copy and to hand to a processor.

    Attributes:
        config: geometry, budgets and rules.
        weights: bytes of the model in memory.
        device: that the model runs on.
        dtype: of its tokens.
        vision_chunk_size, tile_cache_bytes: of the model, see [`UHRBatEncodingMixin`].
        is_loaded: whether the weights are in the device's memory already.
        calls: what the calls of a model of another family cost; None for UHR-BAT's own.
        max_tiles: that its processor encodes where nobody says how many.
        note: what is to be known of every plan.
    """

    config: UHRBatConfig
    weights: int
    device: torch.device
    dtype: torch.dtype
    vision_chunk_size: int
    tile_cache_bytes: int
    is_loaded: bool = False
    calls: HostCosts | None = None
    max_tiles: int | None = None
    note: str = ""

    def plan(
        self,
        image_size: tuple[int, int],
        budgets=None,
        *,
        max_tiles: int | None = None,
        native: bool = False,
        seconds: bool = True,
        max_image_pixels: int | None = None,
        **others,
    ) -> UHRBatPlan:
        """What a question about an image of (height, width) pixels costs.

        Args:
            budgets: int[S] or one number, visual tokens; None for the configuration's. Or a limit, "24GiB" or "5s", for
                the largest budgets, in the configuration's proportions, that stay below it; "free" is the memory that the
                device has left now, with the weights where they are in it.
            max_tiles: tiles that are encoded where the question looks; None for all of every scale, or as many as the
                processor of a model of another family encodes.
            native: whether these are of levels down to the image's own resolution, which share one budget.
            seconds: whether seconds are predicted, of a device that is here; the first time, it is measured, which takes
                some itself.
            max_image_pixels: of the largest image, None for the image processor's own; levels down to the image's own resolution
                are read part by part, of any size.
            others: `text_before`, `text_after`, `num_answer_tokens`, and how many questions are answered at once about how
                many images, `num_questions` and `num_images`, see [`Question`].

        Raises:
            ValueError: a size that no image has or that is over `max_image_pixels`; a limit that the smallest budgets exceed:
                it names the term that is too large and what would fit.
        """
        max_tiles = self.max_tiles if max_tiles is None else max_tiles
        most = UHRBatImageProcessor.max_image_pixels if max_image_pixels is None else max_image_pixels
        height, width = image_size
        check_image_size((min(height, 1), min(width, 1)) if native else (height, width), most)
        limit = budgets if isinstance(budgets, str) else None
        question = question_of(self.config, image_size, None if limit else budgets, max_tiles, native, **others)
        return self.plan_question(question, limit, seconds=seconds)

    def plan_question(self, question: Question, limit: str | None = None, *, seconds: bool = True) -> UHRBatPlan:
        """As `plan`, of a question whose sizes are known; its budgets give way to those of a limit."""
        most, kind = (math.inf, "memory") if limit is None else self._read_limit(limit)
        if kind == "seconds":
            check_device(self.device)
            if self.calls:
                raise ValueError(f"{NO_SECONDS} Got {limit}; give memory, as \"24GiB\", or tokens.")
        seconds = not self.calls and (kind == "seconds" or seconds and is_here(self.device))
        rates = rates_of(self.config, self.device, self.dtype) if seconds else None
        if limit is None:
            return self._price(question, rates)

        def fits(total) -> bool:
            plan = self._price(self.spend(question, total), rates)
            return (plan.total_seconds if kind == "seconds" else plan.peak_bytes) <= most

        window = self.config.text_config.max_position_embeddings - question.num_text - question.num_answer_tokens
        low, high = sum(map(bool, question.available)), min(sum(question.available), window)
        if not fits(low):
            raise ValueError(self._refusal(self._price(self.spend(question, low), rates), limit, kind))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return self._price(self.spend(question, low), rates)

    def _read_limit(self, limit) -> tuple[float, str]:
        if limit.strip().lower() == FREE:
            return free_bytes(self.device) + self.weights * self.is_loaded, "memory"
        return parse_limit(limit)

    def budgets_within(self, limit: str, available: list[int], mask=None) -> list[int] | int:
        """The largest budgets that stay below a limit for an image that is cut already, or encoded.

        Args:
            limit: "24GiB", or "5s" from the tiles to the whole answer.
            available: int[S], tokens that show the image.
            mask: [N], 1 where a patch of any scale shows the image; None where the image is encoded.
        """
        grids, tiles = self.config.grids, [0] * len(available)
        if mask is not None:
            p = self.config.tile_size // self.config.patch_size
            parts = np.split(mask, np.cumsum([height * width for height, width in grids])[:-1])
            tiles = [tiles_of(part.reshape(grid).astype(bool), p) for part, grid in zip(parts, grids)]
        question = Question(0, tiles, available, self.config.budgets)
        return self.plan_question(question, limit, seconds=False).budgets

    def spend(self, question: Question, total: int) -> Question:
        """The question with `total` visual tokens, in the proportions of the configuration's budgets.

        Raises:
            ValueError: fewer than one for each scale that shows the image, or more than there are.
        """
        least, most = sum(map(bool, question.available)), sum(question.available)
        if not least <= total <= most:
            raise ValueError(
                f"{total:,} visual tokens cannot be spent: the image has {most:,}, and each of its {least} scales takes one at "
                "least."
            )
        budgets = total
        if not question.native:
            budgets = budgets_of_total(total, self.config.budgets, question.available, least=1)
        return replace(question, budgets=budgets)

    def _price(self, question, rates) -> UHRBatPlan:
        tell_idle_share(self.config, question.budgets)
        on_gpu = self.device.type != "cpu"
        b = torch.empty((), dtype=self.dtype).element_size()
        flops = question_flops(self.config, question, self.calls)
        machine = on_gpu, self.vision_chunk_size, self.tile_cache_bytes
        memory = question_bytes(self.config, question, self.weights, b, *machine, self.calls)
        host = host_bytes(self.config, question) if on_gpu and question.num_pixels else 0
        seconds = rates and self._seconds(question, flops, rates)
        return UHRBatPlan(question, flops, memory, host, seconds, rates.load if rates else 0.0, self.note)

    def _seconds(self, question, flops, rates: Rates) -> dict[str, float]:
        text, seconds = self.config.text_config, {}
        if question.num_pixels:
            views = sum(scale**2 for scale in self.config.scales)
            if question.max_tiles is not None:
                views = sum(question.tiles) * self.config.tile_size**2
            of_image = question.num_held_pixels * rates.pixel + views * rates.view_pixel
            seconds["preprocess"] = question.num_images * of_image
        # A pass of the decoder takes the way of its weights, too; the head is as many layers as it has weights.
        layer = layer_weights(self.config)
        num_layers = text.num_hidden_layers
        with_head = num_layers + text.hidden_size * text.vocab_size / layer
        depth = reading_layer(self.config) % num_layers + 1
        passes = {"importance": question.num_questions * depth, "prefill": with_head}
        refining = sum(at % num_layers + 1 for _, at, _ in candidates_of(self.config, question))
        passes["refinement"] = question.num_questions * refining
        for stage, number in flops.items():
            if stage == "encode":
                seconds[stage] = number * rates.tower
            elif stage == "regions":
                seconds[stage] = number * rates.kmeans
            elif stage == "answer":
                # A step reads the weights once for all questions; what further ones calculate comes on top.
                steps = (question.num_answer_tokens - 1) * with_head * rates.decoder_layer
                seconds[stage] = steps + number * (1 - 1 / question.num_questions) * rates.decoder
            else:
                seconds[stage] = number * rates.decoder + passes.get(stage, 0) * rates.decoder_layer
        return seconds

    def _refusal(self, least: UHRBatPlan, limit, kind) -> str:
        """Why not even the smallest budgets stay below a limit, and what would."""
        budgets = f"Not even budgets of {least.budgets} stay below {limit}"
        if kind == "seconds":
            stage = max(least.seconds, key=least.seconds.get)
            advice = f'"{_rounded_up(least.total_seconds)}s" would fit; so may fewer scales, or a faster device'
            if stage in ("preprocess", "encode"):
                advice += (
                    "; a second question about an encoded image (`image_features`) takes neither of its first stages"
                )
            return (
                f"{budgets}: they take {least.total_seconds:.4g} s on {self.device.type}, of which {stage} "
                f"{least.seconds[stage]:.4g} s. {advice}."
            )
        terms = least.memory[least.peak_stage]
        term = max(terms, key=terms.get)
        advice = f'"{_rounded_up(least.peak_bytes / 2**30)}GiB" would fit'
        if term == "weights" and self.dtype == torch.float32:
            advice += f", and so may weights in bfloat16, {show_bytes(self.weights // 2)}"
        elif term == "weights":
            linear = (self.calls or Formulas(self.config)).linear_weights
            size = torch.empty((), dtype=self.dtype).element_size()
            advice += f", and so may weights in 4 bits, about {show_bytes(self.weights - linear * (size - NF4_BYTES))}"
        elif term == "tower's chunk":
            advice += ", and so may a smaller `model.vision_chunk_size`"
        return (
            f"{budgets}: they take {show_bytes(least.peak_bytes)} in {least.peak_stage}, of which {term} "
            f"{show_bytes(terms[term])}. {advice}."
        )


def _rounded_up(number: float) -> str:
    """At least the number and at most a hundredth more, in digits that `parse_limit` reads: "320", "1.51", "0.0032"."""
    places = max(0, 2 - math.floor(math.log10(number)))
    text = f"{math.ceil(number * 10**places) / 10**places:.{places}f}"
    return text if float(text) >= number else f"{float(text) + 10**-places:.{places}f}"


def planner_of(model, device=None) -> UHRBatPlanner:
    """All of a model that its plans need; `processor.planner = planner_of(model)` lets the processor take limits.

    Args:
        device: that the plans are for; None for the model's own.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    device = torch.device(model.device if device is None else device)
    embeddings = model.get_input_embeddings().weight
    own = embeddings.dtype, model.vision_chunk_size, model.tile_cache_bytes
    planner = UHRBatPlanner(model.config, weights, device, *own, embeddings.device.type == device.type)
    if not hasattr(model, "host"):
        return planner
    return replace(planner, calls=count_host(model), max_tiles=model.settings.max_tiles, note=NO_SECONDS)


def plan(model, image_size: tuple[int, int], budgets=None, **options) -> UHRBatPlan:
    """What a question about an image of (height, width) pixels costs: see [`UHRBatPlanner.plan`]."""
    return planner_of(model).plan(image_size, budgets, **options)
