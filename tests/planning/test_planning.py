"""Plans: what they say follows from sizes alone, limits are used to the last token, and what is refused says why."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from small import small_config, small_model
from uhr_bat.common.loading import load_model
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration
from uhr_bat.planning import __main__ as command
from uhr_bat.planning import plan, planner_of, rates
from uhr_bat.planning import planner as planning
from uhr_bat.planning.planner import parse_limit
from uhr_bat.planning.rates import Rates, known_rates, rates_of

SLOW = Rates(tower=1e-9, decoder=1e-9, decoder_layer=1e-4, kmeans=1e-9, pixel=1e-8, view_pixel=1e-8)
SIZE = (300, 400)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of its own for rates that are kept, and rates that nobody measures."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured = []
    monkeypatch.setattr(rates, "measure_rates", lambda *device: measured.append(device) or SLOW)
    return measured


def bigger_model():
    """With enough tokens for budgets to matter, and no weights."""
    text = small_config().text_config.to_dict() | {"max_position_embeddings": 8192}
    with torch.device("meta"):
        config = small_config(scales=[64, 128, 256], budgets=[20, 60, 120], text_config=text)
        return UHRBatForConditionalGeneration(config)


@pytest.mark.parametrize(
    "text, limit",
    [
        ("24GiB", (24 * 2**30, "memory")),
        (" 1.5 GB ", (1.5e9, "memory")),
        ("5s", (5.0, "seconds")),
        (".5s", (0.5, "seconds")),
        ("24g", (24 * 2**30, "memory")),
        ("2tib", (2 * 2**40, "memory")),
        ("100 KiB", (100 * 2**10, "memory")),
        ("3gb", (3e9, "memory")),
        ("7 S", (7.0, "seconds")),
    ],
)
def test_a_limit_is_memory_or_time(text, limit):
    assert parse_limit(text) == limit


@pytest.mark.parametrize("text", ["", "24", "GiB", "-1GiB", "5 minutes", "0s", "1e3s", "nans"])
def test_what_is_no_limit_is_refused_with_an_example_and_the_units(text):
    with pytest.raises(ValueError, match='as "24GiB", or a time, as "5s".* TiB, GiB, MiB, KiB, TB, GB, MB, KB, s. Got'):
        parse_limit(text)


@pytest.mark.parametrize("limit", ["0.000001s", "1KiB"])
@pytest.mark.parametrize("pixels", [1, 3_000, 9_000_000, 999_999_999])
def test_what_would_fit_fits(limit, pixels):
    planner, size = planner_of(bigger_model(), "cpu"), (max(1, pixels // 30_000), min(pixels, 30_000))
    with pytest.raises(ValueError) as told:
        planner.plan(size, limit)
    planner.plan(size, re.search('"([^"]+)" would fit', str(told.value))[1])


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (3, -1), (100_001, 4), (40_000, 40_000)])
def test_a_size_that_reading_refuses_is_refused_by_a_plan(size):
    with pytest.raises(ValueError, match=r"pixels .*(show nothing|over the limit of 1000000000|side over)|over the limit of"):
        planner_of(bigger_model(), "cpu").plan(size)


def test_levels_down_to_the_images_own_resolution_are_planned_for_any_size():
    planner = planner_of(bigger_model(), "cpu")
    plan = planner.plan((51_992, 110_162), max_tiles=400, native=True)
    assert sum(plan.question.tiles) == 400 and plan.budgets == 200 and len(plan.question.tiles) > 3
    # The image is read part by part.
    assert plan.peak_bytes < 2**30
    most = planner.plan((51_992, 110_162), f"{plan.peak_bytes}KiB", max_tiles=400, native=True)
    assert most.budgets > 200
    with pytest.raises(ValueError, match="pass `max_tiles`"):
        planner.plan(SIZE, native=True)
    with pytest.raises(ValueError, match="show nothing"):
        planner.plan((0, 5), max_tiles=400, native=True)


def test_questions_at_once_and_users_cost_what_is_theirs():
    planner = planner_of(bigger_model(), "cpu")
    one, batch, users = (
        planner.plan(SIZE, **numbers)
        for numbers in ({}, {"num_questions": 8}, {"num_questions": 8, "num_images": 8})
    )
    assert batch.flops["encode"] == one.flops["encode"] and users.flops["encode"] == 8 * one.flops["encode"]
    assert batch.flops["prefill"] == users.flops["prefill"] == 8 * one.flops["prefill"]
    assert batch.memory["answer"]["KV cache"] == 8 * one.memory["answer"]["KV cache"]
    held = "tokens of all scales"
    assert batch.memory["answer"][held] == one.memory["answer"][held]
    assert users.memory["answer"][held] == 8 * one.memory["answer"][held]
    assert one.total_seconds < batch.total_seconds < users.total_seconds < 8.001 * one.total_seconds
    with pytest.raises(ValueError, match="2 questions about 3 images"):
        planner.plan(SIZE, num_questions=2, num_images=3)


def test_what_is_set_on_the_model_is_planned_with():
    model = bigger_model()
    usual = planner_of(model, "cpu").plan((256, 256), max_tiles=300)
    model.vision_chunk_size, model.tile_cache_bytes = 1, 1000
    small = planner_of(model, "cpu").plan((256, 256), max_tiles=300)
    assert sum(small.memory["encode"].values()) < sum(usual.memory["encode"].values())
    assert small.memory["answer"]["kept tiles"] == 1000 < usual.memory["answer"]["kept tiles"]


def test_free_memory_is_what_the_device_has_left_and_the_weights_that_are_there(monkeypatch):
    monkeypatch.setattr(planning, "free_bytes", lambda device: 2**21)
    model = small_model()
    planner = planner_of(model)
    assert planner.is_loaded and not planner_of(bigger_model(), "cpu").is_loaded
    plan = planner.plan((24, 24), " Free ")
    assert plan.budgets == planner.plan((24, 24), f"{(2**21 + planner.weights) / 2**10}KiB").budgets
    with pytest.raises(ValueError, match="stay below free: they take .* of which weights"):
        replace(planner, is_loaded=False, weights=2**22).plan((24, 24), "free")


def test_free_memory_of_this_machine_is_more_than_nothing_and_less_than_a_million_gigabytes():
    assert 2**20 < rates.free_bytes(torch.device("cpu")) < 2**50


def test_a_device_that_is_not_here_is_planned_without_seconds_and_refused_by_name_for_them():
    for device in ("cuda:77", "meta"):
        planner = planner_of(bigger_model(), device)
        assert planner.plan(SIZE).seconds is None
        assert planner.plan(SIZE, "24GiB").seconds is None
        for limit in ("5s", "free"):
            with pytest.raises(ValueError, match=f"there is no {device} here"):
                planner.plan(SIZE, limit)


def test_without_a_folder_for_the_cache_rates_are_measured_and_used(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    planner = planner_of(bigger_model(), "cpu")
    assert planner.plan(SIZE, "24GiB").seconds and planner.plan(SIZE, "99s").seconds
    assert len(cache) == 1


def test_rates_of_a_busy_machine_are_measured_again_when_it_is_idle(cache, monkeypatch):
    config, cpu, now = small_config(), torch.device("cpu"), [1.0]
    monkeypatch.setattr(rates, "measure_yardstick", lambda *device: now[0])
    monkeypatch.setattr(rates, "measure_rates", lambda *device: cache.append(device) or replace(SLOW, tower=now[0], yardstick=now[0]))

    def next_process():
        rates._looked_at.clear()
        return rates_of(config, cpu, torch.float32).tower

    assert next_process() == 1.0
    now[0] = 0.9  # as good as before
    assert next_process() == 1.0 and len(cache) == 1
    now[0] = 0.1
    assert next_process() == 0.1 and rates_of(config, cpu, torch.float32).tower == 0.1 and len(cache) == 2
    now[0] = 5.0  # busy again: what is kept is better
    assert next_process() == 0.1 and len(cache) == 2


def test_a_plan_says_budgets_tiles_flops_memory_and_seconds_before_there_is_an_image():
    plan = planner_of(bigger_model(), "cpu").plan(SIZE)
    assert plan.budgets == [20, 60, 120] and plan.question.counts == [20, 60, 120]
    assert set(plan.flops) == {"encode", "importance", "regions", "prefill", "answer"}
    assert plan.peak_bytes == sum(plan.memory[plan.peak_stage].values())
    assert plan.total_seconds == pytest.approx(sum(plan.seconds.values()))
    printed = str(plan)
    for shown in ("budgets [20, 60, 120]", "200 of", "encode", "Peak of memory, in"):
        assert shown in printed


@pytest.mark.parametrize("unit, kind", [("MiB", "peak_bytes"), ("s", "total_seconds")])
def test_a_limit_is_used_to_the_last_token(unit, kind):
    planner = planner_of(bigger_model(), "cpu")
    small, large = (planner.plan(SIZE, budgets) for budgets in ([1, 1, 1], [256, 1024, 3000]))
    scale = 2**20 if unit == "MiB" else 1
    limit = (getattr(small, kind) + getattr(large, kind)) / 2
    plan = planner.plan(SIZE, f"{limit / scale:.6f}{unit}")
    assert getattr(plan, kind) <= limit * 1.000001
    more = planner.plan_question(planner.spend(plan.question, sum(plan.question.counts) + 1))
    assert getattr(more, kind) > limit * 0.999999
    assert plan.budgets == sorted(plan.budgets)


def test_a_limit_that_nothing_fits_names_the_term_and_what_would_fit():
    planner = planner_of(bigger_model(), "cpu")
    with pytest.raises(
        ValueError, match=r"Not even budgets of \[1, 1, 1\] stay below 0.1MiB.* of which .*MiB.* would fit"
    ) as told:
        planner.plan(SIZE, "0.1MiB")
    fitting = re.search(r'"([\d.]+GiB)" would fit', str(told.value))[1]
    assert planner.plan(SIZE, fitting).budgets == [1, 1, 1] or planner.plan(SIZE, fitting).question.counts
    with pytest.raises(ValueError, match=r"they take .* s on cpu, of which \w+ .* s\. \".*s\" would fit"):
        planner.plan(SIZE, "0.0000001s")


def test_fewer_tiles_cost_less_and_are_known_before():
    planner = planner_of(bigger_model(), "cpu")
    whole, some = planner.plan(SIZE), planner.plan(SIZE, max_tiles=200)
    assert sum(some.question.tiles) == 200 < sum(whole.question.tiles)
    assert some.flops["encode"] == whole.flops["encode"] * 200 // sum(whole.question.tiles)
    assert some.peak_bytes < whole.peak_bytes
    with pytest.raises(ValueError, match="`max_tiles` is 3, but the"):
        planner.plan(SIZE, max_tiles=3)


def test_rates_are_measured_once_and_kept_whole(cache):
    config, cpu = small_config(), torch.device("cpu")
    assert known_rates(config, cpu, torch.float32) is None
    assert rates_of(config, cpu, torch.float32) == rates_of(config, cpu, torch.float32) == SLOW and len(cache) == 1
    rates_of(config, cpu, torch.bfloat16)
    assert len(cache) == 2
    path, _ = rates.rates_file(config, cpu, torch.float32)
    for content in (
        "",
        "{",
        '{"of": {}}',
        json.dumps({"of": rates.rates_file(config, cpu, torch.float32)[1], "rates": {}}),
    ):
        path.write_text(content)  # whatever a killed process or another release left
        assert rates_of(config, cpu, torch.float32) == SLOW
    assert len(cache) == 6 and len(list(path.parent.iterdir())) == 2


def test_the_processor_takes_a_limit_once_it_knows_the_model():
    processor, model = load_model(device_map=None)
    image, text = Image.new("RGB", (400, 300), "green"), "<image> What colour?"
    with pytest.raises(ValueError, match=r"set `processor.planner = uhr_bat.planner_of\(model\)` first"):
        processor(text=text, images=image, budgets="24GiB")
    processor.planner = planner_of(model)
    inputs = processor(text=text, images=image, budgets="24GiB", return_tensors="pt")
    assert inputs["token_counts"].sum() > 1000  # all that the context window holds
    encoded = model.encode_image(**processor.image_processor(image, return_tensors="pt"))
    again = processor(text=text, image_features=encoded, budgets="24GiB", return_tensors="pt")
    assert again["token_counts"].sum() >= inputs["token_counts"].sum()
    with pytest.raises(ValueError, match="of which weights"):
        processor(text=text, images=image, budgets="1MiB")
    with pytest.raises(ValueError, match="Got 2 images"):
        processor(text="<image><image> Which?", images=[image, image], budgets="24GiB")
    with pytest.raises(ValueError, match="all encoded"):
        processor(text=text, images=image, budgets="24GiB", max_tiles=60)


def test_the_command_plans_by_the_configuration_alone(capsys):
    assert command.main(["--image-size", "30000x20000", "--tokens", "120"]) == 0
    printed = capsys.readouterr()
    assert "30,000 x 20,000 px" in printed.out and "120 of" in printed.out
    assert command.main(["--image-size", "800x600", "--memory", "1MiB"]) == 2
    assert "of which weights" in capsys.readouterr().err
    for tokens in ("-3", "0", "99999999"):
        assert command.main(["--image-size", "800x600", "--tokens", tokens]) == 2
        assert "visual tokens cannot be spent: the image has 2,736" in capsys.readouterr().err
    assert command.main(["--image-size", "110162x51992", "--max-tiles", "200", "--native", "--users", "4", "--memory", "free"]) == 0
    assert "4 questions at once, about 4 images" in capsys.readouterr().out
    for options, told in (
        (["--seconds", "0"], "--seconds must be over 0. Got 0"), (["--memory", ""], "Units: TiB"),
        (["--questions", "0"], "--questions must be at least 1"), (["--max-tiles", "0"], "--max-tiles must be at least 1"),
        (["--seconds", "5", "--device", "cuda:77"], "there is no cuda:77 here"),
    ):  # fmt: skip
        assert command.main(["--image-size", "800x600", *options]) == 2
        assert told in capsys.readouterr().err
    for size in ("800", "0x5", "5x-1", "axb"):
        with pytest.raises(SystemExit):
            command.main(["--image-size", size])
        assert "as 30000x20000" in capsys.readouterr().err


def test_a_model_plans_itself():
    model = small_model()
    assert plan(model, (24, 24), seconds=False).budgets == list(model.config.budgets)


def test_seconds_of_a_busy_machine_say_so(monkeypatch):
    planner = planner_of(small_model())
    for load in (4.5, 0.5):
        monkeypatch.setattr(planning, "rates_of", lambda *args, load=load: replace(SLOW, load=load))
        said = str(planner.plan((300, 200)))
        assert ("busy machine, with 4.5 processes for each processor" in said) == (load > 1)
