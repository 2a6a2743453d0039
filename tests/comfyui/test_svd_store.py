"""Finished chunks: a run goes on where it stopped, and single chunks are made anew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .checkout import ROOT
from .inprocess import CancelledRunError, Comfy, NodeError
from .svd import small_svd
from .svd_model import Call, conditions, empty, function_svd, ksampler, long_model, random_images, spread

LATENTS, CHUNKS, STEPS = 32, 5, 3  # chunks of 8 that carry 2
SPANS = [(0, 8), (6, 14), (12, 20), (18, 26), (24, 32)]
STORE = {"name": "clip", "regenerate_from": 1, "seeds": ""}
_names = iter(range(1000))


def drawing(call: Call) -> Tensor:
    """A network whose estimate depends on noise, image and place, so that no two runs give the same by chance."""
    return (call.x / (call.sigma**2 + 1) ** 0.5 + spread(call.image + 0.1 * call.start, call)) * 0.18215


def stored(comfy: Comfy, model: Any, **changes: Any) -> Any:
    (patched, _) = comfy.call("CVIV_SVDChunkStore", model=model, **{**STORE, **changes})
    return patched


def fresh_name() -> str:
    return f"test {next(_names)}"


def clip(comfy: Comfy, model: Any, sampler: str = "euler", **changes: Any) -> Tensor:
    return ksampler(comfy, model, conditions(random_images(size=4)), empty(LATENTS), sampler, steps=STEPS, **changes)


def breaking(comfy: Comfy, **settings: Any) -> tuple[Any, Any, dict[str, int]]:
    """(MODEL with hooks, network, a dict whose "at" is the call that fails)"""
    limit = {"at": -1}

    def estimate(call: Call) -> Tensor:
        if len(network.calls) == limit["at"]:
            raise torch.OutOfMemoryError("no memory left")
        return drawing(call)

    model, network = function_svd(comfy, estimate)
    return long_model(comfy, model, LATENTS, mode="continuation", **settings), network, limit


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", "dpmpp_sde", "lcm"])
@pytest.mark.parametrize("named", [False, True])
def test_it_goes_on_after_running_out_of_memory(comfy: Comfy, sampler: str, named: bool) -> None:
    settings = {"anchor": "moving", "crossfade": 1, "drift_control": 0.5, "steady_motion": True}
    model, network, limit = breaking(comfy, **settings)
    # the whole clip in a store of its own, for comparison
    whole = clip(comfy, stored(comfy, model, name=fresh_name()), sampler, seed=7)
    calls = len(network.calls)
    network.calls.clear()
    patched = stored(comfy, model, name=fresh_name()) if named else model
    limit["at"] = calls * 3 // CHUNKS + 2  # in chunk 4
    with pytest.raises(NodeError, match="no memory left"):
        clip(comfy, patched, sampler, seed=7)
    network.calls.clear()
    limit["at"] = -1
    again = clip(comfy, patched, sampler, seed=7)
    assert len(network.calls) == calls * 2 // CHUNKS  # chunks 4 and 5
    assert torch.equal(again, whole)
    network.calls.clear()
    assert torch.equal(clip(comfy, patched, sampler, seed=7), whole)
    assert not network.calls


def test_it_goes_on_after_a_cancel(comfy: Comfy) -> None:
    cancel_at = 3 * STEPS + 1  # in chunk 4

    def estimate(call: Call) -> Tensor:
        if len(network.calls) == cancel_at:
            comfy.module("nodes").interrupt_processing(True)
        return drawing(call)

    model, network = function_svd(comfy, estimate)
    patched = long_model(comfy, model, LATENTS, mode="continuation")
    with pytest.raises(CancelledRunError):
        clip(comfy, patched)
    cancel_at = -1
    network.calls.clear()
    clip(comfy, patched)
    assert len(network.calls) == 2 * STEPS


@pytest.mark.parametrize("change", ["seed", "cfg", "steps", "sampler", "image", "patch", "settings", "mask"])
def test_nothing_stale_is_used(comfy: Comfy, change: str) -> None:
    model, network, _ = breaking(comfy)
    patched = stored(comfy, model, name=fresh_name())
    clip(comfy, patched)
    network.calls.clear()
    conds, latent, widgets = conditions(random_images(size=4)), empty(LATENTS), {"steps": STEPS}
    sampler = "euler"
    if change in ("seed", "cfg", "steps"):
        widgets |= {"seed": {"seed": 43}, "cfg": {"cfg": 3.0}, "steps": {"steps": 2}}[change]
    elif change == "sampler":
        sampler = "dpmpp_2m"
    elif change == "image":
        conds = conditions(random_images(size=4) + 0.5)
    elif change == "settings":
        patched = long_model(comfy, patched, LATENTS, mode="continuation", crossfade=1)
    elif change == "patch":
        (patched,) = comfy.call("RescaleCFG", model=patched, multiplier=0.5)
    else:
        latent["noise_mask"] = torch.ones(LATENTS, 1, 32, 32)
        latent["noise_mask"][9:11] = 0
    ksampler(comfy, patched, conds, latent, sampler, **widgets)
    assert len(network.calls) >= 2 * CHUNKS
    if change == "patch":
        network.calls.clear()
        (other,) = comfy.call("RescaleCFG", model=patched, multiplier=0.6)  # a number inside of a function
        ksampler(comfy, other, conds, latent, sampler, **widgets)
        assert network.calls


def test_patches_of_the_weights_count(comfy: Comfy) -> None:
    """A LoRA and its strength; the same one loaded anew is the same."""
    read = comfy.pack("nodes.svd.fingerprint").model_fingerprint
    name = "diffusion_model.out.2.weight"

    def patched(model: Any, seed: int, strength: float) -> str:
        one = model.clone()
        shape = model.model.diffusion_model.out[2].weight.shape
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        assert one.add_patches({name: ("diff", (drawn,))}, strength) == [name]
        return read(one)

    model = small_svd(comfy)
    told = [read(model), patched(model, 1, 0.5), patched(model, 1, 0.6), patched(model, 2, 0.5)]
    assert len(set(told)) == 4
    assert patched(small_svd(comfy), 1, 0.5) == told[1]
    assert read(model) == told[0]


@pytest.mark.parametrize("number", [1, 3, 5])
def test_one_chunk_is_made_anew(comfy: Comfy, number: int) -> None:
    model, network, _ = breaking(comfy, anchor="moving")
    name = fresh_name()
    before = clip(comfy, stored(comfy, model, name=name))
    network.calls.clear()
    after = clip(comfy, stored(comfy, model, name=name, seeds=f"{number}: 77"))
    assert len(network.calls) == (CHUNKS - number + 1) * STEPS
    first = 0 if number == 1 else SPANS[number - 1][0] + 2
    assert torch.equal(after[:first], before[:first])
    for start, stop in SPANS[number - 1 :]:
        assert not torch.equal(after[start + 2 : stop], before[start + 2 : stop])
    network.calls.clear()
    assert torch.equal(clip(comfy, stored(comfy, model, name=name)), before)  # the old ones are still there
    assert not network.calls


def test_the_first_chunks_stay_whatever_the_seed(comfy: Comfy) -> None:
    model, network, _ = breaking(comfy, anchor="moving")
    name = fresh_name()
    before = clip(comfy, stored(comfy, model, name=name), seed=1)
    network.calls.clear()
    after = clip(comfy, stored(comfy, model, name=name, regenerate_from=3), seed=2)
    assert len(network.calls) == 3 * STEPS
    assert torch.equal(after[:14], before[:14])
    assert not torch.equal(after[14:20], before[14:20])
    network.calls.clear()
    once_more = clip(comfy, stored(comfy, model, name=name, regenerate_from=3), seed=2)
    assert torch.equal(once_more, after)
    assert not network.calls


def test_what_cannot_be_kept_is_said(comfy: Comfy) -> None:
    model, _, _ = breaking(comfy)
    name = fresh_name()
    with pytest.raises(NodeError, match=r"Chunk 1 is to be kept.*has none.*regenerate_from to 1"):
        clip(comfy, stored(comfy, model, name=name, regenerate_from=4))
    clip(comfy, stored(comfy, model, name=name))
    other = stored(
        comfy, long_model(comfy, model, 40, mode="continuation", window_length=10), name=name, regenerate_from=2
    )
    with pytest.raises(NodeError, match=r"must have the shape \(10, 4, 4, 4\).*one of shape \(8, 4, 4, 4\)"):
        ksampler(comfy, other, conditions(random_images(size=4)), empty(40), steps=1)


def test_a_run_cut_off_hides_what_no_longer_fits(comfy: Comfy) -> None:
    """The list of chunks is that of the latest run: the end of an older one does not follow a new beginning."""
    model, network, limit = breaking(comfy)
    name = fresh_name()
    clip(comfy, stored(comfy, model, name=name), seed=1)
    network.calls.clear()
    limit["at"] = STEPS + 1
    with pytest.raises(NodeError):
        clip(comfy, stored(comfy, model, name=name), seed=2)
    limit["at"] = -1
    with pytest.raises(NodeError, match=r"Chunk 2 is to be kept.*has none"):
        clip(comfy, stored(comfy, model, name=name, regenerate_from=3), seed=2)


def test_a_longer_clip_goes_on_from_a_shorter_one(comfy: Comfy) -> None:
    model, network, _ = breaking(comfy, anchor="moving")
    patched, conds = stored(comfy, model, name=fresh_name()), conditions(random_images(size=4))
    short = ksampler(comfy, patched, conds, empty(20), steps=STEPS)
    network.calls.clear()
    long = ksampler(comfy, patched, conds, empty(32), steps=STEPS)
    assert len(network.calls) == 2 * STEPS
    assert torch.equal(long[:20], short)


def test_a_damaged_chunk_is_made_anew(comfy: Comfy) -> None:
    model, network, _ = breaking(comfy)
    name = fresh_name()
    before = clip(comfy, stored(comfy, model, name=name))
    folder = comfy.base / "output" / "svd_chunks" / name
    listed = json.loads((folder / "chunks.json").read_text(encoding="utf-8"))["chunks"]
    assert [file[:4] for file in listed] == ["0001", "0002", "0003", "0004", "0005"]
    (folder / listed[1]).write_bytes(b"rubbish")
    network.calls.clear()
    assert torch.equal(clip(comfy, stored(comfy, model, name=name)), before)
    assert len(network.calls) == STEPS


def test_two_stages(comfy: Comfy) -> None:
    model, conds = long_model(comfy, small_svd(comfy), 12, mode="continuation"), conditions(random_images())
    patched = stored(comfy, model, name=fresh_name())
    common: dict[str, Any] = {
        "positive": conds[0], "negative": conds[1], "noise_seed": 42, "steps": 3, "cfg": 2.5,
        "sampler_name": "euler", "scheduler": "karras",
    }  # fmt: skip

    def both(one: Any) -> Tensor:
        (first,) = comfy.call(
            "KSamplerAdvanced", model=one, latent_image=empty(12, 8), add_noise="enable", start_at_step=0,
            end_at_step=2, return_with_leftover_noise="enable", **common,
        )  # fmt: skip
        (second,) = comfy.call(
            "KSamplerAdvanced", model=one, latent_image=first, add_noise="disable", start_at_step=2,
            end_at_step=3, return_with_leftover_noise="disable", **common,
        )  # fmt: skip
        return second["samples"]

    wanted = both(stored(comfy, model, name=fresh_name()))
    assert torch.equal(both(patched), wanted)
    assert torch.equal(both(patched), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../clip"}, r"The name is '../clip': give a plain name"),
        ({"name": ""}, "give a plain name"),
        ({"seeds": "3"}, r"A seed of a chunk is '3'.*such as 3: 77"),
        ({"seeds": "0: 5"}, "counted from 1"),
    ],
)
def test_refusals(comfy: Comfy, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        comfy.call("CVIV_SVDChunkStore", model=small_svd(comfy), **{**STORE, **changes})


KILLED = """
import os, sys, torch
sys.path.append({root!r})
from pathlib import Path
from tests.comfyui import inprocess, svd_model
from tests.comfyui.svd import small_svd
from tests.comfyui.place import make_base
base = Path({base!r})
comfy = inprocess.start(base if base.exists() else make_base(base))
model = small_svd(comfy)
calls = []
network = model.model.diffusion_model
forward = network.forward
def counted(*arguments, **keywords):
    calls.append(1)
    if len(calls) == {limit}:
        os._exit(9)
    return forward(*arguments, **keywords)
network.forward = counted
long = svd_model.long_model(comfy, model, 32, mode="continuation", anchor="moving", drift_control=0.5)
long, _ = comfy.call("CVIV_SVDChunkStore", model=long, name={name!r}, regenerate_from=1, seeds="")
conds = svd_model.conditions(svd_model.random_images())
result = svd_model.ksampler(comfy, long, conds, svd_model.empty(32, 8), steps=1)
torch.save((len(calls), result), {result!r})
"""


def test_it_goes_on_in_another_process(comfy: Comfy, tmp_path: Path) -> None:
    """Killed in chunk 4; a new process, with a model loaded anew, makes chunks 4 and 5 alone."""

    def run(name: str, limit: int) -> int:
        told = {"root": str(ROOT), "base": str(tmp_path / "base"), "limit": limit, "name": name}
        code = KILLED.format(**told, result=str(tmp_path / name))
        return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode

    assert run("whole", -1) == 0
    assert run("cut", 4) == 9
    assert run("cut", -1) == 0
    (all_calls, whole), (calls, cut) = (torch.load(tmp_path / name) for name in ("whole", "cut"))
    assert (all_calls, calls) == (5, 2)
    assert torch.equal(cut, whole)
