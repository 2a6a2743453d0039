"""Fetching weights from a real server on this machine: whole, continued, refused, and checked."""

import hashlib
import http.client
import json
import threading
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vae_core
from vae_core import CheckpointError
from vae_core.cli import app as commands
from vae_core.door import downloads
from vae_core.door.downloads import OFFICIAL_FILES, DownloadError, check, download, fetch
from vae_core.door.loading import official_state


@dataclass
class Site:
    """A server of one file; `breaks_at` ends an answer early, `ranges` is what was asked for."""

    url: str
    data: bytes = b""
    breaks_at: int | None = None
    knows_ranges: bool = True
    tag: str = ""
    ranges: list[str | None] = field(default_factory=list)


@pytest.fixture
def site() -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            served.ranges.append(asked)
            begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked and served.knows_ranges else 0
            if self.headers.get("If-Range", served.tag) != served.tag:
                begin = 0
            if begin >= len(served.data) and begin:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(served.data)}")
                self.end_headers()
                return
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(served.data) - begin))
            if served.tag:
                self.send_header("ETag", served.tag)
            self.end_headers()
            self.wfile.write(served.data[begin : served.breaks_at])

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Site(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def small_official(
    site: Site, monkeypatch: pytest.MonkeyPatch, small_vae: Callable[..., vae_core.VideoVAE], tmp_path: Path
) -> str:
    """A small IV-VAE published on `site` as ivvae_z4_dim64.pth; its name."""
    vae = small_vae("iv-vae", torch.float32)
    torch.save(official_state(vae.model), tmp_path / "published.pth")
    site.data = (tmp_path / "published.pth").read_bytes()
    name = "ivvae_z4_dim64"
    small = replace(OFFICIAL_FILES[name], parameters=vae.info.parameters)
    monkeypatch.setattr(downloads, "OFFICIAL_FILES", {**OFFICIAL_FILES, name: small})
    monkeypatch.setattr(downloads, "MODELSCOPE", site.url)
    return name


def test_a_broken_download_is_continued(site: Site, tmp_path: Path) -> None:
    site.data = bytes(range(256)) * 20_000
    site.breaks_at = 3_000_000
    part = tmp_path / "file"
    with pytest.raises(http.client.IncompleteRead):
        fetch(site.url, part)
    assert part.read_bytes() == site.data[:3_000_000]
    site.breaks_at = None
    seen: list[tuple[int, int | None]] = []
    fetch(site.url, part, report=lambda here, total: seen.append((here, total)))
    assert part.read_bytes() == site.data
    assert site.ranges == [None, "bytes=3000000-"]
    assert seen[-1] == (len(site.data), len(site.data))
    assert seen[0][0] > 3_000_000
    fetch(site.url, part)  # nothing is left to ask for
    assert part.read_bytes() == site.data


def test_a_download_of_a_file_that_changed_starts_again(site: Site, tmp_path: Path) -> None:
    site.data, site.breaks_at, site.tag = b"a" * 3_000_000, 2_000_000, '"first"'
    with pytest.raises(http.client.IncompleteRead):
        fetch(site.url, tmp_path / "file")
    site.data, site.breaks_at, site.tag = b"b" * 3_000_000, None, '"second"'
    assert fetch(site.url, tmp_path / "file") == "second"
    assert (tmp_path / "file").read_bytes() == site.data
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_came_is_written_down_and_looked_at_again(
    site: Site, small_official: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.tag = '"a1b2"'
    path = download(small_official, tmp_path / "models")
    noted = json.loads((tmp_path / "models" / "ivvae_z4_dim64.pth.source.json").read_text())
    assert noted["sha256"] == hashlib.sha256(site.data).hexdigest()
    assert noted["revision"] == "a1b2"
    said = CliRunner(env={"COLUMNS": "200"}).invoke(commands.app, ["info", str(path)])
    assert f"SHA-256          {noted['sha256']}, as downloaded (revision a1b2)" in said.stdout
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of some tensor
    path.write_bytes(content)
    said = CliRunner(env={"COLUMNS": "200"}).invoke(commands.app, ["info", str(path)])
    assert said.exit_code == 2
    assert "is not what was downloaded: its SHA-256 is" in said.stderr


def test_a_server_without_ranges_starts_again(site: Site, tmp_path: Path) -> None:
    site.data, site.knows_ranges = b"new contents" * 1000, False
    (tmp_path / "file").write_bytes(b"old")
    fetch(site.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == site.data


def test_a_part_longer_than_the_file_is_thrown_away(site: Site, tmp_path: Path) -> None:
    site.data = b"short"
    (tmp_path / "file").write_bytes(b"of another, longer file")
    fetch(site.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"short"


def test_a_download_is_checked_and_gets_its_name(site: Site, small_official: str, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "vae"
    path = download(small_official, folder)
    assert path == folder / "ivvae_z4_dim64.pth"
    assert sorted(entry.name for entry in folder.iterdir()) == [path.name, f"{path.name}.source.json"]
    assert vae_core.load(path).info.latent_channels == 4
    asked = len(site.ranges)
    assert download(small_official, folder) == path  # it is there: checked, not fetched
    assert len(site.ranges) == asked


def test_another_model_under_that_name_is_refused(
    site: Site, small_official: str, tmp_path: Path, small_vae: Callable[..., vae_core.VideoVAE]
) -> None:
    torch.save(official_state(small_vae("cv-vae", torch.float32).model), tmp_path / "other.pth")
    site.data = (tmp_path / "other.pth").read_bytes()
    with pytest.raises(CheckpointError, match=r"What was downloaded is not ivvae_z4_dim64, and was deleted: .* cv-vae"):
        download(small_official, tmp_path / "models")
    assert not any((tmp_path / "models").iterdir())
    site.data = site.data[: len(site.data) // 2]
    with pytest.raises(CheckpointError, match="What was downloaded is not ivvae_z4_dim64, and was deleted"):
        download(small_official, tmp_path / "models")
    assert not any((tmp_path / "models").iterdir())


def test_no_connection_says_where_to_get_it_by_hand(
    site: Site, small_official: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "MODELSCOPE", "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(DownloadError) as caught:
        download(small_official, tmp_path / "models")
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("ivvae_z4_dim64 could not be downloaded (")
    assert "download ivvae_z4_dim64.pth from http://127.0.0.1:9/wpy1999/iv-vae/files by hand" in said
    assert f"save it as {tmp_path / 'models' / 'ivvae_z4_dim64.pth'}" in said
    assert not (tmp_path / "models").exists()


def test_a_refusal_by_the_server_is_no_part_of_the_file(tmp_path: Path, site: Site) -> None:
    (tmp_path / "file").write_bytes(b"begun")
    site.data = b""
    fetch(site.url, tmp_path / "file")  # 416 with another length: asked for again, whole
    assert (tmp_path / "file").read_bytes() == b""
    with pytest.raises(urllib.error.URLError):
        fetch("http://127.0.0.1:9", tmp_path / "file")


def test_hugging_face_is_asked_the_same_way(
    site: Site, monkeypatch: pytest.MonkeyPatch, small_vae: Callable[..., vae_core.VideoVAE], tmp_path: Path
) -> None:
    """Through HF_ENDPOINT; broken off, continued, checked, and saved under a name that says what it is."""
    vae = small_vae("cv-vae", torch.float32)
    vae_core.save(vae, tmp_path / "published.safetensors")
    site.data = (tmp_path / "published.safetensors").read_bytes()
    small = replace(OFFICIAL_FILES["vae3d_v1-1"], parameters=vae.info.parameters)
    monkeypatch.setattr(downloads, "OFFICIAL_FILES", {**OFFICIAL_FILES, "vae3d_v1-1": small})
    assert small.url.endswith("/AILab-CVC/CV-VAE/resolve/main/vae3d_v1-1/diffusion_pytorch_model.safetensors")
    monkeypatch.setenv("HF_ENDPOINT", site.url)

    def stop(here: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download("vae3d_v1-1", tmp_path / "models", report=stop)
    (part,) = (tmp_path / "models").iterdir()
    assert part.name == ".part.cv-vae_vae3d_v1-1.safetensors"
    seen: list[tuple[int, int | None]] = []
    path = download("vae3d_v1-1", tmp_path / "models", report=lambda here, total: seen.append((here, total)))
    assert path.name == "cv-vae_vae3d_v1-1.safetensors"
    assert path.read_bytes() == site.data
    assert sorted((tmp_path / "models").iterdir()) == [path, path.with_name(f"{path.name}.source.json")]


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'vae9d' is not a published file; choose one of vae3d, vae3d_v1-1"):
        download("vae9d", tmp_path)


def test_a_model_of_other_widths_is_not_the_published_one(
    tmp_path: Path, small_vae: Callable[..., vae_core.VideoVAE]
) -> None:
    vae_core.save(small_vae("cv-vae", torch.float32), tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match=r"where vae3d is cv-vae with 4 latent channels and 182,446,475 param"):
        check(tmp_path / "small.safetensors", OFFICIAL_FILES["vae3d"])


def test_addresses_are_those_of_the_authors() -> None:
    pages = {official.page for official in OFFICIAL_FILES.values()}
    assert pages == {
        "https://huggingface.co/AILab-CVC/CV-VAE/tree/main/vae3d",
        "https://huggingface.co/AILab-CVC/CV-VAE/tree/main/vae3d_v1-1",
        "https://huggingface.co/AILab-CVC/CV-VAE/tree/main/vae3d_sd3",
        "https://www.modelscope.cn/models/wpy1999/iv-vae/files",
    }
    assert len({official.target for official in OFFICIAL_FILES.values()}) == len(OFFICIAL_FILES) == 7
