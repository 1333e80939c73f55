"""Which model is meant: a folder, or a repository of the Hub, of a model or of an adapter.

`find_model` makes a folder of either: a repository's is its snapshot in the Hub's cache, whose path names the repository
and the revision. What stands behind it reads folders alone. Weights are fetched last (`with_weights`).
"""

import json
import os
import re
from argparse import Action, ArgumentError, ArgumentParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the package, which is UHR-BAT-Tiny's model folder too
NONE_IS_A_NAME = ("region_method",)
ADAPTERS = ROOT / "adapters"  # of UHR-BAT-Tiny, that lie in the package; each is called by its name alone
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
SMALL, WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt"), ("model*.safetensors", "adapter_model.safetensors")


def setting(text: str) -> tuple:
    """("look", 0.5) from "look=0.5", ("max_tiles", None) from "max_tiles=none"; what is no JSON is text, and so is "none"
    for a setting that has a value of this name."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(text)
    try:
        return name, json.loads(value.lower() if value.lower() in ("true", "false") else value)
    except json.JSONDecodeError:
        return name, None if value.lower() == "none" and name not in NONE_IS_A_NAME else value


# What the calls that load a model take beside its settings.
NO_SETTINGS = (
    "folder", "dtype", "device", "device_map", "quantization_config", "check", "make", "calibrated",
)  # fmt: skip


def check_names(settings):
    """Raises `ValueError` for a name that is no setting of any model, but something else of the calls that load one."""
    for name in NO_SETTINGS:
        if name in settings:
            raise ValueError(f"{name!r} is no setting of a model.")


class Each(Action):
    """Collects `setting` after `setting` in a list."""

    def __call__(self, parser, namespace, value, option_string=None):
        try:
            check_names(value[:1])
        except ValueError as error:
            raise ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, self.with_one(getattr(namespace, self.dest), value))

    @staticmethod
    def with_one(found, value):
        return [*found, value]


class Settings(Each):
    """Collects them in a dictionary; the last one of a name holds."""

    @staticmethod
    def with_one(found, value):
        return found | dict([value])


def add_model_argument(parser: ArgumentParser, name: str = "--model"):
    """The option that names a model, or the argument where `name` is none of an option; and `--set` for its settings."""
    optional = {} if name.startswith("-") else {"nargs": "?"}
    parser.add_argument(
        name, default=str(ROOT), metavar="MODEL", **optional,
        help="folder, or name on the Hub, as org/name or org/name@revision, of a model or an adapter, or two_dates (default: "
        "UHR-BAT-Tiny)",
    )  # fmt: skip
    parser.add_argument(
        "--set", type=setting, action=Settings, default={}, metavar="NAME=VALUE",
        help="another value for a setting of the model, as selector=top_k, or of another family's look=0.5; may be repeated",
    )  # fmt: skip


def stay_offline(*places):
    """Nothing is looked for on the Hub where all that a command reads is on this machine; None says nothing."""
    places = [ADAPTERS / place if _is_own(place) else place for place in places if place is not None]
    if all(os.path.exists(place) and not _names_repository(place) for place in places):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _is_own(place) -> bool:
    """Whether it is the name of an adapter of the package, and of nothing that is here."""
    return re.fullmatch(r"\w+", str(place)) is not None and (ADAPTERS / place).is_dir() and not os.path.exists(place)


def _names_repository(folder) -> bool:
    """Whether it is the folder of an adapter whose model is none of this machine's."""
    path = Path(folder) / "adapter_config.json"
    return path.is_file() and not _near(_base_name(path), folder)


# ---- Folders ---------------------------------------------------------------------------------------------------------


def find_model(place=ROOT, weights: bool = True) -> Path:
    """The folder of a model or of an adapter; of a repository, with all that is no weights.

    Args:
        place: a folder, or a repository as `org/name` or `org/name@revision`, or an adapter of the package by its name, as
            `two_dates`. A folder that is there is taken first.
        weights: whether they are needed. Those of a repository may still have to be fetched.

    Raises:
        FileNotFoundError: it is neither; a part of it is missing, and cannot be fetched; an adapter whose model is nowhere.
        ValueError: several adapters, an adapter of an adapter.
    """
    folder = _folder(place)
    base = base_of(folder)
    if base is None and not (folder / "config.json").is_file():
        if hub_name(folder):
            raise _lacking(folder, "config.json")
        hidden = HUB_NAME.fullmatch(str(place)) is not None
        raise FileNotFoundError(
            f"{place}: this is no model folder, there is no config.json in it."
            + " It hides the repository of this name: ask from another folder, or rename it." * hidden
        )
    if weights:
        find_model(base) if base is not None else None
        # An adapter's own are looked for when it is put onto its model.
        missing = _missing_weights(folder)
        if missing and hub_name(folder) is None and base is None:
            pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
            why = "".join(f" Pickles as {name} may run code and are not opened." for name in pickles[:1])
            raise FileNotFoundError(f"{folder}: there are no weights in it, {missing} is missing.{why}")
        if missing and hub_name(folder) and _unreachable(folder) is not None:
            raise _lacking(folder, missing)
    if base is None:
        _check_type(folder / "config.json")
    return folder


def with_weights(folder: Path) -> Path:
    """The same folder, after the weights of a snapshot were fetched. Raises `FileNotFoundError` where they cannot be."""
    if hub_name(folder) and _missing_weights(folder):
        _fetch(*hub_name(folder), WEIGHTS, folder.parents[2])
        if missing := _missing_weights(folder):
            raise _lacking(folder, missing)
    return folder


def base_of(place) -> Path | None:
    """The folder of the model that an adapter of peft was trained on; None for a model.

    The adapter names it as a path, from here or from its own folder, or as a repository, in the Hub's cache or not.

    Raises:
        FileNotFoundError: it is nowhere.
        ValueError: the adapter names none, or one that is an adapter itself.
    """
    folder = _folder(place)
    path = folder / "adapter_config.json"
    if not path.is_file() or any(folder.glob("model*.safetensors")):
        several = sorted(str(file.parent) for file in folder.glob("*/adapter_config.json"))
        if several and not (folder / "config.json").exists():
            raise ValueError(f"{folder}: holds several adapters. Name one: {', '.join(several)}.")
        return None
    name = _base_name(path)
    if name is None:
        raise ValueError(
            f"{path}: names no base model. Write its folder or repository there, as `base_model_name_or_path`."
        )
    near = _near(name, folder)
    if near is None:
        try:
            near = _folder(name)
            found = (near / "config.json").is_file() or (near / "adapter_config.json").is_file()
        except OSError as error:
            found, reason = False, f" ({error})"
        else:
            reason = ""
        if not found:
            raise FileNotFoundError(
                f"{folder}: an adapter of {name!r}, which is no model folder (from here or from the adapter) and no repository "
                f"that could be fetched{reason}. Write where the model is into {path}, as `base_model_name_or_path`."
            )
    if (near / "adapter_config.json").is_file() and not (near / "config.json").is_file():
        raise ValueError(f"{folder}: is an adapter of the adapter {near}. Merge that into its model first.")
    return near


def _base_name(path: Path) -> str | None:
    """What an adapter_config.json says that its model is, with a revision where it has one."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON object ({error}).") from None
    if not name or not isinstance(name, str):
        return None
    return f"{name}@{revision}" if revision and HUB_NAME.fullmatch(name) and not _near(name, path.parent) else name


def _check_type(path: Path):
    """Raises `ValueError` for a config.json that does not say which type its model is of."""
    try:
        model_type = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: names no type of model ({type(error).__name__}: {error}).") from None
    if not isinstance(model_type, str):
        raise ValueError(f"{path}: `model_type` is a text. Got {model_type!r}.")


def _near(name: str | None, folder) -> Path | None:
    """The folder that an adapter calls so, from here or from its own folder; from that first where the name says so: `../model`."""
    places = [Path(name), Path(folder) / name] if name else []
    for place in places[::-1] if name and name.startswith(".") else places:
        if any((place / name_of_file).is_file() for name_of_file in ("config.json", "adapter_config.json")):
            return place
    return None


def _missing_weights(folder: Path) -> str | None:
    """The first file of weights that a folder lacks; None where all are there."""
    if (folder / "adapter_model.safetensors").is_file() or (folder / "model.safetensors").is_file():
        return None
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return "adapter_model.safetensors"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index}: this is no index of weights ({type(error).__name__}: {error}).") from None
        if outside := [name for name in shards if Path(name).name != name]:
            raise ValueError(f"{index}: names weights outside its folder, as {outside[0]}.")
        missing = [name for name in shards if not (folder / name).is_file()]
        return f"{missing[0]} ({len(missing)} of {len(shards)} files)" if missing else None
    # Whoever loads other files of a folder says what is wrong with them. Pickles are never opened.
    return None if any(folder.glob("*.safetensors")) else "model.safetensors"


# ---- Names -----------------------------------------------------------------------------------------------------------


def hub_name(folder) -> tuple[str, str] | None:
    """(repository, revision) of a snapshot in the Hub's cache; None for another folder."""
    repository, snapshots, revision = ("", "", "", *Path(folder).parts)[-3:]
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/", 1), revision


def model_name(folder) -> str:
    """What a model is called in reports: a clone or an installed package may lie anywhere."""
    if hub := hub_name(folder):
        return hub[0]
    return "UHR-BAT-Tiny" if is_tiny(folder) else Path(folder).resolve().name


def is_tiny(folder) -> bool:
    return Path(folder).resolve() == ROOT


def told(folder, changes: dict | None = None) -> dict:
    """How the settings of a run name their model: `model`, the repository or the folder, `revision`, None for a folder, and
    `model_settings`, those that were changed, or None."""
    name, revision = hub_name(folder) or (str(folder), None)
    return {"model": name, "revision": revision, "model_settings": changes or None}


def with_revision(about: dict) -> str:
    """What `told` told, as one name that `find_model` takes."""
    return f"{about['model']}@{about['revision']}" if about.get("revision") else str(about["model"])


def model_in_words(about: dict) -> str:
    """What `told` told, for a report."""
    changes = ", ".join(map(as_given, (about.get("model_settings") or {}).items()))
    return with_revision(about) + f" ({changes})" * bool(changes)


def model_option(folder, changes: dict) -> str:
    """ " --model NAME --set NAME=VALUE", as a command that a report repeats has it; nothing for UHR-BAT-Tiny as it is."""
    named = "" if is_tiny(folder) else f" --model {with_revision(told(folder))}"
    return named + "".join(f" --set {as_given(change)}" for change in changes.items())


def as_given(change: tuple) -> str:
    """What `setting` reads as this."""
    name, value = change
    return f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"


# ---- The Hub ---------------------------------------------------------------------------------------------------------


def _folder(place) -> Path:
    """Of a place that is there, or of a repository: its snapshot, with all that is no weights."""
    if _is_own(place):
        return ADAPTERS / place
    if os.path.isdir(place):
        return Path(place)
    named = HUB_NAME.fullmatch(str(place))
    if named is None or os.path.exists(place):
        raise FileNotFoundError(
            f"{place}: this is no model folder, and no name of a model on the Hub, as Qwen/Qwen3-VL-8B-Instruct is one."
        )
    return _fetch(*named.groups(), SMALL)


def _fetch(name: str, revision: str | None, patterns, cache=None) -> Path:
    """The snapshot of a repository with the files of some patterns, as far as they can be had: without a network, those of
    the cache. Raises `FileNotFoundError` or `ValueError`, a line each, where there is none."""
    from huggingface_hub import constants, errors, snapshot_download

    options = {"revision": revision, "allow_patterns": list(patterns), "ignore_patterns": "*/*", "cache_dir": cache}
    neither = f"{name}: there is no such folder here, and no repository of this name"
    try:
        return Path(snapshot_download(name, **options))
    except errors.HFValidationError as error:
        raise ValueError(f"{name}: is neither a folder nor a name of the Hub ({_line(error)}).") from None
    except errors.GatedRepoError:
        raise FileNotFoundError(
            f"{name}: its repository is behind a gate. Accept its terms at {constants.ENDPOINT}/{name}, and say who you are: "
            "hf auth login."
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{neither} on the Hub, or a private one: then say who you are, hf auth login."
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{name}: its repository has no revision {revision!r}.") from None
    except Exception as error:  # of a network that fails in any way; what is in the cache is enough
        if found := getattr(error, "snapshot_path", None):
            return Path(found)
        try:
            return Path(snapshot_download(name, **options, local_files_only=True))
        except Exception as missing:
            if found := getattr(missing, "snapshot_path", None):
                return Path(found)
        wanted = "" if revision is None else f", revision {revision}"
        raise FileNotFoundError(
            f"{neither}{wanted} in the Hub's cache ({cache or constants.HF_HUB_CACHE}); {_why_not(error)}. Where there is a "
            f"network, fetch it: hf download {name}."
        ) from error


def _unreachable(folder: Path) -> str | None:
    """Why nothing can be fetched for a snapshot; None where it can be."""
    from huggingface_hub import model_info

    try:
        model_info(hub_name(folder)[0])
    except Exception as error:  # of a network that fails in any way
        return _why_not(error)
    return None


def _lacking(folder: Path, file: str) -> FileNotFoundError:
    """The error of a snapshot without a file."""
    name, revision = hub_name(folder)
    why = _unreachable(folder)
    if why is None:
        return FileNotFoundError(f"{name}: there is no {file} in its repository, revision {revision}.")
    return FileNotFoundError(
        f"{name}: {file} is not in the Hub's cache ({folder}); {why}. Where there is a network, fetch it: hf download {name}."
    )


def _why_not(error) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1 says that nothing is fetched"
    return f"the Hub cannot be reached ({_line(error.__cause__ or error)})"


def _line(error) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")
