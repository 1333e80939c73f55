"""A GPU keeps the tokens that a CPU keeps, whatever kernel the attention has and whatever type the weights.

Skipped where there is no GPU.
"""

import numpy as np
import pytest
import torch
from uhr_bat.common.asking import answer_texts, prompt_text
from uhr_bat.common.loading import load_model
from uhr_bat.scenes.layout import make_scene
from uhr_bat.scenes.painting import paint
from uhr_bat.scenes.questions import KINDS, make_question

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"), pytest.mark.weights]

SEEDS = range(20_000_000, 20_000_004)


def ask(device, dtype="float32", kernel="sdpa"):
    """Per question: which tokens stay, bool[all tokens], and the answer."""
    processor, model = load_model(dtype=getattr(torch, dtype), device_map=device)
    model.set_attn_implementation(kernel)
    kept, answers = [], []
    for seed in SEEDS:
        scene, rng = make_scene(seed), np.random.default_rng(seed)
        inputs = processor.image_processor(paint(scene), return_tensors="pt").to(device)
        features = model.encode_image(**inputs)
        for kind in KINDS:
            question = make_question(scene, kind, rng=rng)
            if question is None:
                continue
            prompt = prompt_text(processor, question.text)
            inputs = processor(text=prompt, image_features=features, return_tensors="pt").to(device)
            kept.append(torch.cat(model.compress(**inputs).slots[0]).cpu() >= 0)
            output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
            answers.append(answer_texts(processor, output[:, inputs["input_ids"].shape[1] :])[0])
    return torch.stack(kept), answers


@pytest.fixture(scope="module")
def on_cpu():
    return ask("cpu")


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex_attention"])
def test_tokens_and_answers_are_those_of_a_cpu(on_cpu, kernel):
    kept, answers = ask("cuda", kernel=kernel)
    same = (kept & on_cpu[0]).sum() / on_cpu[0].sum()
    print(f"\nfloat32, {kernel}: {100 * same:.2f} % of the kept tokens the same")
    assert same > 0.995 and answers == on_cpu[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flash_attention_2"])
def test_half_precision_keeps_nearly_the_same(on_cpu, dtype, kernel):
    if kernel == "flash_attention_2":
        pytest.importorskip("flash_attn")
    kept, answers = ask("cuda", dtype, kernel)
    same = (kept & on_cpu[0]).sum() / on_cpu[0].sum()
    alike = np.mean([one == other for one, other in zip(answers, on_cpu[1])])
    print(f"\n{dtype}, {kernel}: {100 * same:.2f} % of the kept tokens and {100 * alike:.1f} % of the answers the same")
    assert same > 0.9 and alike > 0.9
