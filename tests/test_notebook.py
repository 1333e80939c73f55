"""The notebook runs from its first cell to its last, and what is kept of it is fit to be read."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "uhr_bat.ipynb"
# A strip: most of its tiles are letterbox, which is not encoded.
SMALL = "SIZE = (600, 60)\nMAX_NEW_TOKENS = 2"


def text_of(cell):
    return "".join("".join(output.get("text", "")) for output in cell.outputs)


@pytest.mark.slow
def test_the_notebook_runs():
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = SMALL
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [output for cell in code for output in cell.outputs if "image/jpeg" in output.get("data", {})]
    assert len(pictures) == 5
    texts = [text_of(cell) for cell in code]
    assert "budgets [4, 8, 40, 94] tokens" in texts[2]
    assert texts[-1].splitlines()[-1] == "The same answer: True"
    assert sum(line.endswith("?") for line in texts[-2].splitlines()) == 5


def test_the_kept_outputs_are_whole_small_and_free_of_paths():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert NOTEBOOK.stat().st_size < 700_000
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr"
            assert not re.search(r"(^|[\s'\"(])/\w+/", "".join(output.get("text", "")))
