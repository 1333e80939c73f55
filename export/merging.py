"""A LoRA adapter and the model that it was trained on become one model, with the answers of both."""

from pathlib import Path

import torch
from uhr_bat.common.extras import require
from uhr_bat.common.loading import attach_adapter
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.image_raster_files_uhr_bat import reason
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration

from .checkpoint_files import CheckpointError, TensorInfo
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
        allowed = max(TOLERANCES[tensor.dtype] for tensor in weights.values())
        has_head = HEAD in weights
        del weights  # what is merged takes their place in memory
        model.tie_weights()
        named = ", ".join(map(str, adapters))
        try:
            names = [f"adapter_{idx}" for idx in range(len(adapters))]
            for name, folder in zip(names, adapters):
                model = attach_adapter(model, folder, name, torch_device="cpu")
            model.base_model.set_adapter(names, inference_mode=True)
            live = probe(model.eval().get_base_model())
            untie(model.get_base_model())
            model = model.merge_and_unload(safe_merge=True, adapter_names=names)
            merged = probe(model)
        except Exception as error:  # of a wrong adapter peft raises whatever it likes
            raise CheckpointError(f"{named}: cannot be merged ({reason(error)}).") from error
        for wanted, found in zip(live, merged):
            off, size = (wanted - found).abs().max().item(), wanted.abs().max().item()
            if not off <= allowed * size:
                raise CheckpointError(
                    f"{named}: cannot be merged: merged, the model's outputs are off by {off:.3g}, "
                    f"up to {size:.3g} large, where rounding allows {allowed:g} of that. Use the adapter without a merge."
                )
        self.weights = model.state_dict()
        if {name: tensor.shape for name, tensor in self.weights.items()} != expected:
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
