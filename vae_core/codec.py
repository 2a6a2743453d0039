"""`VideoVAE`: encoding and decoding of whole clips and of streams, with either model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .cv_vae import CVVAE
from .detect import Family
from .iv_vae import GROUP, IVVAE
from .keys import Model, family_of_config
from .memory import Memory
from .tiles import ReferencePlan, run_tiled
from .windows import (
    SPACE,
    TIME,
    Windowing,
    check_whole,
    latent_frames,
    pad_stream,
    pixel_frames,
    rechunk,
    whole_stream,
)

Progress = Callable[[int, int], None]

CV_FRAMES, CV_LATENTS = Windowing(first=17, step=16, overlap=1), Windowing(first=5, step=4, overlap=1)
IV_FRAMES, IV_LATENTS = Windowing(first=1, step=GROUP, overlap=0), Windowing(first=1, step=1, overlap=0)

# what a diffusion model applies to an unscaled CV-VAE latent: scale * (latent - shift)
SAMPLER_SCALING = {"cv-vae": (0.18215, 0.0), "cv-vae-sd3": (1.5305, 0.0609)}


@dataclass(frozen=True, kw_only=True)
class VAEInfo:
    """What a loaded VAE is. `str(info)` is a readable block.

    scale_factor, shift_factor: scaled latent = scale_factor * (latent - shift_factor).
    scaled_by: "sampler": our latents are unscaled and the diffusion model's side scales them; "vae": ours are scaled.
    safe_dtypes: dtypes without a known danger of overflow; float16 runs but may overflow on some content.
    """

    family: Family
    latent_channels: int
    time_compression: int
    space_compression: int
    parameters: int
    scale_factor: float
    shift_factor: float
    scaled_by: str
    safe_dtypes: tuple[torch.dtype, ...]
    widths: str

    def __str__(self) -> str:
        scaled = "by the sampler" if self.scaled_by == "sampler" else "by this VAE"
        space = f"{self.space_compression}x{self.space_compression}"
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.safe_dtypes)
        return "\n".join(
            (
                f"family           {self.family}",
                f"latent channels  {self.latent_channels}",
                f"compression      {self.time_compression}x in time, {space} in space",
                f"widths           {self.widths}",
                f"parameters       {self.parameters:,}",
                f"latent scale     {self.scale_factor:g} * (latent {-self.shift_factor:+g}), applied {scaled}",
                f"safe dtypes      {dtypes}",
            )
        )


class VideoVAE:
    """A video VAE: one of the two models, and the way clips of any length go through it.

    Pixels are RGB in [-1, 1], (b, 3, t, h, w); latents are (b, z, 1 + N, h/8, w/8) for 1 + 4N frames. CV-VAE latents
    are unscaled, IV-VAE latents scaled by the VAE itself. Results have the model's dtype and lie on the device of the
    input; pixels are not clamped. No graph is built unless the input or the model requires gradients.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def family(self) -> Family:
        """The family: "cv-vae", "cv-vae-sd3" or "iv-vae"."""
        return family_of_config(self.model.config)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def info(self) -> VAEInfo:
        """Family, compression, scaling and safe dtypes."""
        config = self.model.config
        if isinstance(self.model, IVVAE):
            scale, shift = self.model.config.scale_factor, self.model.config.shift_factor
            widths = f"dim {self.model.config.dim}"
        else:
            scale, shift = SAMPLER_SCALING[self.family]
            blocks = self.model.config.blocks_per_level
            widths = f"{', '.join(map(str, self.model.config.widths))}; {blocks} residual block(s) per level"
        return VAEInfo(
            family=self.family,
            latent_channels=config.latent_channels,
            time_compression=TIME,
            space_compression=SPACE,
            parameters=sum(p.numel() for p in self.model.parameters()),
            scale_factor=scale,
            shift_factor=shift,
            scaled_by="vae" if isinstance(self.model, IVVAE) else "sampler",
            safe_dtypes=(torch.float32, torch.bfloat16),
            widths=widths,
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> VideoVAE:
        """Move the weights, in place; returns self."""
        self.model.to(device=device, dtype=dtype)
        return self

    # ---------------------------------------------------------------------------------------------- encoding

    def encode(
        self,
        video: Tensor,
        *,
        pad: bool = False,
        sample: bool = False,
        generator: torch.Generator | None = None,
        plan: ReferencePlan | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Latent of a whole clip: the posterior mean, or a draw from the posterior with `sample`.

        video: (b, 3, t, h, w) in [-1, 1] with t = 1 + 4N and h, w multiples of 8; with `pad`, any t, h, w: the last
        frame and the right and bottom edge are repeated, and `decode(..., frames=t, size=(h, w))` gives back what went
        in. generator: makes the draw repeatable. plan: the official CV-VAE tiling; None encodes whole frames.
        progress: called with (latents done, latents in all) after every chunk.
        Returns (b, z, t', h', w'). Raises ValueError for a wrong shape or dtype.
        """
        self._check_video(video, pad=pad)
        stream = self.encode_stream([video], pad=pad, sample=sample, generator=generator, plan=plan)
        return _collect(stream, latent_frames(video.shape[2]), progress)

    def moments(self, video: Tensor, *, pad: bool = False, plan: ReferencePlan | None = None) -> tuple[Tensor, Tensor]:
        """(mean, logvar) of the posterior of a whole clip, each (b, z, t', h', w'), unscaled, logvar not clamped.

        Arguments and errors as in `encode`.
        """
        self._check_video(video, pad=pad)
        total = latent_frames(video.shape[2])
        both = _collect((torch.cat(pair, dim=1) for pair in self._moments([video], pad=pad, plan=plan)), total, None)
        mean, logvar = both.chunk(2, dim=1)
        return mean, logvar

    def encode_stream(
        self,
        frames: Iterable[Tensor],
        *,
        pad: bool = False,
        sample: bool = False,
        generator: torch.Generator | None = None,
        plan: ReferencePlan | None = None,
    ) -> Iterator[Tensor]:
        """Latents of a stream of (b, 3, t, h, w) pieces, any t each, as (b, z, t', h', w') pieces; holds one chunk.

        How the stream is cut does not change the result. Without `pad`, raises ValueError at the end of a stream that
        did not have 1 + 4N frames. Other arguments as in `encode`.
        """
        for mean, logvar in self._moments(frames, pad=pad, plan=plan):
            latent = _draw(mean, logvar, generator, clamp=isinstance(self.model, CVVAE)) if sample else mean
            if isinstance(self.model, IVVAE):
                latent = self.model.config.scale_factor * (latent - self.model.config.shift_factor)
            yield latent

    def _moments(
        self, frames: Iterable[Tensor], *, pad: bool, plan: ReferencePlan | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        pieces = self._checked(frames, 3, "video", "frames in [-1, 1]")
        pieces = pad_stream(pieces) if pad else whole_stream(pieces)
        step = self._encode_step(plan)
        windowing = IV_FRAMES if isinstance(self.model, IVVAE) else CV_FRAMES
        drop = 0
        for chunk in rechunk(pieces, windowing):
            mean, logvar = step(chunk.to(self.device, self.dtype)).to(chunk.device).chunk(2, dim=1)
            yield mean[:, :, drop:], logvar[:, :, drop:]
            drop = windowing.overlap

    def _encode_step(self, plan: ReferencePlan | None) -> Callable[[Tensor], Tensor]:
        """The function that turns one chunk after another into moments (b, 2z, t', h', w')."""
        model = self.model
        if isinstance(model, IVVAE):
            self._refuse_plan(plan)
            memory = Memory()
            return lambda group: torch.cat(model.encode(group, memory), dim=1)
        if plan is None:
            return lambda chunk: torch.cat(model.encode(chunk), dim=1)
        return lambda chunk: run_tiled(
            chunk, lambda x: torch.cat(model.encode(x), dim=1), source=plan.pixels, target=plan.latents
        )

    # ---------------------------------------------------------------------------------------------- decoding

    def decode(
        self,
        latent: Tensor,
        *,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        plan: ReferencePlan | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Frames of a whole latent.

        latent: (b, z, t', h', w'), unscaled for CV-VAE, scaled for IV-VAE, as `encode` gives it.
        frames: how many to return, from the first; size: (height, width) to return, from the top left: what `pad` added
        goes. plan: the official CV-VAE tiling; None decodes whole frames. progress: called with (frames done, frames in
        all) after every chunk.
        Returns (b, 3, t, h, w), nominally in [-1, 1], not clamped; t = 1 + 4 (t' - 1) unless `frames` is given.
        Raises ValueError for a wrong shape, dtype, `frames` or `size`.
        """
        self._check_piece(latent, self.model.config.latent_channels, "latent", "unit-scale values")
        if latent.shape[2] == 0:
            raise ValueError("The latent has no frames; give at least one.")
        available = pixel_frames(latent.shape[2])
        if frames is not None and not 1 <= frames <= available:
            raise ValueError(
                f"frames={frames} was asked for, but {latent.shape[2]} latents decode to {available} frames; give a "
                f"number from 1 to {available}, or leave it out."
            )
        stream = self.decode_stream(latent, frames=frames, size=size, plan=plan)
        return _collect(stream, available if frames is None else frames, progress)

    def decode_stream(
        self,
        latent: Tensor | Iterable[Tensor],
        *,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        plan: ReferencePlan | None = None,
    ) -> Iterator[Tensor]:
        """Frames of a latent, or of a stream of (b, z, t', h', w') pieces of any t', chunk by chunk; holds one chunk.

        Stops once `frames` are out, and raises ValueError if the stream ends before. Other arguments as in `decode`.
        """
        pieces = [latent] if isinstance(latent, Tensor) else latent
        pieces = self._checked(pieces, self.model.config.latent_channels, "latent", "unit-scale values")
        step = self._decode_step(plan)
        windowing = IV_LATENTS if isinstance(self.model, IVVAE) else CV_LATENTS
        drop, done = 0, 0
        for chunk in rechunk(pieces, windowing):
            _check_size(size, chunk)
            keep = None if frames is None else drop + frames - done
            y = step(chunk.to(self.device, self.dtype))[:, :, drop:keep]
            if size is not None:
                y = y[..., : size[0], : size[1]]
            drop = windowing.overlap
            done += y.shape[2]
            yield y.to(chunk.device)
            if done == frames:
                return
        if frames is not None:
            raise ValueError(
                f"frames={frames} were asked for, but the latents decode to {done} frames; give a smaller number, or "
                "leave it out."
            )

    def _decode_step(self, plan: ReferencePlan | None) -> Callable[[Tensor], Tensor]:
        """The function that turns one chunk of latents after another into frames."""
        model = self.model
        if isinstance(model, IVVAE):
            self._refuse_plan(plan)
            memory, config = Memory(), model.config
            return lambda z: model.decode(z / config.scale_factor + config.shift_factor, memory)
        if plan is None:
            return model.decode
        return lambda chunk: run_tiled(chunk, model.decode, source=plan.latents, target=plan.pixels)

    # ---------------------------------------------------------------------------------------------- checks

    def _refuse_plan(self, plan: ReferencePlan | None) -> None:
        if plan is not None:
            raise ValueError(
                f"A ReferencePlan is the official tiling of CV-VAE, and this is {self.family}, whose official code "
                "does not tile. Leave plan out."
            )

    def _check_video(self, video: Tensor, *, pad: bool) -> None:
        self._check_piece(video, 3, "video", "frames in [-1, 1]")
        if video.shape[2] == 0:
            raise ValueError("The video has no frames; give at least one.")
        if not pad:
            check_whole(*video.shape[2:])

    def _check_piece(self, piece: Tensor, channels: int, what: str, values: str) -> None:
        layout = f"(batch, {channels}, frames, height, width)"
        if piece.ndim != 5 or piece.shape[1] != channels or 0 in (piece.shape[0], *piece.shape[3:]):
            raise ValueError(
                f"The {what} has shape {tuple(piece.shape)}; {self.family} needs {layout}, none of them 0 but frames "
                f"in a stream.{_shape_hint(piece, channels)}"
            )
        if not piece.is_floating_point():
            raise ValueError(
                f"The {what} has dtype {piece.dtype}; needed are floating-point {values}. For 8-bit pixels: "
                "video.float() / 127.5 - 1."
            )

    def _checked(self, pieces: Iterable[Tensor], channels: int, what: str, values: str) -> Iterator[Tensor]:
        """Pass pieces on, each checked alone and against the first."""
        first: torch.Size | None = None
        for piece in pieces:
            self._check_piece(piece, channels, what, values)
            first = first or piece.shape
            if (piece.shape[:2], piece.shape[3:]) != (first[:2], first[3:]):
                raise ValueError(
                    f"A piece of the {what} stream has shape {tuple(piece.shape)}, the first had {tuple(first)}; only "
                    "the number of frames may change from piece to piece."
                )
            yield piece


def _shape_hint(piece: Tensor, channels: int) -> str:
    """What to do about a common mistake, as a sentence to append."""
    if piece.ndim == 4 and piece.shape[1] == channels:
        return " A batch of frames (frames, channels, height, width) becomes one clip by x.movedim(0, 1)[None]."
    if piece.ndim == 5 and piece.shape[2] == channels:
        return " Channels seem to come after frames: x.transpose(1, 2) swaps them."
    if piece.ndim == 5 and piece.shape[1] in (4, 8, 16, 32):
        return f" A latent with {piece.shape[1]} channels is of another VAE: load the one that made it."
    return ""


def _check_size(size: tuple[int, int] | None, chunk: Tensor) -> None:
    if size is None:
        return
    full = [SPACE * n for n in chunk.shape[-2:]]
    if not all(n - SPACE < given <= n for given, n in zip(size, full, strict=True)):
        raise ValueError(
            f"size={tuple(size)} was asked for, but the latents decode to {full[0]}x{full[1]} (height x width); "
            f"padding adds fewer than {SPACE} pixels, so allowed are heights {full[0] - SPACE + 1} to {full[0]} and "
            f"widths {full[1] - SPACE + 1} to {full[1]}."
        )


def _draw(mean: Tensor, logvar: Tensor, generator: torch.Generator | None, *, clamp: bool) -> Tensor:
    """A draw from the posterior; CV-VAE clamps logvar to [-30, 20], IV-VAE does not."""
    device = mean.device if generator is None else generator.device
    noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype).to(mean.device)
    return mean + torch.exp(0.5 * (logvar.clamp(-30, 20) if clamp else logvar)) * noise


def _collect(pieces: Iterable[Tensor], total: int, progress: Progress | None) -> Tensor:
    """Write a stream of `total` frames into one tensor, allocated once."""
    out: Tensor | None = None
    done = 0
    for piece in pieces:
        if out is None:
            out = piece.new_empty(*piece.shape[:2], total, *piece.shape[3:])
        out[:, :, done : done + piece.shape[2]] = piece
        done += piece.shape[2]
        if progress is not None:
            progress(done, total)
    assert out is not None
    assert done == total
    return out
