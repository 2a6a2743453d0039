"""SVD Long Video in ComfyUI's samplers: what each window and chunk is given, and what is made of the results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .inprocess import CancelledRunError, Comfy, NodeError, RefusedError
from .svd import small_svd
from .svd_model import (
    LATENTS,
    LONG,
    SCALE,
    SPANS,
    Call,
    conditions,
    custom_sampler,
    empty,
    function_svd,
    image_itself,
    indices,
    ksampler,
    long_model,
    random_images,
    spread,
)

SAMPLERS = ["euler", "dpmpp_2m", "heun", "dpmpp_sde"]  # of one stage and of two, with noise and without
FUSES = ["pyramid", "overlap-linear", "random"]
ALL_ON = {"noise": "FreeNoise", "drift_control": 1.0, "time_offset": True, "anchor": "moving", "crossfade": 1}


def one_more(call: Call) -> Tensor:
    """A network that adds one to its image, on the wire's scale."""
    return spread((call.image + 1) * SCALE, call)


# -------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("mode", ["windows", "continuation"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clip_of_one_window_is_untouched(comfy: Comfy, mode: str, sampler: str) -> None:
    model, conds = small_svd(comfy), conditions(random_images())
    plain = ksampler(comfy, model, conds, empty(8, 8), sampler)
    patched = long_model(comfy, model, 8, mode=mode, **ALL_ON)
    assert torch.equal(ksampler(comfy, patched, conds, empty(8, 8), sampler), plain)
    assert torch.equal(ksampler(comfy, model, conds, empty(8, 8), sampler), plain)


def test_windows_see_their_part(comfy: Comfy) -> None:
    model, network = function_svd(comfy, image_itself)
    conds = conditions(indices(LATENTS), torch.arange(101.0, 101 + LATENTS))
    patched = long_model(comfy, model, LATENTS)
    ksampler(comfy, patched, conds, empty(LATENTS), steps=2)
    assert len(network.calls) == 2 * len(SPANS)
    for call, (start, stop) in zip(network.calls, SPANS * 2, strict=True):
        assert call.frames == 8
        assert call.start == start
        assert call.image.tolist() == [index + 1 for index in range(start, stop)]
        assert call.context.tolist() == [index + 101 for index in range(start, stop)]


@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize("changes", [{}, {"window_schedule": "moving"}, {"mode": "loop"}, {"wide_steps": 0.5}])
def test_windows_of_a_function_of_each_frame_change_nothing(comfy: Comfy, fuse: str, changes: dict[str, Any]) -> None:
    model, _ = function_svd(comfy, image_itself)
    conds = conditions(indices(LATENTS))
    plain = ksampler(comfy, model, conds, empty(LATENTS))
    windowed = ksampler(comfy, long_model(comfy, model, LATENTS, fuse=fuse, **changes), conds, empty(LATENTS))
    assert (windowed - plain).abs().max() < 1e-5 * plain.abs().max()
    assert (windowed - 2.5 * indices(LATENTS)).abs().max() < 1e-2  # CFG 2.5 over a negative of zeros


def test_every_sampler(comfy: Comfy) -> None:
    model, _ = function_svd(comfy, image_itself)
    conds = conditions(indices(LATENTS))
    patched = {mode: long_model(comfy, model, LATENTS, mode=mode) for mode in ("windows", "continuation")}
    patched["moving"] = long_model(comfy, model, LATENTS, window_schedule="moving", fuse="random", wide_steps=0.5)
    patched["loop"] = long_model(comfy, model, LATENTS, mode="loop", window_schedule="moving")
    for sampler in comfy.module("comfy.samplers").KSampler.SAMPLERS:
        plain = ksampler(comfy, model, conds, empty(LATENTS), sampler, steps=4)
        for mode in patched:  # frames are independent here, so neither mode may change one
            result = ksampler(comfy, patched[mode], conds, empty(LATENTS), sampler, steps=4)
            worst = (result - plain).abs().max() / plain.abs().max()
            assert worst < 1e-4, f"{sampler}, {mode}: {worst:.1e}"


@pytest.mark.parametrize("changes", [{"mode": "windows"}, {"mode": "loop"}, {"mode": "continuation", "resamples": 2}])
def test_a_seed_gives_the_same_clip(comfy: Comfy, changes: dict[str, Any]) -> None:
    model, conds = small_svd(comfy), conditions(random_images(size=4))
    patched = long_model(comfy, model, LATENTS, fuse="random", window_schedule="moving", **{**ALL_ON, **changes})
    first, other, again = (ksampler(comfy, patched, conds, empty(LATENTS), steps=2, seed=seed) for seed in (3, 4, 3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_windows_fuse_by_weight(comfy: Comfy) -> None:
    schedule = comfy.pack("nodes.svd.schedule").Schedule(length=8, overlap=2, fuse="pyramid", moving=False, loop=False)
    model, _ = function_svd(comfy, lambda call: spread(torch.full((call.frames,), call.start * SCALE), call))
    patched = long_model(comfy, model, LATENTS)
    result = ksampler(comfy, patched, conditions(indices(1)), empty(LATENTS), cfg=1.0)
    wanted = torch.zeros(LATENTS)
    for window in schedule.windows(LATENTS, 0, 0):
        wanted[list(window.latents)] += window.weights * window.latents[0]
    assert (result[:, 0, 0, 0] - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("mode", ["windows", "continuation"])
def test_keyframes(comfy: Comfy, mode: str) -> None:
    model, network = function_svd(comfy, image_itself)
    patched = long_model(comfy, model, LATENTS, mode=mode)
    ksampler(comfy, patched, conditions(indices(4)), empty(LATENTS), steps=1)
    held = [1.0] * 5 + [2.0] * 5 + [3.0] * 5 + [4.0] * 5
    assert [call.image.tolist() for call in network.calls] == [held[start:stop] for start, stop in SPANS]


def test_windows_follow_their_own_estimate(comfy: Comfy) -> None:
    model, network = function_svd(comfy, one_more)
    patched = long_model(comfy, model, LATENTS, anchor="moving", overlap=0, window_length=10)
    ksampler(comfy, patched, conditions(indices(1)), empty(LATENTS), steps=8, cfg=1.0)
    early = [call for call in network.calls if call.sigma >= 5]
    late = [call for call in network.calls if call.sigma < 5]
    assert early
    assert late
    assert {value for call in early for value in call.image.tolist()} == {1.0}
    assert {value for call in late if call.start == 0 for value in call.image.tolist()} == {1.0}
    followed = [call.image for call in late if call.start == 10]
    for step, image in enumerate(followed):  # each step's image is the last step's estimate, which adds one
        assert image.tolist() == pytest.approx([step + 2.0] * 10, rel=1e-4)


# --------------------------------------------------------------------------------------------------------- continuation


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_chunks_are_runs_of_the_sampler(comfy: Comfy, sampler: str) -> None:
    model, conds = small_svd(comfy), conditions(random_images())
    patched = long_model(comfy, model, LATENTS, mode="continuation")
    result = ksampler(comfy, patched, conds, empty(LATENTS, 8), sampler, steps=2)
    sample = comfy.module("comfy.sample")
    noise = sample.prepare_noise(torch.zeros(LATENTS, 4, 8, 8), 42)
    by_hand = torch.zeros(LATENTS, 4, 8, 8)
    with torch.inference_mode():
        for number, (start, stop) in enumerate(SPANS):
            latent, mask = torch.zeros(8, 4, 8, 8), torch.ones(8, 1, 8, 8)
            if number:
                latent[:2], mask[:2] = by_hand[start : start + 2], 0
            chunk = sample.sample(
                model, noise[start:stop], 2, 2.5, sampler, "karras", *conds, latent,
                noise_mask=mask if number else None, seed=42 + number,
            )  # fmt: skip
            by_hand[start + 2 * bool(number) : stop] = chunk[2 * bool(number) :]
    assert torch.equal(result, by_hand)


def test_anchor(comfy: Comfy) -> None:
    def climbing(call: Call) -> Tensor:
        return spread((call.image + 1 + 0.01 * torch.arange(call.frames)) * SCALE, call)

    model, network = function_svd(comfy, climbing)
    conds = conditions(indices(1))
    first = long_model(comfy, model, LATENTS, mode="continuation")
    result = ksampler(comfy, first, conds, empty(LATENTS), cfg=1.0)[:, 0, 0, 0]
    climb = [0.01 * place for place in (*range(8), *range(2, 8), *range(2, 8))]
    assert result.tolist() == pytest.approx([2 + more for more in climb], rel=1e-4)
    network.calls.clear()
    moving = long_model(comfy, model, LATENTS, mode="continuation", anchor="moving")
    result = ksampler(comfy, moving, conds, empty(LATENTS), cfg=1.0)[:, 0, 0, 0]
    images = [1.0, float(result[6]), float(result[12])]  # later chunks start from their first kept latent
    assert [call.image.tolist() for call in network.calls[::3]] == [[image] * 8 for image in images]
    levels = [images[0] + 1] * 8 + [images[1] + 1] * 6 + [images[2] + 1] * 6
    wanted = [level + more for level, more in zip(levels, climb, strict=True)]
    assert result.tolist() == pytest.approx(wanted, rel=1e-4)


def test_crossfade(comfy: Comfy) -> None:
    model, _ = function_svd(comfy, one_more)
    patched = long_model(comfy, model, 12, mode="continuation", anchor="moving", carry=4, crossfade=3)
    result = ksampler(comfy, patched, conditions(indices(1)), empty(12), cfg=1.0)
    ramp = [2.0] * 5 + [2.25, 2.5, 2.75] + [3.0] * 4
    assert result[:, 0, 0, 0].tolist() == pytest.approx(ramp, rel=1e-3)


def test_noise_mask_of_the_user(comfy: Comfy) -> None:
    model, _ = function_svd(comfy, one_more)
    latent = {"samples": torch.full((LATENTS, 4, 4, 4), 9.0), "noise_mask": torch.ones(LATENTS, 1, 32, 32)}
    latent["noise_mask"][3:5] = 0
    latent["noise_mask"][17:] = 0
    patched = long_model(comfy, model, LATENTS, mode="continuation")
    result = ksampler(comfy, patched, conditions(indices(1)), latent, cfg=1.0)[:, 0, 0, 0]
    wanted = [2.0] * 3 + [9.0] * 2 + [2.0] * 12 + [9.0] * 3
    assert result.tolist() == pytest.approx(wanted, rel=1e-4)


def test_kept_latents_have_noise_in_a_second_stage(comfy: Comfy) -> None:
    model, network = function_svd(comfy, image_itself)
    patched = long_model(comfy, model, 12, mode="continuation", carry=4)
    positive, negative = conditions(indices(1))
    common: dict[str, Any] = {
        "model": patched, "positive": positive, "negative": negative, "noise_seed": 42, "steps": 8, "cfg": 1.0,
        "sampler_name": "euler", "scheduler": "karras",
    }  # fmt: skip
    (first,) = comfy.call(
        "KSamplerAdvanced", latent_image=empty(12), add_noise="enable", start_at_step=0, end_at_step=5,
        return_with_leftover_noise="enable", **common,
    )  # fmt: skip
    network.calls.clear()
    (second,) = comfy.call(
        "KSamplerAdvanced", latent_image=first, add_noise="disable", start_at_step=5, end_at_step=8,
        return_with_leftover_noise="disable", **common,
    )  # fmt: skip
    entered = network.calls[3]  # the first step of the second chunk
    root = (entered.sigma**2 + 1) ** 0.5
    kept, new = (entered.x * root / entered.sigma - SCALE / entered.sigma).split(4)
    assert kept.std() == pytest.approx(1, abs=0.2)
    assert new.std() == pytest.approx(1, abs=0.2)
    assert (second["samples"] - 1).abs().max() < 1e-2


# ---------------------------------------------------------------------------------------------------- all of the clip


@pytest.mark.parametrize("mode", ["windows", "continuation"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_a_hundred_latents(comfy: Comfy, mode: str, sampler: str) -> None:
    model, conds = small_svd(comfy), conditions(random_images(size=4))
    patched = long_model(comfy, model, 100, mode=mode, window_length=25, overlap=6, carry=4)
    result = ksampler(comfy, patched, conds, empty(100), sampler, steps=2)
    assert result.shape == (100, 4, 4, 4)
    assert torch.isfinite(result).all()
    assert result.std() > 0.1


@pytest.mark.parametrize("mode", ["windows", "continuation"])
def test_custom_sampler(comfy: Comfy, mode: str) -> None:
    model, conds = small_svd(comfy), conditions(random_images())
    patched = long_model(comfy, model, LATENTS, mode=mode)
    output, denoised = custom_sampler(comfy, patched, conds, empty(LATENTS, 8))
    assert torch.equal(output, ksampler(comfy, patched, conds, empty(LATENTS, 8)))
    assert (denoised - output).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------- progress, cancel, memory


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("mode", ["windows", "continuation"])
def test_progress_and_previews(comfy: Comfy, mode: str, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preview, arguments = comfy.module("latent_preview"), comfy.module("comfy.cli_args")
    method = arguments.LatentPreviewMethod.Latent2RGB
    monkeypatch.setattr(arguments.args, "preview_method", method)
    monkeypatch.setattr(preview, "default_preview_method", method, raising=False)  # newer ComfyUI goes back to it
    model, _ = function_svd(comfy, image_itself)
    patched = long_model(comfy, model, LATENTS, mode=mode)
    ksampler(comfy, patched, conditions(indices(1)), empty(LATENTS), sampler, steps=3)
    reports = [report for report in comfy.progress if report.total == 9]
    values = [report.value for report in reports]
    assert values == sorted(values)
    pictures = [report.value for report in reports if report.preview is not None]
    if mode == "windows":
        assert pictures == [3, 6, 9]
        assert values[0] == 1  # after the first window; newer ComfyUI leaves out reports that come faster than pictures
    else:
        assert pictures == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]  # at last the whole clip


@pytest.mark.parametrize("mode", ["windows", "continuation"])
def test_cancel(comfy: Comfy, mode: str) -> None:
    def cancelling(call: Call) -> Tensor:
        if len(network.calls) == limit:
            comfy.module("nodes").interrupt_processing(True)
        return image_itself(call)

    limit = -1
    model, network = function_svd(comfy, cancelling)
    patched = long_model(comfy, model, LATENTS, mode=mode, **ALL_ON)
    conds = conditions(indices(1))
    whole = ksampler(comfy, patched, conds, empty(LATENTS))
    assert len(network.calls) == 9
    limit = 14
    with pytest.raises(CancelledRunError):
        ksampler(comfy, patched, conds, empty(LATENTS), seed=43)
    assert len(network.calls) == 14  # the window after it was not begun
    limit = -1
    assert torch.equal(ksampler(comfy, patched, conds, empty(LATENTS)), whole)
    assert not [name for name in patched.model_options["transformer_options"] if name.startswith("cviv")]


@pytest.mark.parametrize("mode", ["windows", "continuation"])
def test_memory_of_one_window_is_asked_for(comfy: Comfy, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, network = function_svd(comfy, image_itself)
    asked: list[int] = []
    required = model.model.memory_required

    def watched(input_shape: Any, *arguments: Any, **other: Any) -> Any:
        asked.append(input_shape[0])
        return required(input_shape, *arguments, **other)

    monkeypatch.setattr(model.model, "memory_required", watched)
    patched = long_model(comfy, model, LATENTS, mode=mode)
    ksampler(comfy, patched, conditions(indices(1)), empty(LATENTS))
    assert asked
    assert max(asked) <= 16  # positive and negative of a window
    assert {call.batch for call in network.calls} == {16}


def test_second_node_takes_the_place_of_the_first(comfy: Comfy) -> None:
    model, network = function_svd(comfy, image_itself)
    once = long_model(comfy, model, LATENTS, window_length=10, overlap=0)
    twice = long_model(comfy, once, LATENTS)
    conds = conditions(indices(1))
    ksampler(comfy, twice, conds, empty(LATENTS), steps=1)
    assert [call.frames for call in network.calls] == [8, 8, 8]
    network.calls.clear()
    ksampler(comfy, once, conds, empty(LATENTS), steps=1)
    assert [call.frames for call in network.calls] == [10, 10]
    assert not any("cviv_svd_long" in hooks for hooks in model.wrappers.values())


# ------------------------------------------------------------------------------------------------- picture and refusals


def test_picture_and_report(comfy: Comfy) -> None:
    latent = {**empty(45), "cviv": {"family": "cv-vae", "fps": "24", "frames": 175, "layout": "frames"}}
    widgets = {**LONG, "window_length": 25, "overlap": 6}
    _, picture, report = comfy.call("CVIV_SVDLongVideo", model=small_svd(comfy), samples=latent, **widgets)
    assert picture.shape[0] == 1
    assert picture.shape[3] == 3
    assert 0 <= picture.min() < picture.max() <= 1
    assert "45 latents, 175 frames, 7.3 s at 24 frames per second" in report
    assert "3 windows in every step, 25 latents each: 0-24, 10-34, 20-44" in report
    assert "work of 75 latents (1.67 times the clip), memory of 25" in report
    assert "up to 63 latents (249 frames); 44 latents (173 frames) need one less" in report
    _, other, report = comfy.call(
        "CVIV_SVDLongVideo", model=small_svd(comfy), samples=latent, **{**widgets, "mode": "continuation"}
    )
    assert not torch.equal(picture, other)
    assert "chunks, one after another" in report


@pytest.mark.parametrize(
    ("latent", "changes", "message"),
    [
        ({**empty(20), "cviv": {"family": "iv-vae"}}, {}, r"made by iv-vae, whose latent space is not SVD's.*encode"),
        ({"samples": torch.zeros(1, 4, 20, 4, 4)}, {}, r"shape \(1, 4, 20, 4, 4\).*Latent Layout"),
        ({"samples": torch.zeros(20, 16, 4, 4)}, {}, r"SVD samples \(frames, 4, height, width\)"),
        (empty(20), {"overlap": 8}, r"overlap is 8 and window_length 8; allowed are 0 to 7"),
        (empty(20), {"mode": "continuation", "carry": 9}, r"carry is 9 and window_length 8; allowed are 1 to 7"),
    ],
    ids=["iv-vae", "5-D", "16 channels", "overlap", "carry"],
)
def test_refusals(comfy: Comfy, latent: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NodeError, match=message):
        comfy.call("CVIV_SVDLongVideo", model=small_svd(comfy), samples=latent, **{**LONG, **changes})


def test_a_choice_that_is_gone_names_those_there_are(comfy: Comfy) -> None:
    """ComfyUI replaces nodes, not values: a workflow saved with fuse linear is refused, before or in the run."""
    with pytest.raises((NodeError, RefusedError)) as caught:
        comfy.call("CVIV_SVDLongVideo", model=small_svd(comfy), samples=empty(20), **{**LONG, "fuse": "linear"})
    assert all(choice in str(caught.value) for choice in ("fuse", "linear", *FUSES))


def test_other_models_are_refused(comfy: Comfy) -> None:
    with pytest.raises(NodeError, match=r"works on SVD.*Image Only Checkpoint Loader"):
        comfy.call("CVIV_SVDLongVideo", model=object(), samples=empty(20), **LONG)


def test_comfyuis_own_context_windows(comfy: Comfy) -> None:
    """Newer ComfyUI samples SVD by Context Windows (Manual) without its causal fix; ours, kept still, are the same."""
    stock = comfy.nodes["ContextWindowsManual"]
    names = [one.id for one in stock.GET_SCHEMA().inputs]
    if "causal_window_fix" not in names:
        pytest.skip("this version of ComfyUI has no context windows that SVD can use")
    model, conds = small_svd(comfy), conditions(random_images())
    widgets = {
        "context_length": 8, "context_overlap": 2, "context_schedule": "standard_static", "context_stride": 1,
        "closed_loop": False, "fuse_method": "pyramid", "dim": 0, "freenoise": False, "cond_retain_index_list": "",
        "split_conds_to_windows": False, "latent_retain_index_list": "", "causal_window_fix": False,
    }  # fmt: skip
    (windowed,) = comfy.call("ContextWindowsManual", model=model, **widgets)
    theirs = ksampler(comfy, windowed, conds, empty(LATENTS, 8))
    ours = ksampler(comfy, long_model(comfy, model, LATENTS), conds, empty(LATENTS, 8))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
