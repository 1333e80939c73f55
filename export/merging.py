"""A LoRA adapter and the model that it was trained on become one model, with the answers of both."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from uhr_bat.common.digests import file_digest, weights_digest
from uhr_bat.common.extras import require
from uhr_bat.common.files import whole_folder
from uhr_bat.common.loading import attach_adapter, host_settings, load_model, trained_settings
from uhr_bat.common.models import find_model, hub_name
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.image_raster_files_uhr_bat import reason
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration

from .checkpoint_files import CheckpointError, TensorInfo, read_json
from .model_folder import EMBEDDINGS, HEAD, meta_model

# Differences of the outputs, relative to the largest, that rounding the merged weights makes, by their type.
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


class MergedModel:
    """The checkpoint with adapters of peft merged into it: read like a [`Checkpoint`], but all in memory.

    Args:
        weights: of the base model.
        config: its configuration. If an adapter trained the head and the embeddings apart, they are no longer tied.
        adapters: folders. Several are merged as they answer when all are active: their changes add up.

    Raises:
        CheckpointError: what is merged does not answer as the live adapters do, or they do not fit the model.
    """

    def __init__(self, weights: dict[str, torch.Tensor], config: UHRBatConfig, adapters: list[Path]):
        try:
            require("train", "peft", "accelerate")
        except ImportError as error:
            raise CheckpointError(f"--merge-adapter: {error}") from error
        from accelerate import init_empty_weights

        expected = {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
        with init_empty_weights(include_buffers=False):
            model = UHRBatForConditionalGeneration(config)
        model.load_state_dict(weights, strict=False, assign=True)
        dtypes = {tensor.dtype for tensor in weights.values()}
        has_head = HEAD in weights
        del weights  # what is merged takes their place in memory
        model.tie_weights()
        model = merge(model, adapters, probe, dtypes)
        self.weights = model.state_dict()
        if {name: tensor.shape for name, tensor in self.weights.items()} != expected:
            named = ", ".join(map(str, adapters))
            raise CheckpointError(f"{named}: after merging, names or shapes are no longer those of the model.")
        is_tied = not has_head and torch.equal(self.weights[HEAD], self.weights[EMBEDDINGS])
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = is_tied
        if is_tied:
            del self.weights[HEAD]
        self.tensors = {
            name: TensorInfo(adapters[0], tuple(tensor.shape), tensor.dtype) for name, tensor in self.weights.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self.weights[name]


def check_adapter(folder: Path) -> str:
    """A digest of an adapter's weights. Raises `CheckpointError` for a folder that is none, or whose weights are not whole."""
    read_json(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, "pt"):
            return file_digest(path)
    except FileNotFoundError:
        why = "an adapter without weights, there is no adapter_model.safetensors in it. Pickles are not opened"
        raise CheckpointError(f"{folder}: {why}.") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: these are no whole weights ({reason(error)}).") from error


def notes_of(base: Path, adapters: list[Path], of_host: bool = False) -> list[str]:
    """What to know before adapters are merged into `base`: those that name another model, and whose settings are kept where they
    were trained with different ones."""
    notes = []
    for adapter in adapters:
        named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        # Nothing is fetched to know it.
        here = [place for place in (Path(str(named)), adapter / str(named)) if (place / "config.json").is_file()]
        same = any(one.samefile(base) or weights_digest(one) == weights_digest(base) for one in here[:1])
        if not same and named != (hub_name(base) or ("",))[0]:
            notes.append(f"{adapter}: names {named!r} as its model, and is merged into {base}")
    settings = [trained_settings(adapter, of_host) for adapter in adapters]
    if any(one != settings[-1] for one in settings):
        notes.append(f"settings of the adapters differ: those of the last, {adapters[-1]}, are kept")
    return notes


def merge(model, adapters: list[Path], outputs, dtypes):
    """The model with adapters merged into it.

    Args:
        outputs: function of the model, which returns tensors that show what an adapter does.
        dtypes: of its weights.

    Raises:
        CheckpointError: see [`MergedModel`].
    """
    named, names = ", ".join(map(str, adapters)), [f"adapter_{idx}" for idx in range(len(adapters))]
    allowed = max(map(TOLERANCES.get, dtypes))
    try:
        for name, folder in zip(names, adapters):
            model = attach_adapter(model, folder, name, torch_device="cpu")
        model.base_model.set_adapter(names, inference_mode=True)
        live = outputs(model.eval().get_base_model())
        untie(model.get_base_model())
        model = model.merge_and_unload(safe_merge=True, adapter_names=names)
        merged = outputs(model)
    except Exception as error:  # of a wrong adapter peft raises whatever it likes
        raise CheckpointError(f"{named}: cannot be merged ({reason(error)}).") from error
    for wanted, found in zip(live, merged):
        off, size = (wanted - found).abs().max().item(), wanted.abs().max().item()
        if not off <= allowed * size:
            raise CheckpointError(
                f"{named}: cannot be merged: merged, the model's outputs are off by {off:.3g}, "
                f"up to {size:.3g} large, where rounding allows {allowed:g} of that. Use the adapter without a merge."
            )
    return model


def merge_host(base, adapters: list[Path], output: Path, dtype="auto", max_shard_size="5GB"):
    """The folder of a model of another family with adapters of it merged into it, whole or not at all; with the settings that
    the last one was trained with.

    Raises:
        CheckpointError: see [`MergedModel`].
    """
    try:
        folder = find_model(base)
        processor, model = load_model(folder, dtype, None, **host_settings(adapters[-1], folder))
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{base}: {reason(error)}") from error
    kinds = {one.dtype for one in model.parameters()}
    if not kinds <= TOLERANCES.keys():
        raise CheckpointError(f"{base}: its weights are of fewer bits, into which nothing is merged without a loss.")
    merged = merge(model.host, adapters, lambda host: probe_host(model), kinds)
    if (head := merged.get_output_embeddings()) is not None and head.weight is not merged.get_input_embeddings().weight:
        merged.config.tie_word_embeddings = merged.config.get_text_config().tie_word_embeddings = False
    with whole_folder(output) as building:
        merged.save_pretrained(building, max_shard_size=max_shard_size)
        processor.save_pretrained(building)


@torch.no_grad()
def probe_host(model) -> list[torch.Tensor]:
    """As `probe`, of a host."""
    ids = torch.linspace(0, model.config.text_config.vocab_size - 1, 32).long()
    ids = ids[ids != model.image_token_id][None]
    tile = torch.linspace(0, 255, 3 * model.tile_size**2).view(1, 3, model.tile_size, model.tile_size)
    return [model(input_ids=ids).logits.float(), model.project_tiles(tile).float()]


def untie(model):
    """If an adapter changes the head or the embeddings, each gets weights of its own: merging must not reach the other."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [model.get_output_embeddings(), model.get_input_embeddings()]
    if not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return
    head, embeddings = (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers)
    if head.weight is embeddings.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


@torch.no_grad()
def probe(model) -> list[torch.Tensor]:
    """Outputs that show what an adapter does: logits of ids from all over the vocabulary, and tokens of a tile."""
    config = model.config
    ids = torch.linspace(0, config.text_config.vocab_size - 1, 32).long()
    ids = ids[ids != config.image_token_index][None]
    tile = torch.linspace(-1, 1, 3 * config.tile_size**2).sin().view(1, 3, config.tile_size, config.tile_size)
    tokens = model.model.multi_modal_projector(model.model.vision_tower(tile))
    return [model(input_ids=ids).logits.float(), tokens.float()]
