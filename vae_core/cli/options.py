"""Options that several commands share, and what they stand for."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..door.loading import load
from ..door.vae import VideoVAE
from .guard import UserError
from .work import Form


class DType(str, Enum):
    """Precisions that can be asked for."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class HdrOption(str, Enum):
    """What to do with PQ and HLG."""

    tone_map = "tone-map"
    refuse = "refuse"
    keep = "keep"


class CodecOption(str, Enum):
    """Codecs that can be asked for."""

    h264 = "h264"
    vp9 = "vp9"
    av1 = "av1"
    prores = "prores"
    ffv1 = "ffv1"


Weights = Annotated[
    str,
    typer.Option("--weights", "-w", help="A weights file or folder, or demo-cv-vae, demo-iv-vae.", metavar="FILE"),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, max=2**63 - 1, help="Draw from the posterior with this seed; without: its mean."),
]
DTypeOption = Annotated[DType, typer.Option("--dtype", help="Precision; auto: bfloat16 on CUDA, else float32.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:0, mps ...")]
Start = Annotated[int, typer.Option("--start", min=0, help="First frame to use, counted from 0.")]
Frames = Annotated[int | None, typer.Option("--frames", min=1, help="How many frames to use; without: to the end.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
SkipDamage = Annotated[
    bool,
    typer.Option("--skip-damage", help="Go on where frames are damaged; the one before stands in for a missing one."),
]
HdrChoice = Annotated[
    HdrOption,
    typer.Option("--hdr", help="PQ and HLG: tone-map to SDR by the curve of BT.2390, refuse, or keep the codes."),
]
Crf = Annotated[
    float | None,
    typer.Option("--crf", min=0, max=63, help="Quality, 0 is lossless; 16 if left out.", show_default=False),
]
CodecChoice = Annotated[
    CodecOption | None, typer.Option("--codec", help="h264, vp9, av1, prores (.mov), ffv1 (.mkv, lossless RGB).")
]
Bits = Annotated[
    int | None, typer.Option("--bits", help="Per channel: 8, 10; FFV1, PNG and TIFF also 16.", show_default=False)
]
PixFmt = Annotated[
    str | None, typer.Option("--pix-fmt", help="Pixel format, such as yuv444p10le.", metavar="NAME", show_default=False)
]
Video = Annotated[Path, typer.Argument(help="A video or an image file.", show_default=False)]


def form_of(crf: float | None, codec: CodecOption | None, bits: int | None, pix_fmt: str | None) -> Form:
    """How the options ask for a result to be stored."""
    return Form(crf=crf, codec=None if codec is None else codec.value, bits=bits, pix_fmt=pix_fmt)


def load_weights(weights: str, dtype: DType, device: str) -> VideoVAE:
    """The VAE that the options name."""
    where, kind = device_and_dtype(dtype, device)
    return load(weights, device=where, dtype=kind)


def device_and_dtype(dtype: DType, device: str) -> tuple[torch.device, torch.dtype]:
    """What the two options stand for."""
    where = _device(device)
    if dtype is DType.auto:
        return where, torch.bfloat16 if where.type == "cuda" else torch.float32
    return where, {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16, DType.float16: torch.float16}[dtype]


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device; use auto, cpu, cuda, cuda:0 or mps.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name} is not there: this torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps is not there: this torch sees no Apple GPU; use --device cpu.")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} cannot be used; use auto, cpu, cuda, cuda:0 or mps.")
    return device
