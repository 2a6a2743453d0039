"""How close a reconstruction is to its original: PSNR, SSIM and MS-SSIM, frame by frame."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

SSIM_LEAST_SIDE = 11  # pixels; the width of the window
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
        psnr.append(peak_signal_noise_ratio(ours, theirs, data_range=1.0).cpu())
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
    """SSIM of two pictures (1, c, h, w) in [0, 1]; torchmetrics would also count windows over the mirrored edge."""
    found = structural_similarity_index_measure(ours, theirs, data_range=1.0, return_full_image=True)
    edge = SSIM_LEAST_SIDE // 2
    return found[1][..., edge : found[1].shape[-2] - edge, edge : found[1].shape[-1] - edge].mean()


def _multiscale(ours: Tensor, theirs: Tensor) -> Tensor:
    """MS-SSIM of two pictures (1, c, h, w) in [0, 1]: contrast at every scale, SSIM at the coarsest."""
    total = ours.new_ones(())
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        if scale == len(MS_SSIM_WEIGHTS) - 1:
            value = _ssim(ours, theirs)
        else:
            found = structural_similarity_index_measure(ours, theirs, data_range=1.0, return_contrast_sensitivity=True)
            value = found[1].mean()
        total = total * value.clamp(min=0) ** weight  # a negative term has no real power
        ours, theirs = F.avg_pool2d(ours, 2), F.avg_pool2d(theirs, 2)
    return total


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
