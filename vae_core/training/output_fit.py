"""The decoder's last convolution by least squares: the best that it can make of what it reads, colours included.

Gradients change it last and least: a tint is a small error in every pixel. What it reads does not depend on it, so the
best kernel is the solution of one linear system, found in one pass over some batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families.cv_vae.layers import ClipConv
from ..families.iv_vae.layers import GroupedCausalConv3d, PixelConv
from ..nn.clip import Clip
from ..nn.norm import Activation
from ..nn.steps import Context
from .clips import Batch
from .coders import Coder, VideoCoder
from .tables import ConfigError

SPACING = 7  # pixels from one that is taken to the next
RIDGE = 1e-4  # of the mean square of what is read, towards the kernel as it is


class Fit:
    """The least-squares problem of one kernel, (k, c, t, 3, 3) or (k, c, 3, 3), that stays near what it is now."""

    def __init__(self, conv: nn.Module) -> None:
        weight, bias = conv.weight, conv.bias
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        self.weight, self.bias = weight, bias
        size = self.weight[0].numel() + 1
        self.gram = torch.zeros(size, size, dtype=torch.float64)
        self.product = torch.zeros(size, self.weight.shape[0], dtype=torch.float64)

    def add(self, x: Tensor, target: Tensor) -> None:
        """x: (c, t, h, w), the frames that make a frame. target: (k, h, w)."""
        columns = F.unfold(x.flatten(0, 1)[None], 3, padding=1)[0][:, ::SPACING]
        columns = F.pad(columns, (0, 0, 0, 1), value=1.0)
        self.gram += columns @ columns.T
        self.product += columns @ target.flatten(1)[:, ::SPACING].T

    @torch.no_grad()
    def solve(self) -> None:
        """Write the solution into the convolution; where nothing was added it stays."""
        now = torch.cat((self.weight.flatten(1), self.bias[:, None]), dim=1).double().T
        ridge = RIDGE * self.gram.diagonal().mean()
        if ridge == 0:
            return
        near = self.gram + ridge * torch.eye(len(self.gram), dtype=torch.float64)
        solution = torch.linalg.solve(near, self.product + ridge * now).T.to(self.weight)
        self.weight.copy_(solution[:, :-1].reshape(self.weight.shape))
        self.bias.copy_(solution[:, -1])


@torch.no_grad()
def fit_output(coder: Coder, batches: Iterable[Batch], count: int) -> None:
    """Fit the last convolution of a video VAE's decoder to `count` batches, through the posterior mean.

    Raises ConfigError for a network whose last layer is not a convolution of neighbouring frames.
    """
    if not isinstance(coder, VideoCoder) or coder.model.decoder is None:
        raise ConfigError("run.fit_output is for stage 'video': leave it out, or set it to 0.")
    layer = coder.model.decoder.conv_out
    assert isinstance(layer, nn.Module)
    fits = _fits(layer)
    for _, batch in zip(range(count), batches, strict=False):
        start = 0
        for chunk in _read(coder, layer, batch.video):  # b c t h w
            for x, target in zip(chunk, batch.video[:, :, start : start + chunk.shape[2]], strict=True):
                for frame, (fit, seen) in enumerate(_seen(layer, fits, x)):
                    fit.add(seen, target[:, frame])
            start += chunk.shape[2]
    for fit in fits:
        fit.solve()


def _fits(layer: nn.Module) -> list[Fit]:
    if isinstance(layer, PixelConv) and isinstance(layer.conv_3d, GroupedCausalConv3d) and layer.conv_2d is not None:
        return [Fit(layer.conv_2d), Fit(layer.conv_3d)]
    if isinstance(layer, ClipConv):
        return [Fit(layer)]
    raise ConfigError("run.fit_output is for CV-VAE and for IV-VAE of the published parts: set it to 0.")


def _seen(layer: nn.Module, fits: list[Fit], x: Tensor) -> Iterator[tuple[Fit, Tensor]]:
    """For each frame of (c, t, h, w) which kernel makes it, and of which frames (c, 1 or 3, h, w)."""
    if isinstance(layer, ClipConv) and layer.time_replicate:
        padded = torch.cat((x[:, :1], x, x[:, -1:]), dim=1)
    else:
        padded = F.pad(x, (0, 0, 0, 0, 1, 1))
    for frame in range(x.shape[1]):
        if len(fits) == 2 and frame == 0:  # IV-VAE's keyframe
            yield fits[0], x[:, :1]
        else:
            yield fits[-1], padded[:, frame : frame + 3]


def _read(coder: VideoCoder, layer: nn.Module, video: Tensor) -> list[Tensor]:
    """What the last layer reads of each chunk of a clip."""
    found: list[Tensor] = []

    def note(_: nn.Module, arguments: tuple[Clip, Context, Activation]) -> None:
        found.append(arguments[2].plain(arguments[0].tensor()))

    hook = layer.register_forward_pre_hook(note)
    try:
        device = next(layer.parameters()).device
        coder.decode(coder.moments(video.to(device))[0])
    finally:
        hook.remove()
    return [x.cpu() for x in found]
