"""What later chunks of SVD are told: their image, their motion, the hints of a ControlNet; and steps made in rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .inprocess import Comfy, NodeError
from .svd import small_svd
from .svd_model import (
    LONG,
    SCALE,
    Call,
    conditions,
    empty,
    function_svd,
    indices,
    ksampler,
    long_model,
    random_images,
    small_clip_vision,
    small_image_vae,
    spread,
)

LATENTS = 20
SPANS = [(0, 8), (6, 14), (12, 20)]


def climbing(call: Call) -> Tensor:
    """A network whose chunks rise from the image that each latent is shown."""
    return spread((call.image + 1 + 0.01 * torch.arange(call.frames)) * SCALE, call)


@pytest.fixture(scope="module")
def readers(loaded: Comfy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("clip")
    return {"image_vae": small_image_vae(loaded), "clip_vision": small_clip_vision(loaded, folder)}


def test_every_carried_latent_in_its_place(comfy: Comfy) -> None:
    model, network = function_svd(comfy, climbing)
    patched = long_model(comfy, model, LATENTS, mode="continuation", anchor="all carried", carry=2)
    result = ksampler(comfy, patched, conditions(indices(1)), empty(LATENTS), steps=1, cfg=1.0)[:, 0, 0, 0]
    seen = [call.image for call in network.calls]
    assert seen[0].tolist() == [1.0] * 8
    for image, (start, _) in zip(seen[1:], SPANS[1:], strict=True):
        assert torch.allclose(image[:2], result[start : start + 2], rtol=1e-4)
        assert torch.allclose(image[2:], result[start + 1].expand(6), rtol=1e-4)


def test_by_way_of_a_picture(comfy: Comfy, readers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    vae, clip = readers["image_vae"], readers["clip_vision"]
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls.append(name)
            return function(*arguments, **keywords)

        return call

    model, network = function_svd(comfy, climbing)
    patched, _, _ = comfy.call(
        "CVIV_SVDLongVideo", model=model, samples=empty(LATENTS),
        **{**LONG, "mode": "continuation", "anchor": "re-encoded"}, **readers,
    )  # fmt: skip
    with monkeypatch.context() as patches:
        for kind, name, told in ((vae, "decode", "decode"), (vae, "encode", "encode"), (clip, "encode_image", "see")):
            patches.setattr(type(kind), name, counted(told, getattr(type(kind), name)))
        result = ksampler(comfy, patched, conditions(indices(1)), empty(LATENTS), steps=2)
        assert calls == ["decode", "encode", "see"] * 2  # once for each later chunk
        made = len(network.calls)
        again = ksampler(comfy, patched, conditions(indices(1)), empty(LATENTS), steps=2)
        assert torch.equal(again, result)
        assert len(calls) == 6  # what was finished is not read anew
        assert len(network.calls) == made
    for number, (start, _) in enumerate(SPANS):
        call = network.calls[2 * number]
        if not number:
            assert call.context.tolist() == [1.0] * 8
            continue
        with torch.inference_mode():
            picture = vae.decode(result[start : start + 1])[..., :3]
            image, seen = vae.encode(picture), clip.encode_image(picture).image_embeds
        assert call.image[0] == pytest.approx(float(image[0, 0, 0, 0]), rel=1e-4)
        assert call.context[0] == pytest.approx(float(seen[0, 0]), rel=1e-4)


def test_a_picture_needs_its_models(comfy: Comfy, readers: dict[str, Any]) -> None:
    widgets = {**LONG, "mode": "continuation", "anchor": "re-encoded"}
    with pytest.raises(NodeError, match=r"nothing is connected to image_vae and clip_vision.*anchor moving"):
        comfy.call("CVIV_SVDLongVideo", model=small_svd(comfy), samples=empty(LATENTS), **widgets)
    with pytest.raises(NodeError, match=r"nothing is connected to clip_vision"):
        comfy.call(
            "CVIV_SVDLongVideo",
            model=small_svd(comfy),
            samples=empty(LATENTS),
            image_vae=readers["image_vae"],
            **widgets,
        )


# --------------------------------------------------------------------------------------------------------------- motion


@pytest.mark.parametrize("slowing", [0.85, 0.6])
def test_motion_is_kept_up(comfy: Comfy, slowing: float) -> None:
    """A network that slows down from chunk to chunk, and moves as its motion bucket and rate say."""
    pattern = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    embed = comfy.module("comfy.model_base").Timestep(256)
    numbers = torch.cat([embed(torch.tensor([float(number)])) for number in range(256)])
    told: list[tuple[int, int]] = []

    def moving(call: Call) -> Tensor:
        less_one, bucket = (
            int((numbers - call.told[start : start + 256]).square().sum(1).argmin()) for start in (0, 256)
        )
        told.append((bucket, less_one + 1))
        speed = bucket / 127 * 6 / (less_one + 1) * slowing ** (call.start // 6)
        where = call.start + torch.arange(call.frames)
        return (pattern[:1] + speed * 0.1 * pattern[where]) * SCALE

    model, _ = function_svd(comfy, moving)

    def speeds(steady: bool) -> list[float]:
        told.clear()
        patched = long_model(comfy, model, 32, mode="continuation", steady_motion=steady)
        result = ksampler(comfy, patched, conditions(random_images(size=4)), empty(32), steps=1, cfg=1.0)
        change = result.diff(dim=0).square().mean((1, 2, 3)).sqrt()
        return [float(part.mean()) for part in (change[:7], change[9:13], change[15:19], change[21:25], change[27:31])]

    falling = speeds(False)
    assert told == [(127, 6)] * 5
    assert falling[-1] < 0.6 * falling[0]
    kept = speeds(True)
    assert told[0] == (127, 6)
    buckets, rates = ([one[which] for one in told] for which in (0, 1))
    assert buckets == sorted(buckets)
    if slowing == 0.85:  # the bucket is enough
        assert rates == [6] * 5
        assert kept[-1] > 0.8 * kept[0]
    else:
        assert told[-1] == (255, 5)  # all that SVD knows
        assert kept[-1] > 2 * falling[-1]


def test_motion_of_latents(comfy: Comfy) -> None:
    motion = comfy.pack("nodes.svd.motion")
    still = torch.randn(1, 4, 8, 8).expand(6, -1, -1, -1)
    assert motion.motion_of(still) == 0
    assert motion.motion_of(still + torch.arange(6.0).reshape(-1, 1, 1, 1)) == pytest.approx(0, abs=1e-6)  # brighter
    assert motion.motion_of(torch.randn(6, 4, 8, 8)) == pytest.approx(2**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("bucket", "rate", "motions", "wanted"),
    [
        (127, 6, [1.0], (127, 6)),
        (100, 6, [1.0, 0.8], (125, 6)),
        (200, 12, [1.0, 0.8, 0.9], (255, 11)),  # the bucket is at its end: the rate goes on
        (200, 12, [1.0, 0.1, 0.1, 0.1], (255, 5)),
        (200, 12, [1.0, 0.1, 0.1, 0.1, 2.0], (255, 10)),  # and comes back first
        (2, 12, [1.0, 2.0, 2.0, 2.0, 2.0], (1, 30)),
        (300, 4, [1.0, 1.0], (300, 4)),  # what the user told is kept
        (127, 6, [0.0, 1.0], (127, 6)),
    ],
)
def test_what_the_next_chunk_is_told(
    comfy: Comfy, bucket: int, rate: int, motions: list[float], wanted: tuple[int, int]
) -> None:
    assert comfy.pack("nodes.svd.motion").told_for(bucket, rate, motions) == wanted


# -------------------------------------------------------------------------------------------------------------- hints


class Control:
    """What ComfyUI needs of a ControlNet. calls: the hints of each call."""

    def __init__(self, comfy: Comfy, hint: Tensor) -> None:
        base = comfy.module("comfy.controlnet").ControlBase
        calls: list[Tensor] = []

        class Fake(base):
            def get_control(self, x_noisy: Tensor, t: Any, cond: Any, batched_number: int, options: Any = None) -> Any:
                before = self.previous_controlnet
                if before is not None:
                    before.get_control(x_noisy, t, cond, batched_number, options)
                calls.append(self.cond_hint_original[:, 0, 0, 0])
                return None

            def get_models(self) -> list[Any]:
                return []

            def copy(self) -> Any:
                made = Fake()
                self.copy_to(made)
                return made

        self.calls, self.net = calls, Fake()
        self.net.cond_hint_original = hint


def with_control(conds: tuple[Any, Any], control: Any) -> tuple[Any, Any]:
    ((embeds, told),) = conds[0]
    return [[embeds, {**told, "control": control}]], conds[1]


@pytest.mark.parametrize("mode", ["windows", "continuation"])
@pytest.mark.parametrize("hints", [1, LATENTS, 4 * LATENTS - 3])
def test_a_hint_for_each_latent(comfy: Comfy, mode: str, hints: int) -> None:
    model, _ = function_svd(comfy, climbing)
    control = Control(comfy, torch.arange(float(hints)).reshape(-1, 1, 1, 1).expand(-1, 3, 32, 32))
    chained = Control(comfy, torch.full((1, 3, 32, 32), 7.0))
    control.net.set_previous_controlnet(chained.net)
    conds = with_control(conditions(indices(1)), control.net)
    ksampler(comfy, long_model(comfy, model, LATENTS, mode=mode), conds, empty(LATENTS), steps=1, cfg=1.0)
    step = 1 if hints == LATENTS else 4
    wanted = [[0.0]] * 3 if hints == 1 else [[float(step * place) for place in range(*span)] for span in SPANS]
    assert [call.tolist() for call in control.calls] == wanted
    assert [call.tolist() for call in chained.calls] == [[7.0]] * 3
    assert control.net.cond_hint_original.shape[0] == hints


def test_hints_that_fit_nothing(comfy: Comfy) -> None:
    model, _ = function_svd(comfy, climbing)
    conds = with_control(conditions(indices(1)), Control(comfy, torch.zeros(8, 3, 32, 32)).net)
    with pytest.raises(
        NodeError, match=r"ControlNet has 8 pictures and the clip 20 latents.*20 \(one for each latent\) or 77"
    ):
        ksampler(comfy, long_model(comfy, model, LATENTS), conds, empty(LATENTS), steps=1)


def small_controlnet(comfy: Comfy) -> Any:
    """A CONTROL_NET of ComfyUI that fits the small SVD, with random weights."""
    management = comfy.module("comfy.model_management")
    network = comfy.module("comfy.cldm.cldm").ControlNet(
        image_size=32, in_channels=4, model_channels=32, hint_channels=3, num_res_blocks=[1, 1], channel_mult=[1, 2],
        transformer_depth=[0, 0], transformer_depth_middle=-1, use_spatial_transformer=True, context_dim=1024,
        num_head_channels=32, legacy=False, adm_in_channels=768, num_classes="sequential",
        operations=comfy.module("comfy.ops").disable_weight_init,
    ).requires_grad_(False)  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return comfy.module("comfy.controlnet").ControlNet(network, load_device=management.get_torch_device())


@pytest.mark.parametrize("mode", ["windows", "continuation"])
@pytest.mark.parametrize("frames", [16, 61])
def test_a_real_controlnet(comfy: Comfy, mode: str, frames: int) -> None:
    """Two windows without overlap, or two chunks: each as ComfyUI samples it by itself with its own hints."""
    model, conds = small_svd(comfy), conditions(random_images())
    hints = torch.rand(frames, 1, 1, 3, generator=torch.Generator().manual_seed(5)).repeat(1, 64, 64, 1)
    control = small_controlnet(comfy)
    widgets = {"control_net": control, "strength": 10.0, "start_percent": 0.0, "end_percent": 1.0}

    def with_hints(chosen: Tensor) -> tuple[Any, Any]:
        return comfy.call("ControlNetApplyAdvanced", positive=conds[0], negative=conds[1], image=chosen, **widgets)

    carry = 1 if mode == "continuation" else 0
    latents = 16 - carry
    each = hints[:latents] if frames == 16 else hints[: 4 * latents - 3]
    patched = long_model(comfy, model, latents, mode=mode, overlap=0, carry=1)
    batches: list[int] = []
    watch = control.control_model.register_forward_pre_hook(
        lambda _, __, inputs: batches.append(inputs["x"].shape[0]), with_kwargs=True
    )
    result = ksampler(comfy, patched, with_hints(each), empty(latents, 8), steps=2)
    assert batches == [16] * 4  # positive and negative together
    if mode == "continuation":  # finished chunks know their hints
        assert torch.equal(ksampler(comfy, patched, with_hints(each), empty(latents, 8), steps=2), result)
        assert len(batches) == 4
        ksampler(comfy, patched, with_hints(each.flip(0)), empty(latents, 8), steps=2)
        assert len(batches) == 8
    watch.remove()
    sample = comfy.module("comfy.sample")
    noise = sample.prepare_noise(torch.zeros(latents, 4, 8, 8), 42)
    for number, start in enumerate((0, 8 - carry)):
        own = each[:: 1 if frames == 16 else 4][start : start + 8]
        latent, mask = torch.zeros(8, 4, 8, 8), torch.ones(8, 1, 8, 8)
        if number and carry:
            latent[:1], mask[:1] = result[start : start + 1], 0
        with torch.inference_mode():
            wanted = sample.sample(
                model, noise[start : start + 8], 2, 2.5, "euler", "karras", *with_hints(own), latent,
                noise_mask=mask if number and carry else None, seed=42,
            )  # fmt: skip
        assert (result[start : start + 8] - wanted).abs().max() < 2e-5 * wanted.abs().max()
        if not number:
            other = ksampler(comfy, model, with_hints(own.flip(0)), empty(8, 8), steps=2)
            assert (other - wanted).abs().max() > 1e-3 * wanted.abs().max()


# -------------------------------------------------------------------------------------------------------------- rounds


def test_rounds_of_later_chunks(comfy: Comfy) -> None:
    model, network = function_svd(comfy, climbing)
    conds = conditions(indices(1))
    once = ksampler(comfy, long_model(comfy, model, LATENTS, mode="continuation"), conds, empty(LATENTS), cfg=1.0)
    network.calls.clear()
    patched = long_model(comfy, model, LATENTS, mode="continuation", resamples=3)
    result = ksampler(comfy, patched, conds, empty(LATENTS), cfg=1.0)
    assert [call.start for call in network.calls] == [0] * 3 + [6] * 9 + [12] * 9
    assert (result - once).abs().max() < 1e-3  # the network does not look at the noise
    sigmas = [call.sigma for call in network.calls[3:12]]
    assert sigmas == sorted(sigmas, reverse=True)
    assert len(set(sigmas)) == 3
    with pytest.raises(NodeError, match=r"The sampler is heun, and resamples above 1.*Choose euler"):
        ksampler(comfy, patched, conds, empty(LATENTS), "heun", cfg=1.0, seed=5)


def test_rounds_keep_the_noise_level(comfy: Comfy) -> None:
    model, network = function_svd(comfy, climbing)
    patched = long_model(comfy, model, LATENTS, mode="continuation", resamples=4)
    ksampler(comfy, patched, conditions(indices(1)), empty(LATENTS, 32), steps=8, cfg=1.0)
    for call in network.calls[8:16]:
        noise = (call.x * (call.sigma**2 + 1) ** 0.5 - climbing(call)) / call.sigma
        assert float(noise.std()) == pytest.approx(1, abs=0.1)
