"""What every suite shares: small models with recipe weights, built once."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vae_core
from vae_core.families import FAMILIES, Network
from vae_core.families.cv_vae import CVVAEConfig
from vae_core.families.image_vae import ImageVAEConfig
from vae_core.families.iv_vae import IVVAEConfig

Config = CVVAEConfig | IVVAEConfig | ImageVAEConfig

GOLDEN = Path(__file__).parent / "golden"

# processes that run at the same time take a core each
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

SMALL: dict[str, Config] = {
    "cv-vae": CVVAEConfig(widths=(32, 32, 64, 64), blocks_per_level=1, latent_channels=4, sd3=False),
    "cv-vae-sd3": CVVAEConfig(widths=(32, 32, 64, 64), blocks_per_level=1, latent_channels=16, sd3=True),
    "iv-vae": IVVAEConfig(dim=8, latent_channels=4, scale_factor=1.3, shift_factor=0.1),
    "image-vae": ImageVAEConfig(
        widths=(32, 32, 64, 64),
        blocks_per_level=1,
        latent_channels=4,
        quantized=(True, True),
        decoder_attention=True,
        norm_eps=1e-6,
        scale_factor=0.18215,
        shift_factor=0.0,
    ),
}


def family_of_config(config: Config) -> str:
    """The id of the family that a config is of."""
    if isinstance(config, CVVAEConfig):
        return "cv-vae-sd3" if config.sd3 else "cv-vae"
    return "iv-vae" if isinstance(config, IVVAEConfig) else "image-vae"


def network_of(config: Config) -> Network:
    """The network of a config, freshly drawn."""
    return FAMILIES[family_of_config(config)].network(config)


def _load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden_recipe"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def recipe() -> ModuleType:
    """The golden recipe: deterministic weights, videos and latents."""
    return _load_recipe()


def official_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of the model of `config`."""
    with torch.device("meta"):
        network = network_of(config)
    return dict(network.family.key_map(network).values())


@pytest.fixture(scope="session")
def small_state(recipe: ModuleType) -> Callable[..., dict[str, torch.Tensor]]:
    """A function (family or config, seed) -> official state dict of a small model."""

    def make(config: str | Config, seed: int = 0) -> dict[str, torch.Tensor]:
        return recipe.state_dict(official_shapes(SMALL[config] if isinstance(config, str) else config), seed)

    return make


@pytest.fixture(scope="session")
def small_vae(small_state: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., vae_core.VideoVAE]:
    """A function (family or config, dtype) -> small VAE with recipe weights."""

    def make(config: str | Config, dtype: torch.dtype = torch.float64) -> vae_core.VideoVAE:
        config = SMALL[config] if isinstance(config, str) else config
        scaling = (
            {"scale_factor": config.scale_factor, "shift_factor": config.shift_factor}
            if isinstance(config, IVVAEConfig)
            else {}
        )
        return vae_core.load(small_state(config), dtype=dtype, **scaling)

    return make


@pytest.fixture(params=list(SMALL))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param
