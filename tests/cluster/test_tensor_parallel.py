"""Heads of the decoder shared by two processes (`tp_plan="auto"`): they answer as one."""

import pytest
import torch
from copies import run_copies
from images import random_image
from small import prompt, random_pixels, small_model
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


def share(folder):
    """One of the processes: asks the model of a folder, and saves what it answers."""
    torch.distributed.init_process_group("gloo")
    model = UHRBatForConditionalGeneration.from_pretrained(folder, tp_plan="auto", device_map=None).eval()
    model.generation_config.pad_token_id = 0
    heads = model.model.language_model.layers[0].self_attn.q_proj
    found = answers(model, torch.load(folder / "inputs.pt", weights_only=False))
    found["local"] = heads.out_features, tuple(getattr(heads.weight, "_local_tensor", heads.weight).shape)
    torch.save(found, folder / f"found-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_answer_as_one(tmp_path):
    model = small_model(
        selector="distinct",
        refinement=[3, 5],
        refinement_layers=[1, 2],
        region_focus={"layers": [0, 1], "separator_token_id": 7},
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": prompt(5, "image", 6, 9), "pixel_values": random_pixels(), "image": random_image(60, 44)}
    torch.save(inputs, tmp_path / "inputs.pt")
    run_copies(2, share, tmp_path)
    wanted = answers(model, inputs)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found-{rank}.pt", weights_only=False)
        assert found["local"][1][0] == 12  # of 24 rows: two of four heads
        torch.testing.assert_close(found["logits"], wanted["logits"], rtol=1e-4, atol=1e-4)
        assert torch.equal(found["ids"], wanted["ids"])
        torch.testing.assert_close(found["focus"], wanted["focus"], rtol=1e-4, atol=1e-6)
        assert all(map(torch.equal, found["slots"], wanted["slots"]))
