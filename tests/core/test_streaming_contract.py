"""The contract of every streaming layer and of all families, in float64.

Any way to cut time gives what the whole gives; a later frame never changes an earlier group; batch rows are
independent; nothing is held afterwards.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import vae_core
from vae_core.families.iv_vae import IVVAEConfig
from vae_core.families.iv_vae.layers import (
    PUBLISHED,
    AttentionBlock,
    Downsample,
    GroupedCausalConv3d,
    PixelConv,
    SeparatedConv,
    Upsample,
)
from vae_core.families.iv_vae.network import Decoder, Encoder, block
from vae_core.nn.clip import Clip
from vae_core.nn.layers import FrameConv
from vae_core.nn.steps import Context, Layer, Memory, ResidualBlock, Streaming, walk

CONFIG = IVVAEConfig(dim=8, latent_channels=4, scale_factor=1.0, shift_factor=0.0)

# layer, channels in, frames of the first group, frames of a later group
LAYERS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "separated convolution, groups of 4": (lambda: SeparatedConv(8, 3, kernel=3, parts=PUBLISHED), 8, 1, 4),
    "separated convolution, groups of 2": (lambda: SeparatedConv(8, 3, kernel=3, parts=PUBLISHED), 8, 1, 2),
    "separated convolution 1x1": (lambda: SeparatedConv(8, 3, kernel=1, parts=PUBLISHED), 8, 1, 4),
    "pixel convolution": (lambda: PixelConv(8, parts=PUBLISHED), 8, 1, 4),
    "frame convolution": (lambda: FrameConv(8, 8), 8, 1, 1),
    "residual block": (lambda: block(4, 6, PUBLISHED), 8, 1, 4),
    "residual block, 2-D": (lambda: block(4, 4, PUBLISHED, two_d=True), 8, 1, 1),
    "attention": (lambda: AttentionBlock(4), 8, 1, 1),
    "downsample": (lambda: Downsample(4, halve_time=True), 8, 1, 4),
    "downsample, space only": (lambda: Downsample(4, halve_time=False), 8, 1, 4),
    "upsample": (lambda: Upsample(8, double_time=True), 16, 1, 2),
    "encoder": (lambda: Encoder(CONFIG), 3, 1, 4),
    "decoder": (lambda: Decoder(CONFIG), 4, 1, 1),
}


def groups(x: Tensor, first: int, later: int) -> Iterator[Tensor]:
    yield x[:, :, :first]
    for start in range(first, x.shape[2], later):
        yield x[:, :, start : start + later]


def walked(module: nn.Module, x: Tensor, memory: Memory, *, plain: bool, first: bool) -> Tensor:
    assert isinstance(module, (Encoder, Decoder, ResidualBlock, Layer))
    return walk(module.steps(), Clip([x]), Context(memory=memory, first=first, plain=plain)).tensor()


def run(
    module: nn.Module, x: Tensor, first: int, later: int, *, plain: bool, memory: Memory | None = None
) -> list[Tensor]:
    memory = Memory() if memory is None else memory
    return [walked(module, g.clone(), memory, plain=plain, first=not n) for n, g in enumerate(groups(x, first, later))]


@pytest.fixture(params=list(LAYERS))
def layer(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, int, int]:
    """A layer in float64 with drawn weights, and an input of three groups."""
    make, channels, first, later = LAYERS[request.param]
    torch.manual_seed(0)
    module = make().double().eval().requires_grad_(False)
    for name, part in module.named_modules():
        if isinstance(part, Streaming):
            part.slot = name
    size = (2, 2) if isinstance(module, Decoder) else (16, 8)
    x = torch.randn(2, channels, first + 2 * later, *size, dtype=torch.float64)
    return module, x, first, later


@pytest.fixture(params=[False, True], ids=["fused", "plain"])
def plain(request: pytest.FixtureRequest) -> bool:
    """By the operators of this project, or by torch's own."""
    return request.param


Case = tuple[nn.Module, Tensor, int, int]


def test_fused_and_plain_operators_agree(layer: Case) -> None:
    module, x, first, later = layer
    fused, plain = (torch.cat(run(module, x, first, later, plain=p), dim=2) for p in (False, True))
    assert (fused - plain).abs().max() <= 1e-11 * plain.std()


def test_a_later_frame_never_changes_an_earlier_group(layer: Case, plain: bool) -> None:
    module, x, first, later = layer
    changed = x.clone()
    changed[:, :, first + later :] = torch.randn_like(changed[:, :, first + later :])
    before, after = (run(module, clip, first, later, plain=plain) for clip in (x, changed))
    assert all(torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True))
    assert not torch.equal(before[2], after[2])


def test_batch_rows_are_independent(layer: Case, plain: bool) -> None:
    module, x, first, later = layer
    together = torch.cat(run(module, x, first, later, plain=plain), dim=2)
    alone = torch.cat([torch.cat(run(module, row[None], first, later, plain=plain), dim=2) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_a_layer_holds_nothing_and_a_fresh_memory_starts_over(layer: Case, plain: bool) -> None:
    module, x, first, later = layer
    before = set(vars(module)), {name for name, _ in module.named_buffers()}
    memory = Memory()
    once, twice = (run(module, x, first, later, plain=plain, memory=m) for m in (memory, Memory()))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    assert before == (set(vars(module)), {name for name, _ in module.named_buffers()})
    assert set(memory) <= {m.slot for m in module.modules() if isinstance(m, Streaming)}


def test_memory_keeps_one_frame_per_convolution_and_not_the_group(layer: Case, plain: bool) -> None:
    module, x, first, later = layer
    memory = Memory()
    run(module, x, first, later, plain=plain, memory=memory)
    for slot in memory:
        kept = memory.get(slot, torch.device("cpu"))
        assert kept is not None
        assert kept.shape[2] == 1
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_grouped_causal_convolution_is_the_published_one(plain: bool) -> None:
    """Every group: [last frame before it, the group, a zero frame]; the first frame: [x, x, zero]."""
    torch.manual_seed(0)
    separated = SeparatedConv(3, 2, kernel=3, parts=PUBLISHED).double().requires_grad_(False)
    conv, frames = separated.conv_3d, separated.conv_2d
    assert frames is not None
    assert isinstance(conv, GroupedCausalConv3d)
    x = torch.randn(1, 3, 9, 6, 5, dtype=torch.float64)
    zero = torch.zeros_like(x[:, :, :1])

    def published(before: Tensor, group: Tensor) -> Tensor:
        single = [nn.functional.conv2d(frame, frames.weight, frames.bias, padding=1) for frame in group.unbind(2)]
        padded = torch.cat((before, group, zero), dim=2)
        later = nn.functional.conv3d(padded, conv.weight, conv.bias, padding=(0, 1, 1))
        return torch.cat((torch.stack(single, dim=2), later), dim=1)

    expected = [
        published(x[:, :, :1], x[:, :, :1]),
        published(x[:, :, :1], x[:, :, 1:5]),
        published(x[:, :, 4:5], x[:, :, 5:9]),
    ]
    torch.testing.assert_close(run(separated, x, 1, 4, plain=plain), expected, rtol=1e-13, atol=1e-13)


# ---------------------------------------------------------------------------------------------------- models

CUTS = [(33,), (1,) * 33, (1, 4, 4, 4, 4, 4, 4, 4, 4), (17, 16), (16, 17), (7, 0, 26), (2, 3, 5, 7, 11, 5)]
LATENT_CUTS = [(9,), (1,) * 9, (5, 4), (4, 5), (2, 0, 7), (8, 1)]


def cut(x: Tensor, lengths: tuple[int, ...]) -> Iterator[Tensor]:
    assert sum(lengths) == x.shape[2]
    return iter(x.split(list(lengths), dim=2))


def test_any_cut_of_the_frames_encodes_to_the_same(family: str, small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    video = torch.randn(1, 3, 33, 16, 24, dtype=torch.float64)
    expected = vae.encode(video)
    assert expected.shape == (1, vae.info.latent_channels, vae.info.compression.latent_frames(33), 2, 3)
    for lengths in CUTS:
        assert torch.equal(torch.cat(list(vae.encode_stream(cut(video, lengths))), dim=2), expected), lengths


def test_any_cut_of_the_latent_decodes_to_the_same(family: str, small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    latent = torch.randn(1, vae.info.latent_channels, 9, 2, 3, dtype=torch.float64)
    expected = vae.decode(latent)
    assert expected.shape == (1, 3, vae.info.compression.pixel_frames(9), 16, 24)
    for lengths in LATENT_CUTS:
        assert torch.equal(torch.cat(list(vae.decode_stream(cut(latent, lengths))), dim=2), expected), lengths
    assert torch.equal(torch.cat(list(vae.decode_stream(latent)), dim=2), expected)


def test_draws_from_the_posterior_do_not_depend_on_the_cut(
    family: str, small_vae: Callable[..., vae_core.VideoVAE]
) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    video = torch.randn(1, 3, 33, 8, 8, dtype=torch.float64)
    expected = vae.encode(video, sample=True, generator=torch.Generator().manual_seed(7))
    for lengths in CUTS[1:3]:
        stream = vae.encode_stream(cut(video, lengths), sample=True, generator=torch.Generator().manual_seed(7))
        assert torch.equal(torch.cat(list(stream), dim=2), expected)
    other = vae.encode(video, sample=True, generator=torch.Generator().manual_seed(8))
    mean, logvar = vae.moments(video)
    scale, shift = (vae.info.scale_factor, vae.info.shift_factor) if family == "iv-vae" else (1.0, 0.0)
    for draw in (expected, other):
        noise = (draw / scale + shift - mean) / (0.5 * logvar).exp()
        assert 0.6 < noise.std() < 1.4
        assert noise.abs().max() < 5
    assert not torch.allclose(expected, other)


def test_a_later_frame_never_changes_an_earlier_chunk(family: str, small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    video = torch.randn(1, 3, 33, 8, 16, dtype=torch.float64)
    boundary, kept = {"iv-vae": (13, 4), "image-vae": (5, 5)}.get(family, (17, 5))
    changed = video.clone()
    changed[:, :, boundary:] = 0
    before, after = vae.encode(video), vae.encode(changed)
    assert torch.equal(before[:, :, :kept], after[:, :, :kept])
    assert not torch.allclose(before[:, :, kept:], after[:, :, kept:])
    latent = torch.randn(1, vae.info.latent_channels, 9, 1, 2, dtype=torch.float64)
    changed = latent.clone()
    changed[:, :, kept:] = 0
    frames, others = vae.decode(latent), vae.decode(changed)
    assert torch.equal(frames[:, :, :boundary], others[:, :, :boundary])
    assert not torch.allclose(frames[:, :, boundary:], others[:, :, boundary:])


def test_batch_rows_of_a_model_are_independent(family: str, small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    video = torch.randn(2, 3, 5, 16, 8, dtype=torch.float64)
    together = vae.decode(vae.encode(video))
    alone = torch.cat([vae.decode(vae.encode(row[None])) for row in video])
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)


def test_nothing_is_held_after_a_call(family: str, small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    vae = small_vae(family)
    video = torch.randn(1, 3, 21, 16, 16, dtype=torch.float64)
    latent = vae.encode(video)
    frames = vae.decode(latent)
    held = [weakref.ref(x) for x in (video, latent, frames)]
    parameters = {id(p) for p in vae.model.parameters()}
    del video, latent, frames
    gc.collect()
    assert [ref() for ref in held] == [None] * 3
    alive = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.shape[-2:] == (16, 16)]
    assert not [x for x in alive if id(x) not in parameters]


# ---------------------------------------------------------------------------------------------------- training


def test_gradients_agree_with_and_without_checkpointing(
    family: str, small_vae: Callable[..., vae_core.VideoVAE]
) -> None:
    vae = small_vae(family)
    model = vae.model.requires_grad_(True).train()
    torch.manual_seed(0)
    video = torch.randn(1, 3, 9, 16, 16, dtype=torch.float64)

    def gradients(*, checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = model.decode(model.encode(video, checkpointing=checkpointing)[0], checkpointing=checkpointing)
        (out - video).square().mean().backward()
        return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(checkpointing=False), gradients(checkpointing=True)
    assert torch.equal(plain[0], again[0])
    assert plain[1].keys() == again[1].keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in plain[1].items():
        torch.testing.assert_close(gradient, again[1][name], rtol=1e-9, atol=1e-12, msg=name)
    assert torch.equal(model(video), plain[0])


def test_checkpointing_keeps_fewer_activations() -> None:
    torch.manual_seed(0)
    steps = block(8, 8, PUBLISHED).steps()
    x = torch.randn(1, 16, 4, 16, 16, requires_grad=True)
    sizes: dict[bool, int] = {}
    for checkpointing in (False, True):
        saved: list[int] = []

        def pack(t: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            walk(steps, Clip([x]), Context(plain=True), checkpointing=checkpointing)
        sizes[checkpointing] = sum(saved)
    assert sizes[True] < sizes[False] / 3


def test_decoding_is_differentiable_in_the_latent(family: str, small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    vae = small_vae(family)
    latent = torch.randn(1, vae.info.latent_channels, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    vae.decode(latent).square().sum().backward()
    assert latent.grad is not None
    assert (latent.grad.abs().sum(dim=(0, 1, 3, 4)) > 0).all()
    assert not vae.decode(latent.detach()).requires_grad


@pytest.mark.parametrize("first", [True, False], ids=["gradients first", "gradients later"])
def test_gradients_may_be_asked_for_in_mid_stream(
    family: str, small_vae: Callable[..., vae_core.VideoVAE], first: bool
) -> None:
    """Layers remember what they do, by whichever operators they ran."""
    vae = small_vae(family)
    torch.manual_seed(0)
    latent = torch.randn(1, vae.info.latent_channels, 9, 2, 3, dtype=torch.float64)
    expected = vae.decode(latent)
    vae.model.requires_grad_(True)
    stream = vae.decode_stream(latent)
    chunks: list[Tensor] = []
    for count in (1, 1, 100):
        with torch.set_grad_enabled(first == (len(chunks) == 0)):
            chunks += itertools.islice(stream, count)
    got = torch.cat(chunks, dim=2)
    assert (got - expected[:, :, : got.shape[2]]).abs().max() <= 1e-11 * expected.std()
    assert got.requires_grad


def test_clips_may_be_written_over_once_the_next_is_asked_for(
    family: str, small_vae: Callable[..., vae_core.VideoVAE]
) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    video = torch.randn(1, 3, 21, 13, 16, dtype=torch.float64)

    def lent() -> Iterator[Tensor]:
        buffer = torch.empty(1, 3, 4, 13, 16, dtype=torch.float64)
        for frames in video.split(4, dim=2):
            room = buffer[:, :, : frames.shape[2]]
            yield room.copy_(frames)
            buffer.fill_(torch.nan)

    got = torch.cat(list(vae.encode_stream(lent(), pad=True)), dim=2)
    assert torch.equal(got, vae.encode(video, pad=True))
