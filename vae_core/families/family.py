"""What a family is: all that differs from one kind of VAE to another, in one value.

Whoever runs, plans, loads or trains a VAE asks its `Family`, and never which one it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..nn.clip import Clip, laid_out
from ..nn.steps import Context, Kernels, Memory, Step, Streaming, walk

Direction = Literal["encode", "decode"]
DIRECTIONS: tuple[Direction, Direction] = ("encode", "decode")
HALVES: dict[Direction, str] = {"encode": "encoder", "decode": "decoder"}
Shapes = Mapping[str, tuple[int, ...]]
Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]  # patterns, and what takes their place


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Pixel frames per latent, after the first, and pixels per latent in height and in width."""

    time: int
    space: int

    def latent_frames(self, frames: int) -> int:
        """Latents of a clip of `frames` pixel frames, once it is padded to 1 + time * N."""
        return 1 + -(-(frames - 1) // self.time)

    def pixel_frames(self, latents: int) -> int:
        """Pixel frames that `latents` latents decode to."""
        return 1 + self.time * (latents - 1)

    def cells(self, pixels: int) -> int:
        """Latents along a side of `pixels` pixels, once it is padded."""
        return -(-pixels // self.space)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Chunks over time: `first` frames, then `step` new ones at a time after `overlap` old ones."""

    first: int
    step: int
    overlap: int

    def count(self, frames: int) -> int:
        """Chunks of a clip of `frames` frames."""
        return 1 + max(0, -(-(frames - self.first) // self.step))

    def before(self, frame: int) -> int:
        """Chunks that end before a frame."""
        return 0 if frame < self.first else 1 + (frame - self.first) // self.step

    def until(self, chunks: int) -> int:
        """Frames of the first chunks."""
        return 0 if chunks == 0 else self.first + (chunks - 1) * self.step

    def cut(self, clip: Tensor) -> list[Tensor]:
        """The chunks of a whole clip (b, c, t, h, w); the last may be shorter."""
        starts = [0, *(self.first - self.overlap + n * self.step for n in range(self.count(clip.shape[2]) - 1))]
        return [clip[:, :, a : a + (self.overlap + self.step if a else self.first)] for a in starts]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """scaled latent = scale * (latent - shift)."""

    scale: float
    shift: float


class Network(nn.Module):
    """A network of some family: encoder and decoder, or one of them alone, each as a list of steps.

    It is differentiable and free of state. Latents are unscaled, as the network itself makes and reads them.
    """

    family: Family
    config: Any
    encoder: nn.Module | None
    decoder: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self._steps: dict[Direction, tuple[list[nn.Module], tuple[Step, ...]]] = {}

    def steps(self, direction: Direction) -> tuple[Step, ...]:
        """The network's own way, over the layers that are there now; raises ValueError where it has not this half."""
        if not torch.compiler.is_compiling():
            self._refresh(direction)
        return self._steps[direction][1]

    def _refresh(self, direction: Direction) -> None:
        """Make the steps, again where somebody put another layer in place of one."""
        if direction not in self.halves:
            raise ValueError(
                f"These {self.family.id} weights have no {HALVES[direction]}, so they cannot {direction}. Load a "
                "file that has one."
            )
        layers = list(self.modules())
        if direction not in self._steps or self._steps[direction][0] != layers:
            self._steps[direction] = layers, self.way(direction)

    def __getstate__(self) -> dict[str, Any]:
        """Without the steps, which are made again."""
        return {**self.__dict__, "_steps": {}}

    def way(self, direction: Direction) -> tuple[Step, ...]:
        """The steps of a half that is there."""
        return tuple(getattr(self, HALVES[direction]).steps())

    def chunk(
        self, direction: Direction, x: Tensor, held: dict[str, Tensor], first: bool, checkpointing: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One chunk by torch's own operators, as autograd and compilers want it: its moments or frames, and what the
        layers keep for the next; `held` is what they kept of the one before."""
        at = Context(memory=Memory(), kernels=Kernels(), first=first, plain=True)
        at.memory.restore(held)
        y = walk(self.steps(direction), Clip([laid_out(x)]), at, checkpointing=checkpointing).tensor()
        return y, at.memory.snapshot()

    def encode(self, video: Tensor, *, checkpointing: bool = False) -> tuple[Tensor, Tensor]:
        """Moments of a whole clip, by torch's own operators: for training, and for compilers.

        video: (b, 3, 1 + time * N, h, w) in [-1, 1]. checkpointing: activations are computed again in the backward pass
        instead of kept. Returns (mean, logvar), each (b, z, 1 + N, h/space, w/space); logvar is not clamped.
        """
        mean, logvar = self._plain("encode", video, checkpointing).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latent: Tensor, *, checkpointing: bool = False) -> Tensor:
        """Frames of a whole clip, as `encode`: (b, z, 1 + N, h, w), unscaled, to (b, 3, 1 + time * N, space * h,
        space * w), nominally in [-1, 1]."""
        return self._plain("decode", latent, checkpointing)

    def forward(self, video: Tensor) -> Tensor:
        """Reconstruction of a clip through the posterior mean."""
        return self.decode(self.encode(video)[0])

    def _plain(self, direction: Direction, clip: Tensor, checkpointing: bool) -> Tensor:
        windows = self.family.windows(direction)
        target = self.family.latents if direction == "encode" else self.family.frames
        outs: list[Tensor] = []
        held: dict[str, Tensor] = {}
        for chunk in windows.cut(clip):
            out, held = self.chunk(direction, chunk, held, not outs, checkpointing)
            outs.append(out[:, :, target.overlap :] if outs else out)
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    @property
    def halves(self) -> tuple[Direction, ...]:
        """The directions that it can run."""
        return tuple(d for d in DIRECTIONS if getattr(self, HALVES[d]) is not None)


def _known(name: str) -> Family:
    """The family of this id, for who unpickles a network."""
    from . import FAMILIES

    return FAMILIES[name]


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One kind of VAE.

    id: its name everywhere. compression. frames, latents: how a clip is cut in time to encode and to decode it.
    tell_tales: for each half, names of tensors that only its weights have, with their numbers of axes; any set will do.
    modernize: weights under other names than the official ones, renamed.
    configure: the config that official shapes imply, with what a file says of itself; raises KeyError or IndexError
    where a tensor is missing, ValueError for impossible widths. told: what a file should say of itself.
    build: the network of a config with these halves, on the current default device. official: name and shape of our
    tensor in the official program. widths: of a config, in words.
    scaled: whether the latents that the VAE gives and takes are scaled; else the sampler's model scales them.
    clamp: of logvar where latents are drawn. reference_tiles: whether the official program cuts frames and blends them.
    """

    id: str
    compression: Compression
    frames: Windows
    latents: Windows
    tell_tales: Mapping[Direction, Sequence[Mapping[str, int]]]
    configure: Callable[[Shapes, Mapping[str, float]], Any]
    build: Callable[[Any, Sequence[Direction]], Network]
    official: Callable[[Any, str, tuple[int, ...]], tuple[str, tuple[int, ...]]]
    widths: Callable[[Any], str]
    modernize: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    told: Callable[[Any], dict[str, float]] = lambda config: {}
    scaled: bool = False
    clamp: tuple[float, float] | None = None
    reference_tiles: bool = False

    def __reduce__(self) -> tuple[Callable[[str], Family], tuple[str]]:
        return _known, (self.id,)

    def windows(self, direction: Direction) -> Windows:
        """How a clip is cut in time."""
        return self.frames if direction == "encode" else self.latents

    def scaling(self, config: Any) -> Scaling:
        """That of the latents of a config."""
        return Scaling(scale=config.scale_factor, shift=config.shift_factor)

    def from_network(self, config: Any, latent: Tensor) -> Tensor:
        """The latent that the VAE gives for one of its network."""
        return config.scale_factor * (latent - config.shift_factor) if self.scaled else latent

    def to_network(self, config: Any, latent: Tensor) -> Tensor:
        """What the network decodes for a latent that the VAE is given."""
        return latent / config.scale_factor + config.shift_factor if self.scaled else latent

    def network(self, config: Any, halves: Sequence[Direction] = DIRECTIONS) -> Network:
        """The network of a config, freshly drawn, on the current default device."""
        network = self.build(config, halves)
        network.family = self
        for name, module in network.named_modules():
            if isinstance(module, Streaming):
                module.slot = name
        for direction in network.halves:
            network.steps(direction)  # for who compiles before anything ran
        return network

    def halves_in(self, shapes: Shapes) -> tuple[Direction, ...]:
        """The halves of this family that tensors of these names and shapes have, be they complete or not; none where
        neither is told by its tell-tales."""
        told = {
            direction
            for direction, sets in self.tell_tales.items()
            if any(all(_has(shapes, name, axes) for name, axes in tells.items()) for tells in sets)
        }
        begun = {d for d in DIRECTIONS if any(name.startswith(f"{HALVES[d]}.") for name in shapes)}
        return tuple(d for d in DIRECTIONS if d in told | begun) if told else ()

    def key_map(self, network: Network) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Our name of every tensor of `network`, with its official name and shape."""
        return {
            name: self.official(network.config, name, tuple(tensor.shape))
            for name, tensor in network.state_dict().items()
        }


def _has(shapes: Shapes, name: str, axes: int) -> bool:
    shape = shapes.get(name, ())
    return len(shape) == axes and 0 not in shape


def substituted(name: str, rules: Rules) -> str:
    """`name` after every (pattern, replacement), one after another."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
