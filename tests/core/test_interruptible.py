"""On a CPU a large convolution can be ended in its middle, and gives the same in parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vae_core import TilePlan, VideoVAE
from vae_core.nn import convolution
from vae_core.nn.convolution import convolve, enlarge_frames, interruptible

Make = Callable[..., VideoVAE]


@pytest.fixture
def _in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "LONGEST", 20_000)
    monkeypatch.setattr(convolution, "LEAST_ROWS", 2)


@pytest.mark.usefixtures("_in_small_parts")
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (2, 1, 1), (1, 5, 5)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 1, 1), (1, 1, 1)])
def test_parts_give_the_whole(
    kernel: tuple[int, int, int], stride: tuple[int, int, int], padding: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, 11, 8, dtype=torch.float64)
    weight, bias = torch.randn(7, 5, *kernel, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    calls: list[None] = []
    with interruptible(lambda: calls.append(None)):
        got = convolve(x, weight, bias, stride=stride, padding=padding)
    torch.testing.assert_close(got, torch.nn.functional.conv3d(x, weight, bias, stride, padding), rtol=0, atol=1e-11)
    assert len(calls) > 2


def test_enlarging_goes_frame_by_frame() -> None:
    x, kernel = torch.randn(1, 3, 4, 5, 6, dtype=torch.float64), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    whole = enlarge_frames(x, kernel, None, padding=(1, 1))
    calls: list[None] = []
    with interruptible(lambda: calls.append(None)):
        torch.testing.assert_close(enlarge_frames(x, kernel, None, padding=(1, 1)), whole, rtol=0, atol=1e-12)
    assert len(calls) == 4


@pytest.mark.usefixtures("_in_small_parts")
def test_a_network_gives_the_same_and_can_be_ended_anywhere(family: str, small_vae: Make) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    video = torch.rand(1, 3, 9, 32, 40, dtype=torch.float64).mul(2).sub(1)
    latent = vae.encode(video)
    assert (torch.cat(list(vae.encode_stream([video], between=lambda: None)), dim=2) - latent).abs().max() < 1e-12
    whole, calls = vae.decode(latent), 0

    def count() -> None:
        nonlocal calls
        calls += 1

    got = torch.cat(list(vae.decode_stream(latent, plan=TilePlan(tile=3), between=count)), dim=2)
    assert (got - whole).abs().max() <= 1e-12 * whole.std()
    steps = len(vae.model.steps("decode"))
    assert calls > 4 * steps

    left = steps

    def end() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(vae.decode_stream(latent, between=end))
    assert torch.equal(vae.decode(latent), whole)
