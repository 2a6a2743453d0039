"""The terms that both stages minimise. Clips are (b, 3, t, h, w) in [-1, 1], moments and latents (b, z, t', h', w').

Sums and means are those of the published recipes: a likelihood is summed over channels, height and width and averaged
over frames and clips, KL is summed over a clip's latent volume and averaged over clips.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..metrics import LPIPS, load_lpips
from . import processes

Distance = Literal["l1", "l2"]
LOGVAR_LIMITS = (-30.0, 20.0)
ADAPTIVE_LIMIT = 1e4
LPIPS_FILES = ("vgg16-397923af.pth", "alexnet-owt-7be5be79.pth")  # torchvision's, in the order they are looked for
LPIPS_LEAST_SIDE = 32


class LossError(ValueError):
    """A loss that was asked for cannot be computed."""


def draw_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """A draw from the posterior; `noise` is standard normal, of the mean's shape."""
    return mean + noise.to(mean) * (0.5 * logvar.clamp(*LOGVAR_LIMITS)).exp()


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of the posterior from a standard normal: summed over z, t', h', w', averaged over the batch."""
    logvar = logvar.clamp(*LOGVAR_LIMITS)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / mean.shape[0]


def pixel_distance(reconstruction: Tensor, video: Tensor, kind: Distance) -> Tensor:
    """Absolute or squared differences, pixel by pixel."""
    difference = reconstruction - video
    return difference.abs() if kind == "l1" else difference.square()


def likelihood(distance: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log-likelihood of (b, c, t, h, w) distances under a learned scalar log-variance.

    distance / exp(log_variance) + log_variance, summed over c, h, w and averaged over b and t.
    """
    b, _, t = distance.shape[:3]
    return (distance * torch.exp(-log_variance) + log_variance).sum() / (b * t)


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises: scores of real patches above 1, of reconstructed ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(loss: Tensor, adversarial: Tensor, layers: list[Tensor]) -> Tensor:
    """|grad of `loss`| / (|grad of `adversarial`| + 1e-4) at the weights `layers`, within [0, 1e4]; no graph.

    With several processes the gradients are averaged first, so the ratio is that of the whole batch.
    """
    norms: list[Tensor] = []
    for value in (loss, adversarial):
        gradients = torch.autograd.grad(value, layers, retain_graph=True)
        joined = torch.cat([gradient.flatten() for gradient in gradients])
        norms.append(processes.mean(joined).norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, ADAPTIVE_LIMIT).detach()


# ---------------------------------------------------------------------------------------------------------- LPIPS


def find_lpips(path: Path | None, weight: float) -> LPIPS:
    """The LPIPS network of `path`, or one in torch's cache.

    Raises LossError where there is none, CheckpointError for a file that holds something else.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    found = path or next((cache / name for name in LPIPS_FILES if (cache / name).is_file()), None)
    if found is None:
        raise LossError(
            f"loss.lpips_weight is {weight:g}, and the network of LPIPS is not here: get "
            f"https://download.pytorch.org/models/{LPIPS_FILES[0]} and name the file as loss.lpips, or set "
            "loss.lpips_weight = 0 to train without it."
        )
    return load_lpips(found)


def lpips_frames(network: LPIPS, reconstruction: Tensor, video: Tensor) -> Tensor:
    """LPIPS of every frame, with a gradient: (b, 1, t, 1, 1). Activations are computed again in the backward pass.

    Raises LossError for frames of less than 32 pixels.
    """
    b, _, t, h, w = video.shape
    if min(h, w) < LPIPS_LEAST_SIDE:
        raise LossError(
            f"LPIPS needs frames of at least {LPIPS_LEAST_SIDE} x {LPIPS_LEAST_SIDE} pixels; the crops are {h} x {w}. "
            "Train on larger crops, or set loss.lpips_weight = 0."
        )
    ours, theirs = (clip.transpose(1, 2).flatten(0, 1).float() for clip in (reconstruction, video))
    values: list[Tensor] = []
    with torch.autocast(video.device.type, enabled=False):
        for a, b_ in zip(ours.split(1), theirs.split(1), strict=True):
            value: Tensor = checkpoint(network.distances, a, b_, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            values.append(value)
    return torch.cat(values).view(b, 1, t, 1, 1)
