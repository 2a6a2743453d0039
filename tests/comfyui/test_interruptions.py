"""Cancel and out-of-memory errors in the middle of a decode: the next run works, and nothing is held."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from .calls import DECODE, decode, encode
from .conftest import LoadVAE
from .inprocess import CancelledRunError, Comfy, Progress
from .weights import SMALL, picture


@pytest.mark.parametrize("name", ["cv", "iv"])
@pytest.mark.parametrize("node", ["CVIV_Decode", "VAEDecode", "VAEDecodeTiled"])
def test_cancel_in_the_middle_of_a_decode(comfy: Comfy, load_vae: LoadVAE, name: str, node: str) -> None:
    vae = load_vae(SMALL[name])
    latent, _ = encode(comfy, vae, picture(65, 16, 24))
    tiles = {"tile_size": 64, "overlap": 0, "temporal_size": 8, "temporal_overlap": 4}
    widgets = {"CVIV_Decode": DECODE, "VAEDecode": {}, "VAEDecodeTiled": tiles}[node]

    def cancel(report: Progress) -> None:
        if report.value >= 16:
            comfy.module("nodes").interrupt_processing(True)

    comfy.on_progress = cancel
    with pytest.raises(CancelledRunError) as caught:
        comfy.call(node, vae=vae, samples=latent, **widgets)
    assert caught.value.node_type == node
    stopped_at = comfy.progress[-1].value
    assert 16 <= stopped_at < 40  # at most one piece more

    comfy.on_progress = None
    images, *_ = comfy.call(node, vae=vae, samples=latent, **widgets)
    assert images.shape == (65, 16, 24, 3)


def test_cancel_in_the_middle_of_an_encode(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae, images = load_vae(SMALL["iv"]), picture(65, 16, 24)
    comfy.on_progress = lambda _report: comfy.module("nodes").interrupt_processing(True)
    with pytest.raises(CancelledRunError) as caught:
        encode(comfy, vae, images)
    assert caught.value.node_type == "CVIV_Encode"
    comfy.on_progress = None
    latent, _ = encode(comfy, vae, images)
    assert latent["samples"].shape[2] == 17


def test_a_cancelled_decode_frees_its_frames(comfy: Comfy, load_vae: LoadVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = load_vae(SMALL["cv"])
    latent, _ = encode(comfy, vae, picture(65, 16, 24))
    held: list[weakref.ref[torch.Tensor]] = []
    _watch(monkeypatch, vae, lambda made: held.append(weakref.ref(made)))
    comfy.on_progress = lambda _report: comfy.module("nodes").interrupt_processing(True)
    with pytest.raises(CancelledRunError):
        decode(comfy, vae, latent)
    gc.collect()
    assert held
    assert [one for one in held if one() is not None] == []


@pytest.mark.parametrize(("name", "frames", "width"), [("cv", 33, 96), ("iv", 9, 128)])
@pytest.mark.parametrize("node", ["CVIV_Decode", "VAEDecode"])
def test_out_of_memory_once(
    comfy: Comfy, load_vae: LoadVAE, monkeypatch: pytest.MonkeyPatch, name: str, frames: int, width: int, node: str
) -> None:
    """The failed piece is done again in smaller tiles; frames that were finished are not decoded twice."""
    vae = load_vae(SMALL[name])
    latent, _ = encode(comfy, vae, picture(frames, 64, width))
    widgets = DECODE if node == "CVIV_Decode" else {}
    expected, *_ = comfy.call(node, vae=vae, samples=latent, **widgets)

    calls = 0

    def fail_at_second(_made: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("injected")

    _watch(monkeypatch, vae, fail_at_second)
    images, *rest = comfy.call(node, vae=vae, samples=latent, **widgets)
    assert calls >= 2
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=0)
    values = [report.value for report in comfy.progress]
    assert values == sorted(values)
    if node == "CVIV_Decode":
        assert "out of memory after" in rest[-1]
        assert "went on from there" in rest[-1]

    monkeypatch.undo()
    again, *_ = comfy.call(node, vae=vae, samples=latent, **widgets)
    torch.testing.assert_close(again, expected)


def test_out_of_memory_without_end(comfy: Comfy, load_vae: LoadVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the smallest tiles fail, too, the error reaches the user, and the next run works."""
    vae = load_vae(SMALL["iv"])
    latent, _ = encode(comfy, vae, picture(9, 32, 32))

    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("injected")

    for name in ("decode", "forward"):
        for module in _deepest(vae):
            monkeypatch.setattr(module, name, fail, raising=False)
    with pytest.raises(Exception, match=r"memory|injected"):
        decode(comfy, vae, latent)
    monkeypatch.undo()
    images, *_ = decode(comfy, vae, latent)
    assert images.shape == (9, 32, 32, 3)


def _watch(monkeypatch: pytest.MonkeyPatch, vae: Any, see: Any) -> None:
    """Call `see` with what the decoder's last layer makes, each time it runs."""
    last = _deepest(vae)[-1]
    original = last.forward

    def forward(*args: Any, **keywords: Any) -> torch.Tensor:
        made = original(*args, **keywords)
        see(made)
        return made

    monkeypatch.setattr(last, "forward", forward)


def _deepest(vae: Any) -> list[torch.nn.Module]:
    """The decoder's modules without children, in order."""
    return [module for module in vae.codec.model.decoder.modules() if not list(module.children())]
