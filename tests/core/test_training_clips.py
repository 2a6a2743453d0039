"""Training data: the same whatever the workers and the resume, shared between ranks, and robust to broken files."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vae_core.media.video import read_frames
from vae_core.training.clip_decoding import read_picked
from vae_core.training.clip_files import ClipFile, list_clips
from vae_core.training.clips import Batch, BatchKind, ClipBatches
from vae_core.training.data import TrainingDataError

from .clips import write_av

VIDEO = BatchKind(kind="video", batch=2, size=(16, 24), frames=5, stride=(1, 2), weight=2)
IMAGE = BatchKind(kind="image", batch=2, size=(16, 16))


def _grey(value: int, height: int = 32, width: int = 48) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def _numbered_video(path: Path, frames: int = 14) -> Path:
    """Lossless; frame i is the grey 10 i."""
    pictures = [_grey(10 * i) for i in range(frames)]
    return write_av(path, pictures, codec="libx264rgb", pix_fmt="rgb24", options={"crf": "0", "g": "4", "bf": "2"})


def _greys(video: Tensor) -> list[int]:
    """The numbers of the frames of one clip (3, t, h, w)."""
    return [round(float(value) / 10) for value in (video.mean((0, 2, 3)) + 1) * 127.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos and three images, all telling apart by their pixels."""
    place = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    for i in range(3):
        pictures = [random.integers(0, 255, (32, 48, 3), np.uint8) for _ in range(12)]
        write_av(place / f"video{i}.mp4", pictures)
        Image.fromarray(pictures[0]).save(place / f"image{i}.png")
    return place


def _same(a: Batch, b: Batch) -> bool:
    return (a.kind, a.index) == (b.kind, b.index) and torch.equal(a.video, b.video)


def test_batches_have_the_shapes_and_shares_asked_for(folder: Path) -> None:
    with ClipBatches([folder], [VIDEO, IMAGE], seed=1) as batches:
        some = list(islice(batches, 24))
    assert [batch.index for batch in some] == list(range(24))
    for batch in some:
        assert batch.video.shape == ((2, 3, 5, 16, 24) if batch.kind == "video" else (2, 3, 1, 16, 16))
        assert batch.video.dtype == torch.float32
        assert -1 <= float(batch.video.min()) < -0.2 < 0.2 < float(batch.video.max()) <= 1
    assert 15 <= sum(batch.kind == "video" for batch in some) <= 17  # two of three
    assert 7 <= sum(batch.kind == "video" for batch in some[::2]) <= 9  # of the even ones, too
    assert not batches.broken


def test_workers_and_resume_change_nothing(folder: Path) -> None:
    plain = list(islice(ClipBatches([folder], [VIDEO, IMAGE], seed=3), 7))
    with ClipBatches([folder], [VIDEO, IMAGE], seed=3, workers=2) as batches:
        assert all(_same(a, b) for a, b in zip(plain, islice(batches, 4), strict=False))
        state = json.loads(json.dumps(batches.state_dict()))  # plain enough for any file
    again = ClipBatches([folder], [VIDEO, IMAGE], seed=3)
    again.load_state_dict(state)
    assert all(_same(a, b) for a, b in zip(plain[4:], islice(again, 3), strict=True))
    other = list(islice(ClipBatches([folder], [VIDEO, IMAGE], seed=4), 7))
    assert not all(_same(a, b) for a, b in zip(plain, other, strict=True))


def test_other_data_is_said_and_gone_on_with(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """More clips, another batch, another mixture: a run goes on with what there is."""
    before = ClipBatches([folder], [VIDEO], seed=3)
    list(islice(before, 2))
    state = before.state_dict()
    _numbered_video(tmp_path / "a.mp4")
    changed = (
        ClipBatches([folder], [VIDEO], seed=4),
        ClipBatches([folder], [VIDEO, IMAGE], seed=3),
        ClipBatches([folder], [replace(VIDEO, batch=3)], seed=3),
        ClipBatches([folder, tmp_path], [VIDEO], seed=3),
    )
    for batches in changed:
        caplog.clear()
        batches.load_state_dict(state)
        assert "not what it was: the files, the kinds of batches, the seed or the batch" in caplog.text
        assert next(batches).index == 2
    caplog.clear()
    ClipBatches([folder], [VIDEO], seed=3).load_state_dict(state)
    assert not caplog.text


def test_a_stray_picture_is_one_file_among_others(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(8):
        (tmp_path / f"{i}.mp4").write_bytes((folder / "video0.mp4").read_bytes())
    Image.fromarray(np.full((32, 48, 3), 255, np.uint8)).save(tmp_path / "stray.png")
    kind = BatchKind(kind="image", batch=1, size=(16, 16))
    batches = ClipBatches([tmp_path], [kind], seed=1)
    assert "Image batches are of 1 image and of single frames of 8 videos, each file as often as another" in caplog.text
    white = [bool((batch.video == 1).all()) for batch in islice(batches, 18)]
    assert sum(white) == 2  # once in each of the two rounds


def test_ranks_together_make_the_batches_of_one_process(folder: Path) -> None:
    double = [BatchKind(kind="video", batch=4, size=(16, 24), frames=5, stride=(1, 2), weight=2),
              BatchKind(kind="image", batch=4, size=(16, 16))]  # fmt: skip
    whole = ClipBatches([folder], double, seed=5)
    ranks = [ClipBatches([folder], [VIDEO, IMAGE], seed=5, rank=rank, world=2) for rank in range(2)]
    for _ in range(4):
        one, *parts = next(whole), *map(next, ranks)
        assert {part.kind for part in parts} == {one.kind}
        assert torch.equal(one.video, torch.cat([part.video for part in parts]))
    state = ranks[0].state_dict()
    whole.load_state_dict(state)  # one process may go on where two stopped
    assert _same(next(whole), next(whole_again(folder, double, 4)))


def whole_again(folder: Path, kinds: list[BatchKind], skip: int) -> ClipBatches:
    """A new source after `skip` batches."""
    batches = ClipBatches([folder], kinds, seed=5)
    for _ in range(skip):
        next(batches)
    return batches


def test_an_epoch_takes_every_file_once(tmp_path: Path) -> None:
    for value in range(8):
        Image.fromarray(_grey(10 * value)).save(tmp_path / f"{value}.png")
    batches = ClipBatches([tmp_path], [BatchKind(kind="image", batch=4, size=(16, 16))], seed=0)
    epochs = [[n for _ in range(2) for clip in next(batches).video for n in _greys(clip)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_frames_are_those_of_the_stride_and_the_crop_moves(tmp_path: Path) -> None:
    _numbered_video(tmp_path / "a.mp4")
    kind = BatchKind(kind="video", batch=8, size=(16, 16), frames=5, stride=(1, 3), short_side=24)
    clips = [clip for batch in islice(ClipBatches([tmp_path], [kind], seed=0), 4) for clip in batch.video]
    seen = [_greys(clip) for clip in clips]
    strides = [{b - a for a, b in pairwise(frames)} for frames in seen]
    assert all(len(steps) == 1 for steps in strides)
    assert {step for steps in strides for step in steps} == {1, 2, 3}
    assert {frames[0] for frames in seen} >= {0, 1, 2, 3, 4, 5}
    slope = np.tile(np.arange(48, dtype=np.uint8)[None, :, None] * 5, (32, 1, 3))
    Image.fromarray(slope).save(tmp_path / "slope.png")
    lefts = {round(float(image.mean()), 2)
             for batch in islice(ClipBatches([tmp_path], [IMAGE], seed=0), 8) for image in batch.video}  # fmt: skip
    assert len(lefts) > 4


def test_picked_frames_are_those_of_the_reader(folder: Path) -> None:
    """Seeking finds the very frames that reading from the beginning gives."""
    path = folder / "video0.mp4"
    everything = torch.cat(list(read_frames(path)), dim=2)[0]
    clip = ClipFile(path=path, key="", kind="video")
    picked = torch.stack(list(read_picked(clip, lambda count: range(1, count, 3))), dim=1)
    assert torch.equal(picked, everything[:, 1::3])
    for index in (0, 7, 11):
        assert torch.equal(next(read_picked(clip, lambda _, index=index: [index])), everything[:, index])


def test_a_csv_gives_weights_and_parts(tmp_path: Path) -> None:
    _numbered_video(tmp_path / "a.mp4", frames=20)
    table = tmp_path / "list.csv"
    table.write_text("path,caption,start,end,weight\na.mp4,x,0.2,0.4,\na.mp4,y,0.6,,3\na.mp4,z,,,0\n")
    kind = BatchKind(kind="video", batch=8, size=(16, 16), frames=5)
    clips = [clip for batch in islice(ClipBatches([table], [kind], seed=0), 6) for clip in batch.video]
    firsts = [_greys(clip)[0] for clip in clips]  # at 25 frames/s: frames 5 to 9, or 15 to 19
    assert set(firsts) == {5, 15}
    assert 28 <= firsts.count(15) <= 44  # three of four


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\na.mp4\n", "names the columns file; one of them must be path"),
        ("path,start\na.mp4,soon\n", "line 2: start is 'soon'; give a number of 0 or more"),
        ("path,weight\na.mp4,-1\n", "weight is '-1'"),
        ("path,start,end\na.mp4,3,2\n", "ends at 2 s and starts at 3 s"),
        ("path,start\n,3\n", "line 2: the path is empty"),
        ("path\n", "no image and no video in"),
    ],
)
def test_a_wrong_csv_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(TrainingDataError, match=message):
        list_clips([tmp_path / "list.csv"])


def test_tar_shards_hold_the_same_clips(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard-0000.tar", "w") as shard:
        for path in sorted(folder.iterdir()):
            shard.add(path, path.name)
        text = tarfile.TarInfo("video0.json")
        text.size = 2
        shard.addfile(text, io.BytesIO(b"{}"))
    listed = list_clips([tmp_path])
    assert [clip.member for clip in listed.clips] == [path.name for path in sorted(folder.iterdir())]
    from_tar = ClipBatches([tmp_path], [VIDEO, IMAGE], seed=1, workers=1)
    with from_tar:
        for a, b in zip(islice(from_tar, 3), ClipBatches([folder], [VIDEO, IMAGE], seed=1), strict=False):
            assert _same(a, b)


def test_broken_files_are_counted_and_skipped_by_any_number_of_workers(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video at all")
    whole = (folder / "video0.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    _numbered_video(tmp_path / "short.mp4", frames=3)
    write_av(tmp_path / "small.mp4", [_grey(0, 16, 16)] * 9)
    (tmp_path / "good.mp4").write_bytes(whole)
    with tarfile.open(tmp_path / "cut.tar", "w") as shard:
        shard.add(folder / "video1.mp4", "inside.mp4")
        shard.add(folder / "video2.mp4", "lost.mp4")
    shard = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(shard[: len(shard) // 2])
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as packed:
        packed.add(folder / "video1.mp4", "inside.mp4")
    (tmp_path / "packed.tar.gz").rename(tmp_path / "packed.tar")
    made = []
    for workers in (0, 2):
        with ClipBatches([tmp_path], [VIDEO], seed=0, workers=workers) as batches:
            made.append(list(islice(batches, 8)))
            reasons = {Path(name.split(" (")[0]).name: reason for name, reason in batches.broken.items()}
    assert all(_same(a, b) for a, b in zip(*made, strict=True))
    assert set(reasons) == {"text.mp4", "cut.mp4", "short.mp4", "small.mp4", "cut.tar", "packed.tar"}
    assert "has 3 frames; 5 at stride 1 need 5" in reasons["short.mp4"]
    assert "is 16x16, too small for crops of 24x16" in reasons["small.mp4"]
    assert "cannot be read" in reasons["text.mp4"]
    assert "is not a whole, uncompressed tar file" in reasons["packed.tar"]


@pytest.mark.parametrize("workers", [0, 1])
def test_only_when_everything_is_broken_it_ends(workers: int, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.mp4").write_text("no video")
    with (
        ClipBatches([tmp_path], [VIDEO], workers=workers) as batches,
        pytest.raises(
            TrainingDataError, match=r"^None of the 3 files for batches of kind video can be used\. The last"
        ),
    ):
        next(batches)
    assert len(batches.broken) == 3


def test_sources_without_anything_usable_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="no such file or folder"):
        list_clips([tmp_path / "absent"])
    with pytest.raises(TrainingDataError, match=r"no image and no video in .*known are \.png"):
        list_clips([tmp_path])
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(TrainingDataError, match=r"is no image, video, \.csv list or \.tar shard"):
        list_clips([tmp_path / "notes.txt"])
    with pytest.raises(TrainingDataError, match="batches of kind video to make and no video in the sources"):
        ClipBatches([folder / "image0.png"], [VIDEO])
    assert next(ClipBatches([folder / "video0.mp4"], [IMAGE])).video.shape == (2, 3, 1, 16, 16)  # frames of videos


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 4}, "has 1 \\+ 4N frames"),
        ({"kind": "image", "frames": 5}, "got frames = 5 for kind image"),
        ({"size": (20, 16)}, "multiples of 8; got size \\(20, 16\\)"),
        ({"batch": 0}, "greater than or equal to 1"),
        ({"weight": 0.0}, "greater than 0"),
        ({"stride": (2, 1)}, "from a smallest"),
        ({"short_side": 8}, "short side of 8 does not hold crops of 16x16"),
        ({"kind": "film"}, "should be 'image' or 'video'"),
    ],
)
def test_wrong_kinds_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchKind(**({"kind": "video", "batch": 1, "size": (16, 16), "frames": 5} | wrong))
    with pytest.raises(ValueError, match="rank 2 of 2"):
        ClipBatches(["x"], [IMAGE], rank=2, world=2)


def test_the_rate_is_the_files_own(tmp_path: Path) -> None:
    from vae_core.training.clip_decoding import clip_rate

    write_av(tmp_path / "a.mp4", [_grey(0)] * 3, rate=Fraction(30000, 1001))
    assert clip_rate(ClipFile(path=tmp_path / "a.mp4", key="", kind="video")) == Fraction(30000, 1001)
