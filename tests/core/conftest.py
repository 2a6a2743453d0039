"""Fixtures of tests that run commands."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vae_core
from vae_core.families import FAMILIES


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, small_vae: Callable[..., vae_core.VideoVAE]) -> dict[str, Path]:
    """A small checkpoint file of each family."""
    folder = tmp_path_factory.mktemp("weights")
    files = {family: folder / f"small-{family}.safetensors" for family in FAMILIES}
    for family, path in files.items():
        vae_core.save(small_vae(family, torch.float32), path)
    return files


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one; torch's cache is elsewhere and empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path
