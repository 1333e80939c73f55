import json
import sys

import pytest
from small import small_config
from uhr_bat import configuration_uhr_bat
from uhr_bat.configuration_uhr_bat import UHRBatConfig, split_budgets


def test_the_defaults_are_the_paper():
    config = UHRBatConfig()
    assert (config.scales, config.budgets) == ([672, 1344, 2688, 4032], [80, 320, 600, 2000])
    assert (config.tile_size, config.patch_size, config.num_regions) == (336, 14, 600)
    assert sum((scale // config.tile_size) ** 2 for scale in config.scales) == 228
    assert sum(height * width for height, width in config.grids) == 131_328  # Table 4
    assert config.text_config.hidden_size == 3584 and config.vision_config.hidden_size == 1024
    assert (config.question_tokens, config.threshold, config.region_method) == ("all", "ge", "kmeans")


def test_a_configuration_survives_json():
    config = small_config(scale_embedding_form="per_scale", token_mlp=True)
    assert UHRBatConfig(**json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()


def test_a_saved_configuration_loads_equal(tmp_path):
    config = small_config()
    config.save_pretrained(tmp_path)
    assert UHRBatConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_what_earlier_versions_saved_of_the_machine_loads_and_is_not_saved_again(tmp_path):
    gone = {"vision_chunk_size": 2, "tile_cache_bytes": 5, "max_image_pixels": 7}
    config = small_config()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | gone))
    loaded = UHRBatConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() and not gone.keys() & vars(loaded).keys()


def test_the_image_token_has_one_number_under_two_names():
    config = small_config()
    config.image_token_id = 7
    assert config.image_token_index == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": [8, 12, 24]}, "Scale 12 px is not a positive multiple of the tile of 8 px"),
        ({"scales": [16, 8, 24]}, "`scales` must be ascending, the anchor first. Got [16, 8, 24]"),
        ({"scales": [], "budgets": []}, "`scales` is empty"),
        ({"budgets": [2, 5]}, "Got 2 budgets [2, 5] and 3 scales [8, 16, 24]"),
        ({"budgets": [5, 2, 7]}, "must not decrease from one scale to the next finer one. Got [5, 2, 7]"),
        ({"budgets": [0, 2, 7]}, "at least 1 token per image. Got [0, 2, 7]"),
        ({"budgets": [80, 80, 96]}, "sum to 256 visual tokens, but the context window holds 256 tokens"),
        ({"importance_layer": 3}, "`importance_layer` is 3, but the decoder has 3 layers"),
        ({"vision_feature_layer": -4}, "`vision_feature_layer` is -4, but the vision tower has 3 layers"),
        ({"vision_feature_layer": 0}, "`vision_feature_layer` is 0, but the vision tower has 3 layers"),
        ({"image_token_index": -200}, "`image_token_index` is -200, but the vocabulary has 50 rows"),
        ({"image_token_index": 50}, "`image_token_index` is 50, but the vocabulary has 50 rows"),
        ({"num_regions": 0}, "`num_regions` must be at least 1"),
        ({"scale_embedding_additions": 3}, "must be 0, 1 or 2. Got 3"),
        ({"threshold": ">="}, "('ge', 'gt')"),
        ({"region_method": "dbscan"}, "('kmeans', 'birch', 'grid', 'none')"),
        ({"scales": "large"}, "scales"),
    ],
)
def test_a_contradiction_is_an_error_that_names_both_values(changes, message):
    with pytest.raises(Exception) as error:
        small_config(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("budgets", "num_images", "expected"),
    [
        ([80, 320], 1, [[80, 320]]),
        ([80, 320], 2, [[40, 160], [40, 160]]),
        ([80, 320], 3, [[28, 108], [26, 106], [26, 106]]),
        ([2, 3], 2, [[1, 2], [1, 1]]),
    ],
)
def test_budgets_are_shared_evenly_and_the_first_image_gets_the_remainder(budgets, num_images, expected):
    shares = split_budgets(budgets, [672, 1344], num_images)
    assert shares == expected
    assert [sum(column) for column in zip(*shares)] == budgets


def test_more_images_than_tokens_is_an_error():
    with pytest.raises(ValueError, match=r"Got \[2, 2\] for 3 image\(s\) in one prompt"):
        split_budgets([2, 2], [672, 1344], 3)


def test_a_name_table_that_the_library_drops_does_not_stop_the_configuration(monkeypatch):
    from transformers.models.auto import modeling_auto

    monkeypatch.delattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
    monkeypatch.delitem(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "uhr_bat")
    configuration_uhr_bat.register_names()
    table = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    assert table["uhr_bat"] == "UHRBatForConditionalGeneration"
    monkeypatch.setitem(sys.modules, "transformers.models.auto", None)
    configuration_uhr_bat.register_names()
