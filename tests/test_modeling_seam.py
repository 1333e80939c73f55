"""The seam: a class of a dozen lines that has what the Protocol names is asked as UHR-BAT is."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small import BUDGETS, IMAGE, prompt, random_pixels, small_config, small_model
from uhr_bat.image_pyramids_uhr_bat import ImagePyramid
from uhr_bat.modeling_compression_uhr_bat import UHRBatCompressionMixin
from uhr_bat.modeling_encoding_uhr_bat import UHRBatEncodingMixin
from uhr_bat.modeling_importance_uhr_bat import UHRBatImportanceMixin
from uhr_bat.modeling_seam_uhr_bat import VisionLanguageModel
from uhr_bat.token_rules_uhr_bat import CompressionRules

METHODS = [name for name, value in vars(VisionLanguageModel).items() if inspect.isfunction(value) and name[0] != "_"]
SETTINGS = ("scales", "budgets", "scale_embedding_additions")
WIDTH = 9  # a row: six features, and three columns that regions do not see


class Blocks(UHRBatEncodingMixin, UHRBatImportanceMixin, UHRBatCompressionMixin):
    """Rows are the means of patches, and the question looks at bright ones: no tower and no decoder."""

    device, training = torch.device("cpu"), False
    tile_size, patches_per_side, image_token_id, row_width, context_window = 8, 2, IMAGE, WIDTH, None

    def __init__(self, **changes):
        of = small_config(**changes)
        fields = [*SETTINGS, *CompressionRules.__dataclass_fields__]
        self.config = SimpleNamespace(**{name: getattr(of, name) for name in fields})
        self.colours = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
        self.looks = []

    def project_tiles(self, tiles):
        return tiles.unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean((3, 5)).flatten(2).transpose(1, 2) @ self.colours

    def add_scale(self, rows, scale, positions, times):
        return rows

    def features_of(self, rows):
        return rows[:, :6]

    def read_attention(self, input_ids, rows, places, inputs_embeds=None, *, layer=None, question_tokens=None):
        self.looks.append((input_ids, rows, places, layer, question_tokens))
        return (rows[:, 0] + input_ids.float().mean()).sigmoid()

    def visual_inputs(self, input_ids, attention_mask, compressed):
        return {"rows": torch.cat(compressed.pooler_output)}


REFINED = {"refinement": [8, 20], "refinement_layers": [1, 0], "selector": "distinct"}
IDS = prompt(5, "image", 6, 7, num_tokens=1)


def pyramid(max_tiles, **changes):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 37, 3), np.uint8))
    sides = {"tile_size": 8, "patch_size": 4, "anchor": 8}
    return ImagePyramid(picture, arithmetic=(1 / 255, None, None), max_tiles=max_tiles, **{**sides, **changes})


@pytest.mark.parametrize("is_whole", [True, False])
def test_our_own_model_says_of_itself_what_the_seam_names(is_whole):
    model = small_model() if is_whole else small_model().model
    names = {"config", "device", "training", *VisionLanguageModel.__annotations__}
    assert all(hasattr(model, name) for name in names)
    assert (model.tile_size, model.patches_per_side, model.image_token_id, model.row_width) == (8, 2, IMAGE, 24)
    assert model.context_window == 256


def test_our_own_model_has_the_methods_of_the_seam_with_their_arguments():
    for name in METHODS:
        wanted = inspect.signature(getattr(VisionLanguageModel, name)).parameters.values()
        found = inspect.signature(getattr(type(small_model().model), name)).parameters.values()
        assert [(one.name, one.kind, one.default) for one in found] == [
            (one.name, one.kind, one.default) for one in wanted
        ], name


@pytest.mark.parametrize("budgets", [list(BUDGETS), 11])
@pytest.mark.parametrize("changes", [{}, REFINED], ids=["paper", "ours"])
def test_a_class_with_the_seam_alone_spends_exactly_the_budget(budgets, changes):
    model = Blocks(**changes)
    (image,) = model.encode_image(random_pixels())
    compressed = model.compress(IDS, image_features=[image], budgets=budgets)
    rows, number = compressed.pooler_output[0], sum(budgets) if isinstance(budgets, list) else budgets
    assert rows.shape == (number, WIDTH) and compressed.images_per_prompt == [1]
    start = 0
    for tokens, slots, of_scale in zip(image.tokens, compressed.slots[0], compressed.tokens[0]):
        for slot in range(len(of_scale)):
            torch.testing.assert_close(rows[start + slot], tokens[slots == slot].mean(0))
        start += len(of_scale)


def test_what_is_looked_at_comes_with_where_it_lies():
    model = Blocks(**REFINED)
    (image,) = model.encode_image(random_pixels())
    model.compress(IDS, image_features=[image], budgets=BUDGETS)
    assert [(one[3], one[4]) for one in model.looks] == [(None, None), (1, None), (0, "last")]
    for ids, rows, (places,), _, _ in model.looks:
        assert ids.tolist() == IDS[0].tolist() and places.grid == image.grids[places.level]
        torch.testing.assert_close(rows, image.tokens[places.level][places.positions])  # grids are full


def test_a_class_with_the_seam_alone_looks_closer():
    model = Blocks(**REFINED)
    with torch.no_grad():
        (features,) = model.encode_image(image_pyramids=[pyramid(12)])
        compressed = model.compress(IDS, image_features=[features], budgets=9)
    assert compressed.pooler_output[0].shape == (9, WIDTH) and compressed.scales == [[8, 16, 32, 56]]
    assert len(features.cache) == 12
    with pytest.raises(ValueError, match="`region_focus` of the configuration is None"):
        model.encode_image(image_pyramids=[SimpleNamespace(kind="dynamic", tile_size=8, patch_size=4)])
    with pytest.raises(ValueError, match="has tiles of 16 px with patches of 4 px, but the model's have 8 and 4 px"):
        model.encode_image(image_pyramids=[pyramid(12, tile_size=16, anchor=16)])


def test_gradients_go_through_the_rows_of_a_class_with_the_seam_alone():
    model = Blocks()
    compressed = model.compress(IDS, pixel_values=random_pixels(), budgets=BUDGETS)
    compressed.pooler_output[0].sum().backward()
    assert model.colours.grad.abs().sum() > 0


def test_regions_see_the_features_of_a_row_alone():
    model, other = Blocks(), Blocks()
    with torch.no_grad():
        other.colours[:, 6:] *= 100
    regions = [one.compress(IDS, pixel_values=random_pixels(), budgets=BUDGETS).regions[0] for one in (model, other)]
    assert all(torch.equal(*pair) for pair in zip(*regions))


def test_places_of_visual_tokens_are_the_means_of_what_was_merged_into_them():
    model = small_model(selector="preserve_and_merge")
    (image,) = model.encode_image(random_pixels())
    compressed = model.compress(input_ids=IDS, image_features=[image], budgets=BUDGETS)
    for level, found in enumerate(compressed.places(0)):
        assert (found.grid, found.level) == (image.grids[level], level)
        cells = torch.stack(torch.meshgrid(*map(torch.arange, found.grid), indexing="ij"), -1).flatten(0, 1).float()
        slots = compressed.slots[0][level]
        expected = torch.stack([cells[slots == slot].mean(0) for slot in range(BUDGETS[level])])
        torch.testing.assert_close(found.points, expected)


@pytest.mark.parametrize("name", ["vision_chunk_size", "tile_cache_bytes"])
def test_what_is_the_machines_is_set_on_the_model(name):
    model = small_model()
    setattr(model, name, 3)
    assert getattr(model, name) == getattr(model.model, name) == 3
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1. Got 0."):
        setattr(model, name, 0)


def test_a_prompt_is_embedded_once_however_often_it_looks():
    model = small_model(refinement=[8, 20], refinement_layers=[1, 0])
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda *call: calls.append(call))
    model.compress(input_ids=IDS, pixel_values=random_pixels(), budgets=BUDGETS)
    assert len(calls) == 1
