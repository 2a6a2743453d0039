"""How close a reconstruction is to its original: PSNR, SSIM and MS-SSIM, frame by frame."""

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_LEAST_SIDE = 11  # pixels; the width of the window
SSIM_SIGMA = 1.5  # pixels
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # Wang, Bovik, Sheikh and Simoncelli 2004, for values in 0..1
MS_SSIM_LEAST_SIDE = 161  # pixels; the window on a picture that was halved four times
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli and Bovik 2003


def frame_quality(reconstruction: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR in dB and SSIM of each frame of two clips (b, 3, t, h, w), each as (b * t,) float32 on the CPU.

    Values are taken as they are, clamped to [-1, 1] and moved to [0, 1]: not rounded to 8 bits. PSNR is over all pixels
    and channels of a frame, infinite where the two are equal. SSIM has an 11x11 Gaussian window (sigma 1.5), averaged
    over channels, and is NaN for pictures narrower than the window. Raises ValueError for unequal shapes.
    """
    check_pair(reconstruction, original)
    psnr: list[Tensor] = []
    ssim: list[Tensor] = []
    for ours, theirs in zip(_by_frame(reconstruction), _by_frame(original), strict=True):
        psnr.append(-10 * (ours - theirs).square().mean().log10().cpu())
        if min(ours.shape[-2:]) < SSIM_LEAST_SIDE:
            ssim.append(torch.tensor(torch.nan))
            continue
        ssim.append(_ssim(ours, theirs).cpu())
    return torch.stack(psnr), torch.stack(ssim)


def multiscale_ssim(reconstruction: Tensor, original: Tensor) -> Tensor:
    """MS-SSIM of each frame of two clips (b, 3, t, h, w), as (b * t,) float32 on the CPU; five scales.

    Values are taken as in `frame_quality`. NaN where a side is below 161 pixels. Raises ValueError for unequal shapes.
    """
    check_pair(reconstruction, original)
    if min(original.shape[-2:]) < MS_SSIM_LEAST_SIDE:
        return torch.full((original.shape[0] * original.shape[2],), torch.nan)
    values = [_multiscale(a, b) for a, b in zip(_by_frame(reconstruction), _by_frame(original), strict=True)]
    return torch.stack(values).cpu()


def _ssim(ours: Tensor, theirs: Tensor) -> Tensor:
    """SSIM of two pictures (1, c, h, w) in [0, 1], over the windows that lie inside the picture."""
    luminance, contrast = _ssim_terms(ours, theirs)
    return (luminance * contrast).mean()


def _multiscale(ours: Tensor, theirs: Tensor) -> Tensor:
    """MS-SSIM of two pictures (1, c, h, w) in [0, 1]: contrast at every scale, SSIM at the coarsest."""
    total = ours.new_ones(())
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        luminance, contrast = _ssim_terms(ours, theirs)
        value = (luminance * contrast if scale == len(MS_SSIM_WEIGHTS) - 1 else contrast).mean()
        total = total * value.clamp(min=0) ** weight  # a negative term has no real power
        ours, theirs = F.avg_pool2d(ours, 2), F.avg_pool2d(theirs, 2)
    return total


def _ssim_terms(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure of every window of two pictures (1, c, h, w), each (1, c, h - 10, w - 10)."""
    places = torch.arange(SSIM_LEAST_SIDE, device=ours.device) - SSIM_LEAST_SIDE // 2
    line = torch.exp(places.square() / (-2 * SSIM_SIGMA**2))
    line = (line / line.sum()).to(ours.dtype)
    both = torch.cat([ours, theirs, ours * ours, theirs * theirs, ours * theirs]).flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(both, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
    a, b, aa, bb, ab = blurred.view(5, 1, ours.shape[1], *blurred.shape[-2:])
    luminance = (2 * a * b + SSIM_C1) / (a * a + b * b + SSIM_C1)
    contrast = (2 * (ab - a * b) + SSIM_C2) / ((aa - a * a) + (bb - b * b) + SSIM_C2)
    return luminance, contrast


def check_pair(reconstruction: Tensor, original: Tensor) -> None:
    """Raise ValueError unless both are clips (b, 3, t, h, w) of one shape."""
    if reconstruction.shape != original.shape or original.ndim != 5:
        raise ValueError(
            f"Got shapes {tuple(reconstruction.shape)} and {tuple(original.shape)}; both must be the same "
            "(batch, 3, frames, height, width)."
        )


def _by_frame(video: Tensor) -> list[Tensor]:
    frames = video.detach().float().clamp(-1, 1).add(1).div(2)
    return list(frames.transpose(1, 2).flatten(0, 1)[:, None])  # each 1 c h w
