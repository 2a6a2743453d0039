"""A plan in words, for reports."""

from __future__ import annotations

import torch

from ...vae_core import Plan
from .schema import size_words

_WORTH_TELLING = 1 << 20  # bytes


def plan_words(plan: Plan, device: torch.device) -> list[str]:
    """What a plan says beyond whether it is exact, a sentence each; what needs no memory to speak of is left out."""
    chunks = "" if plan.chunks == 1 else f"; {plan.chunks} chunks in time"
    where = "RAM" if device.type == "cpu" else "device memory"
    told = [f"{plan.way.rpartition(', ')[0]}{chunks}"]
    if plan.device_bytes >= _WORTH_TELLING:
        told.append(f"about {size_words(plan.device_bytes)} of {where} to work in, weights not counted")
    if plan.host_bytes >= _WORTH_TELLING:
        told.append(f"about {size_words(plan.host_bytes)} of RAM for what waits off the device")
        told.append(f"{size_words(plan.transfer_bytes)} between device and RAM in all")
    if plan.halo_overhead >= 0.005:
        told.append(f"{100 * plan.halo_overhead:.0f} % extra work, to need less memory")
    if not plan.fits:
        told.append("this does not fit the budget, and no smaller way is known")
    return told
