"""Batches made by moving a camera over a few pictures, for a run without a data set."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .clips import Batch, BatchKind
from .config import CameraMovesConfig
from .data import ImagePool, procedural_images, read_photographs
from .draws import generator_for
from .photographs import from_scikit_image
from .tables import ConfigError

IMAGE_SIDE = 192  # pixels of a procedural image
PHOTO_SHARE = 0.7
BUNDLED_PHOTOGRAPHS = Path("scikit-image")  # in place of a folder: those that the package brings
_CLIP = 2


class CameraMoves:
    """Endless batches, in the manner of `ClipBatches`: each follows from the seed and its index alone.

    Crops are square. Kinds are drawn in proportion to their weights; `stride` and `short_side` are not for this source.
    Raises ConfigError where a crop is not square, TrainingDataError where no picture holds it.
    """

    def __init__(self, config: CameraMovesConfig, kinds: Sequence[BatchKind], *, seed: int, rank: int) -> None:
        for kind in kinds:
            if kind.size[0] != kind.size[1] or kind.stride != (1, 1) or kind.short_side is not None:
                raise ConfigError(
                    f"data.camera_moves makes square crops without stride and short_side; got {kind.size[0]} x "
                    f"{kind.size[1]}. Give equal sides, or sources instead of camera_moves."
                )
        photographs = [] if config.photographs is None else _photographs(config.photographs)
        drawn = procedural_images(config.procedural, IMAGE_SIDE, seed, photographs)
        self._pool = ImagePool(photographs, drawn, photo_share=PHOTO_SHARE)
        self._kinds = tuple(kinds)
        self._weights = torch.tensor([kind.weight for kind in kinds])
        self._seed, self._rank = seed, rank
        self._index = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self._index += 1
            yield self._batch(self._index - 1)

    def state_dict(self) -> dict[str, Any]:
        """How many batches were handed out."""
        return {"index": self._index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after them."""
        self._index = int(state["index"])

    def close(self) -> None:
        """Nothing is held."""

    def _batch(self, index: int) -> Batch:
        kind = self._kinds[
            int(torch.multinomial(self._weights, 1, generator=generator_for(self._seed, _CLIP, index, 0)))
        ]
        first = kind.batch * self._rank
        clips = [
            self._clip(kind, generator_for(self._seed, _CLIP, index, 1 + i)) for i in range(first, first + kind.batch)
        ]
        return Batch(video=torch.cat(clips), kind=kind.kind, index=index)

    def _clip(self, kind: BatchKind, generator: torch.Generator) -> torch.Tensor:
        side = kind.size[0]
        if kind.kind == "image":
            return self._pool.crops(1, side, generator)[:, :, None]
        return self._pool.clips(1, kind.frames, side, generator)


def _photographs(folder: Path) -> list[Tensor]:
    if folder != BUNDLED_PHOTOGRAPHS:
        return read_photographs(folder)
    with tempfile.TemporaryDirectory() as gathered:
        from_scikit_image(Path(gathered))
        return read_photographs(Path(gathered))
