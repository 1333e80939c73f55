"""The model's files keep the rules of the library's own linter for model code."""

import json
import subprocess
import sys

from uhr_bat.common.loading import ROOT

# Rules that do not fit remote code, and why.
LEFT_OUT = {
    # The decorator replaces what a docstring says by the library's own words: for a file outside the library it prints
    # errors at every import, loses the shapes and types of the arguments, and documents `pooler_output` as something else.
    "TRF057",
    # Older releases that are supported, 5.17 among them, read `_defaults` of every processor.
    "TRF019",
}
PATTERNS = ("modeling_*.py", "configuration_*.py", "image_processing_*.py", "processing_*.py")


def test_the_librarys_linter_finds_nothing(tmp_path):
    files = sorted(path.name for pattern in PATTERNS for path in ROOT.glob(pattern))
    command = [sys.executable, "-m", "mlinter", "--no-progress", "--no-cache", "--enable-all-trf-rules"]
    subprocess.run([*command, "--output-json", tmp_path / "found.json", *files], cwd=ROOT, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["findings"]
    # Those that are left out show that the files were read.
    assert any(one["rule"] in LEFT_OUT for one in found)
    assert [one for one in found if one["rule"] not in LEFT_OUT] == []
