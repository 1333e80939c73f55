"""What the tests of the export share."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import write_released
from huggingface_hub import HfApi
from uhr_bat.export.convert_checkpoint import convert


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """All here is small or waits for the disk, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def released(tmp_path):
    return write_released(tmp_path / "released")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The checkpoint of `write_released`, converted. Tests only read it."""
    folder = tmp_path_factory.mktemp("export")
    return convert(write_released(folder / "released"), folder / "model")


@pytest.fixture
def hub(monkeypatch):
    """Uploads instead of a network: a list of (repository, {path in the repository: bytes})."""
    uploads = []

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        uploads.append((repo_id, files))

    def create_commit(self, repo_id, operations, **kwargs):
        files = {}
        for operation in operations:
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        uploads.append((repo_id, files))
        return SimpleNamespace(repo_url=SimpleNamespace(repo_id=repo_id))

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        module = importlib.import_module(module)
        for name, stand_in in (("create_repo", lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id)),
                               ("create_commit", lambda **kwargs: create_commit(None, **kwargs))):  # fmt: skip
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    return uploads
