"""A set cut evenly over motion: the scores, the choice, the clips, the manifest."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner, Result

from vae_core.cli import app as commands
from vae_core.errors import VideoError
from vae_core.evaluation.build_set import Scored, build_set, check_set, digest, evenly, score
from vae_core.evaluation.protocols import find_videos
from vae_core.media.video import probe, read_frames

from .clips import as_pictures, write_av

pytest.importorskip("cv2")


def sliding(frames: int, speed: int, height: int = 96, width: int = 128) -> Tensor:
    """A picture with detail that slides `speed` pixels a frame to the left: (1, 3, t, h, w)."""
    small = torch.randn(
        1, 3, height // 8, (width + speed * frames) // 8 + 1, generator=torch.Generator().manual_seed(1)
    )
    picture = (F.interpolate(small, scale_factor=8, mode="bicubic").clamp(-2, 2) / 2.2)[..., :height, :]
    return torch.stack([picture[..., speed * i : speed * i + width] for i in range(frames)], 2)


def video(path: Path, frames: int = 12, speed: int = 0, height: int = 96, width: int = 128) -> Path:
    return write_av(path, as_pictures(sliding(frames, speed, height, width)), options={"crf": "8"})


def run(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(commands.app, ["build-set", *(str(word) for word in words)])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    return tmp_path


@pytest.mark.parametrize("speed", [0, 1, 2, 3])
def test_the_score_is_the_speed(here: Path, speed: int) -> None:
    path = video(here / "clip.mp4", frames=14, speed=speed)
    (found,) = score("clip", path, probe(path), frames=10, per_video=1)
    assert found.motion == pytest.approx(speed / 96 * 25, rel=0.15, abs=0.02)  # 25 frames a second, 96 lines


def test_several_clips_of_one_video_do_not_overlap(here: Path) -> None:
    still, moving = sliding(14, 0), sliding(14, 3)
    path = write_av(here / "clip.mp4", as_pictures(torch.cat([still, moving], 2)))
    found = score("clip", path, probe(path), frames=10, per_video=2)
    assert [one.start for one in found] == [0, 18]
    assert found[0].motion < 0.1 < found[1].motion
    assert [one.start for one in score("clip", path, probe(path), frames=12, per_video=9)] == [0, 16]
    assert [one.start for one in score("clip", path, probe(path), frames=7, per_video=9)] == [0, 7, 14, 21]


def test_the_choice_is_even_over_motion() -> None:
    crowded = [Scored(name=f"{i:03d}", start=0, motion=0.01 * i / 90) for i in range(90)]
    spread = [Scored(name=f"x{i}", start=0, motion=i / 10) for i in range(11)]
    chosen = evenly(crowded + spread, 11)
    assert [one.motion for one in chosen] == pytest.approx([i / 10 for i in range(11)], abs=0.011)
    assert evenly(spread, 99) == spread
    assert len({id(one) for one in evenly(crowded, 40)}) == 40
    assert len(evenly(spread, 1)) == 1


def test_the_set_and_its_manifest(here: Path) -> None:
    for speed in range(4):
        video(here / "videos" / f"speed {speed}.mp4", frames=12, speed=speed, height=120, width=200)
    video(here / "videos" / "small.mp4", height=64, width=64)
    (here / "videos" / "broken.mp4").write_bytes(b"no video" * 100)
    video(here / "videos" / "short.mp4", frames=4, height=120, width=200)
    result = run("videos", "-o", "set", "-n", 3, "--size", "144x96", "--frames", 9)
    assert result.exit_code == 3, result.output
    assert "1 videos are smaller than 144x96 and were passed over: small.mp4" in result.stderr
    assert result.stderr.strip().endswith("Error: 2 of 7 videos were left out.")
    document = json.loads((here / "set" / "manifest.json").read_text())
    clips = document["clips"]
    assert [clip["source"] for clip in clips][::2] == ["speed 0.mp4", "speed 3.mp4"]
    assert [clip["motion"] for clip in clips] == sorted(clip["motion"] for clip in clips)
    assert set(document["left_out"]) == {"broken.mp4", "short.mp4"}
    for clip in clips:
        path = here / "set" / clip["file"]
        assert digest(path) == clip["sha256"]
        assert digest(here / "videos" / clip["source"]) == clip["source_sha256"]
        assert torch.cat(list(read_frames(path)), 2).shape == (1, 3, 9, 96, 144)
    assert len((here / "set" / "manifest.csv").read_text().splitlines()) == 4
    assert check_set(here / "set") == []
    (here / "set" / clips[1]["file"]).write_bytes(b"changed")
    assert check_set(here / "set") == [clips[1]["file"]]
    assert "manifest.json exists already; add --overwrite" in run("videos", "-o", "set").stderr
    assert list(find_videos([here / "set"])) == [clip["file"] for clip in clips]


def test_a_clip_is_the_centre_of_its_source(here: Path) -> None:
    path = video(here / "videos" / "a.mp4", frames=6, speed=2, height=96, width=160)
    built = build_set({"a.mp4": path}, here / "set", count=1, size=(96, 96), frames=4, crf=0)
    (cut,) = built.cuts
    assert cut.start == 0
    found = torch.cat(list(read_frames(here / "set" / cut.file)), 2)
    wanted = torch.cat(list(read_frames(path)), 2)[:, :, :4, :, 32:128]
    error, beside = ((found - wanted.roll(shift, -1)).abs().mean() for shift in (0, 1))
    assert error < 0.04  # colours are stored at half the size, twice
    assert error < 0.5 * beside


def test_it_needs_opencv_and_no_matplotlib(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert "nowhere: no such file or folder" in run("nowhere").stderr
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert "This command needs opencv-python-headless, which is not installed" in run("nowhere").stderr


def test_nothing_to_cut_says_why(here: Path) -> None:
    path = video(here / "videos" / "a.mp4", height=64, width=64)
    with pytest.raises(VideoError, match=r"None of 1 videos can be cut to 1920x1080 with 97 frames: 1 are too small"):
        build_set({"a.mp4": path}, here / "set", count=1)
    assert not (here / "set").exists()
