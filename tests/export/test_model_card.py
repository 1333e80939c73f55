"""The card of an exported model."""

import re

import pytest
from huggingface_hub import metadata_load
from PIL import Image
from uhr_bat.export.convert_checkpoint import convert


def test_the_card_has_its_front_matter_and_its_sections(exported):
    data = metadata_load(exported / "README.md")
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-text-to-text"
    assert data["license"] == "unknown" and data["base_model"] == ["openai/clip-vit-large-patch14-336"]
    assert "remote-sensing" in data["tags"]
    text = (exported / "README.md").read_text(encoding="utf-8")
    for section in ("Quick start", "Budgets", "Results", "Limits", "Citation"):
        assert f"\n## {section}\n" in text
    assert "{" not in re.sub(r"```.*?```", "", text, flags=re.S)  # a field that nothing filled in
    assert "| threshold (eq. 9) | importance ≥ mean | importance > mean | importance > mean |" in text


def test_licence_and_base_model_are_taken_from_the_checkpoints_card_or_the_command(released, tmp_path):
    (released / "README.md").write_text("---\nlicense: mit\nbase_model: some/model\n---\n# Card\n")
    data = metadata_load(convert(released, tmp_path / "a") / "README.md")
    assert (data["license"], data["base_model"]) == ("mit", ["some/model"])
    data = metadata_load(convert(released, tmp_path / "b", license="apache-2.0", base_model="other/one") / "README.md")
    assert (data["license"], data["base_model"]) == ("apache-2.0", ["other/one"])


@pytest.mark.slow
def test_the_cards_quick_start_answers(exported, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (60, 40), (10, 120, 30)).save(tmp_path / "image.jpg")
    code = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.S)[1]
    code = code.replace('"."', repr(str(exported))).replace("max_new_tokens=256", "max_new_tokens=3")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.endswith("\n")
