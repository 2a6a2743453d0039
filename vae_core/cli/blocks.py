"""What a file holds, in lines of text."""

from pathlib import Path

import torch

from ..media.latents import TENSOR, LatentFile
from ..media.video import losses, probe
from ..weights.folders import SUFFIXES, is_index
from ..weights.headers import UnreadableError, read_header, sniff


def kind_of_file(path: Path) -> str:
    """ "latent", "video" or "weights", by what the file holds."""
    if path.is_dir() or not path.exists() or path.suffix.lower() in SUFFIXES or is_index(path):
        return "latent" if _is_latent(path) else "weights"
    try:
        sniff(path)
    except UnreadableError:
        return "video"
    return "latent" if _is_latent(path) else "weights"


def _is_latent(path: Path) -> bool:
    try:
        return TENSOR in read_header(path).shapes
    except UnreadableError:
        return False


def latent_block(file: LatentFile) -> str:
    meta, (clips, channels, length, height, width) = file.meta, file.shape
    lines = [
        str(file.path),
        f"family           {meta.family}",
        f"latent           {length} frames of {width}x{height}, {channels} channels, {name_of(file.dtype)}",
        f"video            {meta.frames} frames of {meta.width}x{meta.height}, {float(meta.fps):g} frames/s",
        f"scaled           {'yes, by the VAE' if meta.scaled else 'no, the sampler does it'}",
        f"sound in         {meta.audio or 'none'}",
    ]
    if clips > 1:
        lines.insert(2, f"clips            {clips}")
    if meta.aspect != 1:
        lines.append(f"pixel shape      {meta.aspect.numerator}:{meta.aspect.denominator}")
    if meta.times is not None:
        lines.append(f"frame times      of their own, {float(meta.times[-1]):.3f} s in all")
    return "\n".join(lines)


def video_block(path: Path) -> str:
    found = probe(path)
    frames = found.frames or f"about {found.expected_frames or '?'}"
    tracks = f", the first of {found.sounds} tracks" if found.sounds > 1 else ""
    lines = [
        str(path),
        f"{'picture' if found.still else 'video'.ljust(7)}          {found.width}x{found.height}, {found.codec}",
        f"frames           {frames} at {float(found.fps):g} frames/s",
        f"sound            {found.audio_codec or 'none'}{tracks}",
    ]
    if found.aspect != 1:
        lines.append(f"pixel shape      {found.aspect.numerator}:{found.aspect.denominator}")
    return "\n".join(lines + [f"note             {ending}" for ending in losses(found)])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
