"""Fixtures of the tests inside ComfyUI, and the reason why they are skipped where there is none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import inprocess
from .checkout import problem
from .inprocess import Comfy
from .place import make_base
from .server import Server, serve

PROBLEM = problem()

LoadVAE = Callable[..., Any]


def pytest_configure() -> None:
    """Under `make test-comfyui` nothing is skipped as a whole."""
    if PROBLEM is not None and os.environ.get("CVIV_COMFYUI_REQUIRED"):
        raise pytest.UsageError(PROBLEM)


class SkippedModule(pytest.Module):
    """A test file that is not even imported."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(str(PROBLEM), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip the files of this folder, with one reason for all."""
    return None if PROBLEM is None else SkippedModule.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder models/vae that every base directory here shares."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def loaded(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Comfy:
    """ComfyUI in this process, with the pack loaded and the small weights written."""
    from .weights import write_small  # a Python without torch gets as far as the reason above

    comfy = inprocess.start(make_base(tmp_path_factory.mktemp("comfyui") / "base", models=models))
    write_small(comfy, models)
    return comfy


@pytest.fixture
def comfy(loaded: Comfy) -> Iterator[Comfy]:
    """`loaded`, for one test: nothing that the test gave or took stays for the next."""
    yield loaded
    loaded.given.clear()
    loaded.taken.clear()
    loaded.on_progress = None
    loaded.module("nodes").interrupt_processing(False)


@pytest.fixture(scope="session")
def load_vae(loaded: Comfy) -> LoadVAE:
    """A function (vae_name, latent_layout="auto", dtype="fp32") -> VAE of Load Video VAE, loaded once."""
    kept: dict[tuple[str, ...], Any] = {}

    def load(vae_name: str, latent_layout: str = "auto", dtype: str = "fp32") -> Any:
        key = (vae_name, latent_layout, dtype)
        if key not in kept:
            (kept[key],) = loaded.call(
                "CVIV_LoadVideoVAE", vae_name=vae_name, latent_layout=latent_layout, dtype=dtype, device="auto"
            )
        return kept[key]

    return load


@pytest.fixture(scope="session")
def server(loaded: Comfy, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server with the pack; `loaded` has written the weights."""
    with serve(make_base(tmp_path_factory.mktemp("server") / "base", models=models)) as running:
        yield running
