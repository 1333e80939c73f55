"""A model, images and prompts small enough to check by hand: tiles of 8 px with 2 x 2 patches, three scales."""

import torch
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration


IMAGE = 3  # the image token
PAD = 0
TILES = (1, 4, 9)
GRIDS = ((2, 2), (4, 4), (6, 6))
SIZES = (4, 16, 36)
BUDGETS = (2, 5, 7)


def small_config(**changes) -> UHRBatConfig:
    settings = {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "projection_dim": 16,
        },
        "text_config": {
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 50,
            "max_position_embeddings": 256,
            # Wide enough that images and questions change the answer of a random model.
            "initializer_range": 0.3,
        },
        "scales": [8, 16, 24],
        "budgets": list(BUDGETS),
        "image_token_index": IMAGE,
        "importance_layer": 1,
        "num_regions": 6,
        "scale_embedding_grid": 2,
        "initializer_range": 0.3,
    }
    return UHRBatConfig(**{**settings, **changes})


def small_model(seed=0, vision_chunk_size=4, **changes) -> UHRBatForConditionalGeneration:
    torch.manual_seed(seed)
    model = UHRBatForConditionalGeneration(small_config(**changes)).eval()
    model.vision_chunk_size = vision_chunk_size
    model.generation_config.pad_token_id = PAD
    return model


def random_pixels(num_images=1, seed=0) -> torch.Tensor:
    """float[I, T, 3, 8, 8]"""
    return torch.randn(num_images, sum(TILES), 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def prompt(*parts, num_tokens=sum(BUDGETS)) -> torch.Tensor:
    """long[1, M]: ints are text, "image" is an image of `num_tokens` placeholders."""
    ids = [token for part in parts for token in ([IMAGE] * num_tokens if part == "image" else [part])]
    return torch.tensor([ids])


def pad_left(*prompts) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of a batch of prompts long[1, M]."""
    length = max(ids.shape[1] for ids in prompts)
    input_ids = torch.full((len(prompts), length), PAD)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, length - ids.shape[1] :] = ids
        attention_mask[row, length - ids.shape[1] :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def count_tiles(model):
    """A list that grows by the number of tiles that enter the vision tower, chunk by chunk."""
    calls = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls
