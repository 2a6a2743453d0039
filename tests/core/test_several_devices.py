"""Chunks on several devices at once, here copies on the CPU in threads: the same result, and one end for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vae_core import StripPlan, VideoVAE

from .command_line import clip, fail, read_all, succeed

Make = Callable[..., VideoVAE]


@pytest.mark.parametrize("family", ["cv-vae", "image-vae"])
def test_the_result_is_that_of_one(small_vae: Make, family: str) -> None:
    torch.manual_seed(0)
    vae = small_vae(family)
    video = torch.rand(1, 3, 65, 16, 8, dtype=torch.float64).mul(2).sub(1)
    latent = vae.encode(video)
    whole = vae.decode(latent)
    vae.on(["cpu", "cpu", "cpu"])
    assert torch.equal(vae.encode(video), latent)
    assert torch.equal(vae.decode(latent), whole)
    strips = vae.decode(latent, plan=StripPlan(strips=4))
    assert (strips - whole).abs().max() <= 1e-12 * whole.std()
    frames = torch.cat(list(vae.decode_frames(latent, start=20, frames=60, dtype=torch.uint8)), dim=1)
    assert frames.shape == (1, 40, 16, 8, 3)
    vae.on(["cpu"])
    assert torch.equal(vae.decode(latent), whole)


def test_memory_runs_out_on_one_of_them(small_vae: Make) -> None:
    vae = small_vae("cv-vae").on(["cpu", "cpu"])
    latent = torch.randn(1, 4, 17, 4, 4, dtype=torch.float64)
    whole = vae.decode(latent)
    calls, asked = 0, []

    def fail() -> None:
        nonlocal calls
        calls += 1
        if calls == 70:
            raise torch.OutOfMemoryError("injected")

    def recover(error: Exception, plan: object) -> StripPlan:
        asked.append(plan)
        return StripPlan(strips=4)

    got = torch.cat(list(vae.decode_stream(latent, between=fail, recover=recover)), dim=2)
    assert asked == [None]
    assert (got - whole).abs().max() <= 1e-12 * whole.std()


def test_what_ends_one_ends_all(small_vae: Make) -> None:
    vae = small_vae("cv-vae").on(["cpu", "cpu"])
    latent = torch.randn(1, 4, 33, 1, 1, dtype=torch.float64)
    calls = 0

    def end() -> None:
        nonlocal calls
        calls += 1
        if calls >= 90:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(vae.decode_stream(latent, between=end))
    assert calls == 90
    stream = vae.decode_stream(latent)
    next(stream)
    stream.close()  # whoever wants no more does not wait for all
    assert vae.decode(latent).shape[2] == 129


def test_groups_that_depend_on_each_other_are_refused(small_vae: Make) -> None:
    with pytest.raises(ValueError, match="To run on 2 devices was asked of iv-vae"):
        small_vae("iv-vae").on(["cpu", "cpu"])
    with pytest.raises(ValueError, match="0 devices"):
        small_vae("cv-vae").on([])


def test_the_command_takes_several(here: Path, weights: dict[str, Path]) -> None:
    clip(here / "clip.mp4", 40, 32, 48)
    words = ("reconstruct", "clip.mp4", "-w", weights["cv-vae"])
    succeed(*words, "-o", "one.mkv", "--crf", "0")
    succeed(*words, "-o", "two.mkv", "--crf", "0", "--device", "cpu,cpu")
    assert torch.equal(read_all(here / "one.mkv"), read_all(here / "two.mkv"))
    assert "--device cpu,cpu: To run on 2 devices" in fail(
        "reconstruct", "clip.mp4", "-w", weights["iv-vae"], "-o", "x.mkv", "--device", "cpu,cpu"
    )
    assert "--device gpu is no device" in fail(*words, "-o", "x.mkv", "--device", "cpu,gpu")
