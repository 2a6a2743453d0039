"""Options that several commands share, and what they stand for."""

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..door.limits import Limits
from ..door.loading import load
from ..door.vae import VideoVAE
from .guard import UserError
from .outputs import Form

LEAST_SIDE = 16  # pixels


class DType(str, Enum):
    """Precisions that can be asked for."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class TilingOption(str, Enum):
    """Which tiles may be taken."""

    exact = "exact"
    blended = "blended"


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
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:0, xpu, mps; cuda:0,cuda:1: share the chunks.")
]
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


Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Keep finished frames beside the result until it is complete, and go on after those of an earlier run.",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        min=0.001,
        help="Device memory in GiB to work in, without the weights; what is free on a GPU if left out.",
        show_default=False,
    ),
]
Ram = Annotated[
    float | None,
    typer.Option(
        "--ram", min=0.001, help="RAM in GiB for what waits off a GPU; no limit if left out.", show_default=False
    ),
]
Tiling = Annotated[
    TilingOption,
    typer.Option("--tiling", help="exact; or blended: where nothing exact fits, CV-VAE's official tiles."),
]
Tile = Annotated[
    int | None,
    typer.Option("--tile", min=1, help="Exact tiles of this side in latents (8 pixels each).", show_default=False),
]


def limits_of(budget: float | None, ram: float | None, tiling: TilingOption, tile: int | None) -> Limits:
    """What the options allow."""
    return Limits(
        budget_bytes=bytes_of(budget), ram_bytes=bytes_of(ram), blended=tiling is TilingOption.blended, tile=tile
    )


def bounded(vae: VideoVAE, budget: float | None, ram: float | None, tiling: TilingOption, tile: int | None) -> VideoVAE:
    """The VAE, which keeps within what the options allow. Raises UserError for a choice that it does not have."""
    try:
        return limits_of(budget, ram, tiling, tile).keep(vae)
    except ValueError as error:
        raise UserError(str(error)) from error


def bytes_of(gib: float | None) -> int | None:
    """GiB in bytes; what is more than any machine has is a million."""
    return None if gib is None else int(min(gib, 1e6) * 2**30)


def form_of(crf: float | None, codec: CodecOption | None, bits: int | None, pix_fmt: str | None) -> Form:
    """How the options ask for a result to be stored."""
    return Form(crf=crf, codec=None if codec is None else codec.value, bits=bits, pix_fmt=pix_fmt)


def load_weights(weights: str, dtype: DType, device: str) -> VideoVAE:
    """The VAE that the options name, on one device or several."""
    (where, kind), *others = [device_and_dtype(dtype, name) for name in device.split(",")]
    vae = load(weights, device=where, dtype=kind)
    try:
        return vae.on([where, *(other for other, _ in others)]) if others else vae
    except ValueError as error:
        raise UserError(f"--device {device}: {error}") from error


def device_and_dtype(dtype: DType, device: str) -> tuple[torch.device, torch.dtype]:
    """What the two options stand for. Raises UserError for a device that is not there."""
    where = device_named(device)
    if not is_there(where):
        raise UserError(
            f"--device {device} is not there: this torch sees {_count(where.type)} {where.type.upper()} devices; use "
            "--device cpu."
        )
    return where, dtype_for(dtype, where)


def dtype_for(dtype: DType, device: torch.device) -> torch.dtype:
    """What --dtype stands for on a device."""
    if dtype is DType.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16, DType.float16: torch.float16}[dtype]


def device_named(name: str) -> torch.device:
    """What --device stands for, be it there or not. Raises UserError for what is no device."""
    if name == "auto":
        return torch.device(next((kind for kind in ("cuda", "xpu", "mps") if _count(kind)), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "xpu", "mps"):
        raise UserError(f"--device {name} is no device; use auto, cpu, cuda, cuda:0, xpu or mps.")
    return device


def is_there(device: torch.device) -> bool:
    """Whether this torch sees a device."""
    return device.type == "cpu" or (device.index or 0) < _count(device.type)


def _count(kind: str) -> int:
    """How many GPUs of a kind this torch sees."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return torch.cuda.device_count() if kind == "cuda" else torch.xpu.device_count()


def size_of(text: str) -> tuple[int, int]:
    """(height, width) of WIDTHxHEIGHT. Raises UserError for anything else."""
    found = re.fullmatch(r"(\d{1,6})[xX*](\d{1,6})", text)
    if found is None or min(int(found[1]), int(found[2])) < LEAST_SIDE:
        raise UserError(f"--size {text} is no size; give WIDTHxHEIGHT such as 1920x1080, {LEAST_SIDE} or more each.")
    return int(found[2]), int(found[1])
