"""One package: its names, its command, what a wheel of it holds, and which part may use which."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache

import pytest
import uhr_bat
from uhr_bat import cli
from uhr_bat.common.loading import ROOT

# The order of floors, by prefix: no file of the model imports one of a later group.
GROUPS = (
    ("geometry", "budgets"),
    ("configuration",),
    ("image_",),
    ("image_processing",),
    ("processing", "pipeline", "released_api"),
    ("token_", "modeling_outputs"),
    ("modeling_",),
    ("modeling",),
)
ROOMS = (
    "hosts", "common", "planning", "export", "scenes", "regions", "pictures", "geo", "training", "evaluation", "serving", "benchmarks", "examples",
)  # fmt: skip
TOP = ("__init__", "cli", "__main__", "run")  # above the rooms; nothing uses them
FLOORS = (*ROOMS, *TOP)

REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8")
MODEL_FILES = sorted(ROOT.glob("*_uhr_bat.py"))
TOOL_FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def group_of(stem) -> int:
    """The last group whose names, or beginnings of names, fit."""
    name = stem.removesuffix("_uhr_bat")
    fits = [
        number
        for number, names in enumerate(GROUPS)
        if any(name == one or (one.endswith("_") and name.startswith(one)) for one in names)
    ]
    exact = [number for number, names in enumerate(GROUPS) if name in names]
    return (exact or fits)[-1]


def imported(path) -> set[str]:
    """Dotted names below the package that a file imports, wherever in it: modules, and what is taken from them."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            absolute = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["uhr_bat", *inside[: len(inside) - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            absolute = [[*base, alias.name] for alias in node.names]
            absolute += [base] if node.module else []
        else:
            continue
        found |= {".".join(parts[1:]) for parts in absolute if parts[0] == "uhr_bat"}
    return found


def folders():
    """Folders of the repository that are packages, as dotted names."""
    inits = (path.parent.relative_to(ROOT) for path in ROOT.rglob("__init__.py"))
    return {
        ".".join(("uhr_bat", *folder.parts))
        for folder in inits
        if not any(part.startswith(".") or part in ("build", "dist") for part in folder.parts)
    }


def test_every_name_of_the_package_is_there_and_none_is_imported_before_it_is_asked_for():
    assert {"UHRBatProcessor", "UHRBatForConditionalGeneration", "load_model"} <= set(dir(uhr_bat))
    for name in uhr_bat.__all__:
        assert getattr(uhr_bat, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'uhr_bat' has no attribute 'UHRBatBird'"):
        uhr_bat.UHRBatBird
    code = "import sys, uhr_bat; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_wheel_holds_every_folder():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(project["tool"]["setuptools"]["packages"]) == folders()


# The command


def test_every_verb_is_a_module_with_a_main_and_a_line_of_help(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for verb, (module, text) in cli.VERBS.items():
        group, *act = verb.split()
        if act:
            assert cli.acts(group)[act[0]] == text
            assert re.search(rf"\b{group} [\w|-]*\b{act[0]}\b", printed)
        else:
            assert f"  {verb} " in printed and text in printed
        if module is None:
            assert cli.acts(verb)
            continue
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        names = {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")}
        assert "main" in names, module


@pytest.mark.parametrize("verb", [verb for verb, (module, _) in cli.VERBS.items() if module])
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*verb.split(), "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and f"usage: uhr-bat {verb} " in printed
    assert all(f"  {verb} {act} " in printed for act in cli.acts(verb))


def test_a_group_lists_its_acts(capsys):
    assert cli.main(["tiny", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  tiny {act} " in printed and text in printed for act, text in cli.acts("tiny").items())


@pytest.mark.parametrize("arguments, message", [
    (["tiny"], "which act of tiny? It has build, vision, finetune, zoom, point, focus, plain, exchange"),
    (["tiny", "--model", "x"], "which act of tiny?"),
    (["tiny", "visoin"], "tiny has no 'visoin'. It has build, vision,"),
    (["train", "memroy"], "train has no 'memroy'. It has memory, engine"),
    (["bench", "cpu", "--quick"], "bench has no 'cpu'. It has gpu, serve"),
    (["export", "7b"], "export has no '7b'. It has 7b-config"),
])  # fmt: skip
def test_a_second_word_that_a_group_lacks_is_refused_with_those_that_it_has(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_options_of_a_group_that_does_something_by_itself_are_its_own(tmp_path, capsys):
    assert cli.main(["train", "--train_data", "none.json", "--output_dir", str(tmp_path), "--use_cpu", "true"]) == 2
    assert "none.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench", "--only", "gpu"])
    assert "unknown measures: gpu" in capsys.readouterr().err


@pytest.mark.parametrize("old, new", cli.OLD_NAMES.items())
def test_an_old_name_runs_and_names_the_new_one(old, new, capsys):
    assert new in cli.VERBS and old not in cli.VERBS
    with pytest.raises(SystemExit) as ended:
        cli.main([old, "--help"])
    printed = capsys.readouterr()
    assert ended.value.code == 0 and printed.out.startswith(f"usage: uhr-bat {new} ")
    assert (
        printed.err
        == f"FutureWarning: `uhr-bat {old}` is `uhr-bat {new}` now. The old name goes with the next release.\n"
    )


@pytest.mark.parametrize("arguments, message", [([], "a verb is missing"), (["sing"], "there is no verb 'sing'")])
def test_what_is_no_verb_is_refused_with_the_list(arguments, message, capsys):
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed and "ask about an image" in printed


# The order of floors


def test_every_file_and_folder_has_its_floor():
    rooms = {name.split(".")[1] for name in folders() if "." in name}
    assert rooms | {path.stem for path in ROOT.glob("*.py") if path not in MODEL_FILES} <= set(FLOORS)


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_model_files_use_only_model_files_of_no_later_group(path):
    # By relative imports: on the Hub there is no package `uhr_bat`.
    assert "from uhr_bat" not in path.read_text(encoding="utf-8")
    used = {name.split(".")[0] for name in imported(path)}
    assert used <= {file.stem for file in MODEL_FILES}
    assert max(map(group_of, used), default=0) <= group_of(path.stem)


@pytest.mark.parametrize("path", TOOL_FILES, ids=lambda path: str(path.relative_to(ROOT).with_suffix("")))
def test_tools_use_only_what_stands_above_them(path):
    room = path.relative_to(ROOT).parts[0]
    others = {name.split(".")[0] for name in imported(path)} - {room}
    assert others <= {file.stem for file in MODEL_FILES} | set(FLOORS[: FLOORS.index(room)])


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_model_files_import_what_a_plain_installation_brings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    absolute = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    absolute += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    packages = {"PIL" if name == "pillow" else name for name in re.findall(r"^\w+", REQUIREMENTS, re.M)}
    # The first two come with transformers; the others are extras, and their absence is an error with its mend.
    extras = {"rasterio", "sklearn", "geopandas", "shapely"}
    known = packages | set(sys.stdlib_module_names) | {"huggingface_hub", "tokenizers"} | extras
    assert {name.split(".")[0] for name in absolute} <= known


def test_tools_hand_a_model_its_visual_tokens_by_what_the_model_itself_says():
    written = {path for path in TOOL_FILES if "mm_encoder_outputs" in path.read_text(encoding="utf-8")}
    # A host is a model, and what trains the library's own classes asks them as they are.
    assert not [path for path in written if path.parent.name != "hosts" and path.stem != "plain"]


def test_what_kind_of_image_it_is_is_asked_by_its_name():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (*MODEL_FILES, *TOOL_FILES)}
    classes = [(path, node) for path in MODEL_FILES for node in trees[path].body if isinstance(node, ast.ClassDef)]
    known, fields = {}, set()  # classes that have a kind, with their files, and what else tells one from another
    for path, node in classes:
        named = {target.id for line in node.body if isinstance(line, ast.Assign) for target in line.targets}
        bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
        if "kind" in named or bases & set(known):
            known[node.name] = path
            fields |= {line.target.id for line in node.body if isinstance(line, ast.AnnAssign)}
    assert {"UHRBatImageFeatures", "UHRBatPyramidFeatures", "ImagePyramid", "DynamicPyramid", "RasterImage"} <= set(
        known
    )
    asked = []
    for path, tree in trees.items():
        taken = [one for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for one in node.names]
        aliases = {one.asname: one.name for one in taken if one.asname}
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        for call in calls:
            inside = [node for part in call.args[1:2] for node in ast.walk(part)]
            if call.func.id == "isinstance":
                names = {aliases.get(node.id, node.id) for node in inside if isinstance(node, ast.Name)}
                names |= {node.attr for node in inside if isinstance(node, ast.Attribute)}
                asked += [(path.name, name) for name in names & set(known) if path != known[name]]
            if call.func.id in ("hasattr", "getattr"):
                names = {node.value for node in inside if isinstance(node, ast.Constant)}
                asked += [(path.name, name) for name in names & fields]
    assert not asked


def test_there_are_thirteen_floors_at_most():
    uses = defaultdict(set)  # of a file of the model, or of a folder
    for path in (*MODEL_FILES, *TOOL_FILES):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        uses[own] |= {name.split(".")[0] for name in imported(path)} - {own}

    @cache
    def floor(name):
        return 1 + max(map(floor, uses[name]), default=0)

    assert max(map(floor, list(uses))) <= 13


def test_no_file_is_used_by_one_that_it_uses():
    files = [*MODEL_FILES, *TOOL_FILES]
    # A package is what its `__init__` imports.
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    uses = {names[path]: imported(path) & set(names.values()) for path in files}
    order = []
    while free := [name for name in uses if name not in order and uses[name] <= set(order)]:
        order += free
    assert sorted(set(uses) - set(order)) == []
