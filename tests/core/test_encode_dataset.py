"""Encoding a data set: every clip once, whatever ends the job; counts that add up; broken files reported."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import vae_core
from vae_core.cli import app as commands
from vae_core.dataset import Counts, EncodeJob, EncodeJobError, EncodeSettings, encoding, read_latents
from vae_core.dataset import job as job_module
from vae_core.media.video import read_frames
from vae_core.training.data import TrainingDataError

from .clips import as_pictures, moving_picture, write_av


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of 3 to 7 frames, an image, and a file that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(5):
        write_av(folder / f"clip{i}.mp4", as_pictures(moving_picture(3 + i, 32, 48 if i < 4 else 40)))
    Image.fromarray(as_pictures(moving_picture(1, 40, 48))[0]).save(folder / "image.png")
    (folder / "broken.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, small_vae: Callable[..., vae_core.VideoVAE]) -> str:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    vae_core.save(small_vae("cv-vae", torch.float32), path)
    return str(path)


def _settings(weights: str, **changes: object) -> EncodeSettings:
    return EncodeSettings(**({"weights": weights, "clips_per_shard": 3} | changes))  # type: ignore[arg-type]


def _read(folder: Path) -> dict[str, torch.Tensor]:
    return {info.key.split("/", 1)[1]: latent for info, latent in read_latents(folder)}


def _adds_up(folder: Path) -> dict:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["clips"] == manifest["encoded"] + manifest["broken"] + manifest["pending"]
    assert sum(shard["clips"] for shard in manifest["shards"]) <= manifest["encoded"]
    return manifest


@pytest.fixture
def encoded_clips(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of all clips that went through a VAE in this process."""
    seen: list[str] = []
    plain = encoding.encode_clip

    def counted(vae, file, key, *rest):
        seen.append(key)
        return plain(vae, file, key, *rest)

    monkeypatch.setattr(encoding, "encode_clip", counted)
    return seen


@pytest.mark.parametrize("form", ["safetensors", "webdataset"])
def test_every_clip_is_encoded_as_by_hand(form: str, videos: Path, weights: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    counts = EncodeJob([videos], out, _settings(weights, form=form)).run("cpu")
    assert counts == Counts(clips=7, encoded=6, broken=1, frames=3 + 4 + 5 + 6 + 7 + 1, now=6)
    found = {info.key: (info, latent) for info, latent in read_latents(out)}
    vae = vae_core.load(weights)
    for path in videos.iterdir():
        if path.name == "broken.mp4":
            continue
        info, latent = found[f"{videos.name}/{path.name}"]
        frames = torch.cat(list(read_frames(path)), dim=2)
        assert torch.equal(latent, vae.encode(frames, pad=True)[0])
        assert (info.frames, info.height, info.width, info.fps) == (frames.shape[2], *frames.shape[3:], "25")
    manifest = _adds_up(out)
    assert (manifest["encoded"], manifest["broken"], manifest["pending"]) == (6, 1, 0)
    assert [shard["clips"] + shard["broken"] for shard in manifest["shards"]] == [3, 3, 1]
    assert "cannot be read" in manifest["errors"][f"{videos.name}/broken.mp4"]
    assert {path.suffix for path in out.glob("shard-*")} == {
        ".json",
        ".tar" if form == "webdataset" else ".safetensors",
    }
    assert not list((out / ".parts").rglob("*.*"))


def test_a_stopped_job_goes_on_and_does_nothing_twice(
    videos: Path, weights: str, tmp_path: Path, encoded_clips: list[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    EncodeJob([videos], whole, _settings(weights)).run("cpu")
    encoded_clips.clear()

    def stop_after(number: int) -> Callable[[Counts], None]:
        def progress(counts: Counts) -> None:
            if counts.clips - counts.pending >= number:
                raise KeyboardInterrupt

        return progress

    for number in (1, 2, 5):
        with pytest.raises(KeyboardInterrupt):
            EncodeJob([videos], out, _settings(weights)).run("cpu", stop_after(number))
        assert _adds_up(out)["pending"] == 7 - number
    counts = EncodeJob([videos], out, _settings(weights)).run("cpu")
    assert (counts.encoded, counts.broken, counts.pending, counts.now) == (6, 1, 0, 2)
    assert sorted(encoded_clips) == sorted(set(encoded_clips))
    assert len(encoded_clips) == 7  # the broken one was tried once
    for path in whole.glob("shard-*"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    again = EncodeJob([videos], out, _settings(weights)).run("cpu")
    assert (again.encoded, again.now, len(encoded_clips)) == (6, 0, 7)


@pytest.mark.parametrize("at", ["shard", "record", "clean"])
def test_an_end_while_a_shard_is_made_loses_nothing(
    at: str, videos: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded_clips: list[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    EncodeJob([videos], whole, _settings(weights)).run("cpu")
    encoded_clips.clear()

    def end(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if at == "shard":
            patch.setattr(job_module, "write_shard", end)
        elif at == "clean":
            patch.setattr(job_module.shutil, "rmtree", end)
        else:
            patch.setattr(job_module, "_summary", end)
        with pytest.raises(KeyboardInterrupt):
            EncodeJob([videos], out, _settings(weights)).run("cpu")
    EncodeJob([videos], out, _settings(weights)).run("cpu")
    assert len(encoded_clips) == 7
    assert all(torch.equal(latent, _read(out)[key]) for key, latent in _read(whole).items())


def test_new_clips_are_added_and_lost_ones_reported(videos: Path, weights: str, tmp_path: Path) -> None:
    place, out = tmp_path / "set", tmp_path / "out"
    place.mkdir()
    for name in ("clip0.mp4", "clip1.mp4"):
        (place / name).write_bytes((videos / name).read_bytes())
    EncodeJob([place], out, _settings(weights)).run("cpu")
    first = (out / "shard-00000.safetensors").read_bytes()
    (place / "a_new_one.mp4").write_bytes((videos / "clip2.mp4").read_bytes())
    moved = tmp_path / "elsewhere" / "set"
    moved.parent.mkdir()
    place.rename(moved)  # the folder may move
    counts = EncodeJob([moved], out, _settings(weights)).run("cpu")
    assert (counts.clips, counts.encoded, counts.now) == (3, 3, 1)
    assert (out / "shard-00000.safetensors").read_bytes() == first
    (moved / "b.mp4").write_bytes((videos / "clip3.mp4").read_bytes())
    job = EncodeJob([moved], out, _settings(weights))
    (moved / "b.mp4").unlink()
    assert job.run("cpu").broken == 1
    assert "cannot be read" in job.errors()["set/b.mp4"]


def test_frames_stride_size_precision_and_draws(videos: Path, weights: str, tmp_path: Path) -> None:
    settings = _settings(weights, frames=2, stride=2, size=(24, 32), stored=torch.float16, seed=5)
    runs = []
    for name in ("a", "b"):
        EncodeJob([videos], tmp_path / name, settings).run("cpu")
        runs.append({info.key.split("/")[1]: (info, latent) for info, latent in read_latents(tmp_path / name)})
    assert {latent.dtype for _, latent in runs[0].values()} == {torch.float16}
    assert {tuple(latent.shape) for _, latent in runs[0].values()} == {(4, 2, 3, 4), (4, 1, 3, 4)}
    assert (runs[0]["clip0.mp4"][0].frames, runs[0]["clip0.mp4"][0].fps) == (2, "25/2")
    assert all(torch.equal(latent, runs[1][name][1]) for name, (_, latent) in runs[0].items())
    EncodeJob([videos], tmp_path / "mean", _settings(weights, frames=2, stride=2, size=(24, 32))).run("cpu")
    assert not torch.allclose(runs[0]["clip1.mp4"][1].float(), _read(tmp_path / "mean")["clip1.mp4"], atol=1e-2)
    job = EncodeJob([videos], tmp_path / "c", _settings(weights, frames=5, size=(32, 48)))
    assert job.run("cpu").encoded == 3  # 5 and 6 frames, and the image; 40 columns are too few
    reasons = {name.split("/")[1]: reason for name, reason in job.errors().items()}
    assert "has 3 frames; 5 at stride 1 need 5" in reasons["clip0.mp4"]
    assert "is 40x32, too small for 48x32" in reasons["clip4.mp4"]


def test_clips_come_back_in_order_and_each_is_drawn_by_its_own_seed(videos: Path, weights: str, tmp_path: Path) -> None:
    """Two files with the same content get different draws, and each is that of the seed and the clip's number."""
    twins = tmp_path / "twins"
    twins.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4"):
        (twins / name).write_bytes((videos / "clip2.mp4").read_bytes())
    EncodeJob([twins], tmp_path / "out", _settings(weights, seed=5)).run("cpu")
    found = list(read_latents(tmp_path / "out"))
    assert [info.key for info, _ in found] == [f"twins/{name}.mp4" for name in "abcd"]
    assert len(list((tmp_path / "out").glob("shard-*.json"))) > 1
    vae = vae_core.load(weights)
    frames = torch.cat(list(read_frames(videos / "clip2.mp4")), dim=2)
    for info, latent in found:
        generator = torch.Generator().manual_seed(5 * 10**8 + int(info.id))
        assert torch.equal(latent, vae.encode(frames, pad=True, sample=True, generator=generator)[0])
    assert not any(torch.equal(found[0][1], latent) for _, latent in found[1:])


def test_other_settings_and_other_folders_are_refused(videos: Path, weights: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    EncodeJob([videos], out, _settings(weights))
    with pytest.raises(EncodeJobError, match=r"other settings: frames is 5 and was None\. Use those again"):
        EncodeJob([videos], out, _settings(weights, frames=5))
    with pytest.raises(EncodeJobError, match="other settings: weights is sha256"):
        EncodeJob([videos], out, _settings("demo-cv-vae"))
    with pytest.raises(EncodeJobError, match="holds other things and no job"):
        EncodeJob([videos], videos, _settings(weights))
    with pytest.raises(EncodeJobError, match="no such weights; give a file"):
        EncodeJob([videos], tmp_path / "new", _settings("absent"))
    with pytest.raises(TrainingDataError, match="no such file or folder"):
        EncodeJob([tmp_path / "absent"], tmp_path / "new", _settings(weights))
    with pytest.raises(EncodeJobError, match="numbers are 1 or more"):
        _settings(weights, stride=0)


def _command(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(commands.app, ["encode-dataset", *map(str, words)])


def test_the_command_says_what_it_did(videos: Path, weights: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _command(videos, "-o", out, "-w", weights)
    assert result.exit_code == 3, result.output
    assert "6 of 7 clips encoded, 6 of them in this run; 26 frames; 1 clips left out" in result.stdout
    assert "broken.mp4: cannot be read" in result.stderr
    assert "6 of 7 clips encoded, 0 of them in this run" in _command(videos, "-o", out, "-w", weights).stdout
    assert _command(videos / "clip0.mp4", "-o", tmp_path / "whole", "-w", weights).exit_code == 0
    for words, message in (
        (["-o", out, "-w", weights, "--frames", 3], "other settings"),
        (["-o", tmp_path / "new", "--size", "12"], "--size 12 is no size"),
    ):
        result = _command(videos, *words)
        assert result.exit_code == 2
        assert message in result.stderr


def test_the_command_keeps_within_a_budget(videos: Path, weights: str, tmp_path: Path) -> None:
    clip = videos / "clip0.mp4"
    result = _command(clip, "-o", tmp_path / "none", "-w", weights, "--budget", 0.001)
    assert result.exit_code == 2
    assert "smallest budget in which it can be done exactly is" in result.stderr
    again = _command(clip, "-o", tmp_path / "none", "-w", weights, "--budget", 1)  # no clip was marked as broken
    assert "1 of 1 clips encoded, 1 of them in this run" in again.stdout
    for name, words in (("whole", ()), ("tiles", ("--tile", 1))):
        assert _command(clip, "-o", tmp_path / name, "-w", weights, *words).exit_code == 0
    (_, whole), (_, tiled) = (next(read_latents(tmp_path / name)) for name in ("whole", "tiles"))
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)
    assert _command(clip, "-o", tmp_path / "whole", "-w", weights, "--tiling", "blended").exit_code == 2


# ---------------------------------------------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips, each some tenths of a second of work, and a broken one."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(12):
        write_av(folder / f"clip{i:02d}.mp4", as_pictures(moving_picture(17, 64, 64) * (1 - i / 20)))
    (folder / "clip06x.mp4").write_text("no video")
    return folder


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the command in a process of its own, which ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "vae_core", "encode-dataset", *map(str, words)],
            cwd=Path(vae_core.__file__).parent.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            for pid in (*_descendants(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _finished(out: Path) -> list[str]:
    """Clips that are finished and not yet in a shard."""
    return [path.name for path in (out / ".parts").rglob("*.safetensors") if path.name[0] != "."]


def _wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not condition():
        if process.poll() is not None:
            pytest.fail(process.communicate()[0])
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_process_loses_nothing(many: Path, tmp_path: Path, start: Start) -> None:
    out = tmp_path / "out"
    process = start(many, "-o", out)
    _wait_for(lambda: len(_finished(out)) >= 2, process)
    process.kill()
    process.communicate()
    before = len(_finished(out))
    assert 2 <= before < 12
    result = _command(many, "-o", out)
    assert result.exit_code == 3, result.output
    assert f"12 of 13 clips encoded, {12 - before} of them in this run; 204 frames; 1 clips left out" in result.stdout
    manifest = _adds_up(out)
    assert (manifest["encoded"], manifest["broken"], manifest["pending"]) == (12, 1, 0)
    assert len(_read(out)) == 12


def _descendants(pid: int) -> dict[int, str]:
    """Processes started by `pid`, and theirs, with their command lines."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents[int(entry.name)] = parent, (entry / "cmdline").read_text().replace("\0", " ")
            except (OSError, IndexError):
                continue
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        above = waiting.pop()
        children = {child: text for child, (parent, text) in parents.items() if parent == above}
        found |= children
        waiting += children
    return found


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_a_killed_ray_worker_or_driver_loses_nothing(victim: str, many: Path, tmp_path: Path, start: Start) -> None:
    out = tmp_path / "out"
    words = (many, "-o", out, "--ray", "local", "--workers", 1)
    process = start(*words)
    _wait_for(lambda: len(_finished(out)) >= 2, process)
    if victim == "driver":
        process.kill()
        process.communicate()
        process = start(*words)
    else:
        workers = [pid for pid, text in _descendants(process.pid).items() if "_Encoder" in text]
        assert workers
        os.kill(workers[0], signal.SIGKILL)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 3, text
    assert "12 of 13 clips encoded" in text
    manifest = _adds_up(out)
    assert (manifest["encoded"], manifest["broken"], manifest["pending"], manifest["frames"]) == (12, 1, 0, 204)
    alone = tmp_path / "alone"
    _command(many, "-o", alone)
    assert all(torch.equal(latent, _read(out)[key]) for key, latent in _read(alone).items())


def test_without_ray_the_way_to_get_it_is_said(
    videos: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = _command(videos, "-o", tmp_path / "out", "-w", weights, "--ray", "local")
    assert result.exit_code == 2
    assert 'pip install -e ".[distributed]"' in result.stderr
