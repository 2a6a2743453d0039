"""How close a reconstruction is to its original, where it is worst, and whether its seams and flicker show."""

from .compatibility import Compatibility, ImageCoder, latent_compatibility
from .flicker import FlickerMeter, WarpMeter
from .frames import MS_SSIM_LEAST_SIDE, SSIM_LEAST_SIDE, check_pair, frame_quality, multiscale_ssim
from .fvd import Moments, frechet_distance
from .i3d import VideoFeatures, load_i3d
from .motion import optical_flow
from .perceptual import LPIPS, load_lpips
from .phases import phase_means, phase_spread
from .seams import Borders, SeamMeter, SeamReading, chunk_borders, exact_borders, tile_borders

__all__ = [
    "LPIPS",
    "MS_SSIM_LEAST_SIDE",
    "SSIM_LEAST_SIDE",
    "Borders",
    "Compatibility",
    "FlickerMeter",
    "ImageCoder",
    "Moments",
    "SeamMeter",
    "SeamReading",
    "VideoFeatures",
    "WarpMeter",
    "check_pair",
    "chunk_borders",
    "exact_borders",
    "frame_quality",
    "frechet_distance",
    "latent_compatibility",
    "load_i3d",
    "load_lpips",
    "multiscale_ssim",
    "optical_flow",
    "phase_means",
    "phase_spread",
    "tile_borders",
]
