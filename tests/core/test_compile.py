"""`torch.compile`: whole frames are compiled, graphs are counted, results are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from vae_core import TilePlan, VideoVAE

Make = Callable[..., VideoVAE]


class Backend:
    """A compiler that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def clips(vae: VideoVAE) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    latents = {"iv-vae": 4, "image-vae": 2}.get(vae.family, 9)
    frames = vae.info.compression.pixel_frames(latents)
    video = torch.rand(1, 3, frames, 16, 24, dtype=torch.float64) * 2 - 1
    return video, torch.randn(1, vae.info.latent_channels, latents, 2, 3, dtype=torch.float64)


def test_a_compiled_vae_gives_what_it_gave(family: str, small_vae: Make) -> None:
    """One graph for each kind of chunk: of IV-VAE the first and the later ones."""
    vae, backend = small_vae(family), Backend()
    video, latent = clips(vae)
    expected = vae.encode(video), vae.decode(latent)
    assert vae.compile(backend=backend, fullgraph=True, dynamic=False) is vae
    got = vae.encode(video), vae.decode(latent)
    for mine, right in zip(got, expected, strict=True):
        assert (mine - right).abs().max() <= 1e-10 * right.std()
    kinds = 4 if family == "iv-vae" else 2
    assert backend.graphs == kinds
    assert torch.equal(vae.decode(latent), got[1])
    assert backend.graphs == kinds


def test_tiles_of_a_compiled_vae_run_as_ever(family: str, small_vae: Make) -> None:
    vae, backend = small_vae(family), Backend()
    _, latent = clips(vae)
    expected = vae.decode(latent, plan=TilePlan(tile=1))
    vae.compile(backend=backend)
    assert torch.equal(vae.decode(latent, plan=TilePlan(tile=1)), expected)
    assert backend.graphs == 0


def test_changed_weights_are_seen_by_a_compiled_vae(small_vae: Make) -> None:
    vae, backend = small_vae("cv-vae"), Backend()
    _, latent = clips(vae)
    vae.compile(backend=backend)
    before = vae.decode(latent)
    for weight in vae.model.parameters():
        weight.data.mul_(0.5)
    fresh = small_vae("cv-vae")
    fresh.model.load_state_dict(vae.model.state_dict())
    after = vae.decode(latent)
    assert (after - before).abs().max() > 0.1 * before.std()
    torch.testing.assert_close(after, fresh.decode(latent), rtol=0, atol=1e-9)


def test_a_network_compiles_for_training(family: str, small_vae: Make) -> None:
    """One graph, forwards and backwards, and the same gradients."""
    vae, backend = small_vae(family), Backend()
    network = vae.model.requires_grad_(True).train()
    video, _ = clips(vae)
    video = video[:, :, : vae.info.compression.pixel_frames(2)]
    network(video).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    compiled(video).square().mean().backward()
    assert backend.graphs == 1
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("call", ["encode", "decode", "moments"])
def test_a_method_compiled_from_outside_gives_what_it_gave(family: str, small_vae: Make, call: str) -> None:
    """The network is left out of it; `VideoVAE.compile` is the way to compile that."""
    vae, backend = small_vae(family), Backend()
    video, latent = clips(vae)
    given = latent if call == "decode" else video
    expected, got = getattr(vae, call)(given), torch.compile(getattr(vae, call), backend=backend)(given)
    for mine, right in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, expected)), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_out_of_memory_in_a_compiled_run_goes_on_in_tiles(family: str, small_vae: Make, fails: int) -> None:
    """What layers remember of earlier chunks goes over, whichever way these ran."""
    vae = small_vae(family)
    _, latent = clips(vae)
    expected = vae.decode(latent)
    calls: list[int] = []

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == fails:
                raise torch.cuda.OutOfMemoryError("injected")
            return graph.forward(*args)

        return run

    vae.compile(backend=backend)
    got = vae.decode(latent, recover=lambda error, plan: TilePlan(tile=1))
    assert len(calls) >= min(fails, 2)
    assert (got - expected).abs().max() <= 1e-10 * expected.std()


def test_a_compiled_vae_gives_its_type_in_autocast_and_tells_of_chunks(small_vae: Make) -> None:
    vae = small_vae("iv-vae", torch.float32)
    latent = clips(vae)[1].float()
    vae.compile(backend=Backend())
    expected, told = vae.decode(latent), []
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.decode(latent), expected)
    for chunk in vae.decode_stream(latent, between=lambda: told.append(1)):
        del chunk
    assert len(told) == 4
