"""docs/python.md runs as it stands."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from vae_core.media.video import probe

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (tmp_path / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    names = runpy.run_path("page.py")
    assert names["again"].shape == names["odd"].shape
    assert names["plan"].fits
    assert names["psnr"].shape == (10,)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in names["network"].parameters())
    assert probe("again.mp4").frames == 9
