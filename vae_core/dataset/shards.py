"""Files of a job: one small file for each finished clip, and shards made of them. All appear only when complete."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from ..atomic import atomic_write
from ..weights.headers import open_safetensors, read_header

ShardFormat = Literal["safetensors", "webdataset"]
SUFFIX: dict[ShardFormat, str] = {"safetensors": ".safetensors", "webdataset": ".tar"}
TENSOR = "latent"


class EncodeJobError(ValueError):
    """The job cannot be done, or not into this folder."""


@dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """What a latent was made of. key: the clip's place in its source. frames, height, width: of what was encoded, in
    frames and pixels, before any padding. fps: frames per second, as a fraction. damage: what was wrong with them.
    source: size, time and hash of the file that they are of, see `ClipFile.fingerprint`."""

    id: str
    key: str
    frames: int
    height: int
    width: int
    fps: str
    damage: str = ""
    source: str = ""


def check_finite(latent: Tensor, name: object, computed: torch.dtype) -> None:
    """Raise EncodeJobError where a latent (z, t, h, w), computed in another type, holds values that are no numbers."""
    if not torch.isfinite(latent).all():
        narrow = torch.float16 in (latent.dtype, computed)
        remedy = (
            "float16 overflows with these weights: choose --dtype bfloat16 or float32, and --store other than float16."
            if narrow
            else "The weights are damaged or were trained to nothing: use other weights."
        )
        raise EncodeJobError(f"{name}: encoding gives NaN or infinity. {remedy} What was finished before is kept.")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is whole, on the disk, or not there; the writer of the same name that ends last wins."""
    with atomic_write(path) as part:
        part.write_bytes(content)


def write_json(path: Path, value: object) -> None:
    """The same, of JSON."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    return json.loads(path.read_bytes())


def write_clip(path: Path, latent: Tensor, info: ClipInfo) -> None:
    """One finished clip; latent: (z, t, h, w)."""
    metadata = {"clip": json.dumps(asdict(info))}
    write_bytes(path, safetensors.torch.save({TENSOR: latent.contiguous()}, metadata=metadata))


def read_info(path: Path) -> ClipInfo:
    """What `write_clip` wrote of a clip in addition to its latent."""
    return ClipInfo(**json.loads(read_header(path).metadata["clip"]))


def _read_clip(path: Path) -> tuple[ClipInfo, Tensor]:
    with open_safetensors(path) as file:
        return read_info(path), file.get_tensor(TENSOR)


def write_shard(path: Path, clips: Sequence[Path], form: ShardFormat) -> list[ClipInfo]:
    """Join finished clips into a shard.

    safetensors: a tensor for each clip, under its id; the metadata `clips` is a JSON list of ClipInfo. webdataset: a
    tar with `<id>.safetensors` (the tensor `latent`) and `<id>.json` for each clip.
    """
    read = [_read_clip(clip) for clip in clips]
    infos = [info for info, _ in read]
    if form == "safetensors":
        metadata = {"clips": json.dumps([asdict(info) for info in infos])}
        write_bytes(path, safetensors.torch.save({info.id: latent for info, latent in read}, metadata=metadata))
        return infos
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as shard:
        for info, clip in zip(infos, clips, strict=True):
            for suffix, content in (("safetensors", clip.read_bytes()), ("json", json.dumps(asdict(info)).encode())):
                member = tarfile.TarInfo(f"{info.id}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    write_bytes(path, buffer.getvalue())
    return infos


def read_latents(folder: str | Path) -> Iterator[tuple[ClipInfo, Tensor]]:
    """Every finished clip of a job's folder with its latent, (z, t, h, w), shard after shard."""
    for record in sorted(Path(folder).glob("shard-*.json")):
        yield from read_record(record)


def read_record(record: Path) -> Iterator[tuple[ClipInfo, Tensor]]:
    """The clips of one shard, by its record."""
    content = read_json(record)
    if content["file"] is None:
        return
    path = record.with_name(content["file"])
    infos = [ClipInfo(**info) for info in content["clips"]]
    if path.suffix == SUFFIX["safetensors"]:
        with open_safetensors(path) as file:
            for info in infos:
                yield info, file.get_tensor(info.id)
        return
    with tarfile.open(path) as shard:
        for info in infos:
            member = shard.extractfile(f"{info.id}.safetensors")
            assert member is not None
            yield info, safetensors.torch.load(member.read())[TENSOR]
