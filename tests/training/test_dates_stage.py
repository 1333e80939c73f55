"""The stage that trains an adapter for two dates: a run of it, and what its steps read."""

import pytest
import torch
from uhr_bat.common.loading import ROOT, load_model
from uhr_bat.common.models import base_of
from uhr_bat.training.tiny import dates, stages
from uhr_bat.training.tiny.dates import PairTrainer, main


@pytest.mark.slow
def test_an_adapter_is_trained_on_what_the_model_chooses_from_both_dates(tmp_path, monkeypatch):
    folder, pairs = tmp_path / "adapter", tmp_path / "pairs"
    arguments = ["--output", str(folder), "--encoded", str(pairs), "--pairs", "1", "--steps", "1", "--batch-size", "1"]
    asked, rows = PairTrainer.loss_alone, {}

    def watched(self, model, inner, image_features, token_counts, targets, **inputs):
        rows.update(inputs, image_features=image_features, token_counts=token_counts)
        with torch.no_grad():
            images = {"image_features": [one for pair in image_features for _ in targets for one in pair]}
            images |= {"token_counts": token_counts.flatten(0, 1), "registration": [dates.SAME_PLACE] * len(targets)}
            rows["loss"] = float(inner(**inputs, **images).loss)
        return asked(self, model, inner, image_features, token_counts, targets, **inputs)

    monkeypatch.setattr(stages, "computes_bfloat16", lambda: False)
    monkeypatch.setattr(PairTrainer, "loss_alone", watched)
    monkeypatch.setattr(PairTrainer, "log", lambda self, *args, **kwargs: rows.update(self.parts))
    main(["--model", str(ROOT), *arguments, "--together", "2", "--matching", "1"])
    assert rows["answers"] == pytest.approx([rows["loss"]], rel=1e-4)
    assert base_of(folder).resolve() == ROOT and not (folder / "README.md").exists()
    processor, model = load_model(folder)
    weights = {name: one for name, one in model.named_parameters() if "lora_B" in name}
    assert len(weights) == 28 and all(one.abs().max() > 0 for one in weights.values())
