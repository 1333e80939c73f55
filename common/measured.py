"""Settings of models of other families that were measured on this machine (`uhr-bat calibrate`), kept for their user in one
file: `hosts.json` of `user_folder`. They are found again by the repository and revision, or by the folder, of the model, as
long as that holds the model that was measured; and by the weights, wherever these were copied to."""

import json
import warnings
from dataclasses import fields
from pathlib import Path

from ..image_raster_files_uhr_bat import reason
from .digests import folder_digest, weights_digest
from .files import edited_alone, user_folder, whole_files, write_json
from .models import base_of, hub_name, is_tiny, told

FORM = "measured_on"  # what else an entry of the file has
WEIGHTS = "weights"  # what else the file has: {folder: `weights_digest` of the model that was measured}; a revision is always the same


def measured_file() -> Path:
    """Where it lies: a link to it, as programs that carry one's settings along make, stays one."""
    return (user_folder() / "hosts.json").resolve()


def names_of(folder) -> list[str]:
    """What a model may be called in the file, the name that it is written under last: a repository's revisions may be measured
    apart, a folder is the same from wherever it is named."""
    name, revision = hub_name(folder) or (str(Path(folder).resolve()), None)
    return [name, *([f"{name}@{revision}"] if revision else [])]


def form_of(folder) -> str:
    """ "qwen3_vl, 28 layers of 2048": type, layers and width of a model, or of an adapter's."""
    from transformers import PreTrainedConfig

    stated = PreTrainedConfig.get_config_dict(str(base_of(folder) or folder))[0]
    text = stated.get("text_config") or stated
    return f"{stated.get('model_type')}, {text.get('num_hidden_layers')} layers of {text.get('hidden_size')}"


def read_measured(needed: bool = False) -> dict[str, dict]:
    """All of the file, {} where there is none, or none that can be opened.

    Args:
        needed: whether one that is there but cannot be opened is an `OSError`, as where it is to be written again.

    Raises:
        ValueError: a file that holds something else.
    """
    from ..hosts.settings import HostSettings

    path, known = measured_file(), {one.name for one in fields(HostSettings)} | {FORM}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(one, str) for one in found.get(WEIGHTS, {}).values()):
            raise ValueError(f"{WEIGHTS} are digests by name")
        for name, settings in found.items():
            if name == WEIGHTS:
                continue
            if unknown := sorted(set(settings) - known):
                raise ValueError(f"{name} has no setting {', '.join(unknown)}")
            HostSettings().changed({field: value for field, value in settings.items() if field != FORM})
    except OSError:
        if needed and path.exists():
            raise
        return {}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        mend = "Mend the file, or delete it and measure anew: uhr-bat calibrate"
        raise ValueError(f"{path}: these are no measured settings ({reason(error)}). {mend}.") from error
    return found


def measured_settings(folder) -> dict:
    """Of the model of a folder; {} where it was not measured, or another model was there then, which is a warning. Raises
    `ValueError` as `read_measured`."""
    known, found = read_measured(), {}
    digests = known.pop(WEIGHTS, {})
    for name in names_of(folder):
        entry = dict(known.get(name, {}))
        before = entry.pop(FORM, None)
        if not entry:
            continue
        now = form_of(folder)
        if before == now and name in digests and (weights := weights_digest(folder)) not in (None, digests[name]):
            before, now = f"{before}, weights {digests[name]}", f"weights {weights}"
        elif before in (None, now):
            found |= entry
            continue
        says = f"{measured_file()}: what is kept for {name} was measured on another model ({before}, now {now})"
        warnings.warn(f"{says} and is not taken. Measure anew: uhr-bat calibrate.", stacklevel=2)
    if found or not digests:
        return found
    for name, entry in known.items():  # what it was measured on may have been copied or moved
        if name in digests and entry.get(FORM) == form_of(folder) and digests[name] == weights_digest(folder):
            found |= {field: value for field, value in entry.items() if field != FORM}
    return found


def told_as_measured(folder, changes: dict | None = None) -> dict:
    """What `told` tells, with what was measured among the settings, and `weights`, a digest of what lies in the folder now: a run by
    another calibration, or of other weights in the same folder, is another run."""
    about = told(folder, ({} if is_tiny(folder) else measured_settings(folder)) | (changes or {}))
    return about | {"weights": folder_digest(folder)}


def keep_measured(folder, settings: dict, form: str | None = None) -> Path:
    """Adds to what is known of the model of a folder; the file. What another process keeps meanwhile stays. `form`: that of
    `form_of`, of the model that was measured; settings of another form or of other weights go."""
    path, name = measured_file(), names_of(folder)[-1]
    weights = weights_digest(folder) if form and not hub_name(folder) else None
    with edited_alone(path) as check, whole_files(path.parent) as built:
        known = read_measured(needed=True)
        digests = known.pop(WEIGHTS, {})
        before = known.get(name, {})
        before = before if before.get(FORM) == form and digests.get(name, weights) == weights else {}
        known |= {name: before | settings | ({FORM: form} if form else {})}
        digests |= {name: weights} if weights else {}
        write_json(built / path.name, known | ({WEIGHTS: digests} if digests else {}))
        check()
    return path
