"""Heads of the decoder shared by two processes (`tp_plan="auto"`): they answer as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from images import random_image
from small import prompt, random_pixels, small_model
from tensor_parallel import answers

TESTS = Path(__file__).resolve().parents[1]


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
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", str(TESTS / "cluster" / "tensor_parallel.py"), str(tmp_path)]
    paths = [str(TESTS.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = answers(model, inputs)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found-{rank}.pt", weights_only=False)
        assert found["local"][1][0] == 12  # of 24 rows: two of four heads
        torch.testing.assert_close(found["logits"], wanted["logits"], rtol=1e-4, atol=1e-4)
        assert torch.equal(found["ids"], wanted["ids"])
        torch.testing.assert_close(found["focus"], wanted["focus"], rtol=1e-4, atol=1e-6)
        assert all(map(torch.equal, found["slots"], wanted["slots"]))
