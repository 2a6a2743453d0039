"""Load Video VAE: its choices, what it says of a file that is not there, and downloads that the user asks for."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from .calls import LOAD_VAE, decode, encode
from .inprocess import CancelledRunError, Comfy, NodeError, Progress, RefusedError
from .weights import SMALL, picture

NODE = "CVIV_LoadVideoVAE"
MISSING = "cv-vae_vae3d_v1-1.safetensors"


@dataclass
class Site:
    """A server of one file in small blocks. asked: paths and ranges."""

    url: str
    data: bytes
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def site(models: Path, comfy: Comfy) -> Iterator[Site]:
    """The small CV-VAE as a stand-in for an official file, on a server of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            served.asked.append((self.path, asked))
            begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(served.data) - begin))
            self.end_headers()
            self.wfile.write(served.data[begin:])

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Site(f"http://127.0.0.1:{server.server_port}", (models / SMALL["cv"]).read_bytes())
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield served
    server.shutdown()
    thread.join()
    server.server_close()
    for left in models.glob(f"*{MISSING}"):
        left.unlink()


@pytest.fixture(autouse=True)
def no_official_file(models: Path) -> None:
    """Other tests put a small file under the name of an official one into the folder that all share."""
    (models / MISSING).unlink(missing_ok=True)


def options(comfy: Comfy) -> list[str]:
    schema = comfy.nodes[NODE].define_schema()
    return next(one for one in schema.inputs if one.id == "vae_name").options


def refused(comfy: Comfy, vae_name: str) -> str:
    """What the check before the run says; nothing runs."""
    prompt: dict[str, Any] = {"1": {"class_type": NODE, "inputs": {"vae_name": vae_name, **LOAD_VAE}}}
    comfy.take(prompt, ["1", 0])
    with pytest.raises(RefusedError) as caught:
        comfy.validate(prompt)
    return str(caught.value)


def test_every_official_file_is_offered_with_its_size(comfy: Comfy) -> None:
    offered = [option for option in options(comfy) if option.startswith("download ")]
    names = comfy.pack("vae_core.door.downloads").OFFICIAL_FILES
    assert [option.split()[1] for option in offered] == list(names)
    assert "download vae3d_v1-1 (730 MB)" in offered
    assert "download ivvae_z16_dim96 (967 MB)" in offered
    assert options(comfy)[:2] == ["demo-cv-vae", "demo-iv-vae"]


def test_a_missing_official_file_is_named_before_the_run(comfy: Comfy) -> None:
    said = refused(comfy, MISSING)
    assert f"Load Video VAE: there is no '{MISSING}' in models/vae" in said
    assert "Download vae3d_v1-1/diffusion_pytorch_model.safetensors from https://huggingface.co/AILab-CVC" in said
    assert f"save it as models/vae/{MISSING}" in said
    assert "choose 'download vae3d_v1-1 (730 MB)' here" in said


def test_another_missing_file_is_named_before_the_run(comfy: Comfy) -> None:
    assert "Load Video VAE: there is no file 'mine.safetensors' in models/vae" in refused(comfy, "mine.safetensors")
    assert "There is no official file 'vae9d'; choose one of: vae3d" in refused(comfy, "download vae9d (1 MB)")


def test_a_download_is_cancelled_continued_checked_and_used(
    comfy: Comfy, site: Site, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads, official = comfy.pack("vae_core.door.downloads"), comfy.pack("nodes.loading.official")
    small = comfy.pack("vae_core").load(models / SMALL["cv"]).info.parameters
    known = dict(downloads.OFFICIAL_FILES)
    known["vae3d_v1-1"] = replace(known["vae3d_v1-1"], parameters=small)
    for module in (downloads, official):
        monkeypatch.setattr(module, "OFFICIAL_FILES", known)
    monkeypatch.setattr(downloads, "_CHUNK", 1 << 16)
    monkeypatch.setattr(comfy.module("comfy.utils"), "PROGRESS_THROTTLE_MIN_INTERVAL", 0, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    (choice,) = [option for option in options(comfy) if option.startswith("download vae3d_v1-1 ")]

    def cancel(report: Progress) -> None:
        if report.value >= len(site.data) // 2:
            comfy.module("nodes").interrupt_processing(True)

    comfy.on_progress = cancel
    with pytest.raises(CancelledRunError):
        comfy.call(NODE, vae_name=choice, **LOAD_VAE)
    comfy.on_progress = None
    comfy.module("nodes").interrupt_processing(False)
    (part,) = models.glob(f"*{MISSING}")
    assert part.name.startswith(".")
    begun = part.stat().st_size
    assert len(site.data) // 2 <= begun < len(site.data)
    assert MISSING not in options(comfy)

    (vae,) = comfy.call(NODE, vae_name=choice, **LOAD_VAE)
    assert [progress.total for progress in comfy.progress][-1] == len(site.data)
    report = comfy.ui["1"]["text"][0]
    assert f"as {MISSING}, licence: Apache-2.0" in report
    assert f"SHA-256 {hashlib.sha256(site.data).hexdigest()}" in report
    assert site.asked[-1][1] == f"bytes={begun}-"
    assert site.asked[0][0] == "/AILab-CVC/CV-VAE/resolve/main/vae3d_v1-1/diffusion_pytorch_model.safetensors"
    assert (models / MISSING).read_bytes() == site.data
    assert MISSING in options(comfy)
    latent, _ = encode(comfy, vae, picture(5, 16, 24))
    assert latent["samples"].shape == (2, 4, 2, 3)

    asked = len(site.asked)
    comfy.call(NODE, vae_name=choice, **LOAD_VAE)  # it is there
    comfy.call(NODE, vae_name=MISSING, **LOAD_VAE)
    assert len(site.asked) == asked


def test_a_download_that_fails_says_how_to_do_it_by_hand(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(NodeError) as caught:
        comfy.call(NODE, vae_name="download vae3d_v1-1 (730 MB)", **LOAD_VAE)
    assert "vae3d_v1-1 could not be downloaded" in str(caught.value)
    assert "by hand and save it as" in str(caught.value)


def test_a_gpu_that_is_not_there_is_said_in_every_report(comfy: Comfy) -> None:
    sentence = "device is gpu, but ComfyUI has none here or runs with --cpu: this runs on the CPU"
    (vae,) = comfy.call(NODE, vae_name=SMALL["cv"], **{**LOAD_VAE, "device": "gpu"})
    assert list(comfy.ui["1"]["text"]) == [f"cv-vae, 4 channels, float32 on cpu\n{sentence}"]
    latent, report = encode(comfy, vae, picture(5, 16, 24))
    assert sentence in report
    assert sentence in decode(comfy, vae, latent)[2]
    (vae,) = comfy.call(NODE, vae_name=SMALL["cv"], **{**LOAD_VAE, "device": "cpu"})
    assert sentence not in encode(comfy, vae, picture(5, 16, 24))[1]


def test_what_identifies_a_file_tells_no_path(comfy: Comfy, models: Path) -> None:
    """ComfyUI stores it in the files that a workflow writes."""
    stamp = comfy.nodes[NODE].fingerprint_inputs(vae_name=SMALL["cv"], **LOAD_VAE)
    assert str(models) not in str(stamp)
    assert stamp != comfy.nodes[NODE].fingerprint_inputs(vae_name=SMALL["iv"], **LOAD_VAE)
