"""`save_pretrained` and `push_to_hub` of what Auto classes loaded; the results are opened in new processes."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from asking import load, needs_auto_image_processor, picture
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from uhr_bat.common.loading import load_model, save_model


REPO = "someone/UHR-BAT-Tiny"
DATA_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
}

# Opens the folders or repositories that are named, one after the other, as a user who has nothing else, and prints what
# was found in each. What is named "SOURCE=FOLDER" is saved to that folder again, "SOURCE=>REPOSITORY" is pushed there and not
# asked.
OPEN = """
import json, sys
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

transformers.logging.disable_progress_bar()
image, *sources = sys.argv[1:]
found = []
for source in sources:
    source, _, save_to = source.partition("=")
    if save_to.startswith(">"):
        AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True).push_to_hub(save_to[1:])
        AutoProcessor.from_pretrained(source, trust_remote_code=True).push_to_hub(save_to[1:])
        continue
    reports = {}
    for door in (AutoModel, AutoModelForImageTextToText):
        model, report = door.from_pretrained(source, trust_remote_code=True, output_loading_info=True)
        reports[type(model).__name__] = sorted(str(key) for keys in report.values() for key in keys)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    parts = [{"type": "image", "path": image}, {"type": "text", "text": "How many ships are there?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=6, no_repeat_ngram_size=1)
    if save_to:
        model.save_pretrained(save_to)
        processor.save_pretrained(save_to)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    found.append({
        "reports": reports,
        "classes": [type(thing).__name__ for thing in (config, processor, processor.image_processor)],
        "padding_side": tokenizer.padding_side,
        "sequence": ids[0].tolist(),
    })
assert not any(name.split(".")[0] == "uhr_bat" for name in sys.modules)
print(json.dumps(found))
"""


FETCH = """
import json, sys
from pathlib import Path
from huggingface_hub import constants
from uhr_bat import cli

repo, image = sys.argv[1:]
commands = (
    ["plan", repo, "--image-size", "3000x2000", "--tokens", "100", "--device", "cuda"],
    ["ask", image, "How many ships?", "--max-new-tokens", "1", "--model", repo],
)
found = []
for constants.HF_HUB_OFFLINE in (False, True):
    for command in commands:
        code = cli.main(command)
        found.append((code, bool(list(Path(constants.HF_HUB_CACHE).glob("*/snapshots/*/*.safetensors")))))
print(json.dumps(found))
"""


def run(script, *arguments, folder, **environment):
    """The last line that a script prints in a new process in `folder`, offline and with caches of its own."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=folder,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "home"),
            "HF_MODULES_CACHE": str(folder / "modules"),
            **environment,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return (done.stdout.splitlines() or [""])[-1]


def contents(folder):
    """{name: bytes} of the files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def image_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "scene.png"
    picture().save(path)
    return path


@pytest.fixture(scope="module")
def saved(model_folder, tmp_path_factory):
    """A folder that was empty before model and processor were saved there."""
    folder = tmp_path_factory.mktemp("saved")
    AutoModelForImageTextToText.from_pretrained(model_folder, trust_remote_code=True).save_pretrained(folder)
    AutoProcessor.from_pretrained(model_folder, trust_remote_code=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tools_saved(tmp_path_factory):
    """A folder that the package's own tools saved."""
    folder = tmp_path_factory.mktemp("tools") / "model"
    processor, model = load_model(device_map=None)
    save_model(model, processor, folder)
    return folder


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """A folder for what one process opens from `saved` and saves, and opens again: `opened` fills it."""
    return tmp_path_factory.mktemp("again")


@pytest.fixture(scope="module")
def downloaded(pushed, tmp_path_factory):
    """A folder with the files that were pushed."""
    hub, _ = pushed
    folder = tmp_path_factory.mktemp("downloaded")
    for name, content in hub.files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def opened(model_folder, saved, again, tools_saved, downloaded, image_path, tmp_path_factory):
    """What one new process finds in the distribution itself, and in copies of it, offline."""
    sources = (model_folder, f"{saved}={again}", again, tools_saved, downloaded)
    found = json.loads(run(OPEN, image_path, *sources, folder=tmp_path_factory.mktemp("opened")))
    assert found[0]["reports"] == {"UHRBatModel": [], "UHRBatForConditionalGeneration": []}
    return dict(zip(("distribution", "saved", "again", "tools", "downloaded"), found, strict=True))


# ---- Saving ---------------------------------------------------------------------------------------------------------


def test_a_saved_folder_holds_the_code_as_it_is_and_all_data(model_folder, saved):
    code = {name: source for name, source in contents(model_folder).items() if name.endswith(".py")}
    found = contents(saved)
    assert found.keys() == DATA_FILES | code.keys()
    assert {name: found[name] for name in code} == code


def test_saving_keeps_names_and_values_of_all_weights(model_folder, saved):
    """Names of the vision tower differ inside releases, but not in files: a copy loads on every release."""
    weights, copies = load_file(model_folder / "model.safetensors"), load_file(saved / "model.safetensors")
    assert weights.keys() == copies.keys()
    for name, weight in weights.items():
        assert weight.dtype == copies[name].dtype and torch.equal(weight, copies[name]), name


def test_saving_keeps_every_setting(model_folder, saved):
    def settings(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        tokenizer = processor.tokenizer
        special = (tokenizer.special_tokens_map, tokenizer.padding_side, tokenizer.model_max_length)
        return [*map(own, (config.to_dict(), processor.to_dict())), special, processor.chat_template]

    def own(values):
        """Without what the library adds about where and when something was loaded."""
        added = ("_name_or_path", "auto_map", "dtype", "transformers_version")
        return {
            name: own(value) if isinstance(value, dict) else value
            for name, value in values.items()
            if name not in added
        }

    assert settings(saved) == settings(model_folder)


@pytest.mark.slow
def test_a_saved_folder_and_a_copy_of_it_open_by_themselves_in_a_new_process(saved, again, opened):
    assert opened["saved"] == opened["again"] == opened["tools"] == opened["distribution"]
    assert contents(again).keys() == contents(saved).keys()


def test_weights_in_several_files_load_without_a_missing_key(model_folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(model_folder, trust_remote_code=True)
    model.save_pretrained(tmp_path, max_shard_size="3MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    copy = load(AutoModelForImageTextToText, tmp_path)
    weights = model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in copy.state_dict().items())


@needs_auto_image_processor
def test_a_saved_folder_gives_the_image_processor_without_trust_too(saved):
    ours = AutoImageProcessor.from_pretrained(saved, trust_remote_code=True)
    clips = AutoImageProcessor.from_pretrained(saved)
    assert type(ours).__name__ == "UHRBatImageProcessor"
    assert type(clips).__name__.startswith("CLIPImageProcessor")
    assert clips.crop_size == ours.crop_size


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoProcessor])
def test_saving_into_the_folder_that_it_came_from_is_refused(model_folder, tmp_path, monkeypatch, auto_class):
    folder = tmp_path / "repository"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("__pycache__"))
    loaded = auto_class.from_pretrained(folder, trust_remote_code=True)
    source = folder / "modeling_uhr_bat.py"
    source.write_text(source.read_text(encoding="utf-8") + "# an edit since\n", encoding="utf-8")
    before = contents(folder)
    monkeypatch.chdir(tmp_path)
    for target in (folder, str(folder), "repository", folder / ".." / "repository"):
        with pytest.raises(ValueError, match="repository"):
            loaded.save_pretrained(target)
    assert contents(folder) == before


# ---- Pushing --------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """As much of the Hub's HTTP API as creating a repository, committing to it and downloading from it ask for.

    Attributes:
        commits: {path: bytes} that each commit added, in order.
        files: {path: bytes} of the repository at its last commit.
        unknown: requests that no route was made for.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.commits, self.files, self.blobs, self.unknown = [], {}, {}, []
        self.exists = False

    @property
    def sha(self):
        return f"{len(self.commits):040x}"


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, content=b"", status=200, **headers):
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, reason):
        self.reply({"error": reason}, 404, X_Error_Code=reason)

    def do_POST(self):
        hub, body, path = self.server, self.body(), self.path.partition("?")[0]
        if path == "/api/repos/create":
            hub.exists = True
            self.reply({"url": f"{hub.address}/{REPO}", "id": REPO, "name": REPO})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif path == f"/api/models/{REPO}/preupload/main":
            modes = {True: "lfs", False: "regular"}
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [
                {"path": name, "uploadMode": modes[name.endswith(".safetensors")], "shouldIgnore": False}
                for name in names
            ]
            self.reply({"files": files})
        elif path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.address}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        elif path == f"/api/models/{REPO}/commit/main":
            added = {}
            for operation in map(json.loads, body.splitlines()):
                value = operation["value"]
                if operation["key"] == "file":
                    added[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    added[value["path"]] = hub.blobs[value["oid"]]
                else:
                    assert operation["key"] == "header", operation
            hub.commits.append(added)
            hub.files.update(added)
            self.reply({"commitUrl": f"{hub.address}/{REPO}/commit/{hub.sha}", "commitOid": hub.sha})
        else:
            hub.unknown.append(f"POST {self.path}")
            self.missing("EntryNotFound")

    def do_PUT(self):
        content = self.body()
        oid = self.path.removeprefix("/lfs/")
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.blobs[oid] = content
        self.reply()

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        if not hub.exists:
            self.missing("RepoNotFound")
        elif path.startswith(f"/{REPO}/resolve/"):
            name = path.removeprefix(f"/{REPO}/resolve/").partition("/")[2]
            if name not in hub.files:
                self.missing("EntryNotFound")
            else:
                etag = '"{}"'.format(hashlib.sha256(hub.files[name]).hexdigest())
                self.reply(hub.files[name], ETag=etag, X_Repo_Commit=hub.sha)
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            folder = path.removeprefix(f"/api/models/{REPO}/tree/").partition("/")[2]
            if folder:
                self.missing("EntryNotFound")
            else:
                files = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in hub.files.items()
                ]
                self.reply(files)
        elif path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            siblings = [{"rfilename": name} for name in hub.files]
            self.reply({"id": REPO, "sha": hub.sha, "siblings": siblings, "private": False, "tags": []})
        else:
            hub.unknown.append(f"{self.command} {self.path}")
            self.missing("EntryNotFound")

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def pushed(model_folder, image_path, tmp_path_factory):
    """The stub of the Hub after one process pushed model and processor to it, and what that process found there then."""
    with running(Hub()) as hub:
        sources = f"{model_folder}=>{REPO}", REPO
        (found,) = json.loads(run(OPEN, image_path, *sources, folder=tmp_path_factory.mktemp("push"), **online(hub)))
        yield hub, found


@contextmanager
def running(hub):
    """The stub on a thread for a `with` block."""
    with hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def online(hub):
    """The environment in which the stub is the Hub. Plain uploads: the stub has no store of chunks."""
    return {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_stub",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@pytest.mark.slow
def test_pushing_commits_what_saving_writes(pushed, saved):
    """Against a stub of the Hub's HTTP API on loopback: the library's own uploader speaks the real protocol to it."""

    def plain(files):
        """Without the library's note of whether it was online when it loaded the tokenizer."""
        settings = json.loads(files["tokenizer_config.json"])
        return {**files, "tokenizer_config.json": {**settings, "local_files_only": None}}

    hub, _ = pushed
    model_commit, processor_commit = hub.commits
    assert {"config.json", "model.safetensors", "modeling_uhr_bat.py"} <= model_commit.keys()
    assert {"processor_config.json", "tokenizer.json", "chat_template.jinja", "processing_uhr_bat.py"} <= (
        processor_commit.keys()
    )
    files = plain(hub.files)
    assert files.pop("README.md").startswith(b"---")
    assert files == plain(contents(saved))
    assert hub.unknown == []


@pytest.mark.slow
def test_a_pushed_repository_opens_from_the_hub_and_from_a_folder(pushed, opened):
    """Against the stub, by the name of the repository; then offline from a folder with the files that were pushed."""
    _, found = pushed
    assert found == opened["downloaded"] == opened["distribution"]


@pytest.mark.slow
def test_a_command_fetches_what_it_needs_and_then_needs_no_network(pushed, image_path, tmp_path):
    """Against the stub: a plan no weights, a question all; then both without it."""
    hub, _ = pushed
    found = json.loads(run(FETCH, REPO, image_path, folder=tmp_path / "hub", **online(hub)))
    assert found == [[0, False], [0, True], [0, True], [0, True]]
    (snapshot,) = (tmp_path / "hub" / "home" / "hub").glob("models--*/snapshots/*")
    assert snapshot.name == hub.sha and not list(snapshot.glob("*.py"))
