"""Peak memory of a stream does not depend on its length: counted on the meta device, and once as RSS."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vae_core
from vae_core.families.iv_vae import IVVAEConfig

from .meta_profile import MetaProfile

ROOT = Path(__file__).parent.parent.parent


def latent_clips(channels: int, frames: int) -> Iterator[Tensor]:
    for _ in range(frames):
        yield torch.empty(1, channels, 1, 8, 8, device="meta")


def frame_clips(frames: int) -> Iterator[Tensor]:
    for _ in range(frames):
        yield torch.empty(1, 3, 1, 64, 64, device="meta")


def peak(stream: Iterator[Tensor]) -> tuple[int, int]:
    """(peak bytes, frames) of a stream that is looked at and thrown away."""
    count = 0
    with MetaProfile() as profile:
        for chunk in stream:
            count += chunk.shape[2]
            del chunk
    return profile.peak_bytes, count


@pytest.fixture
def meta_vae(family: str, small_state: Callable[..., dict[str, Tensor]]) -> vae_core.VideoVAE:
    state = {name: t.to("meta") for name, t in small_state(family).items()}
    return vae_core.load(state, device="meta")


def test_decoding_101_latents_peaks_no_higher_than_9(meta_vae: vae_core.VideoVAE) -> None:
    channels = meta_vae.info.latent_channels
    short, frames = peak(meta_vae.decode_stream(latent_clips(channels, 9)))
    assert frames == meta_vae.info.compression.pixel_frames(9)
    long, frames = peak(meta_vae.decode_stream(latent_clips(channels, 101)))
    assert frames == meta_vae.info.compression.pixel_frames(101)
    assert long <= short


def test_encoding_401_frames_peaks_no_higher_than_33(meta_vae: vae_core.VideoVAE) -> None:
    short, latents = peak(meta_vae.encode_stream(frame_clips(33)))
    assert latents == meta_vae.info.compression.latent_frames(33)
    long, latents = peak(meta_vae.encode_stream(frame_clips(401)))
    assert latents == meta_vae.info.compression.latent_frames(401)
    assert long <= short


def test_a_whole_clip_call_adds_only_its_result(meta_vae: vae_core.VideoVAE) -> None:
    """The result is one tensor, allocated once: no growth by concatenation."""
    channels = meta_vae.info.latent_channels
    streamed, _ = peak(meta_vae.decode_stream(latent_clips(channels, 101)))
    latent = torch.empty(1, channels, 101, 8, 8, device="meta")
    with MetaProfile() as profile:
        out = meta_vae.decode(latent)
    result = out.numel() * out.element_size()
    assert out.shape[2] == meta_vae.info.compression.pixel_frames(101)
    assert profile.peak_bytes <= streamed + result + latent.numel() * latent.element_size()


RSS = """
import resource, sys, torch, vae_core
torch.set_num_threads(1)
vae = vae_core.load({path!r})
clips = (torch.zeros(1, {channels}, 1, 16, 16) for _ in range({latents}))
frames = sum(chunk.shape[2] for chunk in vae.decode_stream(clips))
print(frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_resident_memory_is_flat_too(small_vae: Callable[..., vae_core.VideoVAE], tmp_path: Path) -> None:
    pytest.importorskip("resource")
    config = IVVAEConfig(dim=2, latent_channels=4, scale_factor=1.0, shift_factor=0.0)
    vae_core.save(small_vae(config, torch.float32), tmp_path / "small.safetensors")
    used: dict[int, int] = {}
    for latents in (9, 101):
        code = RSS.format(path=str(tmp_path / "small.safetensors"), channels=4, latents=latents)
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        frames, rss = (int(n) for n in out.stdout.split())
        assert frames == 1 + 4 * (latents - 1)
        used[latents] = rss
    all_frames = 400 * 3 * 128 * 128 * 4
    assert used[101] - used[9] < all_frames / 3
