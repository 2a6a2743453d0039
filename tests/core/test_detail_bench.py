"""Keyframe detail never makes a video worse, on the scenes of its bench, shortened."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vae_core.detail import DetailSettings

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
FULL = DetailSettings(strength=1.0, radius=3.0, confidence=0.5)
FRAMES = 9


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("cv2")
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(importlib.import_module("detail_scenes"), "SIDES", (96, 128))
    return importlib.import_module("detail_fusion")


def compared(bench: ModuleType, scene: str, video: str, keyframes: str) -> tuple[object, object, object, float]:
    source = bench.SCENES[scene](FRAMES)
    return bench.compare(source, bench.VIDEOS[video](source), bench.KEYFRAMES[keyframes](source), FULL)


@pytest.mark.parametrize("keyframes", ["noisy", "mean"])
@pytest.mark.parametrize("scene", ["still", "texture pan", "turning", "water", "grain", "crossing", "cut"])
def test_a_soft_video_is_never_worse(bench: ModuleType, scene: str, keyframes: str) -> None:
    alone, _, ours, added = compared(bench, scene, "soft", keyframes)
    assert not ours.worse_than(alone), (alone, ours)
    assert ours.pulse <= alone.pulse + 5
    if scene == "water":
        assert added < 0.05
    elif keyframes == "noisy":  # sharp: there is much to be gained, and more than an unsharp mask can give
        assert ours.psnr > alone.psnr + (2 if scene == "crossing" else 3)
        assert added > 0.5


def test_sharp_keyframes_beat_an_unsharp_mask(bench: ModuleType) -> None:
    for scene in ("still", "texture pan", "turning"):
        alone, mask, ours, _ = compared(bench, scene, "soft", "noisy")
        assert ours.psnr > mask.psnr + 1 > alone.psnr
        assert ours.flicker <= alone.flicker + 0.01


@pytest.mark.parametrize(
    ("video", "keyframes"), [("soft", "invented"), ("soft", "other"), ("sharp", "softer")], ids=lambda name: name
)
@pytest.mark.parametrize("scene", ["still", "texture pan"])
def test_keyframes_with_nothing_to_give_change_nothing(
    bench: ModuleType, scene: str, video: str, keyframes: str
) -> None:
    alone, _, ours, added = compared(bench, scene, video, keyframes)
    assert added == 0
    assert ours == alone


def test_a_video_that_pulses_pulses_less(bench: ModuleType) -> None:
    for scene in ("still", "turning"):
        alone, _, ours, _ = compared(bench, scene, "uneven", "noisy")
        assert alone.pulse > 20
        assert ours.pulse < 0.7 * alone.pulse
        assert not ours.worse_than(alone)


def test_what_counts_as_worse(bench: ModuleType) -> None:
    base = bench.Figures(30.0, 5.0, 0.0)
    assert not base.worse_than(base)
    assert bench.Figures(29.99, 5.0, 0.0).worse_than(base)
    assert bench.Figures(31.0, 5.07, 0.0).worse_than(base)
    assert not bench.Figures(30.0, 5.05, 9.0).worse_than(base)
    assert torch.equal(bench.SCENES["water"](5), bench.SCENES["water"](5))
