"""The table of a host: its plain call against the library's own, every row from as many tokens, and a run that goes on."""

import json
import shutil
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import torch
import transformers
from hosts_tiny import FAMILIES
from images import random_image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from uhr_bat import cli
from uhr_bat.common import asking, tables
from uhr_bat.common.measured import keep_measured
from uhr_bat.common.models import ROOT
from uhr_bat.evaluation import hosted, plain, reports, rows
from uhr_bat.evaluation.suites import SUITES
from uhr_bat.hosts.prompts import Parts
from uhr_bat.planning.flops import FlopMeter
from uhr_bat.scenes.layout import make_scene

QUESTIONS = ["How many ships are at the pier?", "Where is it?"]
# What the whole processors of two families are told beside their parts.
STATED = {"qwen3_vl": {}, "llava_onevision": {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}}
SMALL = [
    "--set",
    "levels=2",
    "--set",
    "refinement=16",
    "--fractions",
    "0.1",
    "0.1",  # one row
    "--grids",
    "2",
    "2",
    "--tiles",
    "6",
    "--workers",
    "1",
]


def library_answers(name, folder, picture, **options) -> list[str]:
    """By the family's own processor, and a model of its own."""
    kind = getattr(transformers, f"{FAMILIES[name]['class']}Processor")
    image_processor, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    processor = type(kind.__name__, (kind, Parts), {})(image_processor, tokenizer, **STATED[name])
    processor.image_processor, processor.tokenizer = image_processor, tokenizer
    host, found = AutoModelForImageTextToText.from_pretrained(folder).eval(), []
    for question in QUESTIONS:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=[text], images=[picture], return_tensors="pt", **options)
        ids = host.generate(**inputs, max_new_tokens=5, do_sample=False)
        found.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


@pytest.mark.parametrize("name", STATED)
def test_the_plain_call_is_the_librarys_own(name, loaded, host_folder):
    picture = random_image(150, 200)
    one = plain.PlainHost(*loaded(name, levels=2))
    pixels, number = one.view(picture, 60)
    assert number <= 60
    options, shown = {"size": {"shortest_edge": 64, "longest_edge": 60 * 64}}, picture
    if name == "llava_onevision":  # a picture of one tile of its own, which is seen twice
        options, shown = {}, picture.resize((56, 42), 3)
    assert one.ask(pixels, number, QUESTIONS, max_new_tokens=5) == library_answers(
        name, host_folder(name), shown, **options
    )
    pixels, more = one.view(picture)
    assert more > number
    assert one.ask(pixels, more, QUESTIONS, max_new_tokens=5) == library_answers(name, host_folder(name), picture)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in STATED]
)
def test_every_family_answers_by_itself(name, loaded):
    one = plain.PlainHost(*loaded(name, levels=2))
    numbers = [one.view(random_image(150, 200), most) for most in (20, 100, None)]
    assert [number for _, number in numbers] == sorted(number for _, number in numbers)
    for pixels, number in numbers:
        assert len(one.ask(pixels, number, QUESTIONS, max_new_tokens=2)) == 2


@pytest.fixture(scope="module")
def qwen3_vl(host_folder, tmp_path_factory):
    """Of its own accord it takes at most 200 visual tokens."""
    folder = shutil.copytree(host_folder("qwen3_vl"), tmp_path_factory.mktemp("sized") / "qwen3_vl")
    file = folder / "preprocessor_config.json"
    size = {"size": {"shortest_edge": 64, "longest_edge": 200 * 64}}
    file.write_text(json.dumps(json.loads(file.read_text()) | size))
    return folder


@pytest.fixture
def small_scenes(monkeypatch):
    monkeypatch.setattr(tables, "RESAMPLES", 20)
    monkeypatch.setattr(hosted, "METHODS", ("uniform", rows.PAPER, rows.REFINED))
    for name in (hosted.ORDINARY, hosted.SUITE):
        monkeypatch.setattr(SUITES[name], "lay_out", lambda seed: make_scene(seed, 2.0, width=400))
        monkeypatch.setattr(SUITES[name], "max_new_tokens", 2)
        ask = SUITES[name].samples_of_seed
        monkeypatch.setattr(SUITES[name], "samples_of_seed", lambda seed, ask=ask: ask(seed)[:1])


def run(folder, output, *more) -> int:
    settings = [
        part for key, value in FAMILIES[folder.name].get("settings", {}).items() for part in ("--set", f"{key}={value}")
    ]
    arguments = ["evidence", "hosted", "--model", folder, "--output", output, *SMALL, *settings, *more]
    return cli.main([str(one) for one in arguments])


@pytest.mark.slow
def test_a_table_has_every_row_from_as_many_tokens_and_goes_on(qwen3_vl, small_scenes, tmp_path, capsys, monkeypatch):
    scenes = ["--scenes", "1", "--native-scenes", "1", "--share", "0.5"]
    also = ["--also", "look=0.3", "--also", "look=0.9", "--also", "places=levels"]  # of which one has rows anyhow
    assert run(qwen3_vl, tmp_path, *scenes, *also) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "hosted.json").read_text())
    for suite in (hosted.ORDINARY, hosted.SUITE):
        rows = {row["name"]: row for row in result[suite]["rows"]}
        named = {
            f"{rule}; {other}"
            for rule in hosted.DEFAULTS
            for other in ("places=levels", "places=rectangle", "look=0.3", "look=0.9")
        }
        assert named | {*hosted.METHODS, hosted.PLAIN, hosted.OWN, hosted.TILING, hosted.DESCENDED} <= set(rows)
        spent = {rows[name]["tokens"] for name in (*hosted.METHODS, hosted.DESCENDED, *named)}
        assert len(spent) == 1 and 0 < rows[hosted.PLAIN]["tokens"] <= spent.pop()
        assert {row["questions"] for row in rows.values()} == {1}
        assert all(row["first_question_flops"] > 0 for row in rows.values())
    about = result[hosted.ORDINARY]["about"]
    assert " --share 0.5 " in about["command"] and ": 0.5 of the tiles behind the coarsest level's, by" in about["says"]
    ordinary = {row["name"]: row["first_question_flops"] for row in result[hosted.ORDINARY]["rows"]}
    assert ordinary["uniform"] < ordinary[hosted.REFINED] and ordinary[hosted.PLAIN] < ordinary[hosted.OWN]
    answers = (tmp_path / "hosted.csv").read_text().splitlines()
    assert len(answers) == 1 + sum(row["questions"] for suite in result.values() for row in suite["rows"])
    # A run that was stopped goes on to the same figures, and with other settings not at all.
    lines = (tmp_path / "hosted.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "hosted.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    assert run(qwen3_vl, tmp_path, *scenes, *also) == 0
    again = json.loads((tmp_path / "hosted.json").read_text())
    assert [row["accuracy"] for row in again[hosted.SUITE]["rows"]] == [
        row["accuracy"] for row in result[hosted.SUITE]["rows"]
    ]
    assert run(qwen3_vl, tmp_path, *scenes) == 2
    was = "[['look', 0.3], ['look', 0.9], ['places', 'levels']]"
    assert f"holds a run with also {was}, but [] is asked for" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep_measured(qwen3_vl, {"look": 0.9})
    assert run(qwen3_vl, tmp_path, *scenes, *also) == 2
    assert "but {'look': 0.9, 'levels': 2, 'refinement': 16, 'tile': 32} is asked for" in capsys.readouterr().err


@pytest.mark.slow
def test_a_1d_family_has_rows_with_words_between_its_tiles(host_folder, small_scenes, tmp_path, capsys):
    assert run(host_folder("llava_onevision"), tmp_path, "--scenes", "1", "--native-scenes", "0") == 0, (
        capsys.readouterr().err
    )
    text = (tmp_path / "hosted.md").read_text()
    assert f"{hosted.REFINED}; marks=True" in text and "places=" not in text and "its own tiling" in text


@pytest.mark.parametrize("options, message", [
    ([], "UHR-BAT-Tiny is UHR-BAT's own and has no plain call. `uhr-bat evidence` measures it."),
    (["--also", "places=circle"], "`places` is one of grid, levels, rectangle. Got 'circle'"),
    (["--also", "levels=2"], "--also levels would encode other tiles"),
    (["--also", "bogus=2"], "A host has no setting bogus."),
    (["--also", "selector=best"], "`selector` is one of preserve_and_merge"),
    (["--also", "mask_padding=false"], "--also mask_padding would encode other tiles"),
    (["--also", "budgets=9"], "--also budgets would change no row"),
    (["--set", "levels=many"], "`levels` is no str. Got 'many'"),
    (["--set", "tile=32", "--set", "anchor=3", "--tiles", "8"], "--tiles must be at least 9, those of the coarsest level. Got 8."),
    (["--share", "0"], "--share must be over 0 and at most 1. Got 0.0."),
    (["--share", "0.5", "--scenes", "0"], "--share is of ordinary scenes, of which --scenes 0 asks for none"),
    (["--first-seed", "7"], "Scenes before 20000000 were trained on, or chosen by. Got --first-seed 7."),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(host_folder, tmp_path, capsys, options, message):
    model = ["--model", str(host_folder("qwen3_vl"))] if options else []
    assert cli.main(["evidence", "hosted", *model, "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@torch.no_grad()
def test_all_rows_of_an_image_cost_its_encoding_and_its_answer_and_no_look(loaded):
    pair, picture = loaded("qwen3_vl", levels=2), random_image(60, 64)
    row = rows.Row(hosted.TILING, 100.0, list, rows.ALL)
    views = rows.Views(pair, picture)
    with FlopMeter() as encoding:
        seen = views.seen()
    prompt, kept = rows.choose(views, row, QUESTIONS[0])
    inputs = dict(zip(asking.PROMPT, pair[1].expand_placeholders(*(prompt[name] for name in asking.PROMPT), kept)))
    inputs |= pair[1].visual_inputs(**inputs, compressed=kept)
    with FlopMeter() as answering:
        pair[1].host.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    expected = encoding.get_total_flops() + answering.get_total_flops()
    assert sum(seen.available) == len(kept.pooler_output[0]) and rows.count_flops(
        pair, picture, [row], QUESTIONS[0], 3
    ) == [expected]
    (looked,) = rows.count_flops(pair, picture, [rows.row_of(rows.TOP_K, 1.0)], QUESTIONS[0], 3)
    assert looked > expected


@pytest.mark.parametrize("share, encoded", [(0.25, 1 + 1), (0.5, 1 + 2), (1, 1 + 4)])
def test_a_share_of_the_tiles_behind_the_coarsest_levels_is_encoded(loaded, share, encoded):
    pair = loaded("qwen3_vl", levels=2)
    (row,) = (one for one in hosted.rows_of([0.1], ("share", share), [1], [], pair) if one.name == hosted.DESCENDED)
    assert rows.Views(pair, random_image(64, 64)).seen(row.view).features.pyramid.max_tiles == encoded


def test_a_row_that_fills_the_context_window_is_refused_by_name():
    views, model = SimpleNamespace(available=[16, 64, 256]), SimpleNamespace(host=None, context_window=300)
    rows.check_window(model, views, [rows.row_of(rows.DISTINCT, 0.5)])
    with pytest.raises(
        ValueError, match="distinct at 100 % spends 336 visual tokens, but the context window holds 300"
    ):
        rows.check_window(model, views, [rows.row_of(rows.DISTINCT, 1.0)])


class Pool:
    """In place of processes: their start and their work, here."""

    broken = False

    def __init__(self, workers, context, start, arguments):
        start(*arguments)

    def map(self, *arguments):
        if self.broken:
            raise BrokenProcessPool
        return map(*arguments)

    def shutdown(self): ...


def test_processes_that_cannot_start_or_are_ended_are_an_error_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    jobs = {"scenes": (SUITES["scenes"].samples_of_seed(hosted.TEST_SEEDS[0])[:1], [])}
    with pytest.raises(ValueError, match="The first failure: FileNotFoundError: .*no config.json in it"):
        rows.ask_rows(tmp_path, jobs, workers=2)
    with pytest.raises(ValueError, match="The first failure: ValueError: `selector` is one of"):
        rows.ask_rows(ROOT, jobs, workers=2, changes={"selector": "best"})
    monkeypatch.setattr(Pool, "broken", True)
    with pytest.raises(OSError, match="A process was ended while it worked"):
        rows.ask_rows(tmp_path, jobs, workers=2)


def test_lines_of_something_else_are_refused_by_the_name_of_their_file(tmp_path):
    (tmp_path / "hosted.jsonl").write_text('{"settings": {}}\n{"bird": 1}\n')
    with pytest.raises(ValueError, match="hosted.jsonl holds lines that are none of such a run"):
        rows.Kept(tmp_path / "hosted.jsonl", {})


def test_an_interval_that_ends_at_its_mean_is_drawn():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    reports.draw_lines(axes, {"row": [(1, (0.3, 0.1 + 0.2, 0.4)), (2, (0.1 + 0.2, 0.2, 0.3))]})
    assert len(axes.containers) == 1


def record(row, x, right):
    about = {"image": "a", "sample": "a", "task": "colour", "section": "", "pixels": 3.0, "native": 48.0}
    return {"row": row, "x": x, "line": row, "tokens": x, "right": right, "kept": True, "seconds": {}, **about}


def test_a_row_is_compared_with_the_finest_tiling_that_has_no_more_tokens():
    records = [record(hosted.TILING, 1.2, 0.0), record(hosted.TILING, 5.9, 1.0), record(hosted.OWN, 100.0, 1.0)]
    records += [record(hosted.REFINED, x, 0.0) for x in (1.0, 4.0, 10.0)] + [record(hosted.PLAIN, 4.0, 1.0)]
    rows = {(row["name"], row["x"]): row["differences"] for row in hosted.summary(hosted.ORDINARY, records)}
    assert hosted.TILING not in rows[hosted.REFINED, 1.0] and hosted.PLAIN not in rows[hosted.REFINED, 10.0]
    assert rows[hosted.REFINED, 4.0][hosted.TILING][0] == 0 and rows[hosted.REFINED, 10.0][hosted.TILING][0] == -1
    assert rows[hosted.REFINED, 4.0][hosted.PLAIN][0] == rows[hosted.REFINED, 4.0][hosted.OWN][0] == -1


def test_flops_are_compared_at_the_accuracy_of_tiling_or_a_better_one():
    rows = [
        {"name": name, "x": x, "tokens": 10, "accuracy": (accuracy,) * 3, "first_question_flops": flops}
        for name, x, accuracy, flops in (
            (hosted.TILING, 6, 0.5, 6e9), (hosted.TILING, 20, 0.9, 9e9), (hosted.REFINED, 1, 0.4, 1e9), (hosted.REFINED, 4, 0.6, 3e9),
            (hosted.DESCENDED, 4, 0.5, 2e9), ("uniform", 1, 1.0, 1e9),
        )
    ]  # fmt: skip
    first, second = hosted.flops_table(rows).splitlines()[2:]
    assert f"{hosted.DESCENDED}, 4 %" in first and first.endswith("| 3.00 |") and "| none |" in second


@pytest.mark.slow
def test_the_plain_call_of_an_adapter_is_that_of_its_model(host_folder, loaded, tmp_path):
    from peft import LoraConfig, get_peft_model
    from uhr_bat import load_model

    folder, settings = host_folder("qwen3_vl"), {"levels": 2, "tile": 32}
    adapted = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(folder),
        LoraConfig(target_modules="all-linear", init_lora_weights=False, modules_to_save=["lm_head"]),
    )
    with torch.no_grad():  # of a part that is trained whole, too
        head = next(one for name, one in adapted.named_parameters() if "modules_to_save" in name)
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
    adapted.save_pretrained(tmp_path / "adapter")
    picture, found = random_image(100, 100), []
    for place in (folder, tmp_path / "adapter"):
        one = plain.PlainHost(*load_model(place, torch.float32, None, **settings))
        found.append(one.ask(*one.view(picture, 50), QUESTIONS, max_new_tokens=5))
    assert found[0] == found[1]


def test_the_report_names_its_last_baseline():
    rows = hosted.summary(
        hosted.ORDINARY,
        [record(hosted.OWN, 100.0, 1.0), record(hosted.PLAIN, 4.0, 1.0), record(hosted.REFINED, 4.0, 0.0)],
    )
    about = {"title": "", "says": "", "groups": ""}
    assert f"Minus {hosted.PLAIN}:" in reports.report({"about": about, "rows": rows, "errors": []})


def test_a_host_refines_its_looks_by_its_own_numbers_and_any_number_of_levels_shares_a_budget(loaded):
    _, model = loaded("qwen3_vl", levels=2)
    rules = rows.rules_for(model, rows.RULES[rows.REFINED][0])
    assert (rules["refinement"], rules["refinement_layers"]) == (
        model.config.refinement,
        model.config.refinement_layers,
    )
    for method in (rows.PAPER, rows.REFINED):
        for available in ([16, 64], [16, 64, 256], [4, 16, 64, 256, 1024]):
            counts = rows.row_of(method, 0.1).counts(available)
            assert sum(counts) == round(0.1 * sum(available)) and len(counts) in (1, len(available))
