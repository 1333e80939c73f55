"""The notebook runs from its first cell to its last, and what is kept of it is fit to be read."""

import json
import os
import re
from pathlib import Path

import pytest
from copies import run_copies

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "uhr_bat.ipynb"
# A strip: most of its tiles are letterbox, which is not encoded.
SMALL = "SIZE = (600, 60)\nMAX_NEW_TOKENS = 2"


def run_notebook(folder):
    """All code cells by the shell that is in Jupyter's kernel."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    from traitlets.config import Config

    os.environ["IPYTHONDIR"] = str(folder)
    os.chdir(NOTEBOOK.parent)
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    texts, pictures = [], []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source = SMALL if "parameters" in cell["metadata"].get("tags", ()) else "".join(cell["source"])
            with capture_output() as captured:
                shell.run_cell(source).raise_error()
            texts.append(captured.stdout)
            pictures += [output for output in captured.outputs if "image/jpeg" in output.data]
    assert len(pictures) == 5
    assert "budgets [4, 8, 40, 94] tokens" in texts[2]
    assert texts[-1].splitlines()[-1] == "The same answer: True"
    assert sum(line.endswith("?") for line in texts[-2].splitlines()) == 5


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    pytest.importorskip("IPython", reason="IPython is not installed")
    run_copies(1, run_notebook, tmp_path)


def test_the_kept_outputs_are_whole_small_and_free_of_paths():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert NOTEBOOK.stat().st_size < 700_000
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr"
            assert not re.search(r"(^|[\s'\"(])/\w+/", "".join(output.get("text", "")))
