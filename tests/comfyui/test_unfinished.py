"""Decode to Video goes on after a crash where it is told to keep what is finished."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from .calls import decode_to_video, encode
from .conftest import LoadVAE
from .inprocess import CancelledRunError, Comfy
from .place import make_base
from .server import serve
from .test_server import long_decode
from .test_written_once import content
from .weights import SMALL, picture


def kept(base: Path) -> list[str]:
    """The chunks of unfinished videos."""
    return sorted(path.name for path in (base / "output" / "unfinished_videos").glob("*/chunk_*"))


def test_a_killed_server_goes_on_where_it_was(loaded: Comfy, models: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", models=models)
    prompt = long_decode(400, 64, "broken")
    prompt["decode"]["inputs"]["resume"] = True
    with serve(base) as server:
        server.post("/prompt", {"prompt": prompt})
        end = time.monotonic() + 120
        while len(kept(base)) < 4 and time.monotonic() < end:
            time.sleep(0.01)
        server.process.kill()
        server.process.wait()
    done = len(kept(base))
    assert 4 <= done < 25
    with serve(base) as server:
        said: list[str] = []
        result = server.run(prompt, lambda event: said.append(str(event)))
        assert result["status"]["status_str"] == "success"
        assert kept(base) == []
        assert any(f"{1 + 16 * done} frames were there from an earlier run" in text for text in said)
        server.run(long_decode(400, 64, "whole"))
    one, other = (content(base / "output" / f"{name}_00001_.mp4") for name in ("broken", "whole"))
    assert len(one["frames"]) == 397
    assert all((a[1] == b[1]).all() for a, b in zip(one["frames"], other["frames"], strict=True))


@pytest.mark.parametrize("name", ["cv", "iv"])
def test_only_what_is_missing_is_decoded(comfy: Comfy, load_vae: LoadVAE, tmp_path: Path, name: str) -> None:
    vae = load_vae(SMALL[name])
    latent, _ = encode(comfy, vae, picture(65, 32, 48))
    whole = tmp_path / "whole.mp4"
    decode_to_video(comfy, vae, latent).save_to(str(whole))

    def crash(report: Any) -> None:
        if report.value > 40:
            raise RuntimeError("crash")

    comfy.on_progress = crash
    changes = {"resume": True, "save_latent_on_failure": False}
    with pytest.raises(RuntimeError, match="crash"):
        decode_to_video(comfy, vae, latent, **changes).save_to(str(tmp_path / "broken.mp4"))
    comfy.on_progress = None
    decode_to_video(comfy, vae, latent, **changes).save_to(str(tmp_path / "broken.mp4"))
    assert (tmp_path / "broken.mp4").read_bytes() == whole.read_bytes()
    assert min(report.value for report in comfy.progress) > 33  # the bar goes on where it was
    assert kept(comfy.base) == []


def test_cancel_throws_away_what_was_kept(comfy: Comfy, load_vae: LoadVAE, tmp_path: Path) -> None:
    vae = load_vae(SMALL["cv"])
    latent, _ = encode(comfy, vae, picture(65, 32, 48))

    def cancel(report: Any) -> None:
        if report.value > 30:
            assert kept(comfy.base)
            comfy.module("nodes").interrupt_processing(True)

    comfy.on_progress = cancel
    interrupted = comfy.module("comfy.model_management").InterruptProcessingException
    with pytest.raises((CancelledRunError, interrupted)):
        decode_to_video(comfy, vae, latent, resume=True).save_to(str(tmp_path / "video.mp4"))
    comfy.on_progress = None
    assert kept(comfy.base) == []
    assert torch.is_tensor(latent["samples"])
