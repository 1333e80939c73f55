"""The image and its services, without Docker: every step that can be is run here or held against what it names."""

import re
import shlex
import subprocess
from fnmatch import fnmatch

import pytest
import yaml
from test_setup import extras, pins, requirements
from uhr_bat.common.loading import ROOT
from uhr_bat.serving import demo
from uhr_bat.serving import serve as server

FILE = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))
# [(instruction, its text)]
STEPS = re.findall(r"^([A-Z]+) (.+)$", FILE.replace("\\\n", " "), re.M)
SERVICES = COMPOSE["services"]


def texts(instruction):
    return [text for name, text in STEPS if name == instruction]


def arguments():
    """{name: default} of the build."""
    return dict(text.split("=", 1) for text in texts("ARG"))


def exec_form(text):
    return yaml.safe_load(re.sub(r"^.*?\[", "[", text))


@pytest.fixture(scope="module")
def pinned(tmp_path_factory):
    """The pins that the image is built with, made by its own step: {package: version}."""
    folder = tmp_path_factory.mktemp("source")
    *files, target = texts("COPY")[0].split()
    assert target == "./"
    for name in files:
        (folder / name.rpartition("/")[2]).write_bytes((ROOT / name).read_bytes())
    (step,) = (text for text in texts("RUN") if text.startswith("awk"))
    subprocess.run(["bash", "-c", step.replace("/pins.txt", "pins.txt")], cwd=folder, check=True)
    lines = (folder / "pins.txt").read_text().split()
    found = dict(line.lower().split("==") for line in lines)
    assert len(found) == len(lines)
    # PyTorch's own step finds its line.
    (torch,) = re.findall(r"\$\((grep .*?) /pins\.txt\)", FILE)
    assert subprocess.check_output([*shlex.split(torch), folder / "pins.txt"], text=True).split() == ["torch==2.13.0"]
    return found


def test_every_package_of_the_image_has_its_tested_version(pinned):
    assert pinned == {name: str(version) for name, version in pins("serving/demo_and_batch.txt").items()}
    left, wanted = arguments()["EXTRAS"].split(","), requirements("requirements.txt")
    while left:
        for requirement in extras()[left.pop()]:
            left += requirement.extras if requirement.name == "uhr-bat" else []
            wanted += [] if requirement.name == "uhr-bat" else [requirement]
    assert all(pinned[one.name.lower()] in one.specifier for one in wanted)
    installs = [text for text in texts("RUN") if "pip install" in text]
    assert len(installs) == 2 and all("/pins.txt" in text for text in installs)


def test_the_base_has_a_version_and_a_supported_python():
    assert texts("FROM") == ["python:${PYTHON}"] and re.fullmatch(r"3\.1[1-9]\.\d+-slim-\w+", arguments()["PYTHON"])


def test_it_runs_as_an_ordinary_user_who_is_made_after_all_is_installed():
    names = [name for name, _ in STEPS]
    (user,) = texts("USER")
    assert user not in ("root", "0") and any(
        f"useradd --create-home --uid 1000 {user}" in text for text in texts("RUN")
    )
    assert names.index("USER") > max(number for number, (_, text) in enumerate(STEPS) if "pip install" in text)


def test_the_build_leaves_out_what_the_package_does_not_need():
    ignored = (ROOT / "docker/Dockerfile.dockerignore").read_text().split()
    assert all(any(fnmatch(name, one) for one in ignored) for name in (".git", ".venv", "tests", "uhr_bat.egg-info"))
    needed = (
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "requirements.txt",
        "constraints.txt",
        "model.safetensors",
        "serving",
    )
    assert not any(fnmatch(name, one) for name in needed for one in ignored)


def asked(test):
    """The address that a health check asks."""
    (address,) = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w*)", " ".join(test))
    return int(address[0]), address[1]


def test_the_command_is_the_servers_and_its_health_is_asked_where_it_listens():
    verb, *rest = exec_form(texts("CMD")[-1])
    options = server.parser().parse_args(rest)
    assert (exec_form(texts("ENTRYPOINT")[0]), verb, options.host) == (["uhr-bat"], "serve", "0.0.0.0")
    port, path = asked(exec_form(texts("HEALTHCHECK")[0]))
    assert port == options.port and f'@app.api_route("{path}"' in (ROOT / "serving/app.py").read_text()
    assert texts("EXPOSE") == [f"{options.port} {demo.PORT}"]


@pytest.mark.parametrize("folder", [None, "/data/7b"])
@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_a_command_with_its_model_at_this_machine_alone(name, folder):
    service = SERVICES[name]
    text = re.sub(r"\$\{MODEL_FOLDER:\+(.+?)\}", r"\1" if folder else "", service["command"])
    verb, *rest = shlex.split(text)
    options = {"serve": server, "demo": demo}[verb].parser().parse_args(rest)
    assert str(options.model) == ("/model" if folder else str(ROOT)) and options.host == "0.0.0.0"
    assert service["ports"] == [f"127.0.0.1:{options.port}:{options.port}"]
    assert {volume.split(":")[-2] for volume in service["volumes"]} == {"/model", str(options.allow_local_files)}
    assert all(volume.endswith(":ro") for volume in service["volumes"]) and service["read_only"]
    assert asked(service.get("healthcheck", {"test": exec_form(texts("HEALTHCHECK")[0])})["test"])[0] == options.port


def test_images_for_cpus_and_for_cuda_are_built_of_one_file():
    builds = {service["image"]: service["build"] for service in SERVICES.values()}
    assert builds.keys() == {"uhr-bat:cpu", "uhr-bat:cuda"}
    for build in builds.values():
        assert (ROOT / "docker" / build["context"] / build["dockerfile"]).resolve() == ROOT / "docker/Dockerfile"
    assert "cpu" in arguments()["TORCH_INDEX"] and "args" not in builds["uhr-bat:cpu"]
    assert builds["uhr-bat:cuda"]["args"].keys() <= arguments().keys()
    (device,) = SERVICES["server-cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"] and "deploy" not in SERVICES["server"]
    assert [name for name, service in SERVICES.items() if "profiles" not in service] == ["server"]
