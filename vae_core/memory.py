"""The state of a streaming pass, owned by the caller: modules themselves never keep activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Memory:
    """What streaming layers carry from one group of frames to the next: one tensor per layer.

    One `Memory` serves one video (all rows of a batch together). A fresh one means "the next group is the first".
    Layers use their `slot`, the layer's name inside the model, as the key.
    """

    def __init__(self) -> None:
        self._frames: dict[str, Tensor] = {}

    def get(self, slot: str) -> Tensor | None:
        """The tensor kept under `slot`, or None before the first group."""
        return self._frames.get(slot)

    def put(self, slot: str, frames: Tensor) -> None:
        """Replace what is kept under `slot`."""
        self._frames[slot] = frames

    def __len__(self) -> int:
        return len(self._frames)

    def __iter__(self) -> Iterator[str]:
        return iter(self._frames)

    def snapshot(self) -> dict[str, Tensor]:
        """What is kept now, for `restore`. Kept tensors are never written to, so this copies no data."""
        return dict(self._frames)

    def restore(self, frames: dict[str, Tensor]) -> None:
        """Go back to a `snapshot`."""
        self._frames = dict(frames)

    @property
    def nbytes(self) -> int:
        """Bytes held by all kept tensors."""
        return sum(t.numel() * t.element_size() for t in self._frames.values())

    def clear(self) -> None:
        """Forget everything: the next group is the first again."""
        self._frames.clear()


class StreamingLayer(nn.Module):
    """A layer whose output depends on earlier groups, through `Memory` under `slot`."""

    slot: str = ""


def name_slots(model: nn.Module) -> None:
    """Give every streaming layer inside `model` its own slot: its name."""
    for name, module in model.named_modules():
        if isinstance(module, StreamingLayer):
            module.slot = name


def run_block(block: nn.Module, x: Tensor, memory: Memory, *, checkpointing: bool) -> Tensor:
    """`block(x, memory)`; with `checkpointing`, its activations are computed again in the backward pass.

    The second computation must see the memory as it was, so what the block reads and writes goes through the
    checkpoint as ordinary inputs and outputs.
    """
    if not checkpointing:
        return block(x, memory)
    slots = [m.slot for m in block.modules() if isinstance(m, StreamingLayer)]

    def run(x: Tensor, *held: Tensor | None) -> tuple[Tensor | None, ...]:
        local = Memory()
        for slot, frames in zip(slots, held, strict=True):
            if frames is not None:
                local.put(slot, frames)
        y = block(x, local)
        return (y, *(local.get(slot) for slot in slots))

    y, *kept = checkpoint(run, x, *(memory.get(slot) for slot in slots), use_reentrant=False)
    for slot, frames in zip(slots, kept, strict=True):
        if frames is not None:
            memory.put(slot, frames)
    return y


def run_plain(block: nn.Module, x: Tensor, *, checkpointing: bool) -> Tensor:
    """`block(x)` for a block without memory, checkpointed on request."""
    if not checkpointing:
        return block(x)
    y: torch.Tensor = checkpoint(block, x, use_reentrant=False)
    return y
