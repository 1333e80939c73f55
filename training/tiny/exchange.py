"""Give a trained decoder another vision tower, and rotate its tokens back to those that the decoder was trained on.

    uhr-bat tiny exchange --model runs/tiny --tower runs/vision_longer --output runs/exchanged

A tower that was trained further by itself reads more, but its tokens have moved. The rotation, the factor and the shift
that bring them closest to those of the model's own tower (orthogonal Procrustes problem, Schönemann 1966) go into the
projector's last layer and the scale embedding: a rotation loses nothing that the tower reads, and the decoder has little
to unlearn.
"""

import argparse
from pathlib import Path

import torch

from ...common.commands import tells_errors
from ...common.loading import load_model, save_model
from ...common.outputs import MODEL_FILES, Output, check_outputs
from ...scenes.layout import FINETUNING_SEED
from .encoding import VISION, all_tokens, encode_scenes


@torch.no_grad()
def exchange_tower(model, other, image_processor, seeds) -> float:
    """Give `model` the tower, projector and scale embedding of `other`, turned to the tokens that `model` had.

    Returns the mean cosine between the tokens of `model` before and after, of the scenes of `seeds`.
    """
    before, after = (all_tokens(encode_scenes(each, image_processor, seeds)) for each in (model, other))
    centred_before, centred_after = before - before.mean(0), after - after.mean(0)
    left, _, right = torch.linalg.svd(centred_after.T @ centred_before)
    turn = left @ right * (centred_before.norm() / centred_after.norm())
    shift = before.mean(0) - after.mean(0) @ turn
    for name in VISION:
        getattr(model.model, name).load_state_dict(getattr(other.model, name).state_dict())
    last = model.model.multi_modal_projector.linear_2
    last.weight.copy_(turn.T @ last.weight)
    last.bias.copy_(last.bias @ turn + shift)
    for parameter in model.model.scale_embedding.parameters():
        parameter.copy_(parameter @ turn)
    return torch.cosine_similarity(before, after @ turn + shift).mean().item()


@tells_errors
def main(arguments=None):
    parser = argparse.ArgumentParser(prog="uhr-bat tiny exchange", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder of the decoder")
    parser.add_argument("--tower", type=Path, required=True, metavar="DIR", help="model folder of the tower")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="model folder to write")
    args = parser.parse_args(arguments)
    check_outputs((args.model, args.tower), Output("--output", args.output, names=MODEL_FILES))
    processor, model = load_model(args.model, torch.float32, device_map=None)
    _, other = load_model(args.tower, torch.float32, device_map=None)
    seeds = range(FINETUNING_SEED, FINETUNING_SEED + 20)
    cosine = exchange_tower(model, other, processor.image_processor, seeds)
    print(f"cosine between the tokens before and after: {cosine:.3f}")
    save_model(model, processor, args.output)


if __name__ == "__main__":
    raise SystemExit(main())
