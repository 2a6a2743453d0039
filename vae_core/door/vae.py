"""`VideoVAE`: encoding and decoding of whole clips and of streams, with any family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import islice
from typing import Any, Unpack

import torch
from torch import Tensor

from ..families import Compression, Direction, Network
from ..plan.planner import Budget, Plan, PlanOptions, budget_of, choose, describe, device_bytes, required, smaller
from ..plan.rates import Rates, rates_of
from ..plan.task import Task
from ..run.executor import Pass
from ..run.several import run_on_several
from ..run.snapshots import Snapshots
from ..run.stream import Between, Recover, RunOptions, run_chunks
from ..run.tiling import AnyPlan
from ..run.windows import pad_stream, rechunk, whole_stream
from .checks import check_clip, check_frames, check_start, check_video, checked, draw, runs_on, size_checked
from .info import VAEInfo
from .output import collect, host_frames, trimmed
from .planning import LONG, planned

Progress = Callable[[int, int], None]
VIDEO, LATENT = ("video", "frames in [-1, 1]"), ("latent", "unit-scale values")


class VideoVAE:
    """A VAE for video: a network of some family, and the way clips of any length go through it.

    Pixels are RGB in [-1, 1], (b, 3, t, h, w); latents are (b, z, t', h', w'): of CV-VAE and IV-VAE 1 + N for 1 + 4N
    frames, of image VAEs one for each frame, each of 8x8 pixels. Latents of IV-VAE are scaled by the VAE itself,
    others are not. Results have the model's dtype and lie on the device of the input; pixels are not clamped. No graph
    is built unless the input or the model requires gradients.
    """

    def __init__(self, model: Network) -> None:
        self.model = model
        self._compiled: Callable[..., Any] | None = None
        self._others: list[Network] = []  # the same weights on other devices
        self._limits: tuple[AnyPlan, PlanOptions] | None = None

    @property
    def family(self) -> str:
        """The family's id: "cv-vae", "cv-vae-sd3", "iv-vae" or "image-vae"."""
        return self.model.family.id

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def info(self) -> VAEInfo:
        """Family, compression, scaling and safe dtypes."""
        return VAEInfo.of(self.model)

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
        progress: Progress | None = None,
        **run: Unpack[RunOptions],
    ) -> Tensor:
        """Latent of a whole clip: the posterior mean, or a draw from the posterior with `sample`.

        video: (b, 3, t, h, w) in [-1, 1] with t = 1 + 4N (any t for image VAEs) and h, w multiples of 8; with `pad`,
        any t, h, w: the last frame and the right and bottom edge are repeated, and `decode(..., frames=t, size=(h, w))`
        gives back what went in. generator: makes the draw repeatable. progress: called with (latents done, latents in
        all) after every chunk. run: `RunOptions`.
        Returns (b, z, t', h', w'). Raises ValueError for a wrong shape or dtype, or weights without an encoder.
        """
        check_video(video, self.model.family, pad=pad)
        stream = self.encode_stream([video], pad=pad, sample=sample, generator=generator, **run)
        return collect(stream, self._compression.latent_frames(video.shape[2]), dim=2, progress=progress)

    def moments(self, video: Tensor, *, pad: bool = False, **run: Unpack[RunOptions]) -> tuple[Tensor, Tensor]:
        """(mean, logvar) of the posterior of a whole clip, each (b, z, t', h', w'), unscaled, logvar not clamped.

        Arguments and errors as in `encode`.
        """
        check_video(video, self.model.family, pad=pad)
        total = self._compression.latent_frames(video.shape[2])
        mean, logvar = collect(self._moments([video], pad, run), total, dim=2).chunk(2, dim=1)
        return mean, logvar

    def encode_stream(
        self,
        frames: Iterable[Tensor],
        *,
        pad: bool = False,
        sample: bool = False,
        generator: torch.Generator | None = None,
        **run: Unpack[RunOptions],
    ) -> Iterator[Tensor]:
        """Latents of a stream of (b, 3, t, h, w) clips, any t each, as (b, z, t', h', w'); holds one chunk.

        How the stream is cut does not change the result. Without `pad`, raises ValueError at the end of a stream that
        did not have 1 + 4N frames. Arguments as in `encode`.
        """
        family, config = self.model.family, self.model.config
        for moments in self._moments(frames, pad, run):
            mean, logvar = moments.chunk(2, dim=1)
            latent = draw(mean, logvar, generator, family.clamp) if sample else mean
            yield family.from_network(config, latent)
            del moments, mean, logvar, latent  # not while the next chunk runs

    def _moments(self, frames: Iterable[Tensor], pad: bool, run: RunOptions) -> Iterator[Tensor]:
        """(mean, logvar) of every chunk, side by side along channels."""
        clips = checked(frames, self.family, 3, *VIDEO)
        clips = (pad_stream if pad else whole_stream)(clips, self._compression)
        chunks = rechunk(clips, self.model.family.frames)
        drop = 0
        for moments in self._run("encode", chunks, **run):
            yield moments[:, :, drop:]
            del moments
            drop = self.model.family.latents.overlap

    # ---------------------------------------------------------------------------------------------- decoding

    def decode(
        self,
        latent: Tensor,
        *,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        progress: Progress | None = None,
        **run: Unpack[RunOptions],
    ) -> Tensor:
        """Frames of a whole latent.

        latent: (b, z, t', h', w'), as `encode` gives it.
        frames: how many to return, from the first; size: (height, width) to return, from the top left: what `pad` added
        goes. progress: called with (frames done, frames in all) after every chunk. run: `RunOptions`.
        Returns (b, 3, t, h, w), nominally in [-1, 1], not clamped; all frames unless `frames` is given.
        Raises ValueError for a wrong shape, dtype, `frames` or `size`, or weights without a decoder.
        """
        check_clip(latent, self.family, self.model.config.latent_channels, *LATENT)
        if latent.shape[2] == 0:
            raise ValueError("The latent has no frames; give at least one.")
        total = check_frames(frames, latent.shape[2], self._compression)
        stream = self.decode_stream(latent, frames=frames, size=size, **run)
        return collect(stream, total, dim=2, progress=progress)

    def decode_stream(
        self,
        latent: Tensor | Iterable[Tensor],
        *,
        start: int = 0,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        snapshots: Snapshots | None = None,
        **run: Unpack[RunOptions],
    ) -> Iterator[Tensor]:
        """Frames of a latent, or of a stream of (b, z, t', h', w') of any t', chunk by chunk; holds one chunk.

        Stops after frame `frames` - 1, and raises ValueError if the stream ends before. start: frames before this one
        are left out; chunks that lie before it are not computed, unless later ones depend on them (IV-VAE). snapshots:
        kept of what later chunks depend on; a later call for the same latent begins at the nearest one before `start`.
        Other arguments as in `decode`.
        """
        return self._decoded(latent, start, frames, size, snapshots, run, bring_back=True)

    def decode_frames(
        self,
        latent: Tensor | Iterable[Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        lent: bool = False,
        check: bool = False,
        start: int = 0,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        snapshots: Snapshots | None = None,
        **run: Unpack[RunOptions],
    ) -> Iterator[Tensor]:
        """As `decode_stream`, to be shown or written: (b, t, h, w, 3) in RAM, clamped.

        dtype: torch.uint8 for 0 to 255, torch.float32 or torch.float16 for 0 to 1. On a GPU the pixels are made there,
        and copied while the next chunk is computed: each comes one later. lent: frames are good until the next are
        asked for, for those who do not keep them. check: raise `NotFiniteError` at the first chunk with NaN or
        infinity. Other arguments as in `decode_stream`. Raises ValueError for another dtype.
        """
        chunks = self._decoded(latent, start, frames, size, snapshots, run, bring_back=False)
        return host_frames(chunks, self.device, dtype, lent=lent, check=check)

    def _decoded(
        self,
        latent: Tensor | Iterable[Tensor],
        start: int,
        frames: int | None,
        size: tuple[int, int] | None,
        snapshots: Snapshots | None,
        run: RunOptions,
        *,
        bring_back: bool,
    ) -> Iterator[Tensor]:
        family, config = self.model.family, self.model.config
        clips = checked([latent] if isinstance(latent, Tensor) else latent, family.id, config.latent_channels, *LATENT)
        space = family.compression.space
        check_start(start)
        skipped = family.frames.before(start)
        if any(step.slots() for step in self.model.steps("decode")):
            skipped = 0 if snapshots is None else snapshots.before(skipped)
        sized = (size_checked(chunk, size, space) for chunk in rechunk(clips, family.latents))
        chunks = (family.to_network(config, chunk) for chunk in islice(sized, skipped, None))
        decoded = self._run("decode", chunks, **run, snapshots=snapshots, skipped=skipped, bring_back=bring_back)
        gone = family.frames.until(skipped)
        yield from trimmed(decoded, family.frames.overlap, frames, size, start=start, gone=gone)

    # ---------------------------------------------------------------------------------------------- running

    def compile(self, **options: Any) -> VideoVAE:
        """Compile whole frames by `torch.compile` with its `options`, at the first call of every kind; returns self.

        A kind is a direction, a size and length of a chunk, and, for IV-VAE, the first chunk or a later one. Tiles run
        as without it.
        """
        self._compiled = torch.compile(self.model.chunk, **options)
        return self

    def on(self, devices: Sequence[torch.device | str]) -> VideoVAE:
        """Run chunks on several devices at once, with a copy of the weights on each; returns self.

        For families whose chunks stand alone. Raises ValueError for others, and without a device.
        """
        first, *others = map(torch.device, devices) if devices else (None,)
        if first is None or (others and any(s.slots() for d in self.model.halves for s in self.model.steps(d))):
            raise ValueError(
                f"To run on {len(devices)} devices was asked of {self.family}; needed is one, and more than one only "
                "for CV-VAE and image VAEs, whose chunks do not depend on each other."
            )
        self._others = [deepcopy(self.to(first).model).to(device) for device in others]
        return self

    def within(self, plan: AnyPlan = None, **limits: Unpack[PlanOptions]) -> VideoVAE:
        """From now on, choose plans for what comes without one, and go on by a smaller one when memory runs out.

        plan: run by this one instead of choosing. limits: as in `plan_decode`; on a GPU, without `budget_bytes`, most
        of what is free when a clip begins. Where nothing fits, a clip ends in BudgetError before any work.
        Returns self.
        """
        self._limits = plan, limits
        return self

    def _run(
        self,
        direction: Direction,
        chunks: Iterable[Tensor],
        *,
        plan: AnyPlan = None,
        recover: Recover | None = None,
        between: Between | None = None,
        snapshots: Snapshots | None = None,
        skipped: int = 0,
        bring_back: bool = True,
    ) -> Iterator[Tensor]:
        if self._limits is not None and plan is None and recover is None:
            chunks, plan, recover = planned(self, direction, chunks, *self._limits)
        if self._others:
            networks = [self.model, *self._others]
            return run_on_several(chunks, networks, direction, plan, recover=recover, between=between)
        work = Pass(self.model, direction, plan, compiled=self._compiled, between=between)
        done = run_chunks(chunks, work, device=self.device, dtype=self.dtype, recover=recover, bring_back=bring_back)
        return done if snapshots is None else snapshots.kept(done, work, skipped)

    # ---------------------------------------------------------------------------------------------- planning

    def plan_decode(self, shape: Sequence[int], **options: Unpack[PlanOptions]) -> Plan:
        """How a latent of `shape` (b, z, t, h, w) would be decoded; `PlanOptions` says what can be given.

        The fastest exact plan that fits; where none does, the one with the least memory, with `fits` False. Weights are
        not counted. Raises ValueError for a wrong shape or budget.
        """
        return self._plan(shape, "decode", options)

    def plan_encode(self, shape: Sequence[int], **options: Unpack[PlanOptions]) -> Plan:
        """How a video of `shape` (b, 3, t, h, w) would be encoded, padded where needed; as `plan_decode`."""
        return self._plan(shape, "encode", options)

    def _plan(self, shape: Sequence[int], direction: Direction, options: PlanOptions) -> Plan:
        task, budget, on_cpu, rates = self._asked(shape, direction, options)
        plan = choose(task, budget, on_cpu=on_cpu, rates=rates)
        return required(plan, task, budget, on_cpu=on_cpu) if options.get("required", False) else plan

    def describe_plan(
        self, plan: AnyPlan, shape: Sequence[int], direction: Direction, **options: Unpack[PlanOptions]
    ) -> Plan:
        """What running by `plan` means for a latent ("decode") or a video ("encode") of `shape`."""
        task, budget, _, rates = self._asked(shape, direction, options)
        return describe(task, plan, budget, rates)

    def smaller_plan(
        self, plan: AnyPlan, shape: Sequence[int], direction: Direction, **options: Unpack[PlanOptions]
    ) -> AnyPlan:
        """The next plan that needs clearly less device memory than `plan`, or None; for `recover` of `decode`.

        shape: of the latent for direction "decode", of the video for "encode". Other arguments as in `plan_decode`.
        """
        task, budget, on_cpu, rates = self._asked(shape, direction, options)
        return smaller(task, plan, budget, on_cpu=on_cpu, rates=rates)

    def _asked(
        self, shape: Sequence[int], direction: Direction, options: PlanOptions
    ) -> tuple[Task, Budget, bool, Rates]:
        """What a plan is asked for: the work, the memory, whether on a CPU, and how fast."""
        budget = budget_of(options)
        where, dtype = torch.device(options.get("device") or runs_on(self.device)), options.get("dtype") or self.dtype
        rates = options.get("rates") or rates_of(where, dtype)
        return self._task(shape, direction, dtype), budget, where.type == "cpu", rates

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
        latents = LONG if frames is None else self._compression.latent_frames(frames)
        shape = (1, self.model.config.latent_channels, latents, height, width)
        return device_bytes(self._task(shape, "decode", dtype or self.dtype), plan)

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
        frames = self._compression.pixel_frames(LONG) if frames is None else frames
        return device_bytes(self._task((1, 3, frames, height, width), "encode", dtype or self.dtype), plan)

    @property
    def _compression(self) -> Compression:
        return self.model.family.compression

    def _task(self, shape: Sequence[int], direction: Direction, dtype: torch.dtype) -> Task:
        model, decoding = self.model, direction == "decode"
        channels = model.config.latent_channels if decoding else 3
        if len(shape) != 5 or shape[1] != channels or min(shape) < 1 or any(n % 1 for n in shape):
            raise ValueError(
                f"A plan to {direction} was asked for shape {tuple(shape)}; {self.family} needs (batch, {channels}, "
                "frames, height, width), whole numbers and none of them 0."
            )
        batch, _, frames, height, width = shape
        cells = self._compression.cells
        return Task(
            family=model.family,
            config=model.config,
            halves=model.halves,
            dtype=dtype,
            direction=direction,
            batch=batch,
            latents=frames if decoding else self._compression.latent_frames(frames),
            size=(height, width) if decoding else (cells(height), cells(width)),
        )
