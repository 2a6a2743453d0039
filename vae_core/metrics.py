"""How close a reconstruction is to its original: PSNR and SSIM, frame by frame."""

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

SSIM_LEAST_SIDE = 11  # pixels; the width of the window


def frame_quality(reconstruction: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR in dB and SSIM of each frame of two clips (b, 3, t, h, w), each as (b * t,) float32 on the CPU.

    Values are taken as they are, clamped to [-1, 1] and moved to [0, 1]: not rounded to 8 bits. PSNR is over all pixels
    and channels of a frame, infinite where the two are equal. SSIM has an 11x11 Gaussian window (sigma 1.5), averaged
    over channels, and is NaN for pictures narrower than the window. Raises ValueError for unequal shapes.
    """
    if reconstruction.shape != original.shape or original.ndim != 5:
        raise ValueError(
            f"Got shapes {tuple(reconstruction.shape)} and {tuple(original.shape)}; both must be the same "
            "(batch, 3, frames, height, width)."
        )
    psnr: list[Tensor] = []
    ssim: list[Tensor] = []
    for ours, theirs in zip(_by_frame(reconstruction), _by_frame(original), strict=True):
        psnr.append(peak_signal_noise_ratio(ours, theirs, data_range=1.0).cpu())
        if min(ours.shape[-2:]) < SSIM_LEAST_SIDE:
            ssim.append(torch.tensor(torch.nan))
            continue
        value = structural_similarity_index_measure(ours, theirs, data_range=1.0)
        assert isinstance(value, Tensor)
        ssim.append(value.cpu())
    return torch.stack(psnr), torch.stack(ssim)


def _by_frame(video: Tensor) -> list[Tensor]:
    frames = video.detach().float().clamp(-1, 1).add(1).div(2)
    return list(frames.transpose(1, 2).flatten(0, 1)[:, None])  # each 1 c h w
