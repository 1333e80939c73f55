"""Looks that are divided by an empty question's, and looks at all layers from one pass."""

import shutil

import pytest
import torch
from hosts_tiny import FAMILIES
from images import random_image
from test_exactness import ONE_TILE, ask
from test_plan import compressed
from uhr_bat import load_model, plan
from uhr_bat.benchmarks.meters import FlopMeter
from uhr_bat.common.asking import write_prompt
from uhr_bat.hosts.looks import relative_attention
from uhr_bat.modeling_outputs_uhr_bat import Places


def rows_of(model, number, seed=0):
    return torch.randn(number, model.row_width, generator=torch.Generator().manual_seed(seed))


def test_what_is_looked_at_whatever_is_asked_cancels():
    always, asked_for = torch.linspace(1, 5, 50), torch.ones(50)  # late rows more than early ones
    always[[0, 18, 33]], asked_for[[5, 17, 40]] = 90.0, 6.0  # sinks, and what is asked for
    before, found = 0.7 * always * asked_for, relative_attention(0.7 * always * asked_for, 0.2 * always)
    assert sorted(before.topk(3).indices.tolist()) == [0, 18, 33]
    assert sorted(found.topk(3).indices.tolist()) == [5, 17, 40] and found.sum() == pytest.approx(1)
    assert torch.allclose(relative_attention(3 * always, always), torch.full((50,), 0.02))


def test_a_divided_look_is_the_one_that_is_documented():
    asked, empty = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.6, 1.2])  # m = 0.3
    expected = torch.tensor([0.9 / 0.4, 0.6 / 0.6, 0.4 / 0.9])
    assert torch.allclose(relative_attention(asked, empty), expected / expected.sum())


def test_rows_that_nothing_looks_at_do_not_outweigh_those_that_are_asked_for():
    asked, empty = torch.full((40,), 0.02), torch.full((40,), 0.02)
    asked[3], asked[5:9], empty[5:9] = 0.1, 1e-9, 1e-12
    found = relative_attention(asked, empty)
    assert found.argmax() == 3 and found[5:9].max() < 1.3 * found[20]
    assert torch.isfinite(relative_attention(torch.zeros(40), torch.zeros(40))).all()


@torch.no_grad()
def test_a_divided_look_is_the_quotient_of_two_looks_by_themselves(family, loaded):
    processor, plain = loaded(family, **ONE_TILE)
    _, divided = loaded(family, **ONE_TILE, relative_attention=True)
    ids, empty = ask(processor, 1)[0]["input_ids"][0], write_prompt(processor, "")["input_ids"][0]
    places = [Places(torch.tensor([3, 1, 7, 0, 2, 6, 4, 5, 8]), (3, 3), 0)]
    for question in ("all", "last"):
        look = {"rows": rows_of(plain, 9), "places": places, "question_tokens": question}
        expected = relative_attention(*(plain.read_attention(one, **look) for one in (ids, empty)))
        found = divided.read_attention(ids, **look)
        assert torch.allclose(found, expected, atol=1e-5) and found.sum() == pytest.approx(1)
        assert not torch.allclose(found, plain.read_attention(ids, **look), atol=1e-3)


@torch.no_grad()
def test_one_pass_reads_all_layers_as_a_pass_for_each_does(family, loaded):
    processor, model = loaded(family, **ONE_TILE)
    ids, rows = ask(processor, 1)[0]["input_ids"][0], rows_of(model, 9)
    seen = model.looks([ids], rows, None, list(model.attention))
    groups = FAMILIES[family]["text_config"]["num_key_value_heads"]
    for layer, found in zip(model.attention, seen):
        assert found.shape == (1, groups, 9)
        assert torch.allclose(found[0].mean(0), model.read_attention(ids, rows, None, layer=layer), atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
@pytest.mark.parametrize("max_tiles", [None, 6])
def test_refined_importance_is_divided_at_each_level(name, max_tiles, loaded, monkeypatch):
    settings = {"levels": 3, "max_tiles": max_tiles}
    processor, plain = loaded(name, **settings)
    _, divided = loaded(name, **settings, relative_attention=True)
    image, questions = random_image(200, 160), ["How many ships are at the pier?", "Is it red?"]
    empty, read = write_prompt(processor, "")["input_ids"][0], plain.read_attention

    def quotient(input_ids, *args, **kwargs):
        return relative_attention(*(read(ids, *args, **kwargs) for ids in (input_ids, empty)))

    for question in questions:
        text = write_prompt(processor, question)
        inputs = processor(text=processor.decode(text["input_ids"][0]), images=image, budgets=20, return_tensors="pt")
        with monkeypatch.context() as patch:
            patch.setattr(plain, "read_attention", quotient)
            expected = plain.compress(**inputs)
        found = divided.compress(**inputs)
        for ours, theirs in zip(found.importance[0], expected.importance[0]):
            assert torch.allclose(ours.nan_to_num(-1), theirs.nan_to_num(-1), rtol=1e-3, atol=1e-4)
        assert [len(one) for one in found.pooler_output] == [20]


@pytest.mark.slow
def test_a_plan_counts_the_empty_questions_look(loaded):
    processor, model = loaded("qwen3_vl", relative_attention=True)
    with FlopMeter() as before:
        _, _, told = compressed(processor, model, budgets=90, max_tiles=7)
    flops = plan(model, (200, 200), 90, max_tiles=7, **told).flops
    planned = sum(flops[step] for step in ("encode", "importance", "refinement"))
    assert planned + flops["regions"] == pytest.approx(before.get_total_flops(), rel=0.005)


def test_an_empty_question_without_a_place_for_its_image_is_refused_at_load(host_folder, tmp_path):
    folder = shutil.copytree(host_folder("llava"), tmp_path / "model")
    template = "{% for m in messages %}{% for p in m.content %}{% if p.text %}<image>{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    load_model(folder)
    with pytest.raises(ValueError, match="An empty question has no place for its image"):
        load_model(folder, relative_attention=True)
