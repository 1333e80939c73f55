"""UHR-BAT-Tiny with a decoder of 8 and of 4 bits: does the importance pass choose the same tokens, and are answers the same?"""

from importlib.util import find_spec

import numpy as np
import torch
from tqdm import tqdm

from ...common import asking
from ...common.loading import load_model
from ...scenes.layout import TEST_SEEDS, make_scene
from ...scenes.painting import paint
from ...scenes.questions import draw_question
from ...training.parts import quantize_decoder
from ..compare import Row

NAME = "UHR-BAT-Tiny, {}: kept tokens the same as in bfloat16; answers the same; answers right"
QUESTIONS = 4  # about a scene
MAX_NEW_TOKENS = 6


def decoders() -> dict:
    """{name: (processor, model)}: what answers in bfloat16, and others beside it."""
    loaded = {"bfloat16": load_model(dtype=torch.bfloat16, device_map=None)}
    loaded["float32"] = load_model(dtype=torch.float32, device_map=None)
    if find_spec("bitsandbytes") is not None:
        for name, bits in (("8 bits", 8), ("4 bits (NF4)", 4)):
            quantization = quantize_decoder(bits, torch.bfloat16)
            loaded[name] = load_model(dtype=torch.bfloat16, device_map=None, quantization_config=quantization)
    return loaded


@torch.no_grad()
def quantized(sizes) -> list[Row]:
    """Scenes that nothing was trained on, encoded once: the decoder alone differs."""
    loaded, records = decoders(), {}
    processor, reference = loaded["bfloat16"]
    for seed in tqdm(TEST_SEEDS[: 2 if sizes.quick else 60], desc="quantized", leave=False):
        scene, rng = make_scene(seed), np.random.default_rng([seed, 4])
        features = asking.encode(reference, processor.image_processor(paint(scene), return_tensors="pt"))
        for question in [draw_question(scene, rng) for _ in range(QUESTIONS)]:
            found = {}
            for name, (_, model) in loaded.items():
                inputs = asking.write_prompts(model, processor, [question.text], [features])
                compressed = asking.compress(model, inputs)
                kept = [torch.as_tensor(slots) >= 0 for slots in compressed.slots[0]]
                ids = asking.generate(model, inputs, compressed, max_new_tokens=MAX_NEW_TOKENS)
                (said,) = asking.answer_texts(processor, ids)
                found[name] = torch.cat(kept), said
            kept, said = found["bfloat16"]
            for name, (own, own_said) in found.items():
                same = float((kept & own).sum() / kept.sum())
                records.setdefault(name, []).append((same, said == own_said, question.answer == own_said))
    rows = []
    for name, values in records.items():
        same, answers, right = (100 * float(np.mean(column)) for column in zip(*values))
        numbers = {"kept": same, "answers": answers, "right": right, "questions": len(values)}
        result = f"{same:.1f} %; {answers:.1f} %; {right:.1f} % of {len(values)}"
        rows.append(Row(NAME.format(f"decoder in {name}"), "", result, None, numbers))
    if "8 bits" not in records:
        rows.append(Row(NAME.format("8 and 4 bits"), "", 'not measured: pip install "uhr-bat[qlora]"'))
    return rows
