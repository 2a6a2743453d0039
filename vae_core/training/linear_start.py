"""A fresh IV-VAE that begins as a linear code: patches of 8 x 8 pixels by their principal components.

Nothing is trained here. Each layer is set, in the order that they run, to the least-squares fit from what it really
reads to what it should give: the encoder's to the principal components of patches of 2, 4 and 8 pixels, the decoder's
to those of 4, 2 and 1. A residual block adds what random features of it predict of the rest. All frames of a group are
taken as equal; that they differ is left to training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families.iv_vae import IVVAE
from ..families.iv_vae.layers import (
    AttentionBlock,
    Downsample,
    GroupedCausalConv3d,
    ParallelAtrousConv,
    PixelConv,
    SeparatedConv,
    Upsample,
)
from ..families.iv_vae.network import ToMoments
from ..nn.clip import Clip, frames_of
from ..nn.layers import FrameConv
from ..nn.norm import Activation
from ..nn.steps import Context, Step
from .clips import Batch
from .coders import Coder, VideoCoder

CONSTANT = 2.0  # of the channel that keeps norms from losing how large the others are
GAIN = 0.1  # of the encoder's last norm: small enough for SiLU to be a line
LOGVAR = -9.0
RIDGE = 1e-5
ROWS = 2048  # pixels of each picture that a fit takes
PIXELS = 48 * 128 * 128  # of all pictures that a start is fitted to


def components(patches: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first principal components of (n, d) patches: their directions (count, d), and their deviations (count,)."""
    values, vectors = torch.linalg.eigh(torch.cov(patches.T.double()))
    order = values.argsort(descending=True)[:count]
    return vectors[:, order].T.float(), values[order].clamp_min(0).sqrt().float()


def fit(x: Tensor, target: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """The kernel (k, c, kernel, kernel) and the bias (k,) that make (n, k, h, w) of (n, c, h, w) with least squares."""
    size = x.shape[1] * kernel * kernel + 1
    gram, product = torch.zeros(size, size), torch.zeros(size, target.shape[1])
    generator = torch.Generator().manual_seed(0)
    for row, wanted in zip(x, target, strict=True):
        columns = F.unfold(row[None], kernel, padding=kernel // 2)[0]
        picked = torch.randperm(columns.shape[1], generator=generator)[:ROWS]
        columns = F.pad(columns[:, picked], (0, 0, 0, 1), value=1.0)
        gram += columns @ columns.T
        product += columns @ wanted.flatten(1)[:, picked].T
    gram.diagonal()[:-1] += RIDGE * gram.diagonal()[:-1].mean()
    solved = torch.linalg.solve(gram.double(), product.double()).float().T
    return solved[:, :-1].unflatten(1, (x.shape[1], kernel, kernel)), solved[:, -1]


class Pyramid:
    """Principal components of patches of 1, 2, 4 and 8 pixels, each of those of four patches half as large.

    widths: how many are kept at sides 2, 4 and 8. Components are means over a patch, so those of flat colour are as
    large as pixels.
    """

    def __init__(self, pictures: Tensor, widths: Sequence[int]) -> None:
        self.levels = [pictures]
        self.bases: list[Tensor] = []
        for width in widths:
            small = self.levels[-1]
            patches = F.unfold(small, 2, stride=2).transpose(1, 2).flatten(0, 1)  # n (c 2 2)
            basis, self.deviations = components(patches, width)
            basis = basis.unflatten(1, (small.shape[1], 2, 2)) / 2
            self.bases.append(basis)
            self.levels.append(F.conv2d(small, basis, stride=2))


def some_pictures(batches: Iterable[Batch]) -> Tensor:
    """The first frames of batches of one size, (n, 3, h, w), until there are about PIXELS."""
    found: list[Tensor] = []
    for batch in batches:
        frames = batch.video[:, :, 0]
        if not found or found[0].shape[2:] == frames.shape[2:]:
            found.append(frames)
        if sum(frames[:, 0].numel() for frames in found) >= PIXELS:
            break
    return torch.cat(found)


def start_linear(coder: Coder, batches: Iterable[Batch]) -> None:
    """Let a fresh coder begin as a linear code of the pictures that it will be trained on."""
    assert isinstance(coder, VideoCoder)
    assert isinstance(coder.model, IVVAE)
    make_linear(coder.model, some_pictures(batches))


@torch.no_grad()
def make_linear(network: IVVAE, pictures: Tensor) -> None:
    """Set the weights of a fresh network, from pictures (n, 3, h, w) in [-1, 1] with sides that are multiples of 8."""
    dim = network.config.dim
    pyramid = Pyramid(pictures, (dim - 1, 2 * dim - 1, 4 * dim - 1))
    for module in network.modules():
        if isinstance(module, GroupedCausalConv3d):
            _stand_still(module)
    latent = _encoder(network, pyramid)
    _decoder(network, pyramid, latent)


# ------------------------------------------------------------------------------------------------------ encoder


def _encoder(network: IVVAE, pyramid: Pyramid) -> Tensor:
    assert network.encoder is not None
    encoder, z = network.encoder, network.config.latent_channels
    level = 0
    clip = Clip([pyramid.levels[0][:, :, None]])
    kept = clip
    for step in network.steps("encode"):
        layer = step.layer
        if layer is encoder.conv_in:
            for conv in _convs(layer):
                _write(conv, range(3), torch.eye(3)[:, :, None, None])
                _constant(conv, 3)
        elif isinstance(layer, Downsample):
            level += 1
            basis = pyramid.bases[level - 1]
            for conv in (layer.conv_2d, layer.conv_3d):
                _clear(conv)
                _write(conv, range(len(basis)), F.pad(basis, (0, 1, 0, 1)))
                _constant(conv, len(basis))
            if layer.time_conv is not None:
                layer.time_conv.weight.copy_(torch.eye(layer.time_conv.weight.shape[0])[:, :, None, None, None] / 2)
                layer.time_conv.bias.zero_()
        elif isinstance(layer, ParallelAtrousConv):
            assert step.norm is not None
            step.norm.gamma.fill_(GAIN)
            target = pyramid.levels[3][:, :z] - pyramid.levels[3][:, :z].mean((0, 2, 3), keepdim=True)
            target = target / target.std((0, 2, 3), keepdim=True)
            weight, bias = fit(_read(step, clip), target, 1)
            _write(layer.branches[0], range(z), weight, bias)
            layer.merge.weight.zero_()
            layer.merge.bias.zero_()
            for i in range(z):
                layer.merge.weight[i, i] = 1
        elif isinstance(layer, ToMoments):
            for half, conv in enumerate(_convs(layer)):
                _clear(conv)
                for i in range(z // 2):
                    conv.weight[i, half * (z // 2) + i] = 1
                conv.bias[z // 2 :] = LOGVAR
        else:
            _no_change(step)
        kept = clip.shared() if step.keeps else kept
        if step.adds is not None:
            _pass_on(step.adds)
        clip = step.run(clip, Context(plain=True), None, kept)
    return clip.tensor()[:, :z]


# ------------------------------------------------------------------------------------------------------ decoder


def _decoder(network: IVVAE, pyramid: Pyramid, latent: Tensor) -> None:
    assert network.decoder is not None
    decoder, z = network.decoder, network.config.latent_channels
    level = 3
    clip = Clip([latent])
    kept = clip
    summed = False
    for step in network.steps("decode"):
        layer = step.layer
        if layer is network.from_latent:
            for half, conv in enumerate(_convs(layer)):
                _clear(conv)
                for i in range(z // 2):
                    conv.weight[i, half * (z // 2) + i] = 1
        elif layer is decoder.conv_in:
            _spread(layer, latent, pyramid)
        elif isinstance(layer, Upsample):
            level -= 1
            _enlarge(layer, clip, _targets(pyramid, level), joint=level == 2)
        elif isinstance(layer, PixelConv):
            weight, bias = fit(_read(step, clip), pyramid.levels[0], 3)
            for conv in _convs(layer):
                _clear(conv)
                _write(conv, range(3), weight, bias)
        elif step.adds is not None and isinstance(layer, SeparatedConv):
            assert kept is not None
            if not summed and level == 2:
                _sum_halves(step.adds, pyramid.levels[2].shape[1])
                summed = True
            _boost(step, clip, step.adds(kept, Context(plain=True)), _targets(pyramid, level))
        elif step.adds is not None or isinstance(layer, AttentionBlock):
            _no_change(step)
        kept = clip.shared() if step.keeps else kept
        clip = step.run(clip, Context(plain=True), None, kept)


def _targets(pyramid: Pyramid, level: int) -> Tensor:
    """What both halves should hold; at full size pictures and their negatives, of which SiLU makes a line."""
    target = pyramid.levels[level]
    return torch.cat((target, -target), dim=1) if level == 0 else target


def _spread(layer: FrameConv, latent: Tensor, pyramid: Pyramid) -> None:
    """The decoder's first: principal components of 3 x 3 latents, each as important as for pixels, half and half."""
    z, half = latent.shape[1], layer.weight.shape[0] // 2
    weight = pyramid.deviations[:z, None, None].expand(-1, 3, 3).flatten()
    patches = F.unfold(latent[:, :, 0], 3).transpose(1, 2).flatten(0, 1) * weight
    basis, deviations = components(patches, 2 * (half - 1))
    basis = (basis * weight / deviations.clamp_min(1e-4)[:, None].sqrt()).unflatten(1, (z, 3, 3))
    _clear(layer)
    for number in range(2):
        start = number * half
        _write(layer, range(start, start + len(basis[number::2])), basis[number::2])
        _constant(layer, start + half - 1)


def _enlarge(layer: Upsample, clip: Clip, target: Tensor, *, joint: bool) -> None:
    """Nearest x2 and a convolution for each half. joint: the sum of the halves is fitted to the target, else each."""
    x = F.interpolate(frames_of(clip.tensor()), scale_factor=2.0)
    halves = x.chunk(2, dim=1)
    convs = (layer.conv_2d, layer.conv_3d)
    count = target.shape[1]
    if joint:
        weight, bias = fit(x, target, 3)
        fitted = [(part, bias / 2) for part in weight.chunk(2, dim=1)]
    else:
        fitted = [fit(half, target, 3) for half in halves]
    for conv, (weight, bias) in zip(convs, fitted, strict=True):
        assert conv is not None
        conv.bias.zero_()
        _write(conv, range(count), weight, bias)
        _constant(conv, count)
    if layer.time_conv is not None:
        width = layer.time_conv.weight.shape[1]
        layer.time_conv.weight.copy_(torch.eye(width).repeat(2, 1)[:, :, None, None, None])
        layer.time_conv.bias.zero_()


def _boost(step: Step, clip: Clip, skip: Clip, target: Tensor) -> None:
    """Let a block's second convolution predict what the skip lacks."""
    halves = frames_of(skip.tensor()).chunk(2, dim=1)
    count = target.shape[1]
    missing = torch.cat([target - half[:, :count] for half in halves], dim=1)
    weight, bias = fit(_read(step, clip), missing, 3)
    for number, conv in enumerate(_convs(step.layer)):
        _clear(conv)
        own = slice(number * count, (number + 1) * count)
        _write(conv, range(count), weight[own], bias[own])


# ------------------------------------------------------------------------------------------------------ layers


def _read(step: Step, clip: Clip) -> Tensor:
    """What a step's layer convolves: single frames (n, c, h, w)."""
    x = clip.tensor()
    return frames_of(x if step.norm is None else Activation(step.norm).plain(x))


def _convs(layer: nn.Module) -> list[nn.Module]:
    """The convolutions of both halves of a separated one."""
    assert isinstance(layer, SeparatedConv)
    assert layer.conv_2d is not None
    return [layer.conv_2d, layer.conv_3d]


def _write(conv: nn.Module, rows: Sequence[int], weight: Tensor, bias: Tensor | None = None) -> None:
    """Set some output channels to a kernel of one frame."""
    index = torch.tensor(list(rows))
    weight = F.pad(weight, (0, 0, 0, 0, 0, conv.weight.shape[1] - weight.shape[1]))
    if weight.shape[-1] < conv.weight.shape[-1]:
        weight = F.pad(weight, (1, 1, 1, 1))
    if conv.weight.ndim == 5 and conv.weight.shape[2] == 3:
        weight = F.pad(weight[:, :, None], (0, 0, 0, 0, 1, 1))
    conv.weight[index] = weight.view(-1, *conv.weight.shape[1:])
    conv.bias[index] = 0.0 if bias is None else bias


def _constant(conv: nn.Module, row: int) -> None:
    conv.weight[row] = 0
    conv.bias[row] = CONSTANT


def _clear(conv: nn.Module) -> None:
    conv.weight.zero_()
    conv.bias.zero_()


def _stand_still(conv: GroupedCausalConv3d) -> None:
    """Let each frame of a group be what the same frame would be alone."""
    conv.weight[:, :, 1:2] = conv.alone(conv.weight)
    conv.weight[:, :, ::2] = 0


def _no_change(step: Step) -> None:
    """Let a block or an attention begin as its input alone."""
    layer = step.layer
    if isinstance(layer, AttentionBlock):
        for attention in (layer.attention_2d, layer.attention_3d):
            assert attention is not None
            _clear(attention.proj)
    elif step.adds is not None:
        for conv in [layer] if isinstance(layer, FrameConv) else _convs(layer):
            _clear(conv)


def _pass_on(layer: nn.Module) -> None:
    """A skip between two widths: each half as it is, and zeros."""
    if not isinstance(layer, SeparatedConv):
        return
    for half, conv in enumerate(_convs(layer)):
        width = conv.weight.shape[1] // 2
        _clear(conv)
        for i in range(width):
            conv.weight[i, half * width + i] = 1


def _sum_halves(layer: nn.Module, count: int) -> None:
    """A skip between two widths: the sum of the first `count` channels of both halves for each, and the rest as it is."""
    _pass_on(layer)
    for half, conv in enumerate(_convs(layer)):
        other = (1 - half) * (conv.weight.shape[1] // 2)
        for i in range(count):
            conv.weight[i, other + i] = 1
