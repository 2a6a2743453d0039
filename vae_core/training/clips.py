"""Batches of images and of video clips from files: shuffled, mixed by weight, repeatable, and continued exactly.

This is for a user's own images and videos. The demo weights were made from `data.py` instead: few photographs held in
memory, and clips made by moving a camera over them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Protocol

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import VideoError
from ..families import VIDEO
from .clip_decoding import random_clip
from .clip_files import ClipFile, Kind, Listing, list_clips
from .data import TrainingDataError
from .tables import STRICT

logger = logging.getLogger("cviv_vae.training")
_ORDER, _AGAIN, _CLIP, _MIX = range(4)  # what a random number is for
_GOLDEN = (5**0.5 - 1) / 2  # steps of this size around a circle fill it evenly, also every second of them alone


@dataclass(frozen=True, kw_only=True)
class Batch:
    """video: (b, 3, t, h, w) float32 in [-1, 1], t = 1 for images. index: number of the batch since the start."""

    video: Tensor
    kind: Kind
    index: int


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class BatchKind:
    """One kind of batch in the mixture.

    batch: clips of one batch in one process. size: (height, width) of the random crop, multiples of 8. frames: 1 + 4N,
    1 for images. weight: share of the batches that are of this kind, relative to the other kinds. stride: smallest and
    largest frame stride. short_side: what the short side of a picture is made before the crop; None makes the crop as
    large a part of the picture as fits. Raises ValueError for numbers that do not fit.
    """

    kind: Kind
    batch: Annotated[int, Field(ge=1)]
    size: tuple[int, int]
    frames: Annotated[int, Field(ge=1)] = 1
    weight: Annotated[float, Field(gt=0)] = 1.0
    stride: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 1)
    short_side: int | None = None

    def __post_init__(self) -> None:
        if min(self.size) < VIDEO.space or any(side % VIDEO.space for side in self.size):
            raise ValueError(
                f"Crops have sides that are multiples of {VIDEO.space}; got size {self.size} (height, width)."
            )
        if self.frames % VIDEO.time != 1 or (self.kind == "image" and self.frames != 1):
            raise ValueError(
                f"A clip has 1 + {VIDEO.time}N frames (5, 9, 17 ...) and an image has 1; got frames = {self.frames} "
                f"for kind {self.kind}."
            )
        if self.stride[0] > self.stride[1]:
            raise ValueError(f"The stride goes from a smallest to a largest; got {self.stride}.")
        if self.short_side is not None and self.short_side < min(self.size):
            raise ValueError(
                f"A short side of {self.short_side} does not hold crops of {self.size[0]}x{self.size[1]} (height x "
                "width): make it larger, or leave it out."
            )


class BatchSource(Protocol):
    """Endless batches that can be continued."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on after the last batch handed out."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        ...

    def close(self) -> None:
        """End what runs at the same time."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Request:
    """Make batch `index`, of kind number `kind`, from the draws `first`, `first` + 1, ..."""

    index: int
    kind: int
    first: int


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What a worker sends back: clips (b, 3, t, h, w), or an error; and the files it found broken, with the reason."""

    request: _Request
    video: Tensor | None
    broken: dict[str, str]
    error: str = ""

    def pin_memory(self) -> _Made:
        """What DataLoader calls for `pin_memory`."""
        return self if self.video is None else replace(self, video=self.video.pin_memory())


class ClipBatches:
    """An endless iterator of batches.

    sources: folders, .csv lists, .tar shards, files (see `list_clips`). kinds: the mixture. workers: processes that
    decode; 0 decodes in this one. rank, world: of `world` processes that train together, each makes its own part:
    joined in the order of ranks, their batches are those of one process with `world` times the batch.

    Every batch follows from the sources, the kinds, the seed and its index alone. Kinds take turns evenly. The files of
    a kind are gone through in a new random order again and again; where a CSV gives weights, they are drawn in
    proportion instead. Image batches take images and single frames of videos, each file as often as another. A file
    that cannot be used (missing, damaged, too short, too small) is logged once, kept in `broken` with the reason, and
    another one takes its place.

    Raises TrainingDataError where there is nothing of a kind, at the start, or when no file of it can be used, later.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        kinds: Sequence[BatchKind],
        *,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if not kinds or seed < 0 or workers < 0 or not 0 <= rank < world:
            raise ValueError(
                f"Got {len(kinds)} kinds of batches, seed {seed}, {workers} workers, rank {rank} of {world}; at least "
                "one kind is needed, seed and workers are 0 or more, and the rank is 0 or more and below world."
            )
        self.entries: Listing = list_clips(sources)
        self.kinds = tuple(kinds)
        self.broken: dict[str, str] = {}
        self._seed, self._world = seed, world
        self._workers, self._pin_memory = workers, pin_memory
        self._pools = tuple(_pool(self.entries, kind) for kind in self.kinds)
        self._dataset = _Clips(self._pools, self.kinds, seed, rank)
        self._shares = np.cumsum([kind.weight for kind in self.kinds]) / sum(kind.weight for kind in self.kinds)
        self._digest = self._made_of()
        self._index = 0
        self._taken = [0] * len(self.kinds)  # clips of each kind handed out, on all ranks together
        self._loader: Iterator[_Made] | None = None
        if rank == 0 and any(kind.kind == "image" for kind in kinds):
            _warn_of_mixture(self.entries)
        self._note(self.entries.broken)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._loader is None:
            self._loader = iter(self._make_loader())
        made = next(self._loader)
        self._note(made.broken)
        if made.video is None:
            self.close()
            raise TrainingDataError(made.error)
        kind = self.kinds[made.request.kind]
        self._index = made.request.index + 1
        self._taken[made.request.kind] += kind.batch * self._world
        return Batch(video=made.video, kind=kind.kind, index=made.request.index)

    def state_dict(self) -> dict[str, Any]:
        """Where to go on, after the last batch that was handed out: numbers, texts and lists of them only."""
        return {"made_of": self._digest, "index": self._index, "taken": list(self._taken)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch that was the last when `state` was taken.

        Where files, kinds, seed or the batch of all processes together are others than then, which is logged, the run
        goes on with as many clips taken of each kind, in the order that these now have.
        """
        if state["made_of"] != self._digest:
            logger.warning(
                "The training data is not what it was: the files, the kinds of batches, the seed or the batch of all "
                "processes together have changed. The run goes on with what there is now, in a new order."
            )
        self.close()
        taken = [int(count) for count in state["taken"]]
        same = len(taken) == len(self.kinds)
        self._index, self._taken = int(state["index"]), taken if same else [0] * len(self.kinds)

    def close(self) -> None:
        """End the workers; the next batch starts new ones."""
        self._loader = None

    def __enter__(self) -> ClipBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_loader(self) -> DataLoader[_Made]:
        return DataLoader(
            self._dataset,
            batch_size=None,  # a request is a whole batch
            sampler=_Requests(self._requests(self._index, list(self._taken))),
            num_workers=self._workers,
            pin_memory=self._pin_memory,
        )

    def _requests(self, index: int, taken: list[int]) -> Iterator[_Request]:
        start = np.random.default_rng((self._seed, _MIX)).random()
        while True:
            kind = int(np.searchsorted(self._shares, (start + index * _GOLDEN) % 1, side="right"))
            yield _Request(index=index, kind=kind, first=taken[kind])
            taken[kind] += self.kinds[kind].batch * self._world
            index += 1

    def _made_of(self) -> str:
        kinds = [(kind, kind.batch * self._world) for kind in self.kinds]
        parts = [(k.kind, n, k.size, k.frames, k.weight, k.stride, k.short_side) for k, n in kinds]
        return hashlib.sha256(repr((self.entries.digest(), parts, self._seed)).encode()).hexdigest()[:16]

    def _note(self, broken: Mapping[str, str]) -> None:
        for name, reason in broken.items():
            if name not in self.broken:
                self.broken[name] = reason
                logger.warning("Left out: %s", reason if name in reason else f"{name}: {reason}")


def _pool(listing: Listing, kind: BatchKind) -> tuple[ClipFile, ...]:
    found = listing.of("video") if kind.kind == "video" else listing.clips
    pool = tuple(clip for clip in found if clip.weight > 0)
    if not pool:
        raise TrainingDataError(
            f"There are batches of kind {kind.kind} to make and no {kind.kind} in the sources; add some, or leave "
            "these batches out."
        )
    return pool


def _warn_of_mixture(listing: Listing) -> None:
    """Say that image batches take frames of videos too, where there are both."""
    images, videos = len(listing.of("image")), len(listing.of("video"))
    if images and videos:
        logger.warning(
            "Image batches are of %d image%s and of single frames of %d video%s, each file as often as another (a CSV "
            "with weights says otherwise).", images, "s" * (images > 1), videos, "s" * (videos > 1),
        )  # fmt: skip


class _Requests(Sampler[_Request]):
    def __init__(self, requests: Iterator[_Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[_Request]:
        return self._requests


class _Clips(Dataset[_Made]):
    """Makes batches; a copy of it works in each worker."""

    def __init__(
        self, pools: tuple[tuple[ClipFile, ...], ...], kinds: tuple[BatchKind, ...], seed: int, rank: int
    ) -> None:
        self._pools, self._kinds, self._seed, self._rank = pools, kinds, seed, rank
        self._shares = [_shares(pool) for pool in pools]

    def __getitem__(self, request: _Request) -> _Made:
        batch = self._kinds[request.kind].batch
        first = request.first + self._rank * batch
        broken: dict[str, str] = {}
        try:
            clips = [self._clip(request.kind, number, broken) for number in range(first, first + batch)]
        except TrainingDataError as error:  # as a value: an exception would arrive with a worker's whole traceback
            return _Made(request=request, video=None, broken=broken, error=str(error))
        return _Made(request=request, video=torch.stack(clips), broken=broken)

    def _clip(self, kind: int, number: int, broken: dict[str, str]) -> Tensor:
        """The clip of draw `number`, of the first file in its order of trial that can be used.

        What failed before is tried again: whether it fails may depend on the part that is drawn, and a worker must not
        depend on what it did before.
        """
        wanted, pool, reason = self._kinds[kind], self._pools[kind], ""
        for place in self._trials(kind, number):
            try:
                return random_clip(
                    pool[place],
                    frames=wanted.frames,
                    stride=wanted.stride,
                    size=wanted.size,
                    short_side=wanted.short_side,
                    random=np.random.default_rng((self._seed, _CLIP, kind, number)),
                )
            except (VideoError, TrainingDataError) as error:
                broken[pool[place].name] = reason = str(error)
        raise TrainingDataError(
            f"None of the {len(pool)} files for batches of kind {wanted.kind} can be used. The last one: {reason}"
        )

    def _trials(self, kind: int, number: int) -> Iterator[int]:
        """Places in the pool to try, one after another."""
        count, shares = len(self._pools[kind]), self._shares[kind]
        if shares is None:
            epoch, place = divmod(number, count)
            yield int(_order(count, (self._seed, _ORDER, kind, epoch))[place])
        else:
            draw = np.random.default_rng((self._seed, _ORDER, kind, number)).random()
            yield int(np.searchsorted(shares, draw, side="right"))
        yield from map(int, np.random.default_rng((self._seed, _AGAIN, kind, number)).permutation(count))


def _shares(pool: tuple[ClipFile, ...]) -> NDArray[np.float64] | None:
    """Sums of the weights up to each clip, as shares of all; None where all weigh the same."""
    weights = np.array([clip.weight for clip in pool])
    return None if (weights == weights[0]).all() else np.cumsum(weights) / weights.sum()


@lru_cache(maxsize=8)
def _order(count: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    return np.random.default_rng(key).permutation(count)
