"""Encoding a data set: clips that end their process, sources that change, and two jobs in one folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import vae_core
from vae_core.cli import app as commands
from vae_core.dataset import EncodeJob, EncodeJobError, EncodeSettings, encoding, read_latents
from vae_core.dataset.on_ray import _check_address

from .clips import as_pictures, moving_picture, write_av


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, small_vae: Callable[..., vae_core.VideoVAE]) -> str:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    vae_core.save(small_vae("cv-vae", torch.float32), path)
    return str(path)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Four videos of 3 to 6 frames, and a file that is no video."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(4):
        _write(folder / f"clip{i}.mp4", 3 + i)
    (folder / "broken.mp4").write_text("no video")
    return folder


def _write(path: Path, frames: int) -> None:
    write_av(path, as_pictures(moving_picture(frames, 32, 48)))


def _settings(weights: str) -> EncodeSettings:
    return EncodeSettings(weights=weights, clips_per_shard=3)


def _latents(folder: Path) -> dict[str, tuple[str, int, torch.Tensor]]:
    return {info.key.split("/", 1)[1]: (info.id, info.frames, latent) for info, latent in read_latents(folder)}


KILLED = """
    import os, signal, sys
    from vae_core.cli import app
    from vae_core.dataset import encoding
    plain = encoding.read_picked
    def deadly(file, *rest, **options):
        if file.path.name == "clip2.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(file, *rest, **options)
    encoding.read_picked = deadly
    app.app(sys.argv[1:])
"""


def test_a_clip_that_ends_its_process_is_counted_and_passed_over(videos: Path, weights: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["encode-dataset", str(videos), "-o", str(out), "-w", weights]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(KILLED), *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(vae_core.__file__).parents[1])},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    assert run().returncode == -signal.SIGKILL
    assert run().returncode == -signal.SIGKILL
    third = run()
    assert third.returncode == 3, third.stderr
    assert "clip2.mp4: ended the process that read it, 2 times. --retry-broken tries it again." in third.stderr
    assert "3 of 5 clips encoded" in third.stdout
    assert set(_latents(out)) == {"clip0.mp4", "clip1.mp4", "clip3.mp4"}
    assert not list(out.rglob("*.tries"))
    mended = CliRunner().invoke(commands.app, [*words, "--retry-broken"])
    assert "2 clips are encoded again" in mended.stderr
    assert "4 of 5 clips encoded, 1 of them in this run" in mended.stdout


def test_a_job_that_is_told_to_end_blames_no_clip(
    videos: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_clip", stop)
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                EncodeJob([videos], tmp_path / "out", _settings(weights)).run("cpu")
    assert EncodeJob([videos], tmp_path / "out", _settings(weights)).run("cpu").encoded == 4


def test_unexpected_errors_are_of_the_clip_unless_there_are_many(
    videos: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = encoding.encode_clip

    def failing(vae, file, *rest):
        if file.path.name == "clip1.mp4":
            raise ZeroDivisionError("a strange header")
        return plain(vae, file, *rest)

    monkeypatch.setattr(encoding, "encode_clip", failing)
    job = EncodeJob([videos], tmp_path / "out", _settings(weights))
    counts = job.run("cpu")
    assert (counts.encoded, counts.broken, counts.pending) == (3, 2, 0)
    key = f"{videos.name}/clip1.mp4"
    assert job.errors()[key] == f"{key}: unexpected ZeroDivisionError: a strange header"

    def always(*_: object) -> None:
        raise ZeroDivisionError("no such device")

    monkeypatch.setattr(encoding, "encode_clip", always)
    for i in range(12):
        (videos / f"more{i:02d}.mp4").write_bytes((videos / "clip0.mp4").read_bytes())
    with pytest.raises(EncodeJobError, match=r"10 clips in a row failed .* no such device What was finished is kept"):
        EncodeJob([videos], tmp_path / "out", _settings(weights)).run("cpu")
    monkeypatch.setattr(encoding, "encode_clip", plain)
    again = EncodeJob([videos], tmp_path / "out", _settings(weights), retry_broken=True)
    assert again.again == 12  # one of before, the broken one and ten
    counts = again.run("cpu")
    assert (counts.clips, counts.encoded, counts.broken, counts.pending) == (17, 16, 1, 0)


@pytest.mark.parametrize("form", ["safetensors", "webdataset"])
def test_changed_mended_and_deleted_sources_are_noticed(
    form: str, videos: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = tmp_path / "out", EncodeSettings(weights=weights, clips_per_shard=3, form=form)  # type: ignore[arg-type]
    EncodeJob([videos], out, settings).run("cpu")
    before = _latents(out)
    _write(videos / "clip1.mp4", 7)  # another content
    _write(videos / "broken.mp4", 3)  # mended
    (videos / "clip2.mp4").unlink()
    os.utime(videos / "clip3.mp4", (1, 1))  # another time, the same content
    seen: list[str] = []
    plain = encoding.encode_clip

    def counted(vae, file, key, *rest):
        seen.append(file.path.name)
        return plain(vae, file, key, *rest)

    monkeypatch.setattr(encoding, "encode_clip", counted)
    job = EncodeJob([videos], out, settings)
    assert (job.again, job.gone) == (2, [f"{videos.name}/clip2.mp4"])
    counts = job.run("cpu")
    assert sorted(seen) == ["broken.mp4", "clip1.mp4"]
    assert (counts.clips, counts.encoded, counts.broken, counts.now) == (5, 5, 0, 2)
    after = _latents(out)
    assert after["clip1.mp4"][1] == 7
    assert after["clip1.mp4"][0] == before["clip1.mp4"][0]  # its number stays, and its seed with it
    for name in ("clip0.mp4", "clip2.mp4", "clip3.mp4"):
        assert torch.equal(after[name][2], before[name][2])
    assert EncodeJob([videos], out, settings).again == 0
    whole = tmp_path / "whole"  # as if it had been so from the beginning
    EncodeJob([videos], whole, settings).run("cpu")
    assert all(torch.equal(latent, after[name][2]) for name, (_, _, latent) in _latents(whole).items())


def test_an_end_while_a_shard_is_reopened_loses_nothing(
    videos: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    EncodeJob([videos], out, _settings(weights)).run("cpu")
    before = _latents(out)
    _write(videos / "clip1.mp4", 7)
    plain = Path.unlink

    def end(path: Path, missing_ok: bool = False) -> None:
        if path.name == "shard-00000.json":
            raise KeyboardInterrupt
        plain(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", end)
        with pytest.raises(KeyboardInterrupt):
            EncodeJob([videos], out, _settings(weights))
    assert {name: found[1] for name, found in _latents(out).items()} == {n: found[1] for n, found in before.items()}
    EncodeJob([videos], out, _settings(weights)).run("cpu")
    assert _latents(out)["clip1.mp4"][1] == 7
    assert set(_latents(out)) == set(before)


def test_a_second_job_is_kept_out(videos: Path, weights: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = EncodeJob([videos], out, _settings(weights))
    words = ["encode-dataset", str(videos), "-o", str(out), "-w", weights, "--clips-per-shard", "3"]
    with job.lock():
        result = CliRunner(env={"COLUMNS": "200"}).invoke(commands.app, words)
        assert result.exit_code == 2
        assert f"Another job is at work in {out} (process {os.getpid()} on " in result.stderr
        with pytest.raises(EncodeJobError, match="wait for its end, or choose another folder"):
            job.run("cpu")
    assert job.run("cpu").encoded == 4
    script = f"""
        import time
        from pathlib import Path
        from vae_core.dataset.lock import locked
        with locked(Path({str(out)!r})):
            print("held", flush=True)
            time.sleep(300)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(vae_core.__file__).parents[1])}
    program = [sys.executable, "-c", textwrap.dedent(script)]
    first = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(EncodeJobError, match=rf"process {first.pid} on"):
        EncodeJob([videos], out, _settings(weights))
    first.kill()
    first.communicate()
    EncodeJob([videos], out, _settings(weights))  # the system let go of it


def test_a_cluster_that_is_not_there_is_said_soon() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(EncodeJobError, match=rf"Nothing answers at {address} .*ray start --head"):
            _check_address(address)
    assert time.monotonic() - start < 30
    _check_address("auto")


def test_a_tar_of_latents_is_read_without_this_package(videos: Path, weights: str, tmp_path: Path) -> None:
    EncodeJob([videos / "clip1.mp4"], tmp_path / "out", EncodeSettings(weights=weights, form="webdataset")).run("cpu")
    with tarfile.open(tmp_path / "out" / "shard-00000.tar") as shard:
        assert shard.getnames() == ["00000000.safetensors", "00000000.json"]
        latent = safetensors.torch.load(shard.extractfile("00000000.safetensors").read())["latent"]
        assert latent.shape == (4, 2, 4, 6)
        assert json.load(shard.extractfile("00000000.json"))["frames"] == 4
