"""A cache of the Hub that holds what a test puts into it, as the Hub's own client leaves it there."""

import shutil
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


def put(cache: Path, name: str, folder: Path, revision=REVISION, leave_out=()) -> Path:
    """The snapshot of a repository with the data files of a folder, as links to blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    for place in (snapshot, repository / "blobs", repository / "refs"):
        place.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(revision)
    for pattern in ("*.json", "*.jinja", "*.safetensors"):
        for path in Path(folder).glob(pattern):
            if path.name not in leave_out:
                blob = repository / "blobs" / f"{revision}-{path.name}"
                shutil.copy(path, blob)
                (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot
