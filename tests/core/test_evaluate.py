"""Evaluation of small VAEs over small videos: the numbers, the files, resuming, and videos that are broken."""

import csv
import math
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vae_core
from vae_core.evaluation import PROTOCOLS, ClipMeters, Networks, Protocol, choose, evaluate
from vae_core.evaluation.candidates import Choice, Shrink, borders_of
from vae_core.evaluation.measure import measure
from vae_core.evaluation.networks import find_networks
from vae_core.evaluation.protocols import cover, find_videos
from vae_core.evaluation.records import LINES, pack, unpack
from vae_core.evaluation.runner import tiles_for
from vae_core.evaluation.summary import rows
from vae_core.metrics import VideoFeatures, frame_quality, phase_means

from .clips import moving_picture
from .evaluating import read_all, report, run, video

pytest.importorskip("cv2")
pytest.importorskip("matplotlib")


class _Page(HTMLParser):
    """Tags that a page opens, and what they point to."""

    VOID = ("meta", "img", "br", "link", "input", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.addresses += [found[name] or "" for name in ("src", "href", "poster", "xlink:href") if name in found]
        self.ids += [found["id"] or ""] if "id" in found else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


# ------------------------------------------------------------------------------------------------ the whole command


def test_five_videos_of_which_one_is_corrupt(here: Path, weights: dict[str, Path]) -> None:
    for index in range(4):
        video(here / "videos" / f"{index}.mp4", frames=6 + index)
    whole = video(here / "videos" / "damaged.mp4", frames=30).read_bytes()
    (here / "videos" / "damaged.mp4").write_bytes(whole[: len(whole) // 2])
    words = ("videos", "--vae", weights["cv-vae"], "--vae", weights["iv-vae"], "-o", "report")
    result = run(*words)
    assert result.exit_code == 3, result.output
    assert "Left out: videos/damaged.mp4: " in result.stderr
    assert result.stderr.strip().endswith("Error: 1 of 5 videos were left out.")
    found = report(here / "report")
    assert list(found["left_out"]) == ["damaged.mp4"]
    names = ["small-cv-vae", "small-iv-vae", "shrink-8x"]
    assert [(row["name"], row["videos"]) for row in found["vaes"]] == [(name, 4) for name in names]
    assert [row["frames"] for row in found["videos"] if row["vae"] == "small-cv-vae"] == [6, 7, 8, 9]
    with (here / "report" / "videos.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    with (here / "report" / "summary.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["vae"] for row in table] == names
    assert float(table[0]["psnr"]) == pytest.approx(found["vaes"][0]["figures"]["psnr"], rel=1e-5)
    assert table[0]["lpips"] == table[0]["fvd"] == ""
    page = (here / "report" / "report.html").read_text()
    assert "damaged.mp4" in page
    assert "LPIPS is left out" in page


def test_the_numbers_are_those_of_the_python_api(here: Path, weights: dict[str, Path]) -> None:
    path = video(here / "videos" / "clip.mp4", frames=10, height=40, width=56)
    assert run("videos", "-v", weights["iv-vae"], "-o", "report", "--no-baseline").exit_code == 0
    original, vae = read_all(path), vae_core.load(weights["iv-vae"])
    result = vae.decode(vae.encode(original, pad=True), frames=10, size=(40, 56))
    psnr, ssim = frame_quality(result, original)
    (row,) = report(here / "report")["videos"]
    assert row["per_frame"]["psnr"] == pytest.approx(psnr.tolist(), rel=1e-4)
    assert row["figures"]["ssim"] == pytest.approx(float(ssim.mean()), rel=1e-4)
    assert row["phases"]["psnr"] == pytest.approx(phase_means(psnr.tolist()), rel=1e-4)
    meters = ClipMeters(borders_of((40, 56), 10, tiles_for((40, 56))))
    meters.update(result, original)
    figures = {name: value for name, value in meters.result.figures.items() if not math.isnan(value)}
    known = {name: value for name, value in row["figures"].items() if value is not None}
    assert known == pytest.approx(figures, rel=1e-3, abs=1e-4)
    assert {"psnr", "ssim", "flicker", "warp_error", "ssim_phase_spread"} <= known.keys()


def test_it_keeps_within_a_budget(here: Path, weights: dict[str, Path]) -> None:
    video(here / "videos" / "clip.mp4", frames=5, height=40, width=56)
    words = ("videos", "-v", weights["cv-vae"], "--no-baseline")
    found: list[float] = []
    for name, more in (("whole", ()), ("tiles", ("--tile", 2))):
        assert run(*words, "-o", name, *more).exit_code == 0
        found.append(report(here / name)["vaes"][0]["figures"]["psnr"])
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    result = run(*words, "-o", "none", "--budget", 0.001)
    assert result.exit_code == 2
    assert "smallest budget in which it can be done exactly is" in result.stderr
    result = run("videos", "-v", weights["iv-vae"], "--no-baseline", "-o", "none", "--tiling", "blended")
    assert "--tiling blended: the official tiles are those of CV-VAE, and this is iv-vae." in result.stderr


def test_the_page_stands_alone(here: Path, weights: dict[str, Path]) -> None:
    video(here / "videos" / "a<b>&.mp4", frames=9, height=96, width=128)
    assert run("videos", "-v", weights["cv-vae"], "-o", "report").exit_code == 0
    text = (here / "report" / "report.html").read_text()
    page = _Page(text)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith(("data:image/", "data:video/mp4", "#")) for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    pointed = {address[1:] for address in page.addresses if address.startswith("#")}
    pointed |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert pointed <= set(page.ids)
    assert page.tags.count("video") == 2
    assert page.tags.count("img") == 4  # of both rows: the worst frame and the seam map
    assert page.tags.count("svg") == 6
    assert "a&lt;b&gt;&amp;.mp4" in text
    assert "prefers-color-scheme:dark" in text
    assert "http" not in re.sub(r"https://download\.pytorch\.org\S+|http://www\.w3\.org/[\w/]+", "", text)


# ------------------------------------------------------------------------------------------------ going on


def test_a_run_goes_on_where_it_was(here: Path, weights: dict[str, Path]) -> None:
    for name in "ab":
        video(here / "videos" / f"{name}.mp4", frames=5)
    found, folder = find_videos([here / "videos"]), here / "report"
    asked = Protocol(name="as asked")
    loads: list[str] = []

    def counted(choice: Choice) -> Choice:
        def load() -> object:
            loads.append(choice.name)
            return choice.load()

        return Choice(name=choice.name, identity=choice.identity, load=load)

    small, shrink = counted(choose(str(weights["cv-vae"]))), counted(choose("shrink-8x"))
    only_a = {"a.mp4": found["a.mp4"]}
    first = evaluate(only_a, [small], folder, protocol=asked)
    assert (first.measured, loads) == (1, ["small-cv-vae"])
    again = evaluate(only_a, [small], folder, protocol=asked)
    assert (again.measured, loads) == (0, ["small-cv-vae"])
    assert repr(again.records) == repr(first.records)  # with NaN among them
    with (folder / LINES).open("a") as file:
        file.write('{"video": "b.mp4", "vae": "small-cv-vae", "sta')  # ended in the middle of a line
    more = evaluate(found, [small, shrink], folder, protocol=asked)
    assert more.measured == 3
    assert [(r.video, r.vae) for r in more.records] == [
        (name, vae) for name in ("a.mp4", "b.mp4") for vae in ("small-cv-vae", "shrink-8x")
    ]
    video(here / "videos" / "b.mp4", frames=6)  # another file under the same name
    changed = evaluate(found, [small, shrink], folder, protocol=asked)
    assert changed.measured == 2
    assert {r.count for r in changed.records if r.video == "b.mp4"} == {6}
    assert evaluate(found, [small], folder, protocol=asked, restart=True).measured == 2


def test_other_settings_need_another_folder(here: Path) -> None:
    video(here / "videos" / "a.mp4", frames=5)
    assert run("videos", "-v", "shrink-8x", "--no-baseline", "-o", "report").exit_code == 0
    result = run("videos", "-v", "shrink-8x", "--no-baseline", "-o", "report", "--frames", 3)
    assert result.exit_code == 2
    assert "was measured with meters 1, protocol size of the file, all frames, stride 1" in result.stderr
    assert "Choose another folder with -o, or add --restart" in result.stderr
    words = ("videos", "-v", "shrink-8x", "--no-baseline", "-o", "report", "--frames", 3, "--restart")
    assert run(*words).exit_code == 0
    assert report(here / "report")["videos"][0]["frames"] == 3


# ------------------------------------------------------------------------------------------------ protocols


def test_presets() -> None:
    webvid = PROTOCOLS["webvid"]
    assert (webvid.size, webvid.frames, webvid.stride) == ((256, 256), 33, 3)
    assert {"webvid", "coco", "kinetics-600", "activitynet", "480p", "720p", "1080p"} == set(PROTOCOLS)
    assert all(protocol.note for protocol in PROTOCOLS.values())


@pytest.mark.parametrize(("stride", "start", "frames"), [(1, 0, None), (3, 0, 5), (3, 2, 4), (4, 1, None), (7, 0, 2)])
def test_stride_and_start(here: Path, stride: int, start: int, frames: int | None) -> None:
    path = video(here / "clip.mp4", frames=15, height=32, width=48)
    protocol = Protocol(name="x", frames=frames, stride=stride, start=start)
    found = torch.cat(list(protocol.read(path)), 2)
    wanted = read_all(path)[:, :, start::stride]
    assert torch.equal(found, wanted if frames is None else wanted[:, :, :frames])


def test_a_video_that_is_too_short_is_named(here: Path) -> None:
    path = video(here / "clip.mp4", frames=7)
    with pytest.raises(vae_core.VideoError, match=r"has 7 frames; 4 at stride 3 need 10"):
        list(Protocol(name="x", frames=4, stride=3).read(path))


def test_pictures_cover_the_size_and_keep_their_centre() -> None:
    wide = torch.zeros(1, 3, 2, 40, 120)
    wide[..., 40:80] = 1  # the middle third
    found = cover(wide, (20, 20))
    assert found.shape == (1, 3, 2, 20, 20)
    assert found[..., 2:-2].min() > 0.95
    assert cover(wide, (40, 120)) is wide
    assert cover(wide, (60, 90)).shape[-2:] == (60, 90)


def test_videos_are_found_in_folders_and_lists(here: Path) -> None:
    (here / "videos").mkdir()
    for name in ("b.mp4", "a.MKV", ".hidden.mp4", "notes.md"):
        (here / "videos" / name).write_bytes(b"")
    (here / "list.txt").write_text("videos/b.mp4\n\n")
    assert list(find_videos(["videos"])) == ["a.MKV", "b.mp4"]
    assert find_videos(["list.txt"]) == {"videos/b.mp4": Path("videos/b.mp4")}
    assert len(find_videos(["videos", "videos/b.mp4"])) == 3
    with pytest.raises(vae_core.VideoError, match="no such file or folder"):
        find_videos(["nowhere"])
    (here / "empty").mkdir()
    with pytest.raises(vae_core.VideoError, match="holds no video"):
        find_videos(["empty"])


# ------------------------------------------------------------------------------------------------ parts


def test_the_baseline_is_a_picture_of_an_eighth(here: Path) -> None:
    clip = moving_picture(2, 64, 80)
    (found,) = Shrink().reconstruct([clip], (64, 80))
    blocks = found.unflatten(-1, (10, 8)).unflatten(-3, (8, 8)).mean((-3, -1))
    wanted = clip.unflatten(-1, (10, 8)).unflatten(-3, (8, 8)).mean((-3, -1))
    assert (blocks - wanted).abs().mean() < 0.02
    assert 20 < frame_quality(found, clip)[0].mean() < 60


def test_a_vae_that_loses_frames_is_refused() -> None:
    def lose(stream: Iterator[Tensor]) -> Iterator[Tensor]:
        for chunk in stream:
            yield chunk[:, :, 1:]

    with pytest.raises(ValueError, match="1 of 5 frames did not come back"):
        measure([moving_picture(5, 32, 32)], lose, ClipMeters())


def test_fvd_is_of_windows_of_sixteen_frames(here: Path) -> None:
    """With features that are means, FVD of a brighter copy is the distance of the brightness."""
    network = VideoFeatures(lambda x, **_: torch.stack([x.mean((1, 2, 3, 4)), x.std((1, 2, 3, 4))], 1))
    path = video(here / "clip.mp4", frames=40, height=32, width=48)

    class Brighter(Shrink):
        def reconstruct(self, frames: Iterator[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
            for chunk in frames:
                yield (chunk * 0.5 + 0.25) if self.on else chunk * 0.5

        on = True

    class Plain(Brighter):
        on = False

    choices = [Choice(name=name, identity=name, load=kind) for name, kind in (("same", Plain), ("other", Brighter))]
    outcome = evaluate(
        {"clip": path}, choices, here / "report", protocol=Protocol(name="x"), networks=Networks(video=network)
    )
    for record in outcome.records:
        assert record.features is not None
        assert unpack(record.features[0]).shape == (2, 2)
    same, other = rows(outcome)
    assert same.clips == 2
    a, b = (unpack(r.features[1]) for r in outcome.records)
    torch.testing.assert_close(b - a, torch.tensor([[0.25, 0.0]] * 2), atol=1e-4, rtol=0)
    assert other.figures["fvd"] != same.figures["fvd"]
    features = torch.randn(3, 7)
    assert torch.equal(unpack(pack(features)), features)


def test_lpips_of_another_file_needs_another_folder(here: Path) -> None:
    path = video(here / "clip.mp4", frames=2, height=32, width=48)
    network: Any = SimpleNamespace(kind="alex", frames=lambda ours, theirs: torch.zeros(ours.shape[2]))
    choices = [Choice(name="same", identity="same", load=Shrink)]

    def measured(file: str) -> int:
        found = Networks(lpips=network, lpips_file=file)
        return evaluate(
            {"clip": path}, choices, here / "report", protocol=Protocol(name="x"), networks=found, pictures=False
        ).measured

    assert (measured("1a"), measured("1a")) == (1, 0)
    with pytest.raises(ValueError, match="lpips"):
        measured("2b")


def test_offline_says_what_to_do(here: Path) -> None:
    found = find_networks()
    assert (found.lpips, found.video) == (None, None)
    lpips, fvd = found.missing
    assert lpips.startswith("LPIPS is left out: its network is not here. Get https://download.pytorch.org/models/alex")
    assert "name the file with --lpips, or add --fetch-networks" in lpips
    assert fvd.startswith("FVD is left out: its network is not here.")


@pytest.mark.parametrize(
    ("words", "label"),
    [
        (("-p", "tiny"), "tiny"),
        (("-p", "tiny", "--stride", 3, "--size", "32x16", "--frames", 2, "--start", 1), "tiny"),
        (("-p", "tiny", "--stride", 2), "tiny, changed"),
        (("-p", "tiny", "--start", 0), "tiny, changed"),
        (("--stride", 3), "as asked"),
    ],
)
def test_a_protocol_is_called_changed_where_it_is(
    here: Path, words: tuple[object, ...], label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROTOCOLS, "tiny", Protocol(name="tiny", size=(16, 32), frames=2, stride=3, start=1))
    video(here / "videos" / "a.mp4", frames=5, height=16, width=32)
    result = run("videos", *words, "-v", "shrink-8x", "--no-baseline", "-o", "report")
    assert result.exit_code == 0, result.output
    assert report(here / "report")["protocol"]["name"] == label


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("videos", "--vae", "nowhere.pth"), "--vae nowhere.pth: no such file or folder"),
        (("videos", "--protocol", "imagenet"), "choose one of webvid, coco, kinetics-600"),
        (("videos", "--size", "huge"), "--size huge is no size; give WIDTHxHEIGHT"),
        (("nowhere",), "nowhere: no such file or folder"),
        (("videos", "--tile-px", "100"), "--tile-px: Tiles of 100 px"),
        (("videos", "-v", "demo-iv-vae+reference-tiles"), "the official tiles are those of CV-VAE"),
        (("videos", "-v", "shrink-8x"), "Two VAEs have the same name"),
        (("videos", "-o", "file"), "file is a file; give a folder with -o"),
        (("videos", "--image-vae", "videos"), "is no folder of diffusers' AutoencoderKL"),
    ],
)
def test_wrong_choices_are_named(here: Path, words: tuple[str, ...], said: str) -> None:
    video(here / "videos" / "a.mp4", frames=2)
    (here / "file").write_text("")
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert said in result.stderr.strip().splitlines()[-1]
    assert not (here / "report" / "report.html").exists()


@pytest.mark.parametrize(("module", "package"), [("cv2", "opencv-python-headless"), ("matplotlib", "matplotlib")])
def test_what_is_not_installed_is_named(here: Path, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    result = run("videos")
    assert result.exit_code == 2
    line = f'This command needs {package}, which is not installed: pip install -e ".[evaluation]" in its folder.'
    assert line in result.stderr
