"""How a network says its own way: a list of steps, which everything walks that runs it, plans it or counts it.

A step is one layer, and what it needs to know of others: how far it sees (`reach`), the norm in front of it and whether
that needs sums over the whole chunk (`waits`), whether it must see whole frames (`whole`), and whether it begins
(`keeps`) or ends (`adds`) a skip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .clip import Clip, laid_out
from .norm import Activation, Moments, Norm
from .operators import moments
from .region import POINT, WHOLE_FRAME, Border, Reach


class Memory:
    """What streaming layers carry from one chunk to the next: one tensor per layer, under the layer's `slot`.

    One `Memory` serves one video (all rows of a batch together). A fresh one means "the next chunk is the first".
    home: where the tensors wait; None is where they are made. claim: says of so many bytes whether they stay there.
    """

    def __init__(self, home: torch.device | None = None, claim: Callable[[int], bool] = lambda _: False) -> None:
        self.home = home
        self._claim = claim
        self._frames: dict[str, Tensor] = {}

    def get(self, slot: str, device: torch.device) -> Tensor | None:
        """The tensor kept under `slot`, on `device`, or None before the first chunk."""
        frames = self._frames.get(slot)
        return None if frames is None else frames.to(device)

    def put(self, slot: str, frames: Tensor) -> None:
        """Replace what is kept under `slot`; it is never written to."""
        held = self._frames.get(slot)
        there = self._claim(frames.numel() * frames.element_size()) if held is None else held.device == frames.device
        self._frames[slot] = frames if self.home is None or there else frames.to(self.home)

    def move(self, home: torch.device) -> None:
        """Have everything on another device, one tensor after another."""
        for slot in self._frames:
            self._frames[slot] = self._frames[slot].to(home)

    def __iter__(self) -> Iterator[str]:
        return iter(self._frames)

    def snapshot(self) -> dict[str, Tensor]:
        """What is kept now, for `restore`; copies no data."""
        return dict(self._frames)

    def restore(self, frames: dict[str, Tensor]) -> None:
        """Go back to a `snapshot`."""
        self._frames = dict(frames)


class Streaming(nn.Module):
    """A layer whose output depends on earlier chunks, through `Memory` under `slot`."""

    slot: str = ""


class Kernels:
    """Kernels that layers make of their weights, once for each run, so that they can never be older than these."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, str], Tensor] = {}

    def get(self, layer: nn.Module, name: str, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, at the first call for this layer and name."""
        key = (id(layer), name)
        if key not in self._made:
            self._made[key] = laid_out(make())
        return self._made[key]

    def made(self) -> list[Tensor]:
        """All of them."""
        return list(self._made.values())


@dataclass(kw_only=True)
class Context:
    """What a layer needs to know of the run that it is part of.

    memory: of the video, or of one tile of it. first: the chunk is the video's first. border: which sides of the clip
    at hand are the frame's own. plain: autograd or a compiler follows, so that only torch's own operators may be used.
    """

    memory: Memory = field(default_factory=Memory)
    kernels: Kernels = field(default_factory=Kernels)
    first: bool = True
    border: Border = WHOLE_FRAME
    plain: bool = False

    def kernel(self, layer: nn.Module, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What a layer makes of its weights, under a name of its own."""
        return make() if self.plain else self.kernels.get(layer, name, make)


class Layer(nn.Module):
    """What a step runs: a clip, through a norm and SiLU where given, to a clip of which nobody else knows.

    reach: what it sees. whole: whether it must see whole frames.
    """

    reach: Reach = POINT
    whole: bool = False

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:
        raise NotImplementedError

    def steps(self) -> list[Step]:
        """It alone."""
        return [Step(layer=self, whole=self.whole)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One layer on the way through a network.

    norm: applied, with SiLU, to what the layer reads. keeps: its input is wanted again at the next step that `adds`,
    which adds it to its output, through that layer.
    """

    layer: Layer
    norm: Norm | None = None
    keeps: bool = False
    adds: Layer | None = None
    whole: bool = False

    @property
    def reach(self) -> Reach:
        """What it sees of its input."""
        return self.layer.reach

    @property
    def waits(self) -> bool:
        """Whether it needs sums over the whole chunk before it can begin."""
        return isinstance(self.norm, nn.GroupNorm)

    def moments(self, clip: Clip) -> Moments:
        """Those of `clip` that the norm needs."""
        assert isinstance(self.norm, nn.GroupNorm)
        return moments(clip, self.norm.num_groups)

    def run(self, clip: Clip, at: Context, found: Moments | None = None, kept: Clip | None = None) -> Clip:
        """The layer's output. found: moments of the whole chunk where it waits. kept: what is to be added."""
        clip = self.layer(clip, at, None if self.norm is None else Activation(self.norm, found))
        return clip if kept is None or self.adds is None else add(clip, self.adds(kept, at), at)

    def slots(self) -> list[str]:
        """The slots that the layer uses."""
        return [m.slot for m in self.layer.modules() if isinstance(m, Streaming)]


class Same(Layer):
    """A skip as it is."""

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:
        return clip


class ResidualBlock(nn.Module):
    """Norm, SiLU and a convolution, twice, plus the input. whole: where it must see whole frames."""

    def __init__(
        self, norms: tuple[Norm, Norm], convolutions: tuple[Layer, Layer], shortcut: Layer | None, *, whole: bool
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.conv1, self.conv2 = convolutions
        self.shortcut = Same() if shortcut is None else shortcut
        self.whole = whole

    def steps(self) -> list[Step]:
        return [
            Step(layer=self.conv1, norm=self.norm1, keeps=True, whole=self.whole),
            Step(layer=self.conv2, norm=self.norm2, adds=self.shortcut, whole=self.whole),
        ]


def steps_of(modules: Iterable[nn.Module]) -> list[Step]:
    """The steps of layers and residual blocks, one after another."""
    steps: list[Step] = []
    for module in modules:
        assert isinstance(module, (Layer, ResidualBlock))
        steps += module.steps()
    return steps


def add(y: Clip, x: Clip, at: Context) -> Clip:
    """Their sum; `y` is lost."""
    return Clip([y.tensor() + x.tensor()]) if at.plain else y.plus(x)


def walk(
    steps: Sequence[Step],
    clip: Clip,
    at: Context,
    *,
    between: Callable[[], None] | None = None,
    checkpointing: bool = False,
) -> Clip:
    """All steps over a whole chunk. checkpointing: what lies inside a skip is computed again in the backward pass."""
    for several in skips(steps):
        if checkpointing:
            clip = _checkpointed(several, clip, at)
            continue
        kept: Clip | None = None
        for step in several:
            if step.keeps:
                kept = clip.shared()
            found = step.moments(clip) if step.waits and not at.plain else None
            clip = step.run(clip, at, found, kept)
            if between is not None:
                between()
    return clip


def skips(steps: Iterable[Step]) -> Iterator[list[Step]]:
    """The steps in runs that begin and end outside of any skip."""
    several: list[Step] = []
    inside = False
    for step in steps:
        several.append(step)
        inside = (inside or step.keeps) and step.adds is None
        if not inside:
            yield several
            several = []
    if several:
        yield several


def _checkpointed(steps: list[Step], clip: Clip, at: Context) -> Clip:
    """The second computation must see the memory as it was, so what the steps read and write goes through the
    checkpoint as ordinary inputs and outputs."""
    slots = [slot for step in steps for slot in step.slots()]
    device = clip.tensors[0].device

    def run(x: Tensor, *held: Tensor | None) -> tuple[Tensor | None, ...]:
        local = Memory()
        local.restore({slot: frames for slot, frames in zip(slots, held, strict=True) if frames is not None})
        inner = Context(memory=local, first=at.first, plain=True)
        return (walk(steps, Clip([x]), inner).tensor(), *(local.get(slot, device) for slot in slots))

    y, *kept = checkpoint(run, clip.tensor(), *(at.memory.get(slot, device) for slot in slots), use_reentrant=False)
    for slot, frames in zip(slots, kept, strict=True):
        if frames is not None:
            at.memory.put(slot, frames)
    return Clip([y])
