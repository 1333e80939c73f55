"""`uhr-bat batch` on Ray: two workers, a real run; and STAC item collections. Needs the extra "batch"."""

import json
from types import SimpleNamespace

import pytest

ray = pytest.importorskip("ray", reason='pip install "uhr-bat[batch]"')
pytest.importorskip("pystac", reason='pip install "uhr-bat[batch]"')

import pyarrow.parquet as pq
import torch
from uhr_bat.common.asking import answer_texts, prompt_text
from uhr_bat.common.loading import ROOT, load_model
from uhr_bat.scenes import painting
from uhr_bat.serving import batch
from uhr_bat.serving.batch_inputs import read_images

QUESTIONS = ["What colour is the plane at the runway?", "How many objects are at the pier?", ("ships " * 5000).strip()]


@pytest.mark.slow
def test_two_workers_answer_as_the_model_does_and_failures_stop_nothing(tmp_path, capsys, monkeypatch):
    # Ray's workers step aside for all others by 15 steps of `nice`: beside another lane they would hardly come to run.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    scenes = [tmp_path / "images" / f"{seed}.png" for seed in range(3)]
    scenes[0].parent.mkdir()
    for seed, path in enumerate(scenes):
        painting.example((300, 260), seed=seed).save(path)
    (tmp_path / "images/torn.tif").write_bytes(b"II*\0 nothing")
    (tmp_path / "questions.json").write_text(json.dumps(QUESTIONS))
    output = tmp_path / "results.parquet"
    arguments = ["--images", tmp_path / "images", "--questions", tmp_path / "questions.json", "--output", output]
    assert batch.main([*map(str, arguments), "--workers", "2", "--max-new-tokens", "6"]) == 1  # some failed
    assert "6 answers about 4 images" in capsys.readouterr().out
    rows = pq.read_table(output).to_pylist()
    assert [(row["image"], row["question"]) for row in rows] == [
        (str(path), question) for path in [*scenes, tmp_path / "images/torn.tif"] for question in QUESTIONS
    ]
    processor, model = load_model()
    for row in rows:
        if row["image"].endswith("torn.tif"):
            assert "torn.tif" in row["error"]
        elif row["question"] == QUESTIONS[2]:
            assert "context window" in row["error"]
        else:
            inputs = processor(text=prompt_text(processor, row["question"]), images=row["image"], return_tensors="pt")
            with torch.inference_mode():
                expected = model.generate(**inputs, do_sample=False, max_new_tokens=6)
            assert row["answer"] == answer_texts(processor, expected[:, inputs["input_ids"].shape[1] :])[0]
            assert (row["error"], row["visual_tokens"], row["model"]) == (None, 146, str(ROOT)) and row["seconds"] > 0
    encoded = [row["image"] for row in rows if row["encoding_seconds"] is not None]
    assert encoded == list(map(str, scenes))  # each once


def test_an_image_that_ends_its_processes_is_given_up(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(batch, "PAUSE", 0)
    attempts = batch.Attempts()
    handle = SimpleNamespace(**{name: SimpleNamespace(remote=getattr(attempts, name)) for name in ("number", "begin")})
    settings = {"model": str(ROOT), "budgets": None, "max_new_tokens": 2, "reading": {}}
    worker = batch.Worker(settings, 8, handle)
    row = {"image": "gone.png", "item": "", "questions": ["How many?", "Where?"]}
    for _ in range(batch.MAX_ATTEMPTS):
        assert all("gone.png" in one["error"] for one in worker(row))
    assert [one["error"] for one in worker(row)] == [f"MemoryError: {batch.LOST}"] * 2


# STAC


def item(name, assets, self_href=None):
    links = [{"rel": "self", "href": self_href}] if self_href else []
    properties = {"datetime": "2026-01-01T00:00:00Z"}
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "geometry": None, "properties": properties,
        "links": links, "assets": assets,
    }  # fmt: skip


def collection(path, *items):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    return path


COG = "image/tiff; application=geotiff; profile=cloud-optimized"


def test_an_items_picture_in_colours_is_taken_or_its_first_raster_or_what_is_named(tmp_path):
    path = collection(
        tmp_path / "items.json",
        item("one", {"B04": {"href": "./one/B04.tif", "type": COG}, "visual": {"href": "one/TCI.tif"}}),
        item(
            "two",
            {
                "thumbnail": {"href": "t.tif", "type": COG, "roles": ["thumbnail"]},
                "B04": {"href": "B04.tif", "type": COG},
            },
            "https://host/stac/two.json",
        ),
        item("three", {"B04": {"href": "s3://bucket/three/B04.tif", "type": COG}}),
    )
    found = [(image.item, image.source) for image in read_images(path)]
    rest = [("two", "https://host/stac/B04.tif"), ("three", "s3://bucket/three/B04.tif")]
    assert found == [("one", f"{tmp_path}/one/TCI.tif"), *rest]
    assert [image.source for image in read_images(path, "B04")] == [
        f"{tmp_path}/one/B04.tif", *(source for _, source in rest)
    ]  # fmt: skip


def test_an_item_without_the_asset_is_an_error_that_names_what_it_has(tmp_path):
    path = collection(tmp_path / "items.json", item("one", {"metadata": {"href": "m.xml"}}))
    with pytest.raises(ValueError, match=r"item one has no asset \"visual\" and no raster; it has \['metadata'\]"):
        read_images(path)
    with pytest.raises(ValueError, match="item one has no asset 'B04'; it has"):
        read_images(path, "B04")


@pytest.mark.parametrize("text", ["[]", "{", '{"type": "Feature"}', '{"type": "FeatureCollection", "features": [{}]}'])
def test_what_is_no_item_collection_is_an_error(tmp_path, text):
    path = tmp_path / "items.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"items\.json: this is no STAC item collection"):
        read_images(path)
