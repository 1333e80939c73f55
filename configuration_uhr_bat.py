# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT configuration: every number of the model, with its reason and its check.

The defaults are the paper's 7B model (CLIP ViT-L/14-336 and Qwen2-7B, four scales, Table 4 and appendix A) with the
paper's rules. A checkpoint that was trained with the released code states its rules in the same fields; nothing is
guessed from a name or a shape.
"""

import os
from copy import copy
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from .budgets_uhr_bat import is_one_budget, split_budgets
from .geometry_uhr_bat import check_scales, grids


def register_names():
    """Enter our classes into those tables of the library that are looked up by name; one that is gone is left out."""
    try:
        from transformers.models.auto import modeling_auto as tables
    except ImportError:
        return
    names = {
        # `transformers serve` looks the class of a model up here before it loads it, remote code included.
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "UHRBatForConditionalGeneration",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "UHRBatForConditionalGeneration",
        # The library's own model tests tell base models from models with a head by this one.
        "MODEL_MAPPING_NAMES": "UHRBatModel",
    }
    for table, name in names.items():
        getattr(tables, table, {}).setdefault("uhr_bat", name)


register_names()


class TowerForm(NamedTuple):
    """What tells vision towers apart: the norm before the first layer, and tokens that show no patch."""

    first_norm: str | None
    num_class_tokens: int


# The towers and decoders that the model takes, by model type; SigLIP 2 of a fixed resolution is `siglip_vision_model` too.
# All else is found in their own classes (`modeling_layers_uhr_bat.py`).
VISION_TOWERS = {"clip_vision_model": TowerForm("pre_layrnorm", 1), "siglip_vision_model": TowerForm(None, 0)}
DECODERS = ("qwen2", "qwen3", "llama")  # "qwen2" is Qwen2.5, too


@dataclass(frozen=True)
class PointerSettings:
    """A pointer: which of the visual tokens show the objects that a question asks about (`modeling_pointing_uhr_bat.py`).

    Attributes:
        hidden: width of its layers.
        width: of what is compared, words with what tokens show.
        threshold: least probability of a token that is pointed to.
    """

    hidden: int = 256
    width: int = 32
    threshold: float = 0.2

    def check(self):
        """Raises `ValueError` for what cannot be."""
        for name in ("hidden", "width"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"`{name}` of `pointer` is a whole number, at least 1. Got {getattr(self, name)!r}.")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float) or not 0 < self.threshold < 1:
            raise ValueError(f"`threshold` of `pointer` is a probability, above 0 and below 1. Got {self.threshold!r}.")


@dataclass(frozen=True)
class RegionFocus:
    """The system of LRS-VQA (arXiv 2503.07588): a module that says where to look, and how it is obeyed (its Algorithm 1).

    Attributes:
        layers: decoder layers that the module's own begin as; attention is read at the last. The release has
            [0, 1, 5, 11, 14] for 28 layers.
        alpha_select: share of a level's tokens whose tiles of the next level are read.
        alpha_keep: share of the last level's tokens that the decoder gets.
        n_max: tiles of a level that are encoded at most, N_max: where more are asked for, the descent ends before it. 80 is
            the paper's for Qwen2, 40 for Vicuna; the released code never reads it. None: no limit.
        max_levels: levels that are looked at; the released code stops at 2. None: down to the image's own resolution.
        separator_token_id: of the token between thumbnail and level, ":" of the tokenizers of Qwen2.
        newline_votes: as the released code: the newline at the end of each row counts among the tokens, is always chosen, and
            pulls the last tile of its row.
        mask_mode: "additive": what was not encoded is not there, but its place in the sequence stays empty. "upstream", as the
            released code: it is there, as zeros, and takes its share of the attention when that is read. "packed": it leaves no
            place, as deep levels have far more places than a decoder knows positions.
    """

    layers: tuple[int, ...]
    alpha_select: float = 0.25
    alpha_keep: float = 0.25
    n_max: int | None = 80
    max_levels: int | None = None
    separator_token_id: int = 25
    newline_votes: bool = False
    mask_mode: Literal["additive", "upstream", "packed"] = "additive"

    def check(self, num_layers: int, vocab_size: int):
        """Raises `ValueError` for what cannot be."""
        if not self.layers or any(not 0 <= layer < num_layers for layer in self.layers):
            raise ValueError(f"`layers` names decoder layers, 0 to {num_layers - 1}. Got {list(self.layers)}.")
        for name in ("alpha_select", "alpha_keep"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a share above 0, 1 at most. Got {getattr(self, name)}.")
        for name in ("n_max", "max_levels"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, or None for no limit. Got {getattr(self, name)}.")
        if not 0 <= self.separator_token_id < vocab_size:
            raise ValueError(f"`separator_token_id` is {self.separator_token_id}, but there are {vocab_size} tokens.")
        if self.mask_mode not in ("additive", "upstream", "packed"):
            raise ValueError(f"`mask_mode` is 'additive', 'upstream' or 'packed'. Got {self.mask_mode!r}.")


SELECTOR_NAMES = ("preserve_and_merge", "distinct", "top_k", "uniform")
# Scales of section 4 and budgets of appendix A.
PAPER_SCALES = (672, 1344, 2688, 4032)
PAPER_BUDGETS = (80, 320, 600, 2000)

# CLIP ViT-L/14-336 and Qwen2-7B, the towers of the paper (section 4, "More Details of Our Method").
CLIP_VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


def check_selector(name):
    """Raises `ValueError` for what is no name of a selector."""
    if name not in SELECTOR_NAMES:
        raise ValueError(
            f"`selector` is one of {', '.join(SELECTOR_NAMES)} in a configuration. Got {name!r}. Any other rule is handed in as a "
            'function: `compress(..., rules={"selector": function})`; those of other papers are in '
            '`uhr_bat.evaluation.reducers`. A folder that names one loads with another: `from_pretrained(..., selector="distinct")`.'
        )


def refuse_own_folder(source, save_directory):
    """Raises `ValueError` where something is to be saved into the folder, with its code, that it was loaded from.

    The library would copy the code that it loaded over the sources there, edits since then included.
    """
    own = os.path.realpath(source) if source else None
    if os.path.realpath(save_directory) == own and os.path.exists(os.path.join(own, "configuration_uhr_bat.py")):
        raise ValueError(
            f"{own} is the folder that this was loaded from: saving there would overwrite its code and settings. Save "
            "into another folder."
        )


@strict
class UHRBatConfig(PreTrainedConfig):
    """Configuration of [`UHRBatModel`] and [`UHRBatForConditionalGeneration`].

    The tile size is `vision_config.image_size` and the patch size `vision_config.patch_size`: a tile is what the
    vision tower sees at once. Each field stands with the reason for its default; `validate_*` raise `ValueError` with
    both numbers of a contradiction.
    """

    model_type = "uhr_bat"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    attribute_map = {"image_token_id": "image_token_index"}
    # What `Trainer` leaves out of its predictions: caches, and the visual tokens of the whole evaluation.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs"]

    @property
    def custom_pipelines(self) -> dict:
        """What `pipeline` uses in place of its own class. Made anew for each reader: the library changes what it gets."""
        return {
            "image-text-to-text": {"impl": "pipeline_uhr_bat.UHRBatPipeline", "pt": ["AutoModelForImageTextToText"]}
        }

    # Towers. `None` means the paper's: CLIP ViT-L/14-336 and Qwen2-7B.
    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None

    # Side of every view in pixels, ascending; the first one is the anchor (section 3.3). Multiples of the tile.
    scales: list[int] | tuple[int, ...] = PAPER_SCALES
    # Visual tokens that each scale may spend, B_s (section 3.3; appendix A gives these for 48 GB training). One number
    # is a budget of all scales, for which their tokens compete.
    budgets: list[int] | tuple[int, ...] | int = PAPER_BUDGETS

    # Id of the token that stands for an image in the prompt: the first row after Qwen2's own special tokens.
    image_token_index: int = 151646
    # The last but one layer of CLIP, patch tokens only (LLaVA's choice, kept by the released weights).
    vision_feature_layer: int = -2
    # Activation between the two linear layers of the projector and of the token MLP ("mlp2x_gelu").
    projector_hidden_act: str = "gelu"

    # Decoder layer whose attention gives the importance (section 3.2 "a fixed interface layer"); negative counts from
    # the end. The last one is the only choice that is documented for the released weights.
    importance_layer: int = -1
    # Eq. 2 averages over all text after the image; the released code reads the last prompt token.
    question_tokens: Literal["all", "last"] = "all"

    # Region partition (appendix C.2) of an image that comes without label maps. "grid" cuts the scale into square
    # cells, known before the image is encoded. "none" makes every token a region of its own, which is plain top-k by
    # importance: what the released code does where it has no SAM masks.
    region_method: Literal["kmeans", "birch", "grid", "none"] = "kmeans"
    # k of the clustering (Table 7: 600 matches the granularity of SAM). `None` takes the budget of the scale.
    num_regions: int | None = 600
    # Lloyd iterations; labels rarely change after ten.
    kmeans_iterations: int = 10
    # Weight of the coordinates beside unit-length features (eq. 13), the released value.
    coord_weight: float | int = 0.05
    # Coordinates over the whole scale (eq. 13) or, as the released code has them, inside each tile.
    coord_frame: Literal["scale", "tile"] = "scale"

    # Fields of [`RegionFocus`], of a model that has the second system of the paper's comparison, LRS-VQA's; None: no such
    # module, and no weights of one.
    region_focus: dict | None = None
    # Whose attention eq. 2 reads at the anchor: the decoder's, or that of the region focus module, which has fewer layers.
    importance_source: Literal["decoder", "region_focus"] = "decoder"

    # Fields of [`PointerSettings`], of a model that points to what it counts; None: no such module, and no weights of one.
    pointer: dict | None = None

    # The rule that decides which tokens stay, one of SELECTOR_NAMES. "preserve_and_merge" is the paper's (eq. 8-12); "distinct"
    # ranks tokens by importance times what differs from their region. `compress` takes functions of your own, too.
    selector: Any = validated_field(check_selector, default="preserve_and_merge")
    # Weight of what differs beside the importance. On validation scenes more is better at 1 % of the tokens, less at
    # 4 %; 0.75 loses a point of the best at either.
    distinctiveness_power: float | int = 0.75
    # Tokens of each scale after the anchor that the question looks at once more, those of greatest importance so far,
    # to refine the importance from scale to scale. Empty: the anchor's importance is all there is, as in the paper.
    refinement: list[int] | tuple[int, ...] = ()
    # Decoder layer at which each of these looks is read. Empty: `importance_layer`.
    refinement_layers: list[int] | tuple[int, ...] = ()
    # Where the tokens of all scales compete for one budget, the part of it that only the anchor's may have: a model that was
    # not trained on chosen tokens needs the whole scene around them.
    anchor_share: float | int = 0.0
    # Of an image's own levels, weight of the importance of tokens whose place is encoded at the next level, too, from the third
    # level on. UHR-BAT-Tiny has 0.1: of an object of few pixels the finest token counts.
    superseded_weight: float | int = 1.0
    # Eq. 9 keeps a_i >= mean; the released code keeps a_i > mean.
    threshold: Literal["ge", "gt"] = "ge"
    # Whether every region is guaranteed a token. Eq. 12 alone does not: early regions can fill the budget.
    coverage: bool = False

    # "factorized": one base table interpolated over the whole scale plus a vector per scale (eq. 5).
    # "per_scale": the released form, one table per scale, interpolated over one tile and repeated for every tile.
    scale_embedding_form: Literal["factorized", "per_scale"] = "factorized"
    # Sides of deeper levels (`native`) that have a scale vector of their own, beyond the scales: a level takes what lies
    # between its neighbours. None: deeper levels take the vector of the finest scale. Of "factorized" only.
    native_scales: list[int] | tuple[int, ...] = ()
    # Side of the base table: the grid that CLIP was trained on, 336 / 14. Released tables are capped at 64.
    scale_embedding_grid: int = 24
    # How often the embedding is added to the tokens that are clustered, merged and read by the decoder. The pass that
    # measures importance always adds it once. The released code adds it twice, or never if it was switched off.
    scale_embedding_additions: int = 1
    # Two-layer GELU MLP after the selection, no skip: part of the released weights, not of the paper.
    token_mlp: bool = False
    # Whether tokens that show only the letterbox are left out. The released code lets them be chosen.
    mask_padding: bool = True

    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = _sub_config(self.vision_config, "clip_vision_model", CLIP_VIT_L_14_336)
        self.text_config = _sub_config(self.text_config, "qwen2", QWEN2_7B)
        # JSON has no tuples: lists here keep a config equal to its own copy that was saved and loaded.
        self.scales = list(self.scales)
        self.native_scales = list(self.native_scales)
        if not is_one_budget(self.budgets):
            self.budgets = list(self.budgets)
        self.refinement = list(self.refinement)
        self.refinement_layers = list(self.refinement_layers) if self.refinement else []  # no looks have no layers
        # Configurations of earlier versions have what is the machine's, and the image processor's.
        for name in ("vision_chunk_size", "tile_cache_bytes", "max_image_pixels"):
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As the library's, but a value that is given takes the place of the saved one before that is checked: so a folder whose
        rule is gone loads with another."""
        own = UHRBatConfig.__annotations__.keys() - cls.sub_configs.keys()
        return super().from_dict(config_dict | {name: kwargs[name] for name in own & kwargs.keys()}, **kwargs)

    def check_rules(self, changes: dict):
        """Raises `ValueError` where a call has values for fields that this configuration could not have."""
        changed = copy(self)
        try:
            for name, value in changes.items():
                setattr(changed, name, value)
            for check in (changed.validate_refinement, changed.validate_layers, changed.validate_numbers):
                check()
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from None

    def validate_towers(self):
        """The classes of the towers are ones that the model knows how to read."""
        for name, known in (("vision_config", tuple(VISION_TOWERS)), ("text_config", DECODERS)):
            model_type = getattr(self, name).model_type
            if model_type not in known:
                raise ValueError(f"`{name}` is of the model type {model_type!r}. Known here: {', '.join(known)}.")

    def validate_scales(self):
        """Scales, those of deeper levels too, are ascending multiples of the tile, and the tile a multiple of the patch."""
        check_scales([*self.scales, *self.native_scales], self.tile_size, self.patch_size)
        if self.native_scales and self.scale_embedding_form != "factorized":
            raise ValueError("`native_scales` have vectors, which the scale embedding 'per_scale' has not.")

    def validate_budgets(self):
        """One budget per scale, ascending, and together they leave room for text in the context window."""
        (share,) = split_budgets(self.budgets, self.scales)
        if min(share) < 1:  # a call may leave a scale out, a model reads all of its own
            raise ValueError(f"Every budget must be at least 1 token per image. Got {self.budgets}.")
        if sum(share) >= self.text_config.max_position_embeddings:
            raise ValueError(
                f"The budgets {self.budgets} sum to {sum(share)} visual tokens, but the context window holds "
                f"{self.text_config.max_position_embeddings} tokens and needs room for text."
            )

    def validate_layers(self):
        """The vision and the importance layer exist in their towers."""
        # As an index into CLIP's hidden states, where 0 is what enters the first layer.
        num_layers = self.vision_config.num_hidden_layers
        if not 1 <= abs(self.vision_feature_layer) <= num_layers:
            raise ValueError(
                f"`vision_feature_layer` is {self.vision_feature_layer}, but the vision tower has {num_layers} layers."
            )
        num_layers = self.text_config.num_hidden_layers
        for name, layers in (
            ("importance_layer", [self.importance_layer]),
            ("refinement_layers", self.refinement_layers),
        ):
            for layer in layers:
                if not -num_layers <= layer < num_layers:
                    raise ValueError(f"`{name}` is {layer}, but the decoder has {num_layers} layers.")
        # Llama has no such field: all of its layers see everything.
        if "sliding_attention" in (getattr(self.text_config, "layer_types", None) or ()):
            raise ValueError("The importance pass needs full attention in every layer, not sliding windows.")

    def validate_region_focus(self):
        """The module's layers are the decoder's; importance is read from a module that is there."""
        if self.region_focus is not None:
            if unknown := sorted(set(self.region_focus) - {one.name for one in fields(RegionFocus)}):
                raise ValueError(f"`region_focus` has no {', '.join(unknown)}.")
            layers = self.region_focus.get("layers")
            if not isinstance(layers, list | tuple) or any(type(layer) is not int for layer in layers):
                raise ValueError(f"`region_focus` needs `layers`, a list of decoder layers. Got {layers!r}.")
            self.focus.check(self.text_config.num_hidden_layers, self.text_config.vocab_size)
        elif self.importance_source == "region_focus":
            raise ValueError("`importance_source` is 'region_focus', but there is no `region_focus`.")

    def validate_pointer(self):
        """The pointer's settings are known; tokens are read as they were before any MLP behind the selection."""
        if self.pointer is not None:
            if unknown := sorted(set(self.pointer) - {one.name for one in fields(PointerSettings)}):
                raise ValueError(f"`pointer` has no {', '.join(unknown)}.")
            self.pointing.check()
            if self.token_mlp:
                raise ValueError("A `pointer` reads tokens without `token_mlp`, and this configuration has both.")

    def validate_refinement(self):
        """One number of candidates per scale after the anchor, and a layer for each of them; or none at all."""
        for name, allowed in (("refinement", len(self.scales) - 1), ("refinement_layers", len(self.refinement))):
            given = len(getattr(self, name))
            if given not in (0, allowed):
                raise ValueError(f"`{name}` needs {allowed} numbers, or none. Got {given}.")
        if any(number < 1 for number in self.refinement):
            raise ValueError(f"`refinement` counts tokens, at least 1 per scale. Got {self.refinement}.")

    def validate_numbers(self):
        """Weights are numbers, counts positive; the image token has a row in the embedding table."""
        for name in ("coord_weight", "distinctiveness_power"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` is a number that is not negative. Got {getattr(self, name)}.")
        if not 0 <= self.anchor_share <= 1:
            raise ValueError(f"`anchor_share` is a part of the budget, from 0 to 1. Got {self.anchor_share}.")
        if not 0 < self.superseded_weight <= 1:
            raise ValueError(f"`superseded_weight` is above 0, 1 at most. Got {self.superseded_weight}.")
        if self.projector_hidden_act not in ACT2FN:
            raise ValueError(
                f"`projector_hidden_act` is no function of the library. Got {self.projector_hidden_act!r}."
            )
        for name in ("kmeans_iterations", "scale_embedding_grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1. Got {getattr(self, name)}.")
        if self.num_regions is not None and self.num_regions < 1:
            raise ValueError(f"`num_regions` must be at least 1, or None for the budget. Got {self.num_regions}.")
        if self.scale_embedding_additions not in (0, 1, 2):
            raise ValueError(f"`scale_embedding_additions` must be 0, 1 or 2. Got {self.scale_embedding_additions}.")
        if not 0 <= self.image_token_index < self.text_config.vocab_size:
            raise ValueError(
                f"`image_token_index` is {self.image_token_index}, but the vocabulary has "
                f"{self.text_config.vocab_size} rows."
            )

    @property
    def tile_size(self) -> int:
        """Pixels a side of what the vision tower sees at once."""
        return self.vision_config.image_size

    @property
    def patch_size(self) -> int:
        """Pixels a side of what one token shows."""
        return self.vision_config.patch_size

    @property
    def tower_form(self) -> TowerForm:
        """What the vision tower has that others have not."""
        return VISION_TOWERS[self.vision_config.model_type]

    @property
    def focus(self) -> RegionFocus:
        """`region_focus`, with its defaults."""
        return RegionFocus(**{**self.region_focus, "layers": tuple(self.region_focus["layers"])})

    @property
    def pointing(self) -> PointerSettings:
        """`pointer`, with its defaults."""
        return PointerSettings(**self.pointer)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(height, width) in tokens of every scale, U_s x V_s in the paper."""
        return grids(self.scales, self.patch_size)


def _sub_config(value, model_type, defaults):
    """A tower's config from None (the paper's), a dict as it stands in config.json, or a config object."""
    if value is None:
        return CONFIG_MAPPING[model_type](**defaults)
    if isinstance(value, dict):
        value = dict(value)
        return CONFIG_MAPPING[value.pop("model_type", model_type)](**value)
    return value


__all__ = ["UHRBatConfig"]
