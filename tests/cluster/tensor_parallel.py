"""One of the processes that share a model's heads: asks the model of a folder, and saves what it answers."""

import sys
from pathlib import Path

import torch
from uhr_bat.image_pyramids_uhr_bat import DynamicPyramid
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration


def answers(model, inputs) -> dict:
    """Logits and generated ids of whole images, and what is kept of a dynamic pyramid."""
    asked = {name: value for name, value in inputs.items() if name != "image"}
    with torch.no_grad():
        found = {"logits": model(**asked).logits, "ids": model.generate(**asked, max_new_tokens=4, do_sample=False)}
        pyramid = DynamicPyramid(inputs["image"], tile_size=8, patch_size=4, arithmetic=(1 / 255,))
        ids = torch.tensor([[5, model.config.image_token_id, 6, 9]])
        out = model.compress(input_ids=ids, image_pyramids=[pyramid])
        found |= {"focus": torch.cat([one.flatten() for one in out.importance[0]]), "slots": list(out.slots[0])}
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    model = UHRBatForConditionalGeneration.from_pretrained(folder, tp_plan="auto", device_map=None).eval()
    model.generation_config.pad_token_id = 0
    heads = model.model.language_model.layers[0].self_attn.q_proj
    found = answers(model, torch.load(folder / "inputs.pt", weights_only=False))
    found["local"] = heads.out_features, tuple(getattr(heads.weight, "_local_tensor", heads.weight).shape)
    torch.save(found, folder / f"found-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
