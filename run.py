"""The two commands of the README. They need Python 3.11 or newer with pip, and nothing else.

    python run.py ask [IMAGE] [QUESTION]      set up what is missing, then ask about an image (--help: all options)
    python run.py test [--without LANE] [pytest arguments]
                                              set up what is missing, then run the tests, all lanes of them or without
                                              some, or, with arguments, those of the pinned lane alone

Everything is installed into .venv/ beside this file; delete that folder to start over.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
MADE = VENV / "made.stamp"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

# Python compiles what is imported when it is first imported: a small part of what is installed.
UNCOMPILED = ["--no-compile"]

# Older supported releases of transformers, and what of their requirements differs from constraints.txt. They go into
# folders of their own that come first on PYTHONPATH: an environment each would repeat PyTorch's 800 MB.
OVERLAYS = {
    "5.10.4": ["transformers==5.10.4", "huggingface_hub==1.33.0", "tokenizers==0.22.2"],
    "5.17.0": ["transformers==5.17.0", "huggingface_hub==1.33.0"],
}
OVERLAY_TESTS = [
    "tests/doors/test_quick_start.py",
    "tests/doors/test_remote_code.py",
    "tests/test_modeling_generation.py",
    "tests/test_released_api.py",
    "tests/test_threads.py",
]

# What vLLM and no other release decodes has a lane of its own, and so have engines that train in several processes.
PINNED_TESTS = [
    "tests", "--ignore=tests/cluster", "--ignore=tests/clients", "--ignore=tests/agents", "-m", "not vllm",
]  # fmt: skip
# What is refused before a decoder sees it is tested in the main lane.
VLLM_TESTS = ["tests/serving", "-m", "vllm", "-k", "not refused and not names_the_field"]
# A page in a browser and a batch on Ray take minutes, and a Pillow that constraints.txt is ahead of.
EXTRAS_TESTS = ["tests/serving_extras"]
CLUSTER_TESTS = ["tests/cluster"]
# The server as LangChain, LiteLLM and LlamaIndex ask it, with some fifty packages of their own.
CLIENTS_TESTS = ["tests/clients"]
# The tools of `uhr-bat mcp` as an agent of the OpenAI Agents SDK calls them.
AGENTS_TESTS = ["tests/agents"]
# What those lanes take beside constraints.txt, or in other releases.
PACKAGES = {
    "vllm": "serving/vllm_cpu.txt",
    "cluster": "tests/cluster/deepspeed.txt",
    "demo-and-batch": "serving/demo_and_batch.txt",
    "clients": "serving/clients.txt",
    "agents": "serving/agents.txt",
}
# Models of other families, with the first release that takes them. The README is read in the main lane.
HOSTS_TESTS = [
    *("tests/hosts/test_exactness.py", "tests/hosts/test_calls.py", "tests/hosts/test_families.py"),
    *("-k", "not readmes_blocks"),
]
# What requirements.txt brings today, be it newer than constraints.txt, is tested at every door of the library.
NEWEST_TESTS = [
    "tests/doors",
    "tests/test_modeling_generation.py",
    "tests/test_released_api.py",
    "tests/test_threads.py",
]


def set_up(extra="", lanes=()):
    """Make .venv/ and install this folder as the package, with the packages of an extra of pyproject.toml as "[test]".

    It is done once for what the package requires at present; its code is used where it lies. Beside it, what some lanes take:
    pip keeps one core busy. A lane that fails here is tried again when it runs.
    """
    if not MADE.exists() or not PYTHON.exists():
        print("Setting up .venv/: this takes a few minutes, once.", flush=True)
        check(call(sys.executable, "-m", "venv", "--clear", VENV))
        MADE.touch()
    files = ("pyproject.toml", "requirements.txt", "constraints.txt")
    contents = [(ROOT / file).read_text(encoding="utf-8") for file in files]
    with ThreadPoolExecutor(1) as beside:
        for lane in lanes:
            beside.submit(set_up_lane, lane)
        once(f"package{extra}", contents, lambda: pip("-e", f"{ROOT}{extra}", "-c", ROOT / "constraints.txt"))


def set_up_overlay(name, packages):
    """Put the packages (each name==version) into a folder of their own and return that folder."""
    folder = VENV / name

    def install():
        shutil.rmtree(folder, ignore_errors=True)  # pip leaves what is there already as it is
        if packages:
            check(call_pip("install", *UNCOMPILED, "--quiet", "--no-deps", "--target", folder, *packages))

    once(name, packages, install)
    return folder


def set_up_lane(lane):
    """The folder of what a lane takes by its file in `PACKAGES`."""
    lines = (ROOT / PACKAGES[lane]).read_text(encoding="utf-8").splitlines()
    return set_up_overlay(lane, [line for line in lines if not line.startswith("#")])


def resolve_newest():
    """Ask pip what `pip install -r requirements.txt` brings today: {name: version}, or None if pip cannot tell.

    PyTorch keeps its pin and is left out: .venv/ has it.
    """
    report = VENV / "newest.json"
    pinned = pins()
    # --ignore-installed: without a registry, pip would be content with what .venv/ has.
    options = ["--quiet", "--dry-run", "--ignore-installed", "--report", report]
    if call_pip("install", *options, "-r", ROOT / "requirements.txt", f"torch=={pinned['torch']}"):
        return None
    packages = [package["metadata"] for package in json.loads(report.read_text(encoding="utf-8"))["install"]]
    resolved = {package["name"]: package["version"] for package in packages if package["name"] != "torch"}
    # Where one of several registries cannot be reached, pip takes what the others have, however old that is.
    outdated = release(resolved["transformers"]) < release(pinned["transformers"])
    return None if outdated else resolved


def release(version):
    return [int(number) for number in re.findall(r"\d+", version)]


def pins():
    """{name: version} of constraints.txt."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))


def once(name, inputs, action):
    """Do it unless it was done with the same inputs. The stamp comes last, so an interrupted action is repeated."""
    stamp = VENV / f"{name}.stamp"
    digest = hashlib.sha256(repr(inputs).encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != digest:
        action()
        stamp.write_text(digest)


def pip(*arguments):
    # A pip that is killed can leave half a package, which the next one takes for a whole one: .venv/ is made anew then.
    MADE.unlink()
    code = call_pip("install", *UNCOMPILED, *arguments)
    MADE.touch()
    check(code)


def call_pip(*arguments):
    return call(PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments)


def call(*command):
    command = [str(part) for part in command]
    print("+", *command, flush=True)
    return subprocess.call(command)


def check(code):
    if code:
        print("The set-up stopped there. The same command again takes it up.", file=sys.stderr)
        sys.exit(code)


def run_tests(lane, arguments, overlay=None):
    """Run pytest and return (passed, failed, skipped).

    With an overlay it is one process beside that of another lane, and what it prints comes whole when it ends.
    """
    report = VENV / f"tests-{lane}.xml"
    report.unlink(missing_ok=True)
    # Each of the many processes that tests start would compile anew what it imports, where Python is told to write nothing.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    if overlay:
        if lane != "vllm":  # it binds its threads itself
            environment.setdefault("OMP_NUM_THREADS", "1")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(overlay), os.environ.get("PYTHONPATH")]))
        environment["PATH"] = os.pathsep.join([str(overlay / "bin"), os.environ["PATH"]])
    command = [PYTHON, "-m", "pytest", "--timeout=900", f"--junitxml={report}", *arguments]
    if overlay:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        print(f"\nTests: {lane}\n{done.stdout.decode(errors='replace')}", flush=True)
        code = done.returncode
    else:
        print(f"\nTests: {lane}", flush=True)
        # Two processes: each has half of the files, and who is done takes over half of what the other has left.
        code = subprocess.call([*command, "-n", "2", "--dist", "worksteal"], cwd=ROOT, env=environment)
    passed, failed, skipped = count(report)
    # A run that collected nothing or died on the way reports no failure, but it is one.
    return passed, max(failed, int(code != 0)), skipped


def run_newest_tests():
    """Run pytest with what `pip install -r requirements.txt` brings today and return (passed, failed, skipped)."""
    resolved = resolve_newest()
    if resolved is None:
        problem = "pip could not find the newest releases. Can the package registry be reached?"
        print(f"Not tested with what users get today: {problem}", file=sys.stderr, flush=True)
        return 0, 1, 0
    installed = subprocess.check_output([str(PYTHON), "-m", "pip", "freeze", "--all"], text=True).split()
    missing = sorted({f"{name}=={version}" for name, version in resolved.items()}.difference(installed))
    overlay = set_up_overlay("transformers-newest", missing)
    unlike = " ".join(missing) or "none"
    print(f"\nNewest: transformers {resolved['transformers']}; unlike constraints.txt: {unlike}", flush=True)
    return run_tests("transformers-newest", NEWEST_TESTS, overlay)


def run_older_tests(version, packages, tests=OVERLAY_TESTS):
    """Run pytest with an older release of transformers and return (passed, failed, skipped)."""
    lane = f"transformers-{version}"
    return run_tests(lane, tests, set_up_overlay(lane, packages))


def run_other_tests(lane, tests):
    """Run what takes packages of its own and return (passed, failed, skipped)."""
    return run_tests(lane, tests, set_up_lane(lane))


# What is tested beside the pinned releases; `--without NAME` leaves one out. The longest begin.
LANES = {
    "vllm": partial(run_other_tests, "vllm", VLLM_TESTS),
    "transformers-newest": run_newest_tests,
    "demo-and-batch": partial(run_other_tests, "demo-and-batch", EXTRAS_TESTS),
    "cluster": partial(run_other_tests, "cluster", CLUSTER_TESTS),
    **{f"transformers-{version}": partial(run_older_tests, version, OVERLAYS[version]) for version in OVERLAYS},
    "hosts": partial(run_older_tests, "5.18.0", ["transformers==5.18.0"], HOSTS_TESTS),
    "clients": partial(run_other_tests, "clients", CLIENTS_TESTS),
    "agents": partial(run_other_tests, "agents", AGENTS_TESTS),
}


def run_lane(name):
    """(passed, failed, skipped) of a lane; one that cannot be set up has failed, and the others go on."""
    try:
        return LANES[name]()
    except SystemExit:
        print(f"The lane {name} could not be set up: nothing of it was tested.", file=sys.stderr, flush=True)
        return 0, 1, 0


def count(report):
    """(passed, failed, skipped) of a JUnit report; nothing if pytest did not get as far as writing one."""
    if not report.exists():
        return 0, 0, 0
    suites = list(ElementTree.parse(report).iter("testsuite"))
    total = {key: sum(int(suite.get(key)) for suite in suites) for key in ("tests", "errors", "failures", "skipped")}
    failed = total["errors"] + total["failures"]
    return total["tests"] - failed - total["skipped"], failed, total["skipped"]


def ask(arguments):
    set_up()
    # The current folder stays, as IMAGE may be relative to it; -P keeps that folder's modules out of the way.
    command = [str(PYTHON), "-P", "-m", "uhr_bat", "ask", *arguments]
    if os.name == "nt":
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)


def test(arguments):
    parser = argparse.ArgumentParser(prog="run.py test", add_help=False, allow_abbrev=False)
    parser.add_argument("--without", action="append", choices=LANES, default=[])
    options, arguments = parser.parse_known_args(arguments)
    lanes = [] if arguments else [name for name in LANES if name not in options.without]
    set_up("[test]", [name for name in PACKAGES if name in lanes])
    pinned = f"transformers-{pins()['transformers']}"
    results = {pinned: run_tests(pinned, arguments or PINNED_TESTS)}
    if lanes:
        print(f"\nTwo lanes at a time, each printed when it ends: {', '.join(lanes)}", flush=True)
        with ThreadPoolExecutor(2) as pool:
            results |= zip(lanes, pool.map(run_lane, lanes))
    summary = "{} passed, {} failed, {} skipped".format
    print()
    for lane, counts in results.items():
        print(f"{lane}:", summary(*counts))
    for name in options.without:
        print(f"{name}: left out")
    total = [sum(column) for column in zip(*results.values())]
    print(summary(*total), flush=True)
    sys.exit(int(total[1] > 0))


def main():
    commands = {"ask": ask, "test": test}
    if sys.version_info < (3, 11):
        sys.exit("Python 3.11 or newer is needed; this is {}.{}.".format(*sys.version_info))
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(__doc__.strip())
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
