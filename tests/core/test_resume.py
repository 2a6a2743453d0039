"""A decode that goes on after its process was killed: the same file, and only what was missing is computed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vae_core import VideoError, VideoVAE, load
from vae_core.cli.decoding import chosen, decode, store_for
from vae_core.cli.outputs import Form
from vae_core.door.resume import DecodeStore
from vae_core.media.latents import open_latent

from .clips import same_sound, with_sound
from .command_line import fail, files, read_all, run, succeed

Make = Callable[..., VideoVAE]
LATENTS = {"cv-vae": 14, "cv-vae-sd3": 14, "iv-vae": 12, "image-vae": 40}


class KilledError(BaseException):
    pass


def frames_of(store: DecodeStore, vae: VideoVAE, latent: Tensor, between: Callable[[], None], **options: Any) -> Tensor:
    count = vae.info.compression.pixel_frames(latent.shape[2])

    def make(start: int, snapshots: Any) -> Any:
        return vae.decode_stream(latent, start=start, snapshots=snapshots, between=between, **options)

    return torch.cat(list(store.all(make, count, dim=2)), dim=2)


def test_only_what_is_missing_is_computed(tmp_path: Path, family: str, small_vae: Make) -> None:
    vae, steps = small_vae(family), 0
    torch.manual_seed(0)
    latent = torch.randn(1, vae.info.latent_channels, LATENTS[family], 2, 1, dtype=torch.float64)
    whole = vae.decode(latent)

    def count() -> None:
        nonlocal steps
        steps += 1

    list(vae.decode_stream(latent, between=count))
    everything, steps = steps, 0

    def killed() -> None:
        count()
        if steps > 0.7 * everything:
            raise KilledError

    with pytest.raises(KilledError):
        frames_of(DecodeStore(tmp_path / "kept", "key", every=2), vae, latent, killed)
    done, steps = steps, 0
    store = DecodeStore(tmp_path / "kept", "key", every=2)
    assert store.found > 0
    assert torch.equal(frames_of(store, vae, latent, count), whole)
    chunks = -(-latent.shape[2] // (1 if family == "iv-vae" else 4))
    again = 3 if family == "iv-vae" else 1  # chunks: the broken one, and since the latest snapshot
    assert steps <= everything - done + again * -(-everything // chunks)
    steps = 0
    assert torch.equal(frames_of(DecodeStore(tmp_path / "kept", "key"), vae, latent, count), whole)
    assert steps == 0
    store.remove()
    assert files(tmp_path) == set()


def test_what_is_not_of_this_decode_goes(tmp_path: Path, small_vae: Make) -> None:
    vae = small_vae("iv-vae")
    latent = torch.randn(1, vae.info.latent_channels, 6, 1, 1, dtype=torch.float64)
    folder = tmp_path / "kept"
    frames_of(DecodeStore(folder, "one", every=1), vae, latent, lambda: None)
    names = files(folder)
    assert {"snapshot_000005.safetensors", "snapshot_000006.safetensors"} <= names  # the latest two
    assert len(names) == 8
    damaged = folder / "chunk_000003.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100] + bytes(100))  # values alone
    (folder / f".chunk_000009.{2**22 - 1}.part.safetensors").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    store = DecodeStore(folder, "one")
    assert store.found == 21  # a sum of each is looked at when it is read
    assert torch.equal(frames_of(store, vae, latent, lambda: None), vae.decode(latent))
    cut = folder / "chunk_000002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    assert DecodeStore(folder, "one").found == 5  # 1 + 4: what comes after the damaged one is of no use
    assert DecodeStore(folder, "another").found == 0
    assert files(folder) == {"notes.txt"}
    store.remove()
    assert folder.is_dir()


def test_a_full_disk_ends_the_keeping_and_not_the_decode(
    tmp_path: Path, small_vae: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vae, store = small_vae("cv-vae"), DecodeStore(tmp_path / "kept", "key")
    latent = torch.randn(1, 4, 9, 1, 1, dtype=torch.float64)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vae_core.door.resume.write_tensors", full)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(frames_of(store, vae, latent, lambda: None), vae.decode(latent))
    assert "from frame 0 on nothing is kept for a later run" in caplog.text
    with pytest.raises(VideoError, match=r"931\.3 GiB|9313225\.7 GiB"):
        store.check_room(10**16)


def notes(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stderr


def latents(here: Path, weights: Path, frames: int) -> None:
    with_sound(here / "clip.mp4", frames)
    succeed("encode", "clip.mp4", "-w", weights, "-o", "clip.latent.safetensors")


@pytest.mark.parametrize(
    ("family", "words"),
    [("cv-vae", ()), ("iv-vae", ("--bits", "10")), ("iv-vae", ("--start", "20", "--frames", "50"))],
)
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is of POSIX")
def test_killed_and_resumed(here: Path, weights: dict[str, Path], family: str, words: tuple[str, ...]) -> None:
    latents(here, weights[family], 90)
    given = ("decode", "clip.latent.safetensors", "-w", weights[family], *words)
    succeed(*given, "-o", "whole.mp4")
    code = (  # with as many threads, for the same sums; each chunk takes its time, so that the kill comes in between
        f"import time, torch\ntorch.set_num_threads({torch.get_num_threads()})\n"
        "from vae_core.door.resume import DecodeStore\nkeep = DecodeStore._keep\n"
        "def slow(*a):\n    keep(*a)\n    time.sleep(1)\nDecodeStore._keep = slow\n"
        "from vae_core.cli import main\nmain()"
    )
    command = [sys.executable, "-c", code, *map(str, given), "-o", "film.mp4", "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    second = here / ".film.mp4.unfinished" / "chunk_000001.safetensors"
    with subprocess.Popen(command, cwd=here, env=environment) as process:
        end = time.monotonic() + 120
        while not second.exists() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert second.exists()
    assert not (here / "film.mp4").exists()
    said = notes(*given, "-o", "film.mp4", "--resume")
    assert "are there from an earlier run; goes on after them" in said
    assert (here / "film.mp4").read_bytes() == (here / "whole.mp4").read_bytes()
    assert [path for path in files(here) if path.startswith(".")] == []


def test_a_run_that_was_stopped_says_what_is_kept(here: Path, weights: dict[str, Path]) -> None:
    latents(here, weights["cv-vae"], 40)
    given = ("decode", "clip.latent.safetensors", "-w", weights["cv-vae"], "-o", "film.mp4")
    file = open_latent(here / "clip.latent.safetensors")
    job = chosen(file, Form(), 0, None)
    vae = load(weights["cv-vae"])
    store = store_for(vae, job, [here / "film.mp4"])

    def stop(frames: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(vae, job, [here / "film.mp4"], sound=None, store=store, advance=stop)
    assert store.frames == 17
    said = notes(*given)  # without the option nothing of it is used, and nothing is lost
    assert "holds frames of a run that was not finished: with --resume they are used" in said
    said = notes(*given, "--overwrite", "--resume")
    assert "17 frames of 40 are there from an earlier run; goes on after them." in said
    assert files(here) == {"clip.mp4", "clip.latent.safetensors", "clip.latent.sound.mka", "film.mp4"}


def test_some_frames_of_a_latent_file(here: Path, weights: dict[str, Path]) -> None:
    latents(here, weights["cv-vae"], 75)
    given = ("decode", "clip.latent.safetensors", "-w", weights["cv-vae"], "--crf", "0")
    succeed(*given, "-o", "whole.mkv")
    succeed(*given, "-o", "some.mkv", "--start", "25", "--frames", "25")
    assert torch.equal(read_all(here / "some.mkv"), read_all(here / "whole.mkv")[:, :, 25:50])
    same_sound(here / "clip.mp4", here / "some.mkv", offset=1.0, length=0.9)
    assert "has 75 frames, numbered from 0; 10 from frame 70 on is not among them" in fail(
        *given, "-o", "x.mkv", "--start", "70", "--frames", "10"
    )
    assert "all the rest from frame 75 on" in fail(*given, "-o", "x.mkv", "--start", "75")


def test_pictures_go_on_and_blended_tiles_do_not(here: Path, weights: dict[str, Path]) -> None:
    latents(here, weights["cv-vae"], 40)
    given = ("decode", "clip.latent.safetensors", "-w", weights["cv-vae"], "-o", "out_%05d.png", "--resume")
    file = open_latent(here / "clip.latent.safetensors")
    job, vae = chosen(file, Form(), 0, None), load(weights["cv-vae"])
    store = store_for(vae, job, [here / "out_%05d.png"])
    next(iter(store.all(lambda done, kept: job.levels(vae, done, kept), 40, dim=1)))
    (here / "out_00000.png").write_bytes(b"written before the crash")
    assert "17 frames of 40 are there" in notes(*given)
    assert len(list(here.glob("out_*.png"))) == 40
    assert (here / "out_00000.png").read_bytes()[:4] == b"\x89PNG"
    assert "out_00000.png exists already" in fail(*given)
    assert "--resume goes with --tiling exact" in fail(*given[:-1], "-o", "x.mp4", "--resume", "--tiling", "blended")
