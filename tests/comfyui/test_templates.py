"""The templates: what they say of their models, and what each gives, with small weights in place of large ones."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .calls import play
from .checkout import ROOT
from .inprocess import Comfy
from .place import make_base
from .server import Server, serve
from .stand_in import add_stand_in
from .workflows import WORKFLOWS, comfy_cli, nodes_of, provide_files, read, small

LOADERS = (
    "CheckpointLoaderSimple",
    "ImageOnlyCheckpointLoader",
    "FrameInterpolationModelLoader",
    "CVIV_LoadVideoVAE",
)
FOLDERS = {
    "CheckpointLoaderSimple": "checkpoints",
    "ImageOnlyCheckpointLoader": "checkpoints",
    "FrameInterpolationModelLoader": "frame_interpolation",
    "CVIV_LoadVideoVAE": "vae",
}
NOTES = ("MarkdownNote", "Note")
BY_NAME = {path.stem: path for path in WORKFLOWS}

# what Save Video gets: frames, and frames per second
IN_BETWEEN = "SVD with frames in between"  # which saves two videos
SVD = {
    "SVD image to 97 frames": (97, 24),
    "SVD 193 frames by windows": (193, 24),
    "SVD endless by continuation": (433, 24),
    "SVD ambient loop": (196, 24),
    "SVD chunks kept and made anew": (265, 24),
    "SVD from one image to another": (97, 24),
    "SVD extend a clip": (49 + 84, 24),
    "Sharp keyframes": (97, 24),
}


@pytest.fixture(scope="module")
def svd_server(models: Path, loaded: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on which Image Only Checkpoint Loader gives small random models; `loaded` has written the VAEs."""
    base = add_stand_in(make_base(tmp_path_factory.mktemp("templates") / "base", models=models))
    _write_picture(base / "input" / "example.png")
    with serve(base) as running:
        yield running


def _write_picture(path: Path) -> None:
    from PIL import Image

    shade = torch.linspace(0, 255, 160).expand(90, -1).to(torch.uint8)
    Image.fromarray(torch.stack((shade, shade.flip(1), shade // 2), dim=-1).numpy()).save(path)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_loader_says_where_its_file_is_from(comfy: Comfy, path: Path) -> None:
    """name, url and directory as ComfyUI's page reads them; for our files those of the download."""
    official = comfy.pack("vae_core.door.downloads").OFFICIAL_FILES.values()
    known = {one.target: one.url for one in official}
    for node in nodes_of(read(path), *LOADERS):
        name = node["widgets_values"][0]
        if name.startswith("demo-"):
            continue
        (model,) = node["properties"]["models"]
        assert model["name"] == name
        assert model["directory"] == FOLDERS[node["type"]]
        assert model["url"].startswith("https://huggingface.co/")
        assert model["url"].endswith(".safetensors")
        if node["type"] == "CVIV_LoadVideoVAE":
            assert model["url"] == known[name]
        else:
            assert model["url"].endswith(name)
        note = nodes_of(read(path), *NOTES)[0]["widgets_values"][0]
        assert name in note, f"the note does not say what to save {name} as"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_node_says_which_pack_it_is_of(comfy: Comfy, path: Path) -> None:
    """So that ComfyUI can offer a pack that is missing; an id or a version of another form would be refused."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    nodes = [node for node in read(path)["nodes"] if node["type"] not in NOTES]
    for node in nodes:
        told = node["properties"]
        assert told["cnr_id"] == (project["name"] if node["type"].startswith("CVIV_") else "comfy-core")
        assert re.fullmatch(r"\d+\.\d+\.\d+", told["ver"])
        assert node["type"] in comfy.nodes


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_widgets_are_in_their_ranges(comfy: Comfy, path: Path) -> None:
    """As many values as the node has widgets, or fewer where later ones are optional; each is allowed."""
    for node in read(path)["nodes"]:
        if not node["type"].startswith("CVIV_"):
            continue
        wanted = []
        for one in comfy.nodes[node["type"]].GET_SCHEMA().inputs:
            if one.get_io_type() in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"):
                wanted += [one, None] if one.id == "seed" else [one]
        assert len(node["widgets_values"]) <= len(wanted)
        for value, one in zip(node["widgets_values"], wanted, strict=False):
            if one is None or one.id in ("vae_name", "file", "adapter"):
                continue
            told = one.as_dict()
            assert value in told.get("options", [value]), (node["type"], one.id)
            if isinstance(value, float | int) and "min" in told:
                assert told["min"] <= value <= told["max"], (node["type"], one.id)


@pytest.mark.parametrize("name", [name for name in BY_NAME if name.startswith("SVD ") and "97" not in name])
def test_svd_templates_have_the_defaults_of_today(comfy: Comfy, name: str) -> None:
    """All but the mode, which is the template's subject."""
    for node in nodes_of(read(BY_NAME[name]), "CVIV_SVDLongVideo"):
        inputs = [one for one in comfy.nodes["CVIV_SVDLongVideo"].GET_SCHEMA().inputs if hasattr(one, "default")]
        defaults = [one.default for one in inputs if one.get_io_type() in ("COMBO", "INT", "FLOAT", "BOOLEAN")]
        assert node["widgets_values"][1:] == defaults[1:]


def test_what_was_not_measured_is_said() -> None:
    for name in (*SVD, *(name for name in BY_NAME if name == IN_BETWEEN)):
        note = nodes_of(read(BY_NAME[name]), *NOTES)[0]["widgets_values"][0]
        assert "**What to expect.**" in note, name
        assert re.search(r"random weights|random models|stand-ins|Measured with", note), name


@pytest.mark.parametrize("name", SVD)
def test_svd_templates_give_what_they_promise(svd_server: Server, tmp_path: Path, name: str) -> None:
    """Frames, rate and size of the video that was saved, sampled by a small random model of SVD's kind."""
    pytest.importorskip("comfy_cli")
    if name == "Sharp keyframes":
        pytest.importorskip("cv2", reason="Keyframe Detail needs OpenCV")
    _run(svd_server, tmp_path, name)
    frames, fps = SVD[name]
    found = play(str(_newest(svd_server.base / "output" / "video")))
    size = (192, 320) if name == "SVD extend a clip" else (72, 128)
    assert found["frames"].shape == (frames, *size, 3)
    assert float(found["fps"]) == pytest.approx(fps)
    assert found["frames"].std() > 1


def test_frames_in_between(svd_server: Server, tmp_path: Path) -> None:
    """SVD with frame interpolation, and both: what the template saves."""
    pytest.importorskip("comfy_cli")
    if IN_BETWEEN not in BY_NAME:
        pytest.skip("this version of ComfyUI has no frame interpolation")
    _run(svd_server, tmp_path, IN_BETWEEN)
    for name, frames, fps in (("svd_interpolated", 97, 24), ("svd_both", 193, 48)):
        (path,) = (svd_server.base / "output" / "video").glob(f"{name}_*.mp4")
        found = play(str(path))
        assert found["frames"].shape == (frames, 72, 128, 3)
        assert float(found["fps"]) == pytest.approx(fps)
        assert found["frames"].std() > 1


def _run(server: Server, folder: Path, name: str) -> None:
    """Run a template with small models, as a user of the command line does."""
    workflow = read(BY_NAME[name])
    provide_files({"nodes": [node for node in workflow["nodes"] if node["type"] != "LoadImage"]}, server.base)
    file = folder / "workflow.json"
    file.write_text(json.dumps(small(workflow)), encoding="utf-8")
    answer = comfy_cli(server, folder, "--workflow", str(file), "--wait", "--timeout", "900")
    assert answer["ok"], answer["error"]


def _newest(folder: Path) -> Path:
    return max(folder.glob("*.mp4"), key=lambda path: path.stat().st_mtime_ns)


def test_a_chunk_store_is_used_again(svd_server: Server, tmp_path: Path) -> None:
    """The template's promise: with a seed for chunk 2 the first chunk is read, not sampled."""
    pytest.importorskip("comfy_cli")
    store = svd_server.base / "output" / "svd_chunks" / "clip"
    if not store.is_dir():
        pytest.skip("runs after the template itself")
    workflow: dict[str, Any] = small(read(BY_NAME["SVD chunks kept and made anew"]))
    before = {path.name for path in store.rglob("*") if path.is_file()}
    (node,) = nodes_of(workflow, "CVIV_SVDChunkStore")
    node["widgets_values"][2] = "2: 77"
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(workflow), encoding="utf-8")
    answer = comfy_cli(svd_server, tmp_path, "--workflow", str(file), "--wait", "--timeout", "900")
    assert answer["ok"], answer["error"]
    after = {path.name for path in store.rglob("*") if path.is_file()}
    assert before - after == set()  # the first run's chunks are still there
    assert len([name for name in after - before if name.endswith(".safetensors")]) == 2  # chunks 2 and 3
