"""What is seen while a long clip is sampled: the whole clip so far, and words with the time left."""

from __future__ import annotations

import re

import pytest
import torch

from .inprocess import Comfy
from .svd_model import Call, conditions, empty, function_svd, indices, ksampler, long_model, spread

LATENTS = 20


def image_itself(call: Call) -> torch.Tensor:
    return spread(call.image * 0.18215, call)


@pytest.mark.parametrize(("latents", "cells"), [(1, 1), (2, 2), (4, 4), (9, 9), (16, 16), (100, 16)])
def test_contact_sheet(comfy: Comfy, latents: int, cells: int) -> None:
    progress = comfy.pack("nodes.svd.progress")
    clip = torch.arange(1.0, latents + 1).reshape(-1, 1, 1, 1).expand(-1, 4, 24, 40)
    sheet = progress.contact_sheet(clip)
    assert sheet.shape == (1, 4, 24, 40)
    side = 1 if cells == 1 else 2 if cells <= 4 else 3 if cells == 9 else 4
    height, width = 24 // side, 40 // side
    shown = [float(sheet[0, 0, i // side * height, i % side * width]) for i in range(cells)]
    assert shown == sorted(shown)
    assert shown[0] == 1
    assert shown[-1] == latents
    assert len(set(shown)) == cells
    both = progress.with_sheet(clip)
    assert torch.equal(both[:1], sheet)
    assert torch.equal(both[1:], clip)


@pytest.mark.parametrize("mode", ["windows", "continuation"])
def test_words(comfy: Comfy, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(comfy.pack("nodes.svd.progress"), "show_text", lambda text, node: said.append((node, text)))
    model, _ = function_svd(comfy, image_itself)
    patched = long_model(comfy, model, LATENTS, mode=mode)
    ksampler(comfy, patched, conditions(indices(1)), empty(LATENTS), seed=91)
    assert {node for node, _ in said} == {"1"}  # the sampler
    texts = [text for _, text in said]
    if mode == "windows":
        assert re.fullmatch(r"step 1 of 3, window 1 of 3, \d+ s left", texts[0])
        assert texts[-1].startswith("step 3 of 3, window 2 of 3, ")
        return
    assert re.fullmatch(r"chunk 1 of 3, step 1 of 3, \d+ s left", texts[0])
    assert re.fullmatch(r"chunk 3 of 3, step 3 of 3, 0 s left", texts[-2])
    assert texts[-1] == "3 chunks"
    said.clear()
    ksampler(comfy, patched, conditions(indices(1)), empty(LATENTS), seed=91)
    assert [text for _, text in said] == ["3 chunks, 3 of them finished before"]


def test_time_left(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = comfy.pack("nodes.svd.progress")
    now, said = [100.0], list[str]()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    told = progress.Told(20)
    monkeypatch.setattr(told, "say", said.append)
    told.skip(10)  # chunks that were there
    now[0] += 30
    told.step("a", 15)
    assert said == ["a, 30 s left"]
    now[0] += 90
    told.step("b", 16)
    assert said[1] == "b, 1 min 20 s left"


def test_the_preview_is_of_the_whole_clip_so_far(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sampler's callback is given: a sheet, then every latent up to now; at last the clip alone."""
    preview = comfy.module("latent_preview")
    given: list[torch.Tensor] = []

    class Keeping(preview.LatentPreviewer):
        def decode_latent_to_preview(self, x0: torch.Tensor) -> object:
            given.append(x0.clone())
            from PIL import Image

            return Image.new("RGB", (8, 8))

    monkeypatch.setattr(preview, "get_previewer", lambda *_: Keeping())
    model, _ = function_svd(comfy, image_itself)
    for mode in ("continuation", "windows"):
        given.clear()
        patched = long_model(comfy, model, LATENTS, mode=mode)
        ksampler(comfy, patched, conditions(indices(LATENTS)), empty(LATENTS), cfg=1.0, steps=2, seed=92)
        lengths = [len(one) for one in given]
        assert lengths == ([9, 9, 15, 15, 21, 20, 20] if mode == "continuation" else [21, 20])
        last = given[-1][:, 0, 0, 0] / 0.18215
        assert torch.allclose(last, torch.arange(1.0, 21), rtol=1e-3)
        before = given[-2 if mode == "windows" else 2]
        assert torch.allclose(before[1:9, 0, 0, 0] / 0.18215, torch.arange(1.0, 9), rtol=1e-2)
