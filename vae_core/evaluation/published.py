"""What the papers print, to stand beside one's own table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A line of a paper; empty where it prints nothing."""

    vae: str
    channels: int
    videos: str
    psnr: str = ""
    ssim: str = ""
    lpips: str = ""
    fvd: str = ""


_WEBVID = "WebVid, by CV-VAE's authors"
PUBLISHED = (
    Published("SD 2.1 image VAE", 4, _WEBVID, "28.9", ".810", ".145"),
    Published("CV-VAE", 4, _WEBVID, "28.5", ".817", ".143"),
    Published("CV-VAE-SD3", 16, _WEBVID, "32.0", ".899", ".087"),
    Published("CV-VAE, in its ablation", 4, "COCO (pictures), by CV-VAE's authors", "27.6", ".803", ".138"),
    Published("OD-VAE", 4, "Kinetics-600", "33.88", fvd="10.69"),
    Published("Open-Sora VAE", 4, "Kinetics-600", fvd="19.05"),
    Published("IV-VAE", 4, "Kinetics-600", "34.29", fvd="8.01"),
    Published("CogVideoX VAE", 16, "Kinetics-600", "38.38", fvd="3.17"),
    Published("IV-VAE", 16, "Kinetics-600", "39.02", ".9685", ".0228", "2.97"),
    Published("OD-VAE", 4, "ActivityNet", fvd="8.10"),
    Published("IV-VAE", 4, "ActivityNet", fvd="6.08"),
)
