"""Plans for the cards that people have: what they fit in, what they move, and that a run needs what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vae_core import ReferencePlan, StripPlan
from vae_core.plan.profile import Profile
from vae_core.run.ram import Blocks, Rows

from .full_size import FULL, full_size, latent_shape

GIB = 2**30


def test_blended_tiles_are_the_last_choice() -> None:
    vae = full_size(FULL["cv-vae"])
    shape = latent_shape(vae, 25, 135, 240)
    exact = vae.plan_decode(shape, budget_bytes=8 * GIB, ram_bytes=16 * GIB, blended=True)
    assert exact.exact
    plan = vae.plan_decode(shape, budget_bytes=8 * GIB, ram_bytes=4 * GIB, blended=True)
    assert plan.tiles == ReferencePlan(576)
    assert plan.fits
    assert not plan.exact
    assert not vae.plan_decode(shape, budget_bytes=8 * GIB, ram_bytes=4 * GIB).fits
    less = vae.smaller_plan(plan.tiles, shape, "decode", ram_bytes=4 * GIB, blended=True)
    assert less == ReferencePlan(432)


@pytest.mark.parametrize(
    ("size", "budget", "ram", "bus", "host"),
    [
        ((72, 128), 8, None, 30e9, 4.5),
        ((72, 128), 6, None, 45e9, 4.5),
        ((90, 160), 12, None, 55e9, 0.1),
        ((135, 240), 8, 16, 120e9, 16),
    ],
    ids=["576p in 8", "576p in 6", "720p in 12", "1080p in 8"],
)
def test_cv_vae_on_the_cards_that_people_have(
    size: tuple[int, int], budget: float, ram: float | None, bus: float, host: float
) -> None:
    """97 frames in bf16, exact: bytes over the bus for each chunk, and what waits in RAM, in GiB."""
    vae = full_size(FULL["cv-vae"])
    plan = vae.plan_decode(
        latent_shape(vae, 25, *size),
        budget_bytes=int(budget * GIB),
        ram_bytes=None if ram is None else int(ram * GIB),
        dtype=torch.bfloat16,
        required=True,
    )
    assert plan.exact
    assert plan.device_bytes <= budget * GIB
    assert plan.transfer_bytes <= plan.chunks * bus
    assert plan.host_bytes <= host * GIB


def test_iv_vae_on_the_cards_that_people_have() -> None:
    vae = full_size(FULL["iv-vae"])
    small = vae.plan_decode(latent_shape(vae, 25), budget_bytes=2 * GIB, dtype=torch.bfloat16)
    large = vae.plan_decode(
        latent_shape(vae, 25, 270, 480), budget_bytes=8 * GIB, ram_bytes=16 * GIB, dtype=torch.bfloat16
    )
    assert small.fits
    assert small.exact
    assert large.fits
    assert large.exact


@pytest.mark.parametrize(
    "plan",
    [
        StripPlan(strips=16),
        StripPlan(strips=8, again=1),
        StripPlan(strips=16, room=GIB // 2),
        StripPlan(strips=32, room=GIB // 4, again=2),
        StripPlan(strips=4, room=0),
    ],
    ids=["strips", "again", "half", "both", "ram"],
)
@pytest.mark.parametrize("decoding", [True, False], ids=["decode", "encode"])
def test_what_strips_are_said_to_need_is_what_they_need(
    plan: StripPlan, decoding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arithmetic against a run without data that counts: live tensors on both sides, and bytes between them."""
    vae = full_size(FULL["cv-vae"])
    shape = latent_shape(vae, 5, 60, 60) if decoding else (1, 3, 17, 480, 480)
    said = vae.describe_plan(plan, shape, "decode" if decoding else "encode")
    moved = 0
    pairs, take = Rows.pairs, Blocks.take

    def counted_pairs(rows: Rows, x: Any, region: Any) -> Any:
        nonlocal moved
        for there, here in pairs(rows, x, region):
            moved += here.numel() * here.element_size()
            yield there, here

    def counted_take(blocks: Blocks, nbytes: int) -> Any:
        with profile.on_host():
            return take(blocks, nbytes)

    monkeypatch.setattr(Rows, "pairs", counted_pairs)
    monkeypatch.setattr(Blocks, "take", counted_take)
    with Profile() as profile:
        x = torch.empty(shape, dtype=vae.dtype, device="meta")
        for chunk in vae.decode_stream(x, plan=plan) if decoding else vae.encode_stream([x], plan=plan):
            del chunk
    said_device = said.waiting_bytes + said.working_bytes
    assert profile.device.peak <= 1.08 * said_device
    assert said_device <= 1.25 * profile.device.peak
    assert profile.host.peak == pytest.approx(said.host_bytes, rel=0.1, abs=2**27)
    assert moved == pytest.approx(said.transfer_bytes, rel=0.1)
