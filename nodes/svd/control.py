"""ControlNets with a hint for each latent of a clip: ComfyUI gives every call the first; here each gets its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...vae_core.families import VIDEO


def control_of(control: Any, latents: int, which: Sequence[int], made: dict[int, Any]) -> Any:
    """A ControlNet and those chained to it, with the hints of the latents `which` of a clip of `latents`.

    A hint for each latent, or for each frame that they decode to, is cut; one picture for all stays. made: those of
    these latents so far, by the id of what they are of: ComfyUI runs positive and negative together where they have
    one and the same. Raises ValueError for any other number of hints.
    """
    if control is None:
        return None
    if id(control) not in made:
        made[id(control)] = _cut(control, latents, which, made)
    return made[id(control)]


def _cut(control: Any, latents: int, which: Sequence[int], made: dict[int, Any]) -> Any:
    before = getattr(control, "previous_controlnet", None)
    chained = control_of(before, latents, which, made)
    hint = getattr(control, "cond_hint_original", None)
    cut = isinstance(hint, Tensor) and hint.shape[0] > 1
    if not cut and chained is before:
        return control
    ours = copy.copy(control)
    ours.previous_controlnet = chained
    if cut:
        ours.cond_hint_original = hint[_places(hint.shape[0], latents, which)]
        ours.cond_hint = None  # made anew of the original; so is the input that T2I adapters keep of it
        if hasattr(ours, "control_input"):
            ours.control_input = None
    return ours


def _places(hints: int, latents: int, which: Sequence[int]) -> list[int]:
    """Which hints belong to the latents `which`."""
    if hints == latents:
        return list(which)
    if hints == VIDEO.pixel_frames(latents):
        return [VIDEO.time * latent for latent in which]  # the last frame that a latent stands for
    raise ValueError(
        f"A ControlNet has {hints} pictures and the clip {latents} latents: connect one picture, {latents} (one for "
        f"each latent) or {VIDEO.pixel_frames(latents)} (one for each frame)."
    )
