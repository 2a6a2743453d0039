"""What is compared: our VAEs, those of diffusers, and the honest baseline of shrinking a picture and enlarging it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..door.limits import NO_LIMITS, Limits
from ..door.loading import DEMO_WEIGHTS, load
from ..door.vae import VideoVAE
from ..families import VIDEO
from ..metrics import Borders, chunk_borders, tile_borders
from ..run.tiling import AnyPlan, ReferencePlan
from ..run.windows import pad_stream
from .protocols import whole

BASELINE = "shrink-8x"
TILED = "+reference-tiles"
DIFFUSERS = ("AutoencoderKL", "AutoencoderKLTemporalDecoder", "AutoencoderKLCogVideoX", "AutoencoderKLWan")


class Candidate(Protocol):
    """Something that takes video in and gives video back."""

    @property
    def facts(self) -> dict[str, str]:
        """What to print of it: family, latent channels, parameters."""
        ...

    def reconstruct(self, frames: Iterable[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
        """Chunks (1, 3, t, h, w) in [-1, 1] in, chunks of the same frames out, cut to `size`; more may follow."""
        ...


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A candidate that is not loaded yet. identity: changes when its weights do."""

    name: str
    identity: str
    load: Callable[[], Candidate]


class Native:
    """One of our VAEs, run by `plan`."""

    def __init__(self, vae: VideoVAE, plan: AnyPlan = None) -> None:
        self.vae = vae
        self.plan = plan

    @property
    def facts(self) -> dict[str, str]:
        """Family, latent channels, parameters, precision."""
        info = self.vae.info
        space, time = info.space_compression, info.time_compression
        time = f" and {time} in time" if time > 1 else ""
        return {
            "family": info.family,
            "latent": f"{info.latent_channels} channels, {space}x{space}{time}",
            "parameters": f"{info.parameters:,}",
            "runs in": f"{str(self.vae.dtype).removeprefix('torch.')} on {self.vae.device}",
        }

    def reconstruct(self, frames: Iterable[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
        """Streamed: holds one chunk."""
        latents = self.vae.encode_stream(frames, pad=True, plan=self.plan)
        yield from self.vae.decode_stream(latents, size=size, plan=self.plan)


class Shrink:
    """The baseline: every frame made 8 times smaller and enlarged again."""

    @property
    def facts(self) -> dict[str, str]:
        """What it does."""
        return {"family": "baseline", "latent": "3 channels, 8x8", "parameters": "0", "runs in": "float32 on cpu"}

    def reconstruct(self, frames: Iterable[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
        """Area average down, bicubic up."""
        for chunk in frames:
            flat = chunk[0].transpose(0, 1)  # t c h w
            small = F.interpolate(flat, [max(1, round(side / VIDEO.space)) for side in size], mode="area")
            back = F.interpolate(small, size, mode="bicubic", align_corners=False)
            yield back.transpose(0, 1)[None]


class Diffusers:
    """A VAE of diffusers, whole clips at a time: it needs memory for the clip. kind: its class."""

    def __init__(self, model: Any, kind: str) -> None:  # noqa: ANN401
        self.model = model
        self.kind = kind

    @property
    def facts(self) -> dict[str, str]:
        """Class, latent channels, parameters, precision."""
        config = self.model.config
        channels = getattr(config, "latent_channels", None) or getattr(config, "z_dim", "?")
        return {
            "family": self.kind,
            "latent": f"{channels} channels",
            "parameters": f"{sum(p.numel() for p in self.model.parameters()):,}",
            "runs in": f"{str(self.model.dtype).removeprefix('torch.')} on {self.model.device}",
        }

    @torch.no_grad()
    def reconstruct(self, frames: Iterable[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
        """Encode to the mean and decode; images one by one, videos as a whole."""
        if self.kind == "AutoencoderKL":
            for chunk in frames:
                for frame in chunk[0].unbind(1):
                    yield self._images(_padded(frame[None, :, None])[:, :, 0])[:, :, None, : size[0], : size[1]]
            return
        clip = whole(pad_stream(frames, VIDEO))  # 1 c t h w
        if self.kind == "AutoencoderKLTemporalDecoder":
            latents = torch.cat([self._mean(frame[None]) for frame in clip[0].unbind(1)])
            result = self.model.decode(latents, num_frames=len(latents)).sample  # t c h w
            yield result.float().cpu().transpose(0, 1)[None, :, :, : size[0], : size[1]]
            return
        result = self.model.decode(self._mean(clip)).sample
        yield result.float().cpu()[..., : size[0], : size[1]]

    def _mean(self, pixels: Tensor) -> Tensor:
        return self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist.mode()

    def _images(self, images: Tensor) -> Tensor:
        return self.model.decode(self._mean(images)).sample.float().cpu()


class DiffusersImages:
    """diffusers' AutoencoderKL as an image VAE for `latent_compatibility`; latents unscaled, as CV-VAE's are."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        self.model = model

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) in [-1, 1] to the posterior mean."""
        return self.model.encode(images.to(self.model.device, self.model.dtype)).latent_dist.mode().float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to (b, 3, h, w)."""
        return self.model.decode(latents.to(self.model.device, self.model.dtype)).sample.float().cpu()


def choose(
    spec: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tiles: ReferencePlan | None = None,
    limits: Limits = NO_LIMITS,
) -> Choice:
    """The candidate that `spec` names: demo-cv-vae, a weights file or folder of ours, a folder of one of diffusers'
    VAEs, or shrink-8x. With "+reference-tiles" at its end, one of ours runs in the official tiles (or in `tiles`).
    limits: of the memory of ours.

    Raises ValueError where a folder is of a diffusers VAE and diffusers is not installed.
    """
    if spec == BASELINE:
        return Choice(name=BASELINE, identity=BASELINE, load=Shrink)
    bare = spec.removesuffix(TILED)
    plan = (tiles or ReferencePlan()) if spec != bare else None
    path = DEMO_WEIGHTS.get(bare, Path(bare))
    name = f"{bare if bare in DEMO_WEIGHTS else path.stem or path.name}{TILED if plan else ''}"
    kind = _diffusers_class(path)
    blended = ", blended" if limits.blended else ""  # exact plans give the same
    identity = f"{_identity(path)}, {dtype}, {plan}{blended}"
    if kind is not None:
        model_class = _diffusers(kind)
        return Choice(
            name=name,
            identity=identity,
            load=lambda: Diffusers(
                model_class.from_pretrained(str(path), torch_dtype=dtype, local_files_only=True).to(device).eval(), kind
            ),
        )
    return Choice(name=name, identity=identity, load=lambda: _native(bare, device, dtype, plan, limits))


def _native(
    spec: str, device: torch.device | str, dtype: torch.dtype, plan: ReferencePlan | None, limits: Limits
) -> Native:
    vae = load(spec, device=device, dtype=dtype)
    if plan is not None and not vae.model.family.reference_tiles:
        raise ValueError(
            f"{spec}{TILED}: the official tiles are those of CV-VAE, and this is {vae.family}; leave them out."
        )
    return Native(limits.keep(vae), plan)


def image_coder(path: Path, *, device: torch.device | str, dtype: torch.dtype) -> DiffusersImages:
    """The image VAE of a folder of diffusers' AutoencoderKL. Raises ValueError for another folder."""
    if _diffusers_class(path) != "AutoencoderKL":
        raise ValueError(f"{path} is no folder of diffusers' AutoencoderKL; give the vae folder of an image model.")
    model = _diffusers("AutoencoderKL").from_pretrained(str(path), torch_dtype=dtype, local_files_only=True)
    return DiffusersImages(model.to(device).eval())


def borders_of(size: tuple[int, int], frames: int, tiles: ReferencePlan) -> Borders:
    """Where seams are looked for, in every candidate alike: the borders of `tiles` and of CV-VAE's chunks."""
    space = tile_borders(tiles.pixels, size)
    return Borders(rows=space.rows, columns=space.columns, frames=chunk_borders(frames))


def _padded(frames: Tensor) -> Tensor:
    return next(iter(pad_stream([frames], VIDEO)))


def _diffusers_class(path: Path) -> str | None:
    """The class that a diffusers folder names, where it is one that can be compared."""
    try:
        name = json.loads((path / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None
    return name if name in DIFFUSERS else None


def _diffusers(kind: str) -> Any:  # noqa: ANN401
    try:
        return getattr(importlib.import_module("diffusers"), kind)
    except ModuleNotFoundError as error:
        raise ValueError(f"{kind} needs diffusers, which is not installed: pip install diffusers") from error
    except (AttributeError, ImportError) as error:
        raise ValueError(f"{kind} is not in the diffusers installed here ({error}); update it.") from error


def _identity(path: Path) -> str:
    """Changes when the file does, or any file of the folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return " ".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)
