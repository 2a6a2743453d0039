"""Save and Load Video Latent: what goes in comes out, a workflow resumes, and no name leaves the output folder."""

from __future__ import annotations

import json
import os
import time
from copy import deepcopy
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from .inprocess import Comfy, NodeError, RefusedError

SAVE, LOAD = "CVIV_SaveVideoLatent", "CVIV_LoadVideoLatent"
NUMBER, REUSE = "number a new file", "reuse it (do not compute again)"
FACTS = {"family": "cv-vae", "fps": "24000/1001", "frames": 15, "height": 31, "width": 41}


def _latent(b: int = 1, t: int = 5, z: int = 4, layout: str = "video", **changes: Any) -> dict[str, Any]:
    samples = torch.randn(b, z, t, 4, 6, generator=torch.Generator().manual_seed(t))
    if layout == "frames":
        samples = samples[0].movedim(1, 0)
    told = {**FACTS, "layout": layout, **changes}
    return {"samples": samples, "cviv": {name: value for name, value in told.items() if value is not None}}


def _plain(latent: dict[str, Any]) -> dict[str, Any]:
    return {"samples": latent["samples"]}


def _save(comfy: Comfy, latent: Any, prefix: str, mode: str = NUMBER, **more: Any) -> tuple[dict[str, Any], Path]:
    saved, path = comfy.call(SAVE, samples=latent, filename_prefix=prefix, when_file_exists=mode, **more)
    return saved, Path(path)


def _load(comfy: Comfy, path: Path, first: int = 0, count: int = 0, layout: str = "as saved") -> tuple[Any, ...]:
    name = path.relative_to(comfy.base).as_posix()
    return comfy.call(LOAD, file=name, first_latent=first, latent_count=count, layout=layout)


def _vae(comfy: Comfy, name: str) -> Any:
    keywords = {"dtype": "fp32", "device": "cpu", "latent_layout": "auto"}
    return comfy.call("CVIV_LoadVideoVAE", vae_name=name, **keywords)[0]


@pytest.mark.parametrize(
    "latent",
    [
        _latent(),
        _latent(b=2),
        _latent(layout="frames"),
        _latent(family="iv-vae", z=16),
        _latent(family="cv-vae-sd3", z=16, fps=None),
        _latent(frames=None, height=None, width=None),
        _latent(t=1, frames=1, height=32, width=48),
    ],
    ids=["video", "batch", "frames", "iv", "no rate", "no size", "image"],
)
def test_a_latent_comes_back_with_its_facts(comfy: Comfy, latent: dict[str, Any]) -> None:
    kept = latent["samples"].clone()
    saved, path = _save(comfy, latent, "latents/round")
    loaded, fps, info = _load(comfy, path)
    t = kept.shape[2] if kept.ndim == 5 else kept.shape[0]
    full = {"frames": 4 * t - 3, "height": 32, "width": 48}
    assert saved["cviv"] == latent["cviv"]
    assert loaded["cviv"] == {**full, **latent["cviv"]}
    assert torch.equal(loaded["samples"], kept)
    assert torch.equal(saved["samples"], kept)
    assert loaded["samples"].is_contiguous()
    assert fps == (float(Fraction(24000, 1001)) if "fps" in latent["cviv"] else 24.0)
    assert latent["cviv"]["family"] in info
    assert ("not known" in info) == ("fps" not in latent["cviv"])


def test_files_are_numbered_and_announced(comfy: Comfy) -> None:
    year, folder = time.strftime("%Y"), comfy.base / "output" / "many"
    names = [_save(comfy, _latent(), "many/%year%_%width%x%height%")[1] for _ in range(2)]
    assert names == [folder / f"{year}_41x31_0000{n}.latent.safetensors" for n in (1, 2)]
    assert comfy.ui["1"]["latents"] == [{"filename": names[1].name, "subfolder": "many", "type": "output"}]
    names[1].rename(folder / f"{year}_41x31_00017.latent.safetensors")
    assert _save(comfy, _latent(), f"many/{year}_41x31")[1].name == f"{year}_41x31_00018.latent.safetensors"
    assert _save(comfy, _latent(), "plain")[1] == comfy.base / "output" / "plain_00001.latent.safetensors"
    assert comfy.ui["1"]["latents"][0]["subfolder"] == ""
    _save(comfy, _latent(), ".cache/deep/plain")
    assert comfy.ui["1"]["latents"][0]["subfolder"] == ".cache/deep"
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_the_workflow_is_in_the_file(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(prefix: str) -> dict[str, str]:
        prompt = {"1": {"class_type": SAVE, "inputs": {"filename_prefix": prefix, "when_file_exists": REUSE}}}
        prompt["1"]["inputs"]["samples"] = comfy.give(prompt, _latent())
        comfy.run(prompt, extra={"extra_pnginfo": {"workflow": {"nodes": ["é"]}, "frames": "not ours"}})
        path = comfy.base / "output" / f"{prefix}.latent.safetensors"
        with safe_open(path, framework="pt") as file:
            return file.metadata()

    kept = texts("latents/with")
    assert json.loads(kept["workflow"]) == {"nodes": ["é"]}
    assert json.loads(kept["prompt"])["1"]["class_type"] == SAVE
    assert kept["frames"] == "15"
    monkeypatch.setattr(comfy.module("comfy.cli_args").args, "disable_metadata", True)
    assert not {"workflow", "prompt"} & set(texts("latents/without"))


def test_a_file_is_reused_and_nothing_is_computed(comfy: Comfy) -> None:
    prompt = {"1": {"class_type": SAVE, "inputs": {"filename_prefix": "resume/a", "when_file_exists": REUSE}}}
    link = comfy.give(prompt, _latent())
    prompt["1"]["inputs"]["samples"] = link
    first, again = comfy.take(prompt, ["1", 0]), comfy.take(prompt, ["1", 0])
    executor = comfy.executor()
    comfy.run(deepcopy(prompt), executor)
    kept = comfy.taken[first]
    path = comfy.base / "output" / "resume" / "a.latent.safetensors"
    written = path.stat().st_mtime_ns
    comfy.given.pop(link[0])  # what comes before would fail now
    for runner in (executor, comfy.executor()):
        comfy.run(deepcopy(prompt), runner)  # ComfyUI keeps fingerprints in the prompt, and clients send a new one
        assert torch.equal(comfy.taken[again]["samples"], kept["samples"])
        assert comfy.taken[again]["cviv"] == kept["cviv"]
    assert path.stat().st_mtime_ns == written
    path.unlink()
    comfy.run(deepcopy(prompt), executor)  # this executor still has what comes before
    assert path.exists()
    path.unlink()
    with pytest.raises(NodeError) as caught:
        comfy.run(deepcopy(prompt))
    assert caught.value.node_type == "TestGive"
    comfy.given[link[0]] = _latent(t=3, frames=9)
    comfy.run(deepcopy(prompt))
    assert comfy.taken[again]["samples"].shape[2] == 3
    assert path.exists()


def test_a_damaged_file_is_not_reused(comfy: Comfy) -> None:
    _, path = _save(comfy, _latent(), "resume/damaged", REUSE)
    path.write_bytes(path.read_bytes()[:-40])
    _, other = _save(comfy, _latent(), "resume/damaged", REUSE)
    assert other.name == "damaged_00001.latent.safetensors"


def test_a_file_is_reused_for_the_same_inputs_alone(comfy: Comfy) -> None:
    first, path = _save(comfy, _latent(t=5), "resume/same", REUSE)
    second, other = _save(comfy, _latent(t=4, frames=12), "resume/same", REUSE)
    assert other != path
    assert not torch.equal(first["samples"], second["samples"])
    assert torch.equal(_load(comfy, path)[0]["samples"], first["samples"])
    assert torch.equal(_load(comfy, other)[0]["samples"], second["samples"])


def test_every_item_of_a_list_has_its_own_latent(comfy: Comfy) -> None:
    prompt = {"1": {"class_type": SAVE, "inputs": {"filename_prefix": "resume/list", "when_file_exists": REUSE}}}
    items = [_latent(t=n, frames=4 * n - 3) for n in (2, 3, 4)]
    prompt["1"]["inputs"]["samples"] = comfy.give(prompt, items, each=True)
    taken = comfy.take(prompt, ["1", 0], each=True)
    for _ in range(2):
        comfy.run(deepcopy(prompt))
        got = comfy.taken[taken]
        assert [float(one["samples"].sum()) for one in got] == [float(one["samples"].sum()) for one in items]
    assert len(list((comfy.base / "output" / "resume").glob("list*"))) == 3


def test_fingerprints_tell_nothing_of_this_machine(comfy: Comfy) -> None:
    _, path = _save(comfy, _latent(), "resume/private", REUSE)
    node = comfy.nodes[SAVE]
    shown = [node.fingerprint_inputs(filename_prefix="resume/private", when_file_exists=REUSE)]
    shown.append(
        comfy.nodes[LOAD].fingerprint_inputs(
            file="output/resume/private.latent.safetensors", first_latent=0, latent_count=0
        )
    )
    shown.append(comfy.nodes[LOAD].fingerprint_inputs(file="output/nothing", first_latent=0, latent_count=0))
    assert not any(str(part) in str(shown) for part in path.parents[:3])


def test_the_vae_names_the_family_where_the_latent_does_not(comfy: Comfy) -> None:
    with pytest.raises(NodeError, match=r"does not say which VAE it belongs to.* connect the VAE"):
        _save(comfy, _plain(_latent()), "latents/who")
    vae = _vae(comfy, "demo-cv-vae")
    saved, path = _save(comfy, _plain(_latent(layout="frames")), "latents/who", vae=vae)
    assert saved["cviv"] == {"family": "cv-vae", "layout": "frames"}
    assert _load(comfy, path)[0]["cviv"]["family"] == "cv-vae"
    with pytest.raises(NodeError, match=r"has 4 channels and the VAE .* takes 16"):
        _save(comfy, _plain(_latent()), "latents/who", vae=_vae(comfy, "demo-iv-vae"))
    with pytest.raises(NodeError, match="needs a VAE from Load Video VAE"):
        _save(comfy, _plain(_latent()), "latents/who", vae=object())


def test_the_vae_is_loaded_only_where_it_is_needed(comfy: Comfy) -> None:
    prompt = {"1": {"class_type": SAVE, "inputs": {"filename_prefix": "latents/lazy", "when_file_exists": NUMBER}}}
    prompt["1"]["inputs"]["samples"] = comfy.give(prompt, _latent())
    prompt["1"]["inputs"]["vae"] = comfy.give(prompt, None)
    comfy.given.pop(prompt["1"]["inputs"]["vae"][0])  # computing it would fail
    comfy.run(prompt)


def test_a_noise_mask_is_announced_as_lost(comfy: Comfy, caplog: pytest.LogCaptureFixture) -> None:
    latent = {**_latent(), "noise_mask": torch.ones(1, 32, 48)}
    saved, path = _save(comfy, latent, "latents/mask")
    assert "noise mask of the latent is not saved" in caplog.text
    assert saved["noise_mask"] is latent["noise_mask"]
    assert "noise_mask" not in _load(comfy, path)[0]


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("../escaped", "holds '..' as a folder"),
        ("latents/../../escaped", "holds '..' as a folder"),
        ("latents\\..\\..\\escaped", "holds '..' as a folder"),
        ("/tmp/escaped", "is an absolute path"),
        ("\\\\server\\share\\escaped", "is an absolute path"),
        ("C:\\escaped", "holds ':'"),
        ("latents/escaped:stream", "holds ':'"),
        ("latents/a\u0000b", "which not every system allows"),
        ("latents/\ud800", "which not every system allows"),
        ("latents/" + 101 * "é", "holds a name of 202 bytes; 200 are allowed"),
        ("latents/", "has no name"),
        ("", "has no name"),
        ("latents//escaped", "is no name on every system"),
        ("latents/NUL", "is no name on every system"),
        ("com1.old/escaped", "is no name on every system"),
        ("latents /escaped", "is no name on every system"),
    ],
)
def test_a_name_cannot_leave_the_output_folder(comfy: Comfy, prefix: str, said: str) -> None:
    before = sorted(comfy.base.rglob("*"))
    for mode in (NUMBER, REUSE):
        with pytest.raises(RefusedError, match=said):
            _save(comfy, _latent(), prefix, mode)
        with pytest.raises(NodeError, match=said):  # a name through a link passes no validation
            _linked(comfy, prefix, mode)
    assert sorted(comfy.base.rglob("*")) == before


def _linked(comfy: Comfy, prefix: str, mode: str) -> None:
    prompt = {"1": {"class_type": SAVE, "inputs": {"when_file_exists": mode}}}
    prompt["1"]["inputs"] |= {"samples": comfy.give(prompt, None), "filename_prefix": comfy.give(prompt, prefix)}
    comfy.given.pop(prompt["1"]["inputs"]["samples"][0])  # nothing is computed for such a name
    comfy.run(prompt)


def test_a_folder_may_be_a_link_to_another_disk(comfy: Comfy, tmp_path: Path) -> None:
    for root in ("output", "input"):
        try:
            os.symlink(tmp_path, comfy.base / root / "out", target_is_directory=True)
        except OSError:
            pytest.skip("this system makes no links")
    saved, path = _save(comfy, _latent(), "out/elsewhere")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    (tmp_path / "round").symlink_to(comfy.base / "output", target_is_directory=True)  # a link to a folder around it
    for name in (f"output/out/{path.name}", f"input/out/{path.name}"):
        assert name in comfy.nodes[LOAD].INPUT_TYPES()["required"]["file"][1]["options"]
        loaded, *_ = comfy.call(LOAD, file=name, first_latent=0, latent_count=0, layout="as saved")
        assert torch.equal(loaded["samples"], saved["samples"])
    for root in ("output", "input"):
        (comfy.base / root / "out").unlink()


def test_passing_names_are_not_reused(comfy: Comfy) -> None:
    with pytest.raises(NodeError, match=r"holds %second%, which changes.* 'number a new file'"):
        _save(comfy, _latent(), "latents/%second%", REUSE)
    _, path = _save(comfy, _latent(), "latents/%year%/day", REUSE)
    assert path == comfy.base / "output" / "latents" / time.strftime("%Y") / "day.latent.safetensors"
    assert _save(comfy, _latent(), "latents/whole.latent.safetensors", REUSE)[1].name == "whole.latent.safetensors"


@pytest.mark.parametrize(
    ("first", "count", "frames"), [(0, 0, 15), (0, 2, 5), (1, 2, 5), (1, 0, 11), (4, 0, 1), (3, 2, 3)]
)
def test_a_part_is_loaded_alone(comfy: Comfy, first: int, count: int, frames: int) -> None:
    latent = _latent()
    _, path = _save(comfy, latent, "latents/part")
    part, _, info = _load(comfy, path, first, count)
    stop = first + count if count else 5
    assert torch.equal(part["samples"], latent["samples"][:, :, first:stop])
    assert part["cviv"] == {**latent["cviv"], "frames": frames}
    assert f"{stop - first} of 5, from number {first} on" in info
    vae = _vae(comfy, "demo-cv-vae")
    images, *_ = comfy.call("CVIV_Decode", vae=vae, samples=part, memory_budget_gb=0.0, preview=False)
    assert images.shape == (frames, 31, 41, 3)


@pytest.mark.parametrize(("first", "count"), [(5, 0), (0, 6), (4, 2)])
def test_a_part_that_is_not_there_is_refused(comfy: Comfy, first: int, count: int) -> None:
    _, path = _save(comfy, _latent(), "latents/short")
    with pytest.raises(NodeError, match=r"has 5 latent frames, numbered from 0; .*Give a smaller range"):
        _load(comfy, path, first, count)


def test_the_layout_can_be_chosen(comfy: Comfy) -> None:
    latent = _latent()
    _, path = _save(comfy, latent, "latents/layout")
    batch = _load(comfy, path, layout="clip as frame batch")[0]
    assert torch.equal(batch["samples"], latent["samples"][0].movedim(1, 0))
    assert batch["cviv"]["layout"] == "frames"
    _, path = _save(comfy, batch, "latents/layout")
    assert torch.equal(_load(comfy, path)[0]["samples"], batch["samples"])
    assert torch.equal(_load(comfy, path, layout="video 5-D")[0]["samples"], latent["samples"])
    _, path = _save(comfy, _latent(family="iv-vae", z=16), "latents/layout")
    with pytest.raises(NodeError, match="made by iv-vae, whose latent space is its own"):
        _load(comfy, path, layout="clip as frame batch")


def test_separate_images_stay_separate(comfy: Comfy) -> None:
    latent = _latent(layout="frames", frames=None)
    latent["cviv"]["layout"] = "images"
    _, path = _save(comfy, latent, "latents/images")
    loaded, _, info = _load(comfy, path)
    assert torch.equal(loaded["samples"], latent["samples"])
    assert loaded["cviv"]["layout"] == "images"
    assert "1 frames" in info


def test_files_are_listed_newest_first(comfy: Comfy) -> None:
    def listed() -> list[str]:
        return comfy.nodes[LOAD].INPUT_TYPES()["required"]["file"][1]["options"]

    _, path = _save(comfy, _latent(), "list/old")
    inner = comfy.base / "input" / "latents" / "deep"
    inner.mkdir(parents=True)
    (inner / "other.safetensors").write_bytes(path.read_bytes())
    (comfy.base / "input" / "weights.safetensors").write_bytes(b"x")
    (comfy.base / "output" / "list" / ".hidden.latent.safetensors").write_bytes(b"x")
    os.utime(path, (1, 1))
    os.utime(inner / "other.safetensors", (2**31, 2**31))
    assert listed()[0] == "input/latents/deep/other.safetensors"
    assert listed()[-1] == "output/list/old_00001.latent.safetensors"
    assert not [name for name in listed() if "weights" in name or "hidden" in name]
    assert _load(comfy, inner / "other.safetensors")[0]["cviv"] == _latent()["cviv"]


def test_a_changed_file_is_loaded_again(comfy: Comfy) -> None:
    _, path = _save(comfy, _latent(), "latents/changing", REUSE)
    inputs = {"file": f"output/latents/{path.name}", "first_latent": 0, "latent_count": 0, "layout": "as saved"}
    prompt = {"1": {"class_type": LOAD, "inputs": inputs}}
    key = comfy.take(prompt, ["1", 0])
    executor = comfy.executor()
    comfy.run(deepcopy(prompt), executor)
    path.unlink()
    _save(comfy, _latent(t=2, frames=5), "latents/changing", REUSE)
    comfy.run(deepcopy(prompt), executor)
    assert comfy.taken[key]["samples"].shape[2] == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("output/nowhere.latent.safetensors", "There is no file"),
        ("output/../../secret.latent.safetensors", "choose one of the list"),
        ("/etc/passwd", "choose one of the list"),
        ("temp/a.latent.safetensors", "choose one of the list"),
        ("output/stock_00001_.latent", "was saved by ComfyUI's Save Latent: put it into input/ and use Load Latent"),
    ],
)
def test_other_names_are_refused_before_the_run(comfy: Comfy, name: str, said: str) -> None:
    comfy.call("SaveLatent", samples=_plain(_latent()), filename_prefix="stock") if "stock" in name else None
    with pytest.raises(RefusedError, match=said):
        comfy.call(LOAD, file=name, first_latent=0, latent_count=0, layout="as saved")


def test_other_files_are_named_for_what_they_are(comfy: Comfy) -> None:
    path = comfy.base / "output" / "wrong.latent.safetensors"
    path.write_text("<html>login</html>")
    with pytest.raises(NodeError, match="is an HTML page"):
        _load(comfy, path)
