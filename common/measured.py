"""Settings of models of other families that were measured on this machine (`uhr-bat calibrate`), kept for their user in one
file: `hosts.json` of `user_folder`. They are found again by the repository and revision, or by the folder, of the model."""

import json
from dataclasses import fields
from pathlib import Path

from ..image_raster_files_uhr_bat import reason
from .files import edited_alone, user_folder, whole_files, write_json
from .models import hub_name, told, with_revision


def measured_file() -> Path:
    return user_folder() / "hosts.json"


def names_of(folder) -> list[str]:
    """What a model may be called in the file, the name that it is written under last: a repository's revisions may be measured
    apart, a folder is the same from wherever it is named."""
    about = told(folder)
    return [about["model"], with_revision(about) if hub_name(folder) else str(Path(folder).resolve())]


def read_measured() -> dict[str, dict]:
    """All of the file, {} where there is none that can be opened. Raises `ValueError` for one that holds something else."""
    from ..hosts.settings import HostSettings

    path, known = measured_file(), {one.name for one in fields(HostSettings)}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, settings in found.items():
            if unknown := sorted(set(settings) - known):
                raise ValueError(f"{name} has no setting {', '.join(unknown)}")
            HostSettings().changed(settings)
    except OSError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        mend = "Mend the file, or delete it and measure anew: uhr-bat calibrate"
        raise ValueError(f"{path}: these are no measured settings ({reason(error)}). {mend}.") from error
    return found


def measured_settings(folder) -> dict:
    """Of the model of a folder; {} where it was not measured. Raises `ValueError` as `read_measured`."""
    found = read_measured()
    return {field: value for name in names_of(folder) for field, value in found.get(name, {}).items()}


def keep_measured(folder, settings: dict) -> Path:
    """Adds to what is known of the model of a folder; the file. What another process keeps meanwhile stays."""
    path, name = measured_file(), names_of(folder)[-1]
    with edited_alone(path) as check, whole_files(path.parent) as built:
        known = read_measured()
        write_json(built / path.name, known | {name: known.get(name, {}) | settings})
        check()
    return path
