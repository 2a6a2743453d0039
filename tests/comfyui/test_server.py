"""A real server: the example workflows through comfy-cli, cancel, and the memory of a long video."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from .calls import DECODE_TO_VIDEO, LOAD_VAE, SAVE_VIDEO, play
from .inprocess import Comfy
from .place import make_base
from .server import Event, Server, serve
from .weights import SMALL
from .workflows import WORKFLOWS, comfy_cli, is_executable, provide_files, read, with_small_weights

MIB = 1 << 20


def long_decode(frames: int, side: int, prefix: str) -> dict[str, Any]:
    """An empty latent of `frames` frames, decoded into a file."""
    latents = {"width": side, "height": side, "batch_size": (frames + 3) // 4}
    return {
        "vae": {"class_type": "CVIV_LoadVideoVAE", "inputs": {**LOAD_VAE, "vae_name": SMALL["cv"]}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": latents},
        "decode": {
            "class_type": "CVIV_DecodeToVideo",
            "inputs": {"vae": ["vae", 0], "samples": ["latent", 0], **DECODE_TO_VIDEO},
        },
        "save": {
            "class_type": "SaveVideo",
            "inputs": {"video": ["decode", 0], "filename_prefix": prefix, **SAVE_VIDEO},
        },
    }


def test_the_server_loads_the_pack_silently(server: Server) -> None:
    lines = [line for line in server.printed().splitlines() if "cviv" in line.lower()]
    assert lines
    assert [line for line in lines if "failed" in line.lower() or "warning" in line.lower()] == []
    assert "CVIV_Decode" in server.get("/object_info")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_workflow_is_valid(comfy: Comfy, server: Server, tmp_path: Path, path: Path) -> None:
    """No node is missing, and ComfyUI's validation takes the prompt that the workflow becomes."""
    pytest.importorskip("comfy_cli")
    workflow = read(path)
    assert {node["type"] for node in workflow["nodes"]} <= set(comfy.nodes) | {"MarkdownNote", "Note"}
    for base in (server.base, comfy.base):
        provide_files(workflow, base)
    answer = comfy_cli(server, tmp_path, "--workflow", str(path), "--print-prompt")
    prompt = _prompt(answer)
    assert {node["class_type"] for node in prompt.values()} <= set(comfy.nodes)
    assert comfy.validate(prompt)


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if is_executable(path)], ids=lambda path: path.stem)
def test_executable_workflows_run(server: Server, tmp_path: Path, path: Path) -> None:
    pytest.importorskip("comfy_cli")
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(with_small_weights(read(path))), encoding="utf-8")
    answer = comfy_cli(server, tmp_path, "--workflow", str(file), "--wait", "--timeout", "300")
    assert answer["ok"], answer["error"]
    assert answer["data"]["status"] == "completed"
    videos = [url for url in answer["data"]["outputs"] if ".mp4" in url]
    assert videos
    for url in videos:
        query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
        saved = server.base / "output" / query.get("subfolder", "") / query["filename"]
        found = play(str(saved))
        assert found["frames"].shape[0] > 1
        assert json.loads(found["metadata"]["prompt"])


def test_cancel_while_a_video_is_written(server: Server) -> None:
    """POST /interrupt in the middle of a decode into a file: no file stays, and the next run works."""
    asked: list[float] = []
    steps: list[float] = []

    def interrupt(event: Event) -> None:
        if event["type"] != "progress" or event["data"]["node"] != "decode":
            return
        steps.append(event["data"]["value"])
        if not asked:
            asked.append(event["data"]["value"])
            server.post("/interrupt", {})

    ended = server.run(long_decode(401, 64, "cancelled/video"), interrupt)
    assert asked
    assert ended["status"]["status_str"] == "error"
    names = [name for name, _ in ended["status"]["messages"]]
    assert "execution_interrupted" in names
    assert steps[-1] - asked[0] <= 32  # at most the chunk that was under way and the one after
    folder = server.base / "output" / "cancelled"
    assert not folder.exists() or list(folder.iterdir()) == []

    again = server.run(long_decode(17, 64, "after/video"))
    assert again["status"]["status_str"] == "success"
    assert play(str(_saved(server, again)))["frames"].shape == (17, 64, 64, 3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(("side", "allowed"), [(96, 60 * MIB), (256, 200 * MIB)])
def test_a_long_video_needs_no_more_memory_than_a_short_one(
    models: Path,
    comfy: Comfy,
    tmp_path: Path,
    record_testsuite_property: Callable[[str, object], None],
    side: int,
    allowed: int,
) -> None:
    """1001 frames against 65. All frames at once would be 1001 * side * side * 3 * 4 bytes: 106 and 751 MiB."""
    if side > 100 and not os.environ.get("CVIV_FULL_SIZE"):
        pytest.skip("takes many minutes without a GPU: set CVIV_FULL_SIZE=1 to run it")
    # large tensors go straight back to the system, so that the peak is of what is in use, not of what malloc keeps
    giving_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
    with serve(make_base(tmp_path / "base", models=models), **giving_back) as fresh:
        peaks = []
        for frames in (65, 1001):
            ended = fresh.run(long_decode(frames, side, f"long/{frames}"))
            assert ended["status"]["status_str"] == "success", ended["status"]
            assert play(str(_saved(fresh, ended)))["frames"].shape[0] == frames
            peaks.append(fresh.peak_bytes())
    grown = peaks[1] - peaks[0]
    record_testsuite_property(f"peaks_mib_{side}", [peak / MIB for peak in peaks])  # with --junitxml=FILE
    assert grown <= allowed, f"{grown / MIB:.0f} MiB more for 1001 frames than for 65"


def _saved(server: Server, ended: Event) -> Path:
    (file,) = ended["outputs"]["save"]["images"]
    return server.base / "output" / file["subfolder"] / file["filename"]


def _prompt(answer: dict[str, Any]) -> dict[str, Any]:
    """The API prompt in what `--print-prompt` printed."""
    data = answer.get("data", answer)
    return data.get("prompt", data) if isinstance(data, dict) else data
