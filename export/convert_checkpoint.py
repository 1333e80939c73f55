"""Trained weights into a complete model folder: code, configuration, tokenizer, processors, card, sharded safetensors.

    uhr-bat export --checkpoint DIR --output DIR [--help: all options]
    uhr-bat export --start DIR --output DIR      a model to train, from one of the LLaVA family (`start_model.py`)
    python -m export.convert_checkpoint ...      the same, in a bare clone

Reads a checkpoint of the released layout (`released_layout.py`) or of this project's own Trainer. Tensors pass through
one by one, so that memory holds one shard of the output and a part of the input. The folder is built beside its place,
read back and compared with the checkpoint, and moved to its place as the last step.
"""

import argparse
import os
import runpy
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a file: run again, as the module of a package that it is
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    runpy.run_module("export.convert_checkpoint", run_name="__main__")
    sys.exit()

import torch
from huggingface_hub import HfApi, snapshot_download, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm
from uhr_bat.common.budgets import budgets as read_budgets
from uhr_bat.common.files import whole_folder, write_json
from uhr_bat.common.loading import is_host, trained_settings
from uhr_bat.common.models import base_of, hub_name
from uhr_bat.common.outputs import Output, check_outputs
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.image_raster_files_uhr_bat import reason

from . import model_folder, released_layout
from .checkpoint_files import Checkpoint, CheckpointError, TensorInfo, read_json
from .merging import MergedModel, check_adapter, merge_host, notes_of
from .model_card import read_provenance, write_model_card
from .model_folder import EMBEDDINGS, HEAD, meta_model
from .start_model import Contents, GrownTables, read_start

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# What weights may be, and integers of the same size, in which numbers that are not finite are comparable too.
BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
# What to do where a start holds parts that the model has not.
START_HINT = (
    "A start is a CLIP or SigLIP tower, a projector of two linear layers and a decoder of Qwen or Llama. "
    "A resampler, Q-Former or other part between them has no place here: start from a model without it, or take tensors "
    "that nothing reads out of the file."
)


@dataclass(frozen=True)
class Entry:
    """What becomes of one tensor of the checkpoint; `name` is None if it is left out."""

    source: str
    info: TensorInfo
    name: str | None
    dtype: torch.dtype | None
    action: str

    @property
    def num_parameters(self) -> int:
        return torch.Size(self.info.shape).numel()


# The checkpoint


def locate(checkpoint: str | Path) -> Path:
    """A folder, or a repository of the Hub, of which only data files are fetched."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    checkpoint = str(checkpoint)
    # Code is none of ours, and subfolders hold other models or the state of an optimiser.
    data = ["*.json", "*.jinja", "merges.txt", "README.md"]
    try:
        folder = Path(snapshot_download(checkpoint, allow_patterns=[*data, "*.safetensors"], ignore_patterns="*/*"))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(checkpoint, allow_patterns=[*data, "*.bin"], ignore_patterns="*/*"))
    except Exception as error:  # the Hub's, the network's, or of a name that is none
        raise CheckpointError(
            f"{checkpoint}: neither a folder nor a repository that could be fetched ({reason(error)})."
        ) from error
    return folder


def read_config(folder: Path, tensors: dict[str, TensorInfo], vision_heads: int | None = None):
    """(configuration, notes, whether it is of the released layout).

    Raises:
        CheckpointError: no configuration of either layout, or one that contradicts itself.
    """
    path = folder / "config.json"
    settings = read_json(path)
    try:
        if released_layout.is_released_config(settings):
            return *released_layout.make_config(settings, tensors, vision_heads), True
        if settings.get("model_type") == UHRBatConfig.model_type:
            if vision_heads is not None:
                raise CheckpointError("--vision-heads is for the released layout: here the configuration states it.")
            return UHRBatConfig.from_dict(settings), [], False
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a field of a wrong type fails wherever it is used first
        raise CheckpointError(f"{path}: {reason(error)}") from error
    raise CheckpointError(
        f"{path}: model type {settings.get('model_type')!r} is neither the released layout (a flat Qwen2 "
        f"configuration) nor this project's own ({UHRBatConfig.model_type!r})."
    )


def make_plan(checkpoint: Checkpoint, config: UHRBatConfig, rename, dtype=None, hint="") -> list[Entry]:
    """One entry per tensor of the checkpoint, in the order of its files.

    Args:
        checkpoint: its tensors.
        config: what they must fit, names and shapes.
        rename: name in the checkpoint -> name in the output, None for what is left out, `KeyError` if it is unknown.
        dtype: torch.dtype of the output; None leaves every tensor as it is.
        hint: what to say where tensors are unknown.

    Raises:
        CheckpointError: all at once, tensors that are unknown, missing or of a wrong shape, and copies that differ.
    """
    weights = meta_model(config).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if config.tie_word_embeddings:
        del expected[HEAD]
    plan, problems, taken, unknown = [], [], {}, ""
    for source, info in checkpoint.tensors.items():
        try:
            name = rename(source)
        except KeyError:
            name = ""
        if name is None:
            plan.append(Entry(source, info, None, None, "drop"))
            continue
        if config.tie_word_embeddings and name == HEAD:
            name = EMBEDDINGS
        if name not in expected:
            problems.append(f"{info.path}: tensor {source!r} is unknown.")
            unknown = hint and f"\n{hint}"
        elif info.shape != expected[name]:
            problems.append(
                f"{info.path}: tensor {source!r} has the shape {list(info.shape)}, the configuration asks for "
                f"{list(expected[name])}."
            )
        elif info.dtype not in BITS:
            problems.append(f"{info.path}: tensor {source!r} is of type {info.dtype}, which weights here cannot be.")
        elif name in taken:
            first = taken[name]
            if not torch.equal(checkpoint.read(first).float(), checkpoint.read(source).float()):
                problems.append(
                    f"{info.path}: tensor {source!r} differs from {first!r} in {checkpoint.tensors[first].path}, but "
                    f"both become {name!r}."
                )
            plan.append(Entry(source, info, None, None, f"same as {first}"))
        else:
            target = dtype or info.dtype
            action = "copy" if target == info.dtype else f"cast to {_word(target)}"
            plan.append(Entry(source, info, name, target, action))
        taken.setdefault(name, source)
    problems += [f"missing: {name!r}" for name in expected if name not in taken]
    if problems:
        raise CheckpointError(
            f"The checkpoint does not fit its configuration, in {len(problems)} points:" + _lines(problems) + unknown
        )
    return plan


def is_untrained(tensors, entry: Entry) -> bool:
    """Whether a tensor is a scale table that is still the noise that it began as."""
    return ".scale_embedding.tables." in entry.name and released_layout.looks_untrained(tensors.read(entry.source))


def nest_tower(name: str) -> str:
    """The name of a tensor of this project's own layout: some checkpoints hold the vision tower one level higher."""
    nested, flat = "model.vision_tower.vision_model.", "model.vision_tower."
    return name.replace(flat, nested, 1) if name.startswith(flat) and not name.startswith(nested) else name


# The output


def read_tensor(source, entry: Entry) -> torch.Tensor:
    """A tensor of the output, in memory of its own."""
    tensor = source.read(entry.source)
    if tensor.dtype == entry.dtype:
        return tensor.clone(memory_format=torch.contiguous_format)
    cast = tensor.to(entry.dtype, memory_format=torch.contiguous_format)
    if not cast.isfinite().all() and tensor.isfinite().all():
        raise CheckpointError(
            f"{entry.info.path}: tensor {entry.source!r} holds numbers beyond {_word(entry.dtype)}. Try bfloat16."
        )
    return cast


def write_weights(output: Path, source, plan: list[Entry], max_shard_size: str):
    """Safetensors of at most `max_shard_size`, with an index where there are several. One is in memory at a time."""
    entries = {entry.name: entry for entry in plan}
    sizes = {name: torch.empty(entry.info.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
    try:
        split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    except ValueError as error:
        raise CheckpointError(f"--max-shard-size {max_shard_size}: {error}") from error
    with _bar(plan, "Writing") as bar:
        for file_name, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = read_tensor(source, entries[name])
                bar.update(shard[name].nbytes)
            save_file(shard, output / file_name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(output / "model.safetensors.index.json", index)


def check_weights(output: Path, source, plan: list[Entry]):
    """Reads every tensor back and compares it, bit by bit, with what the checkpoint holds. Raises `CheckpointError`."""
    written = Checkpoint(output)
    if written.tensors.keys() != {entry.name for entry in plan}:
        raise CheckpointError(f"{output}: the tensors that were written are not those of the plan.")
    with _bar(plan, "Checking") as bar:
        for entry in plan:
            wanted, found = read_tensor(source, entry), written.read(entry.name)
            bits = BITS[entry.dtype]
            if wanted.dtype != found.dtype or not torch.equal(wanted.view(bits), found.view(bits)):
                path = written.tensors[entry.name].path
                raise CheckpointError(f"{path}: tensor {entry.name!r} is not what was to be written.")
            bar.update(found.nbytes)


@dataclass
class Plan:
    """What a checkpoint becomes. All that can be refused was, and nothing of the output is written yet.

    `print(plan)` is the table of its tensors; `plan.write(output)` makes the model folder.

    Attributes:
        source: the checkpoint's tensors, as they are read.
        entries: what becomes of each.
        config: the configuration of the output.
        notes: what to know about it, a line or more each.
        files: tokenizer, processors and chat template of the output.
        card: arguments of `write_model_card`.
        adapters: folders of what is merged into the weights.
    """

    source: Checkpoint
    entries: list[Entry]
    config: UHRBatConfig
    notes: list[str]
    files: tempfile.TemporaryDirectory
    card: dict
    adapters: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, checkpoint, *, merge_adapter=None, vision_heads=None, **output) -> "Plan":
        """Of a checkpoint, folder or repository, from its headers and small files alone. The arguments are those of the
        command line; `output`: those of [`Plan.of_contents`].

        Raises:
            CheckpointError: whatever is wrong with the checkpoint.
        """
        checkpoint, adapters = find_adapters(checkpoint, merge_adapter)
        folder = locate(checkpoint)
        tensors = Checkpoint(folder)
        config, notes, is_released = read_config(folder, tensors.tensors, vision_heads)
        try:
            trained = trained_settings(adapters[-1]) if adapters else {}
            config = UHRBatConfig.from_dict(config.to_dict(), **trained) if trained else config
        except Exception as error:  # a field of a wrong type fails wherever it is used first
            raise CheckpointError(f"{adapters[-1]}: {reason(error.__cause__ or error)}") from error
        notes += notes_of(folder, adapters)
        contents = Contents(config, notes, tensors, released_layout.rename if is_released else nest_tower, is_released)
        budgets = trained.get("budgets")
        return cls.of_contents(checkpoint, folder, contents, adapters=adapters, budgets=budgets, **output)

    @classmethod
    def of_start(cls, start, *, vision_heads=None, vision_tower=None, scales=None, budgets=None, **output) -> "Plan":
        """Of a model of the LLaVA family, which becomes an untrained one of ours; otherwise as `of`."""
        folder = locate(start)
        contents = read_start(folder, Checkpoint(folder), scales, budgets, vision_tower, vision_heads)
        config = contents.config
        rows = model_folder.rows_for_image_token(folder, config) if contents.is_released else 0
        if rows > config.text_config.vocab_size:
            new = f"new, for <image>: embeddings and head have {rows} rows, the last the mean of the others"
            contents.notes.append(new)
            contents, config.text_config.vocab_size = (
                contents._replace(tensors=GrownTables(contents.tensors, rows)),
                rows,
            )
        return cls.of_contents(start, folder, contents, is_start=True, **output)

    @classmethod
    def of_contents(
        cls,
        name,
        folder,
        contents,
        *,
        is_start=False,
        adapters=(),
        budgets=None,
        dtype="auto",
        license=None,
        base_model=None,
    ) -> "Plan":
        """Of what was read of a checkpoint.

        Args:
            name: of the checkpoint, as it was given: a folder, or a repository that lies in `folder`.
            contents: [`Contents`].
            adapters: folders of what is merged into the weights.
            budgets: of the output; those of the checkpoint's processor if None.
            dtype, license, base_model: as on the command line.
        """
        config, notes, tensors, rename, is_released = contents
        entries = make_plan(tensors, config, rename, DTYPES[dtype], START_HINT if is_start else "")
        kept = [entry for entry in entries if entry.name]
        numbers = Counter()
        for entry in kept:
            numbers[entry.dtype] += entry.num_parameters
        config.dtype = _word(numbers.most_common(1)[0][0])
        untrained = [entry.source for entry in kept if is_untrained(tensors, entry)]
        stated_license, base_models = read_provenance(folder, config)
        license = license or stated_license
        if base_model or not Path(name).is_dir():
            base_models = [base_model or str(name)]
        if dropped := [entry.source for entry in entries if entry.action == "drop"]:
            notes.append("dropped, nothing here uses it:" + _lines(dropped))
        if untrained:
            notes.append("never trained, still noise of deviation 1/sqrt(width):" + _lines(untrained))
        notes.append(f"model card: licence {license}, base model {', '.join(base_models) or 'unknown'}")
        plan = cls(tensors, entries, config, notes, tempfile.TemporaryDirectory(), {}, list(adapters))
        notes.append(
            f"weights: {len(kept)} tensors, {numbers.total():,} parameters, {plan.num_bytes:,} bytes, {config.dtype}"
        )
        plan.card = {
            "origin": _origin(folder, is_start, is_released) + " and LoRA" * bool(adapters),
            "num_parameters": numbers.total(),
            "license": license,
            "base_models": base_models,
            "limits": ["The scale tables of this checkpoint are noise: they were never trained."] * bool(untrained)
            + ["**This model is a start: nothing in it was trained to read an image at several scales.**"] * is_start,
            "has_tokenizer": plan.make_files(folder, is_released, budgets),
        }
        return plan

    def make_files(self, folder: Path, is_released: bool, budgets=None) -> bool:
        """Tokenizer, processors and chat template of the output, and its budgets; whether the checkpoint has a tokenizer."""
        # A Trainer that was given the processor saves it beside the adapter.
        beside = [adapter for adapter in self.adapters if (adapter / "tokenizer_config.json").is_file()]
        files = Path(self.files.name)
        source = beside[-1] if beside else folder
        has_tokenizer = model_folder.write_processing(files, source, self.config, is_released, budgets)
        self.config.budgets = read_json(files / "processor_config.json")["default_budgets"]
        return has_tokenizer

    @property
    def num_bytes(self) -> int:
        """Of the weights of the output."""
        return sum(entry.dtype.itemsize * entry.num_parameters for entry in self.entries if entry.name)

    def __str__(self) -> str:
        """The table: what each tensor is, what becomes of it, its name before and after."""
        rows = [("action", "dtype", "shape", "name in the checkpoint", "name here")]
        for entry in self.entries:
            dtype, shape = _word(entry.info.dtype), str(list(entry.info.shape))
            rows.append((entry.action, dtype, shape, entry.source, entry.name or "-"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)

    def write(self, output: Path, max_shard_size: str = "5GB", repository: str | None = None):
        """The model folder, whole or not at all. `repository`: its name on the Hub, for the card.

        Raises:
            CheckpointError: no room, an adapter that cannot be merged, or a tensor that was not written as it is.
        """
        check_room(output, self.num_bytes)
        output.parent.mkdir(parents=True, exist_ok=True)
        # config.json comes last: a folder that a killed run leaves does not load.
        with whole_folder(output) as building:
            weights, kept = self.source, [entry for entry in self.entries if entry.name]
            if self.adapters:
                dtypes = {entry.name: entry.dtype for entry in kept}
                dtypes.setdefault(HEAD, dtypes[EMBEDDINGS])  # of a head that an adapter untied
                weights = MergedModel(
                    {entry.name: read_tensor(weights, entry) for entry in kept}, self.config, self.adapters
                )
                kept = [Entry(name, info, name, dtypes[name], "merge") for name, info in weights.tensors.items()]
            write_weights(building, weights, kept, max_shard_size)
            check_weights(building, weights, kept)
            shutil.copytree(self.files.name, building, dirs_exist_ok=True)
            write_model_card(building / "README.md", self.config, repository=repository, **self.card)
            model_folder.write_code(building)
            model_folder.write_config(building, self.config)


def check_room(output: Path, num_bytes: int):
    """Raises `CheckpointError` if the disk of a folder that is yet to be made has no room for so many bytes."""
    place = next(folder for folder in output.parents if folder.is_dir())
    if (free := shutil.disk_usage(place).free) < num_bytes:
        raise CheckpointError(f"{output.parent}: {free:,} bytes are free, but the weights need {num_bytes:,}.")


def convert(
    checkpoint: str | None = None,
    output: str | Path = "",
    max_shard_size: str = "5GB",
    *,
    start: str | None = None,
    push_to_hub: str | None = None,
    dry_run: bool = False,
    **options,
) -> Path:
    """Builds the model folder `output`: a [`Plan`], and the end of it.

    Args:
        options: of [`Plan.of`], or with `start` of [`Plan.of_start`]. All are those of the command line.

    Raises:
        CheckpointError: whatever is wrong with the checkpoint or the output. Then there is no output.
    """
    output = free_folder(output)
    options = {name: value for name, value in options.items() if value is not None and value is not False}
    if start and "merge_adapter" in options:
        raise CheckpointError("--merge-adapter is for --checkpoint: merge an adapter of a start model into it first.")
    if not start and options.keys() & {"vision_tower", "scales", "budgets"}:
        raise CheckpointError("--vision-tower, --scales and --budgets are for --start: a checkpoint states its own.")
    if not start:
        base, adapters = find_adapters(checkpoint, options.get("merge_adapter"))
        if adapters and is_host(locate(base)):
            if others := sorted(options.keys() - {"merge_adapter", "dtype"}) + ["dry_run"] * dry_run:
                raise CheckpointError(
                    f"{base} is of another family than ours: {', '.join(others)} cannot be given for it."
                )
            print(*notes_of(locate(base), adapters, of_host=True), sep="\n")
            merge_host(base, adapters, output, DTYPES[options.get("dtype", "auto")] or "auto", max_shard_size)
            print(f"{output}: complete, in the layout of its own family.")
            if push_to_hub:
                push(output, push_to_hub)
            return output
    plan = Plan.of_start(start, **options) if start else Plan.of(checkpoint, **options)
    if dry_run:
        print(plan)
    print(*plan.notes, sep="\n")
    if dry_run:
        print("dry run: nothing was written")
        return output
    plan.write(output, max_shard_size, push_to_hub)
    print(f"{output}: complete. Every tensor was read back and is equal.")
    if push_to_hub:
        push(output, push_to_hub)
    return output


def free_folder(output: str | Path) -> Path:
    """The whole path of a folder that is to be made, or is empty. Raises `CheckpointError` where it is neither."""
    output = Path(os.path.abspath(output))
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise CheckpointError(f"{output}: is there and not an empty folder. Nothing is overwritten.")
    try:
        check_outputs((), Output("--output", output, names=()))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    return output


def find_adapters(checkpoint, merge_adapter) -> tuple[str | Path, list[Path]]:
    """The base model and the folders of the adapters to merge into it; `merge_adapter` is as on the command line."""
    if merge_adapter in (None, False):
        return checkpoint, []
    if merge_adapter is True or merge_adapter == []:
        adapter = locate(checkpoint)
        check_adapter(adapter)
        try:
            base = base_of(adapter)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{error} Or give the model as --checkpoint, and the adapter behind --merge-adapter."
            ) from error
        # A repository's weights are fetched by its name.
        return (hub_name(base) or (base,))[0], [adapter]
    adapters = [locate(name) for name in ([merge_adapter] if isinstance(merge_adapter, (str, Path)) else merge_adapter)]
    if len(set(map(check_adapter, adapters))) < len(adapters):
        raise CheckpointError(
            f"--merge-adapter names an adapter twice, whose changes would count twice: {merge_adapter}."
        )
    return checkpoint, adapters


def _origin(folder, is_start, is_released):
    """What the weights were before, in words."""
    if is_start:
        return (
            f"{'the layout of LongVA' if is_released else read_json(folder / 'config.json')['model_type']}, as a start"
        )
    return "the released layout" if is_released else "this project's Trainer"


def push(folder: Path, repository: str):
    """The whole folder to the Hub, in one commit."""
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="UHR-BAT model folder")
    except Exception as error:  # the Hub's, the network's, or of a missing token
        raise CheckpointError(
            f"{folder} is complete, but could not be pushed to {repository} ({reason(error)})."
        ) from error
    print(f"{repository}: pushed")


def _bar(plan, what):
    return tqdm(
        total=sum(entry.dtype.itemsize * entry.num_parameters for entry in plan), desc=what, unit="B", unit_scale=True
    )


def _word(dtype):
    return str(dtype).removeprefix("torch.")


def _lines(items):
    return "".join(f"\n  {item}" for item in items)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="uhr-bat export" if __package__ == "uhr_bat.export" else "python -m export.convert_checkpoint",
        description="Trained weights into a complete, loadable model folder.",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--checkpoint", help="folder or Hub repository: released layout, or of this project's Trainer")
    source("--start", help="folder or Hub repository of a LLaVA model or of LongVA: a model that is yet to be trained")
    add("--output", required=True, help="the model folder to make; must not be there, or be empty")
    add("--max-shard-size", default="5GB", help="of a safetensors file (default: 5GB)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, every tensor as it is)")
    add("--push-to-hub", metavar="REPO", help="upload the folder when it is complete")
    add(
        "--merge-adapter",
        metavar="DIR",
        nargs="*",
        help="LoRA adapters to merge into the checkpoint, which is in memory as a whole then; without DIR, --checkpoint "
        "is the adapter and names its base model",
    )
    add("--vision-heads", type=int, help="attention heads of the vision tower, which the released layout lacks")
    add("--vision-tower", metavar="DIR", help="CLIP's folder, where a start of LongVA's layout holds no tower")
    add("--scales", type=lambda text: [*map(int, text.split(","))], help="of a start in px (default: 2,4,8,12 tiles)")
    add("--budgets", type=read_budgets, help="of a start: one per scale, or one for all (default: the paper's)")
    add("--license", help="of the weights, for the model card (default: what the checkpoint's card says)")
    add("--base-model", metavar="REPO", help="for the model card (default: what the checkpoint says)")
    add("--dry-run", action="store_true", help="print what would become of every tensor, write nothing")
    torch.set_num_threads(1)  # copies wait for the disk, and on a busy machine threads wait for each other
    try:
        convert(**vars(parser.parse_args(arguments)))
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
