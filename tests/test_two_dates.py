"""`docs/two_dates.md`: its block runs as it stands, and the figures of `uhr-bat evidence dates` are read from what was kept."""

import re

import pytest
import torch
from uhr_bat.common.loading import ROOT
from uhr_bat.evaluation import dates as measured
from uhr_bat.modeling_outputs_uhr_bat import TokenMaps, UHRBatCompressionOutput

PAGE = (ROOT / "docs" / "two_dates.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_asks_about_two_dates_and_sees_what_changed(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(compile(block, "two_dates.md", "exec"), names)
    said, pair = names["said"], names["pair"]
    differences, grids = said.compressed.differences[1], said.compressed.importance[1].grids
    changed = [token for scale, token in names["dates"].changed_tokens(pair, grids)[1] if scale == 3]
    assert differences[3].flatten()[changed].mean() > 4 * differences[3][differences[3] > 0].mean()
    assert said.num_tokens == sum(names["model"].config.budgets) and capsys.readouterr().out


def test_kept_tokens_are_told_by_scale_and_place_and_shares_are_of_all_that_were_kept():
    maps = TokenMaps([torch.tensor([0, -1]), torch.tensor([1, -1, 0])], [torch.tensor([2, 3]), torch.tensor([5, 6, 7])],
                     [(2, 2), (3, 3)], fill=-1, flat=True)  # fmt: skip
    assert measured.kept_tokens(UHRBatCompressionOutput(slots=[maps])) == [{(0, 2), (1, 5), (1, 7)}]
    right, wrong = (True, True, 0.25, 0.5), (False, False, 0.75, 1.0)
    asked = [measured.Asked(1, "new", "ship", right), measured.Asked(2, "gone", "car", wrong)]
    told = measured.report(
        {(measured.COMPARED, 1.0): asked, (measured.APART, 0.01): asked[:1], (measured.COMPARED, 0.01): asked}
    )
    assert "| 1 % | each date by itself | 100.0 [100.0, 100.0] |" in told and "| 100 % | all | 50.0 " in told
    assert "| right | 100 % | 1 % |" in told and "| new | 100.0 | 100.0 |" in told and "| gone | 0.0 | 0.0 |" in told
    moved = [measured.Asked(1, "new", "car", wrong), asked[1]]
    assert measured.differing({(measured.COMPARED, 0.01): moved}, {(measured.COMPARED, 0.01): asked}).endswith(
        ": 1 of 2 answers differ from those without a shift."
    )
