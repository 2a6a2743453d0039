"""A LATENT that notices when a node mirrors or turns it: its padding then lies on another side."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from ...vae_core.families import FAMILIES, VIDEO

FACTS = "cviv"
MOVED = "moved"  # among the facts: the true size is not known any more, for this reason
_SIDES = (3, 2)  # the axes that Flip Latent and Rotate Latent take for the sides, whatever the layout


class VideoLatent(dict[str, Any]):
    """The dict on a LATENT wire. Nodes copy it and set its `samples`; what it says of them is set right then."""

    def copy(self) -> VideoLatent:
        """Another of this kind, with the same values."""
        return VideoLatent(self)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "samples" and isinstance(value, Tensor) and isinstance(self.get(FACTS), Mapping):
            how = _how_moved(self.get("samples"), value)
            if how is not None:
                super().__setitem__(FACTS, _facts_moved(self[FACTS], self["samples"], value, how))
        super().__setitem__(key, value)


def _how_moved(before: object, after: Tensor) -> Literal["mirrored", "turned"] | None:
    """Whether `after` is `before` mirrored (or upside down) or turned by 90 degrees."""
    if not isinstance(before, Tensor) or before.ndim not in (4, 5) or before.ndim != after.ndim:
        return None
    if before.is_nested or after.is_nested or (before.dtype, before.device) != (after.dtype, after.device):
        return None
    one, other = before[:, :1], after[:, :1]  # of one channel, which tells as much
    if torch.equal(one, other):
        return None
    mirrored = (one.flip(axis) for axis in (*_SIDES, _SIDES))
    if one.shape == other.shape and any(torch.equal(image, other) for image in mirrored):
        return "mirrored"
    turned = (torch.rot90(one, times, _SIDES) for times in (1, 3))
    return "turned" if any(torch.equal(image, other) for image in turned) else None


def _facts_moved(facts: Mapping[str, Any], before: Tensor, after: Tensor, how: str) -> dict[str, Any]:
    """`facts` with the size, and of a 5-D latent the length, of all that the latent decodes to."""
    family = FAMILIES.get(facts.get("family", ""))
    compression = VIDEO if family is None else family.compression

    def whole(samples: Tensor) -> dict[str, int]:
        sides = zip(("height", "width"), samples.shape[-2:], strict=True)
        sizes = {name: compression.space * side for name, side in sides}
        return sizes | ({"frames": compression.pixel_frames(samples.shape[2])} if samples.ndim == 5 else {})

    known = {name: size for name, size in whole(before).items() if name in facts}
    result = {**facts, **{name: size for name, size in whole(after).items() if name in facts}}
    if any(facts[name] != size for name, size in known.items()):
        result[MOVED] = True
    if how == "turned" and after.ndim == 4 and "aspect" in facts:
        result["aspect"] = str(1 / Fraction(facts["aspect"]))
    return result
