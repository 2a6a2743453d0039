"""`VideoVAE`: encoding and decoding of whole clips and of streams, with either model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..cv_vae import CVVAE
from ..iv_vae import GROUP, IVVAE
from ..keys import Model, family_of_config
from ..output import collect, host_frames, trimmed
from ..pieces import Pass, Recover, make_pass, run_pieces
from ..planner import Budget, Plan, choose, describe, device_bytes, smaller
from ..prediction import CHUNK_LATENTS, Task
from ..tiles import AnyPlan, TilePlan
from ..weights.detect import Family
from ..windows import (
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
Direction = Literal["decode", "encode"]

CV_FRAMES, CV_LATENTS = Windowing(first=17, step=16, overlap=1), Windowing(first=5, step=4, overlap=1)
IV_FRAMES, IV_LATENTS = Windowing(first=1, step=GROUP, overlap=0), Windowing(first=1, step=1, overlap=0)

# what the diffusion models of so many channels apply to an unscaled CV-VAE latent: scale * (latent - shift)
SAMPLER_SCALING = {4: (0.18215, 0.0), 16: (1.5305, 0.0609)}  # SD 1.5, SD 2.1 and SVD; SD3 and SD3.5


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
        shifted = f"(latent {-self.shift_factor:+g})" if self.shift_factor else "latent"
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.safe_dtypes)
        return "\n".join(
            (
                f"family           {self.family}",
                f"latent channels  {self.latent_channels}",
                f"compression      {self.time_compression}x in time, {space} in space",
                f"widths           {self.widths}",
                f"parameters       {self.parameters:,}",
                f"latent scale     {self.scale_factor:g} * {shifted}, applied {scaled}",
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
            scale, shift = SAMPLER_SCALING.get(config.latent_channels, (1.0, 0.0))
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
        plan: AnyPlan = None,
        recover: Recover | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Latent of a whole clip: the posterior mean, or a draw from the posterior with `sample`.

        video: (b, 3, t, h, w) in [-1, 1] with t = 1 + 4N and h, w multiples of 8; with `pad`, any t, h, w: the last
        frame and the right and bottom edge are repeated, and `decode(..., frames=t, size=(h, w))` gives back what went
        in. generator: makes the draw repeatable. plan, recover: how to run and what to do when memory runs out, as in
        `decode`. progress: called with (latents done, latents in all) after every chunk.
        Returns (b, z, t', h', w'). Raises ValueError for a wrong shape or dtype.
        """
        self._check_video(video, pad=pad)
        stream = self.encode_stream([video], pad=pad, sample=sample, generator=generator, plan=plan, recover=recover)
        return collect(stream, latent_frames(video.shape[2]), dim=2, progress=progress)

    def moments(
        self, video: Tensor, *, pad: bool = False, plan: AnyPlan = None, recover: Recover | None = None
    ) -> tuple[Tensor, Tensor]:
        """(mean, logvar) of the posterior of a whole clip, each (b, z, t', h', w'), unscaled, logvar not clamped.

        Arguments and errors as in `encode`.
        """
        self._check_video(video, pad=pad)
        total = latent_frames(video.shape[2])
        pairs = self._moments([video], pad=pad, plan=plan, recover=recover)
        mean, logvar = collect((torch.cat(pair, dim=1) for pair in pairs), total, dim=2).chunk(2, dim=1)
        return mean, logvar

    def encode_stream(
        self,
        frames: Iterable[Tensor],
        *,
        pad: bool = False,
        sample: bool = False,
        generator: torch.Generator | None = None,
        plan: AnyPlan = None,
        recover: Recover | None = None,
    ) -> Iterator[Tensor]:
        """Latents of a stream of (b, 3, t, h, w) pieces, any t each, as (b, z, t', h', w') pieces; holds one chunk.

        How the stream is cut does not change the result. Without `pad`, raises ValueError at the end of a stream that
        did not have 1 + 4N frames. Other arguments as in `encode`.
        """
        for mean, logvar in self._moments(frames, pad=pad, plan=plan, recover=recover):
            latent = _draw(mean, logvar, generator, clamp=isinstance(self.model, CVVAE)) if sample else mean
            if isinstance(self.model, IVVAE):
                latent = self.model.config.scale_factor * (latent - self.model.config.shift_factor)
            yield latent

    def _moments(
        self, frames: Iterable[Tensor], *, pad: bool, plan: AnyPlan, recover: Recover | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        pieces = self._checked(frames, 3, "video", "frames in [-1, 1]")
        pieces = pad_stream(pieces) if pad else whole_stream(pieces)
        windowing = IV_FRAMES if isinstance(self.model, IVVAE) else CV_FRAMES
        work = make_pass(self.model, plan, decoding=False)
        drop = 0
        for both in self._run(rechunk(pieces, windowing), work, recover):
            mean, logvar = both[:, :, drop:].chunk(2, dim=1)
            del both
            yield mean, logvar
            del mean, logvar  # not while the next chunk runs
            drop = windowing.overlap

    def _run(
        self, pieces: Iterable[Tensor], work: Pass, recover: Recover | None, *, bring_back: bool = True
    ) -> Iterator[Tensor]:
        pieces = (self._without_graph(piece) if isinstance(work.plan, TilePlan) else piece for piece in pieces)
        device, dtype = self.device, self.dtype
        return run_pieces(pieces, work, device=device, dtype=dtype, recover=recover, bring_back=bring_back)

    # ---------------------------------------------------------------------------------------------- decoding

    def decode(
        self,
        latent: Tensor,
        *,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        plan: AnyPlan = None,
        recover: Recover | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Frames of a whole latent.

        latent: (b, z, t', h', w'), unscaled for CV-VAE, scaled for IV-VAE, as `encode` gives it.
        frames: how many to return, from the first; size: (height, width) to return, from the top left: what `pad` added
        goes. plan: how to run: None for whole frames, a `TilePlan` for exact tiles, a `ReferencePlan` for the official
        tiling of CV-VAE; `plan_decode` chooses one. recover: called with the error and the plan when memory runs out;
        it returns the plan by which to go on at the failed piece, or None to give up, and the error is raised. What
        was done before stays; the tensors of the failed piece are freed by then. progress: called with (frames done,
        frames in all) after every chunk.
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
        stream = self.decode_stream(latent, frames=frames, size=size, plan=plan, recover=recover)
        return collect(stream, available if frames is None else frames, dim=2, progress=progress)

    def decode_stream(
        self,
        latent: Tensor | Iterable[Tensor],
        *,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        plan: AnyPlan = None,
        recover: Recover | None = None,
    ) -> Iterator[Tensor]:
        """Frames of a latent, or of a stream of (b, z, t', h', w') pieces of any t', chunk by chunk; holds one chunk.

        Stops once `frames` are out, and raises ValueError if the stream ends before. Other arguments as in `decode`.
        """
        return self._decoded(latent, frames, size, plan, recover, bring_back=True)

    def decode_frames(
        self,
        latent: Tensor | Iterable[Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        lent: bool = False,
        check: bool = False,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        plan: AnyPlan = None,
        recover: Recover | None = None,
    ) -> Iterator[Tensor]:
        """As `decode_stream`, to be shown or written: pieces (b, t, h, w, 3) in RAM, clamped.

        dtype: torch.uint8 for 0 to 255, torch.float32 or torch.float16 for 0 to 1. On a GPU the pixels are made there,
        and copied while the next piece is computed: pieces come one later. lent: a piece is good until the next is
        asked for, for those who do not keep it. check: raise `NotFiniteError` at the first piece with NaN or infinity.
        Other arguments as in `decode`. Raises ValueError for another dtype.
        """
        pieces = self._decoded(latent, frames, size, plan, recover, bring_back=False)
        return host_frames(pieces, self.device, dtype, lent=lent, check=check)

    def _decoded(
        self,
        latent: Tensor | Iterable[Tensor],
        frames: int | None,
        size: tuple[int, int] | None,
        plan: AnyPlan,
        recover: Recover | None,
        *,
        bring_back: bool,
    ) -> Iterator[Tensor]:
        pieces = [latent] if isinstance(latent, Tensor) else latent
        pieces = self._checked(pieces, self.model.config.latent_channels, "latent", "unit-scale values")
        windowing = IV_LATENTS if isinstance(self.model, IVVAE) else CV_LATENTS
        work = make_pass(self.model, plan, decoding=True)
        chunks = (_size_checked(chunk, size) for chunk in rechunk(pieces, windowing))
        yield from trimmed(self._run(chunks, work, recover, bring_back=bring_back), windowing.overlap, frames, size)

    # ---------------------------------------------------------------------------------------------- planning

    def plan_decode(
        self,
        shape: Sequence[int],
        *,
        budget_bytes: int | None = None,
        ram_bytes: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Plan:
        """How a latent of `shape` (b, z, t, h, w) would be decoded within `budget_bytes` of device memory.

        The exact plan with the least work that fits; where none does, the one with the least memory, with `fits` False.
        ram_bytes: what may wait in RAM between tiles; no limit, if not given. dtype: the model's, if not
        given. device: where it will run; if not given, where the weights lie, or an accelerator if they lie in RAM
        and there is one. Weights are not counted. Raises ValueError for a wrong shape or budget.
        """
        task = self._task(shape, "decode", dtype)
        budget = Budget(device=_checked_bytes(budget_bytes, "budget_bytes"), ram=_checked_bytes(ram_bytes, "ram_bytes"))
        return choose(task, budget, on_cpu=self._on_cpu(device))

    def plan_encode(
        self,
        shape: Sequence[int],
        *,
        budget_bytes: int | None = None,
        ram_bytes: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Plan:
        """How a video of `shape` (b, 3, t, h, w) would be encoded, padded where needed; as `plan_decode`."""
        task = self._task(shape, "encode", dtype)
        budget = Budget(device=_checked_bytes(budget_bytes, "budget_bytes"), ram=_checked_bytes(ram_bytes, "ram_bytes"))
        return choose(task, budget, on_cpu=self._on_cpu(device))

    def describe_plan(
        self, plan: AnyPlan, shape: Sequence[int], direction: Direction, *, dtype: torch.dtype | None = None
    ) -> Plan:
        """What running by `plan` means for a latent ("decode") or a video ("encode") of `shape`."""
        return describe(self._task(shape, direction, dtype), plan, Budget())

    def smaller_plan(
        self,
        plan: AnyPlan,
        shape: Sequence[int],
        direction: Direction,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> TilePlan | None:
        """The next exact plan that needs clearly less memory than `plan`, or None; for `recover` of `decode`.

        shape: of the latent for direction "decode", of the video for "encode". dtype, device: as in `plan_decode`.
        """
        return smaller(self._task(shape, direction, dtype), plan, on_cpu=self._on_cpu(device))

    def decode_bytes(
        self,
        height: int,
        width: int,
        *,
        frames: int | None = None,
        dtype: torch.dtype | None = None,
        plan: AnyPlan = None,
    ) -> int:
        """Predicted peak of device memory while decoding one clip of height x width latents, without weights.

        frames: pixel frames of the clip, where it may be shorter than a chunk. plan: as in `decode`.
        """
        latents = CHUNK_LATENTS if frames is None else latent_frames(frames)
        shape = (1, self.model.config.latent_channels, latents, height, width)
        return device_bytes(self._task(shape, "decode", dtype), plan)

    def encode_bytes(
        self,
        height: int,
        width: int,
        *,
        frames: int | None = None,
        dtype: torch.dtype | None = None,
        plan: AnyPlan = None,
    ) -> int:
        """As `decode_bytes`, while encoding one clip of height x width pixels."""
        frames = pixel_frames(CHUNK_LATENTS) if frames is None else frames
        return device_bytes(self._task((1, 3, frames, height, width), "encode", dtype), plan)

    def _on_cpu(self, device: torch.device | str | None) -> bool:
        if device is not None:
            return torch.device(device).type == "cpu"
        accelerated = torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()
        return self.device.type == "cpu" and not accelerated

    def _task(self, shape: Sequence[int], direction: Direction, dtype: torch.dtype | None) -> Task:
        decoding = direction == "decode"
        channels = self.model.config.latent_channels if decoding else 3
        if len(shape) != 5 or shape[1] != channels or min(shape) < 1:
            raise ValueError(
                f"A plan to {direction} was asked for shape {tuple(shape)}; {self.family} needs (batch, {channels}, "
                "frames, height, width), none of them 0."
            )
        batch, _, frames, height, width = shape
        return Task(
            config=self.model.config,
            dtype=dtype or self.dtype,
            decoding=decoding,
            batch=batch,
            latents=frames if decoding else latent_frames(frames),
            size=(height, width) if decoding else (-(-height // SPACE), -(-width // SPACE)),
        )

    # ---------------------------------------------------------------------------------------------- checks

    def _without_graph(self, piece: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (piece.requires_grad or any(p.requires_grad for p in self.model.parameters())):
            raise ValueError(
                "Exact tiles keep nothing for gradients, and the input or the model requires them. Leave plan out, or "
                "run under torch.no_grad()."
            )
        return piece

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


def _size_checked(chunk: Tensor, size: tuple[int, int] | None) -> Tensor:
    if size is None:
        return chunk
    full = [SPACE * n for n in chunk.shape[-2:]]
    if not all(n - SPACE < given <= n for given, n in zip(size, full, strict=True)):
        raise ValueError(
            f"size={tuple(size)} was asked for, but the latents decode to {full[0]}x{full[1]} (height x width); "
            f"padding adds fewer than {SPACE} pixels, so allowed are heights {full[0] - SPACE + 1} to {full[0]} and "
            f"widths {full[1] - SPACE + 1} to {full[1]}."
        )
    return chunk


def _checked_bytes(count: int | None, name: str) -> int | None:
    if count is not None and count < 1:
        raise ValueError(f"{name}={count} was given; it is a number of bytes above 0. Leave it out for no limit.")
    return count


def _draw(mean: Tensor, logvar: Tensor, generator: torch.Generator | None, *, clamp: bool) -> Tensor:
    """A draw from the posterior; CV-VAE clamps logvar to [-30, 20], IV-VAE does not."""
    device = mean.device if generator is None else generator.device
    noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype).to(mean.device)
    return mean + torch.exp(0.5 * (logvar.clamp(-30, 20) if clamp else logvar)) * noise
