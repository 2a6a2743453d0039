"""One clip of a data set into a latent, or into the reason why there is none."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..door.limits import NO_LIMITS, Limits
from ..door.loading import DEMO_WEIGHTS, load
from ..door.vae import VideoVAE
from ..errors import BudgetError, VideoError
from ..evaluation.protocols import cover
from ..run.stream import is_out_of_memory
from ..training.checkpoint import is_full
from ..training.clip_decoding import clip_rate, damage_of, read_picked
from ..training.clip_files import ClipFile
from ..training.data import TrainingDataError
from ..weights.files import SUFFIXES
from .shards import SUFFIX, ClipInfo, EncodeJobError, ShardFormat, check_finite, write_bytes, write_clip, write_json

logger = logging.getLogger("cviv_vae.dataset")
CHUNK = 4  # frames that are read at once
MOST_TRIES = 2  # of a clip that ends the process
UNREADABLE, UNEXPECTED, ENDED = "unreadable", "unexpected", "ended"  # why there is no latent


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """What decides the latents and their files; a folder holds the latents of one such choice.

    weights: a file, a folder or the name of demo weights. dtype: of the computation; stored: of the latents. size:
    (height, width) that pictures are made to cover and cut to, never enlarged; None leaves them. frames: of each video,
    from its beginning; None takes all. stride: every so manyth frame. seed: draws from the posterior; None takes its
    mean. form: of the shards. clips_per_shard: at most. limits: of memory.
    """

    weights: str
    dtype: torch.dtype = torch.float32
    stored: torch.dtype = torch.float32
    size: tuple[int, int] | None = None
    frames: int | None = None
    stride: int = 1
    seed: int | None = None
    form: ShardFormat = "safetensors"
    clips_per_shard: int = 256
    limits: Limits = NO_LIMITS

    def __post_init__(self) -> None:
        numbers = (self.stride, self.frames or 1, self.clips_per_shard, *(self.size or (1, 1)))
        if min(numbers) < 1 or self.form not in SUFFIX or self.stored not in (
            torch.float32, torch.float16, torch.bfloat16
        ):  # fmt: skip
            raise EncodeJobError(
                f"Got size {self.size}, {self.frames} frames, stride {self.stride}, {self.clips_per_shard} clips per "
                f"shard, form {self.form}, stored as {self.stored}; numbers are 1 or more, the form is "
                f"{' or '.join(SUFFIX)}, latents are stored as float32, float16 or bfloat16."
            )

    def described(self) -> dict[str, Any]:
        """For the folder: what must be the same when the job goes on."""
        texts = {name: str(value) if isinstance(value, torch.dtype) else value for name, value in asdict(self).items()}
        del texts["limits"]
        blended = {"blended": True} if self.limits.blended else {}
        return json.loads(json.dumps(texts | blended | {"weights": _digest(self.weights)}))

    def load(self, device: torch.device | str) -> VideoVAE:
        """The VAE that encodes, within its limits."""
        vae = load(self.weights, device=device, dtype=self.dtype)
        try:
            return self.limits.keep(vae)
        except ValueError as error:
            raise EncodeJobError(str(error)) from error


def _digest(weights: str) -> str:
    """A name for weights that follows from their bytes."""
    place = DEMO_WEIGHTS.get(weights, Path(weights))
    if not place.exists():
        raise EncodeJobError(f"{weights}: no such weights; give a file, a folder, or {', '.join(DEMO_WEIGHTS)}.")
    files = sorted(path for path in place.iterdir() if path.suffix in SUFFIXES) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()[:32]}"


def encode_row(vae: VideoVAE, file: ClipFile | None, key: str, part: Path, settings: EncodeSettings) -> None:
    """Encode one clip into the file `part`, or leave the reason why not, as `.json`; what is there stays as it is.

    An attempt is counted in a file before it is made: a clip that ends the process again and again is left out.
    """
    tries, reason = part.with_suffix(".tries"), part.with_suffix(".json")
    if part.exists() or reason.exists():
        return
    before = int(tries.read_text()) if tries.exists() else 0
    error = {"id": part.stem, "key": key, "source": "" if file is None else file.fingerprint()}
    if before >= MOST_TRIES:
        text = f"{key}: ended the process that read it, {before} times. --retry-broken tries it again."
        write_json(reason, error | {"kind": ENDED, "reason": text})
        tries.unlink()
        return
    write_bytes(tries, str(before + 1).encode())
    try:
        if file is None:
            raise TrainingDataError(f"{key}: is no longer in the sources.")
        latent, info = encode_clip(vae, file, key, part.stem, settings)
        write_clip(part, latent, replace(info, source=error["source"]))
    except (VideoError, TrainingDataError) as found:
        logger.warning("Left out: %s", found)
        write_json(reason, error | {"kind": UNREADABLE, "reason": str(found)})
    except Exception as found:
        if isinstance(found, (EncodeJobError, BudgetError)) or is_out_of_memory(found) or is_full(found):
            raise  # the clip is not to blame
        text = f"{key}: unexpected {type(found).__name__}: {found}"
        logger.warning("Left out: %s", text)
        write_json(reason, error | {"kind": UNEXPECTED, "reason": text})
    finally:  # where the process was told to end, the clip is not to blame
        tries.unlink(missing_ok=True)


def encode_clip(
    vae: VideoVAE, file: ClipFile, key: str, identity: str, settings: EncodeSettings
) -> tuple[Tensor, ClipInfo]:
    """The latent of a clip, (z, t, h, w) on the CPU. Raises VideoError or TrainingDataError where it cannot be read."""
    frames = 0
    shape = (0, 0)

    def pick(count: int) -> range:
        last = None if settings.frames is None or file.kind == "image" else 1 + (settings.frames - 1) * settings.stride
        if last is not None and count < last:
            raise TrainingDataError(
                f"{file.name}: has {count} frames; {settings.frames} at stride {settings.stride} need {last}."
            )
        return range(0, count if last is None else last, settings.stride)

    def chunks() -> Iterator[Tensor]:
        nonlocal frames, shape
        held: list[Tensor] = []
        for picture in read_picked(file, pick, whole=True):
            held.append(_fitted(picture, settings.size, file))
            frames, shape = frames + 1, (held[-1].shape[-2], held[-1].shape[-1])
            if len(held) == CHUNK:
                yield torch.cat(held, dim=2)
                held = []
        if held:
            yield torch.cat(held, dim=2)

    seed = settings.seed
    generator = None if seed is None else torch.Generator().manual_seed((seed * 10**8 + int(identity)) % 2**63)
    stream = vae.encode_stream(chunks(), pad=True, sample=seed is not None, generator=generator)
    latent = torch.cat([chunk.cpu() for chunk in stream], dim=2)[0].to(settings.stored)  # z t h w
    check_finite(latent, file.name, vae.dtype)
    info = ClipInfo(
        id=identity,
        key=key,
        frames=frames,
        height=shape[0],
        width=shape[1],
        fps=str(clip_rate(file) / settings.stride),
        damage=damage_of(file),
    )
    return latent, info


def _fitted(picture: Tensor, size: tuple[int, int] | None, file: ClipFile) -> Tensor:
    """(3, H, W) as (1, 3, 1, h, w)."""
    height, width = picture.shape[-2:]
    if size is None:
        return picture[None, :, None]
    if height < size[0] or width < size[1]:
        raise TrainingDataError(f"{file.name}: is {width}x{height}, too small for {size[1]}x{size[0]}.")
    return cover(picture[None, :, None], size)
