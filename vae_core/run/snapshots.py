"""What layers remember of earlier chunks, kept now and then, so that a clip can be decoded from there."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, MutableMapping

from torch import Tensor

from .executor import Pass

Remembered = dict[str, Tensor]


class Snapshots:
    """What the layers of a streaming network remembered before some chunks of one video, by these chunks' numbers.

    every: chunks from one to the next. held: where they lie, in RAM if left out; each is as large as what a decode of
    whole frames remembers.
    Raises ValueError for an `every` below 1.
    """

    def __init__(self, every: int = 8, held: MutableMapping[int, Remembered] | None = None) -> None:
        if every < 1:
            raise ValueError(f"Snapshots every {every} chunks were asked for; give 1 or more.")
        self.every = every
        self.held: MutableMapping[int, Remembered] = {} if held is None else held

    def before(self, chunk: int) -> int:
        """The latest chunk up to this one at which a run can begin; 0 is always one."""
        return max((number for number in self.held if number <= chunk), default=0)

    def kept(self, chunks: Iterable[Tensor], work: Pass, first: int) -> Iterator[Tensor]:
        """What `work` makes, which begins with chunk `first`, and keep snapshots of it."""
        if first in self.held:
            work.recall(self.held[first])
        numbers = itertools.count(first + 1)  # unlike enumerate, which keeps a chunk
        for chunk in chunks:
            number = next(numbers)
            if number % self.every == 0 and number not in self.held:
                remembered = work.remembered()
                if remembered:
                    self.held[number] = remembered
            yield chunk
            del chunk
