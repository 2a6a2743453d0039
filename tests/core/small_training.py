"""Very small training runs for tests: clips of squares, and one run in float64 that torchrun can start.

    python -m torch.distributed.run --standalone --nproc-per-node 2 small_training.py OUT cv-vae 2

The last number is the batch of all processes together. In float64 the order of sums does not show.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_core.training import processes
from vae_core.training.checkpoint import read_checkpoint
from vae_core.training.clips import Batch, BatchKind
from vae_core.training.config import (
    DataConfig,
    DiscriminatorConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from vae_core.training.draws import generator_for
from vae_core.training.journal import Watch
from vae_core.training.loop import Trainer

SIDE = 16
CPU = torch.device("cpu")
SIZES: dict[str, dict[str, Any]] = {
    "cv-vae": {"widths": (32, 32, 32, 32), "blocks_per_level": 1, "latent_channels": 4},
    "iv-vae": {"dim": 4, "latent_channels": 4},
}


class Squares:
    """Clips of squares that move, by turns with single frames; each follows from its number, or all are `again` one.

    batch: of this process, which makes part `rank` of the whole.
    """

    def __init__(
        self,
        batch: int,
        frames: int,
        *,
        again: bool = False,
        poisoned_at: tuple[int, ...] = (),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.batch, self.frames, self.again, self.poisoned_at = batch, frames, again, poisoned_at
        self.index, self.rank, self.world = 0, rank, world

    def __iter__(self) -> Iterator[Batch]:
        while True:
            still = self.frames > 1 and self.index % 2 == 1
            first = 0 if self.again else (self.index * self.world + self.rank) * self.batch
            video = torch.stack([self._clip(first + i, 1 if still else self.frames) for i in range(self.batch)])
            if self.index in self.poisoned_at:
                video[0] = torch.nan
            self.index += 1
            yield Batch(video=video, kind="image" if still else "video", index=self.index - 1)

    def _clip(self, number: int, frames: int) -> Tensor:
        generator = generator_for(0, number)
        clip = torch.zeros(3, frames, SIDE, SIDE) + torch.rand(3, 1, 1, 1, generator=generator) - 0.5
        x, y = torch.randint(SIDE - 8, (2,), generator=generator).tolist()
        for t in range(frames):
            clip[:, t, y : y + 6, x + t // 2 : x + t // 2 + 6] += 0.5
        return clip

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.index = state["index"]

    def close(self) -> None:
        pass


def small_config(out: Path, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        stage="video",
        out=out,
        model=ModelConfig(family="cv-vae", init="fresh", **SIZES["cv-vae"]),
        data=DataConfig(batches=(BatchKind(kind="video", batch=1, size=(SIDE, SIDE), frames=5),), sources=("none",)),
        loss=LossConfig(lpips_weight=0.0),
        optimizer=OptimizerConfig(learning_rate=2e-3, warm_up=2),
        run=RunConfig(steps=6, device="cpu", precision="float32", ema=0.5, save_every=2, keep=2, log_every=1),
    )
    return replace(config, **changes)


def watching(stop_at: int | None = None, seen: list[Mapping[str, float]] | None = None) -> Watch:
    steps = [0]

    def step(done: int, total: int, figures: Mapping[str, float]) -> None:
        steps[0] = done
        if seen is not None:
            seen.append(figures)

    return Watch(step=step, validation=lambda done, figures: None, should_stop=lambda: steps[0] == stop_at)


def same_checkpoints(a: Path, b: Path) -> None:
    """Assert that two checkpoints hold the same bits, but for the folder they were written to."""
    first, second = read_checkpoint(a), read_checkpoint(b)
    first["config"].pop("out"), second["config"].pop("out")

    def compare(x: Any, y: Any, name: str) -> None:
        assert type(x) is type(y), name
        if isinstance(x, dict):
            assert list(x) == list(y), name
            for key in x:
                compare(x[key], y[key], f"{name}.{key}")
        elif isinstance(x, list):
            assert len(x) == len(y)
            for i, (p, q) in enumerate(zip(x, y, strict=True)):
                compare(p, q, f"{name}[{i}]")
        else:
            assert torch.equal(x, y) if isinstance(x, Tensor) else x == y, name

    compare(first, second, "")


def main() -> None:
    """The run of the command line, with a discriminator and two batches for each step."""
    out, family, batch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    config = small_config(
        out,
        model=ModelConfig(family=family, init="fresh", **SIZES[family]),
        discriminator=DiscriminatorConfig(start=1, width=32),
    )
    config = replace(config, run=replace(config.run, steps=4, accumulation=2, save_every=100))
    with processes.joined("cpu") as device:
        share = batch // processes.world()
        Trainer(config, device, Squares(share, 5, rank=processes.rank(), world=processes.world())).run(watching())


if __name__ == "__main__":
    main()
