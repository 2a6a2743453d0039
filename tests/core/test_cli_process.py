"""The command line as a process of its own: interrupted, on a full disk, in bounded memory, without its libraries."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import vae_core
from vae_core.cli.work import open_clip, reconstruct
from vae_core.families.cv_vae import CVVAEConfig

from .clips import write_av

ROOT = Path(__file__).parents[2]
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits are POSIX features")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, small_vae: Callable[..., vae_core.VideoVAE]) -> Path:
    """The smallest CV-VAE."""
    config = CVVAEConfig(widths=(32, 32, 32, 32), blocks_per_level=1, latent_channels=4, sd3=False)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    vae_core.save(small_vae(config, torch.float32), path)
    return path


def command(*words: object, before: str = "") -> list[str]:
    code = f"{before}\nfrom vae_core.cli import main\nmain()"
    return [sys.executable, "-c", code, *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def gray_clip(path: Path, frames: int, height: int = 64, width: int = 96) -> Path:
    return write_av(path, [np.full((height, width, 3), index % 200, np.uint8) for index in range(frames)])


def files(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@posix
@pytest.mark.parametrize(
    ("words", "number", "code", "said"),
    [
        (("reconstruct",), signal.SIGINT, 130, "Stopped. No unfinished file is left behind."),
        (("encode",), signal.SIGINT, 130, "Stopped. No unfinished file is left behind."),
        (("reconstruct",), signal.SIGTERM, 143, "Ended from outside. No unfinished file is left behind."),
        (("encode",), signal.SIGHUP, 129, "Ended from outside. No unfinished file is left behind."),
    ],
)
def test_a_signal_leaves_no_half_file(
    tmp_path: Path, weights: Path, words: tuple[str, ...], number: int, code: int, said: str
) -> None:
    gray_clip(tmp_path / "clip.mp4", 800)

    def heard() -> None:
        for name in (signal.SIGINT, signal.SIGHUP):  # which a shell in the background, or nohup, has switched off
            signal.signal(name, signal.SIG_DFL)

    with subprocess.Popen(
        command(*words, "clip.mp4", "-w", weights),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heard,
    ) as process:
        deadline = time.monotonic() + 120
        # it is in the middle of the work once something is in the hidden file
        while not any(path.stat().st_size > 100 for path in tmp_path.glob(".*part*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (code, said + "\n")
    assert files(tmp_path) == {"clip.mp4"}


@posix
@pytest.mark.parametrize(("words", "limit"), [(("reconstruct",), 2000), (("encode",), 2000)])
def test_a_full_disk_leaves_no_half_file(tmp_path: Path, weights: Path, words: tuple[str, ...], limit: int) -> None:
    gray_clip(tmp_path / "clip.mp4", 33)
    before = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    done = subprocess.run(
        command(*words, "clip.mp4", "-w", weights, before=before),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    line = "Error: The disk is full. No unfinished file is left behind; make room, or choose another -o.\n"
    assert (done.returncode, done.stderr) == (1, line)
    assert files(tmp_path) == {"clip.mp4"}


def tensor_bytes() -> int:
    """Memory of all tensors alive in this process."""
    gc.collect()
    storages = [entry.untyped_storage() for entry in gc.get_objects() if type(entry) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_memory_does_not_grow_with_the_clip(tmp_path: Path, weights: Path) -> None:
    clip = open_clip(gray_clip(tmp_path / "clip.mp4", 97, 32, 48), 0, None)
    used: dict[int, int] = {}

    def watch(first: int, originals: torch.Tensor, results: torch.Tensor) -> None:
        used[first] = tensor_bytes()

    outputs = {"plain": tmp_path / "plain.mp4", "beside": tmp_path / "beside.mp4"}
    quality, _ = reconstruct(
        vae_core.load(weights), clip, **outputs, seed=None, advance=lambda count: None, watch=watch
    )
    assert len(quality.psnr) == 97
    one_frame = 3 * 32 * 48 * 4
    assert list(used) == [0, 17, 33, 49, 65, 81]
    assert used[81] < used[17] + 3 * one_frame, used
    assert tensor_bytes() < used[81]


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        command("--help", before="import sys\nsys.modules['typer'] = None"),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    line = 'The command line needs typer, which is not installed: pip install -e ".[cli]" in its folder.\n'
    assert done.stderr == line


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vae_core", "info", "nowhere.safetensors"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert "nowhere.safetensors" in done.stderr
