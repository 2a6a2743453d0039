"""The contract of every streaming layer and of both models, in float64.

Any way to cut time gives what the whole gives; a later frame never changes an earlier group; batch rows are
independent; nothing is held afterwards.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import vae_core
from vae_core.iv_layers import FrameConv, GroupedCausalConv3d, ResidualBlock, SeparatedConv
from vae_core.iv_vae import AttentionBlock, Decoder, Downsample, Encoder, IVVAEConfig, Upsample
from vae_core.memory import Memory, StreamingLayer, name_slots, run_block

CONFIG = IVVAEConfig(dim=8, latent_channels=4, scale_factor=1.0, shift_factor=0.0)
Step = Callable[[Tensor, Memory], Tensor]


class FirstKnown(nn.Module):
    """`Upsample`, told by a memory entry of its own whether the group is the first."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Upsample(8, double_time=True)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        first_group = memory.get("seen") is None
        memory.put("seen", x[:0])
        return self.up(x, memory, first_group=first_group)


# layer, channels in, frames of the first group, frames of a later group
LAYERS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "grouped causal convolution, groups of 4": (lambda: GroupedCausalConv3d(6, 5), 6, 1, 4),
    "grouped causal convolution, groups of 2": (lambda: GroupedCausalConv3d(6, 5), 6, 1, 2),
    "separated convolution": (lambda: SeparatedConv(8, 3, kernel=3), 8, 1, 4),
    "separated convolution 1x1": (lambda: SeparatedConv(8, 3, kernel=1), 8, 1, 4),
    "frame convolution": (lambda: FrameConv(4, 4, kernel=3), 8, 1, 1),
    "residual block": (lambda: ResidualBlock(4, 6, two_d=False), 8, 1, 4),
    "residual block, 2-D": (lambda: ResidualBlock(4, 4, two_d=True), 8, 1, 1),
    "attention": (lambda: AttentionBlock(4), 8, 1, 1),
    "downsample": (lambda: Downsample(4, halve_time=True), 8, 1, 4),
    "downsample, space only": (lambda: Downsample(4, halve_time=False), 8, 1, 4),
    "upsample": (FirstKnown, 16, 1, 2),
    "encoder": (lambda: Encoder(CONFIG), 3, 1, 4),
    "decoder": (lambda: Decoder(CONFIG), 4, 1, 1),
}


def groups(x: Tensor, first: int, later: int) -> Iterator[Tensor]:
    yield x[:, :, :first]
    for start in range(first, x.shape[2], later):
        yield x[:, :, start : start + later]


def run(step: Step, x: Tensor, first: int, later: int) -> list[Tensor]:
    memory = Memory()
    return [step(group, memory) for group in groups(x, first, later)]


@pytest.fixture(params=list(LAYERS))
def layer(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, int, int]:
    """A layer in float64 with drawn weights, and an input of three groups."""
    make, channels, first, later = LAYERS[request.param]
    torch.manual_seed(0)
    module = make().double().eval().requires_grad_(False)
    name_slots(module)
    size = (2, 2) if isinstance(module, Decoder) else (16, 8)
    x = torch.randn(2, channels, first + 2 * later, *size, dtype=torch.float64)
    return module, x, first, later


def test_a_later_frame_never_changes_an_earlier_group(layer: tuple[nn.Module, Tensor, int, int]) -> None:
    module, x, first, later = layer
    changed = x.clone()
    changed[:, :, first + later :] = torch.randn_like(changed[:, :, first + later :])
    before, after = run(module, x, first, later), run(module, changed, first, later)
    assert all(torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True))
    assert not torch.equal(before[2], after[2])


def test_batch_rows_are_independent(layer: tuple[nn.Module, Tensor, int, int]) -> None:
    module, x, first, later = layer
    together = torch.cat(run(module, x, first, later), dim=2)
    alone = torch.cat([torch.cat(run(module, row[None], first, later), dim=2) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_a_layer_holds_nothing_and_a_fresh_memory_starts_over(layer: tuple[nn.Module, Tensor, int, int]) -> None:
    module, x, first, later = layer
    once = run(module, x, first, later)  # it may prepare kernels
    before = set(vars(module)), {name for name, _ in module.named_buffers()}
    twice = run(module, x, first, later)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    assert before == (set(vars(module)), {name for name, _ in module.named_buffers()})
    memory = Memory()
    for group in groups(x, first, later):
        module(group, memory)
    assert set(memory) - {"seen"} == {m.slot for m in module.modules() if isinstance(m, StreamingLayer)}
    memory.clear()
    assert torch.equal(module(x[:, :, :first], memory), once[0])


def test_memory_keeps_one_frame_per_convolution_and_not_the_group(layer: tuple[nn.Module, Tensor, int, int]) -> None:
    module, x, first, later = layer
    memory = Memory()
    for group in groups(x, first, later):
        module(group, memory)
    for slot in set(memory) - {"seen"}:
        kept = memory.get(slot)
        assert kept is not None
        assert kept.shape[2] == 1
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_grouped_causal_convolution_is_the_published_one() -> None:
    """Every group: [last frame before it, the group, a zero frame]; the first frame: [x, x, zero]."""
    torch.manual_seed(0)
    conv = GroupedCausalConv3d(3, 2).double().requires_grad_(False)
    x = torch.randn(1, 3, 9, 6, 5, dtype=torch.float64)
    zero = torch.zeros_like(x[:, :, :1])

    def plain(*frames: Tensor) -> Tensor:
        return nn.functional.conv3d(torch.cat(frames, dim=2), conv.weight, conv.bias, padding=(0, 1, 1))

    expected = [
        plain(x[:, :, :1], x[:, :, :1], zero),
        plain(x[:, :, :1], x[:, :, 1:5], zero),
        plain(x[:, :, 4:5], x[:, :, 5:9], zero),
    ]
    torch.testing.assert_close(run(conv, x, 1, 4), expected, rtol=1e-13, atol=1e-13)


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
    assert expected.shape == (1, vae.info.latent_channels, 9, 2, 3)
    for lengths in CUTS:
        assert torch.equal(torch.cat(list(vae.encode_stream(cut(video, lengths))), dim=2), expected), lengths


def test_any_cut_of_the_latent_decodes_to_the_same(family: str, small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    latent = torch.randn(1, vae.info.latent_channels, 9, 2, 3, dtype=torch.float64)
    expected = vae.decode(latent)
    assert expected.shape == (1, 3, 33, 16, 24)
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
    scaled = [vae.info.scale_factor * (x - vae.info.shift_factor) for x in (mean, mean + (0.5 * logvar).exp())]
    spread = scaled[1] - scaled[0] if family == "iv-vae" else (0.5 * logvar).exp()
    centre = scaled[0] if family == "iv-vae" else mean
    for draw in (expected, other):
        noise = (draw - centre) / spread
        assert 0.6 < noise.std() < 1.4
        assert noise.abs().max() < 5
    assert not torch.allclose(expected, other)


def test_a_later_frame_never_changes_an_earlier_chunk(family: str, small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    video = torch.randn(1, 3, 33, 8, 16, dtype=torch.float64)
    boundary, kept = (17, 5) if family != "iv-vae" else (13, 4)
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
        if family == "iv-vae":
            memory, other = Memory(), Memory()
            means = [model.encode(g, memory, checkpointing=checkpointing)[0] for g in groups(video, 1, 4)]
            out = torch.cat([model.decode(m, other, checkpointing=checkpointing) for m in means], dim=2)
        else:
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
    block = ResidualBlock(8, 8, two_d=False)
    name_slots(block)
    x = torch.randn(1, 16, 4, 16, 16, requires_grad=True)
    sizes: dict[bool, int] = {}
    for checkpointing in (False, True):
        saved: list[int] = []

        def pack(t: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run_block(block, x, Memory(), checkpointing=checkpointing)
        sizes[checkpointing] = sum(saved)
    assert sizes[True] < sizes[False] / 3


def test_decoding_is_differentiable_in_the_latent(family: str, small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    vae = small_vae(family)
    latent = torch.randn(1, vae.info.latent_channels, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    vae.decode(latent).square().sum().backward()
    assert latent.grad is not None
    assert (latent.grad.abs().sum(dim=(0, 1, 3, 4)) > 0).all()
    assert not vae.decode(latent.detach()).requires_grad


def test_torch_compile_takes_the_streaming_step() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(4, 4, two_d=False).eval().requires_grad_(False)
    name_slots(block)
    x = torch.randn(1, 8, 9, 8, 8)
    expected = run(block, x, 1, 4)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, x, 1, 4), expected)
