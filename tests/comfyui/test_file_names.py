"""The tokens in the file name of Save Video Latent, as in Save Video's, filled in by the server alone."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest
import torch

from .inprocess import Comfy, NodeError, RefusedError

SAVE = "CVIV_SaveVideoLatent"
NUMBER, REUSE = "number a new file", "reuse it (do not compute again)"
LATENT = {"samples": torch.zeros(1, 4, 5, 4, 6), "cviv": {"family": "cv-vae", "layout": "video"}}


def save(comfy: Comfy, prefix: str, mode: str = NUMBER) -> Path:
    _, path = comfy.call(SAVE, samples=LATENT, filename_prefix=prefix, when_file_exists=mode)
    return Path(path).relative_to(comfy.base / "output")


def test_dates_are_filled_in_with_folders(comfy: Comfy) -> None:
    before = datetime.now()
    path = save(comfy, "named/%date:yyyy-MM-dd%/v_%date:yy.M.d%_%width%")
    assert path.parts[:2] == ("named", before.strftime("%Y-%m-%d"))
    assert path.name.startswith(f"v_{before:%y}.{before.month}.{before.day}_48_00001.")
    assert save(comfy, "named/%date:yyyy/MM%/v").parts[:3] == ("named", f"{before:%Y}", f"{before:%m}")


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ("%date:yyyyMMdd_hhmmss%", "20260307_040509"),
        ("%date:yy-M-d h.m.s%", "26-3-7 4.5.9"),
        ("%date:d%x%date:MM%", "7x03"),
        ("%date:%", ""),
        ("100%", "100%"),
    ],
)
def test_a_date_is_written_as_the_page_does(comfy: Comfy, token: str, text: str) -> None:
    moment = time.strptime("2026-03-07 04:05:09", "%Y-%m-%d %H:%M:%S")
    assert comfy.pack("nodes.latents.dates").fill_dates(token, moment) == text


def test_a_time_with_colons_is_refused_before_the_run(comfy: Comfy) -> None:
    with pytest.raises((RefusedError, NodeError), match="holds ':'"):
        save(comfy, "named/%date:hh:mm%")


def test_a_reused_file_may_have_a_date_but_no_time(comfy: Comfy) -> None:
    before = time.strftime("day_%Y-%m-%d.latent.safetensors")
    saved = save(comfy, "named/day_%date:yyyy-MM-dd%", REUSE).name
    assert saved in (before, time.strftime("day_%Y-%m-%d.latent.safetensors"))  # midnight may pass
    with pytest.raises((RefusedError, NodeError), match=r"holds %date:hh-mm%, which changes"):
        save(comfy, "named/%date:hh-mm%", REUSE)
