"""Cancel and errors in the middle of a decode: the next run works, nothing is held, and the latent is not lost."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .calls import DECODE, ENCODE, LOAD_LATENT, SAVE_VIDEO, decode, decode_to_video, encode
from .conftest import LoadVAE
from .inprocess import CancelledRunError, Comfy, NodeError, Progress
from .weights import SMALL, picture


@pytest.fixture(autouse=True)
def _nothing_remembered(comfy: Comfy) -> Iterator[None]:
    yield
    comfy.pack("nodes.bridge.session").SESSION.clear()


@pytest.mark.parametrize("name", ["cv", "iv"])
@pytest.mark.parametrize("node", ["CVIV_Decode", "VAEDecode", "VAEDecodeTiled"])
def test_cancel_in_the_middle_of_a_decode(comfy: Comfy, load_vae: LoadVAE, name: str, node: str) -> None:
    vae = load_vae(SMALL[name])
    latent, _ = encode(comfy, vae, picture(65, 16, 24))
    tiles = {"tile_size": 64, "overlap": 0, "temporal_size": 8, "temporal_overlap": 4}
    widgets = {"CVIV_Decode": DECODE, "VAEDecode": {}, "VAEDecodeTiled": tiles}[node]

    def cancel(report: Progress) -> None:
        if report.value >= 16:
            comfy.module("nodes").interrupt_processing(True)

    comfy.on_progress = cancel
    with pytest.raises(CancelledRunError) as caught:
        comfy.call(node, vae=vae, samples=latent, **widgets)
    assert caught.value.node_type == node
    stopped_at = comfy.progress[-1].value
    assert 16 <= stopped_at < 40  # at most one chunk more

    comfy.on_progress = None
    images, *_ = comfy.call(node, vae=vae, samples=latent, **widgets)
    assert images.shape == (65, 16, 24, 3)


@pytest.mark.parametrize("name", ["cv", "iv", "image"])
@pytest.mark.parametrize("node", ["CVIV_Decode", "VAEDecodeTiled", "CVIV_Encode", "VAEEncode"])
def test_cancel_in_the_middle_of_a_chunk(
    comfy: Comfy, load_vae: LoadVAE, monkeypatch: pytest.MonkeyPatch, name: str, node: str
) -> None:
    """A chunk of a large frame may take a minute: nothing runs after the step in which Cancel was pressed."""
    vae, images = load_vae(SMALL[name]), picture(1, 64, 96)
    latent, _ = encode(comfy, vae, images)
    direction: Any = "encode" if "Encode" in node else "decode"
    given: dict[str, dict[str, Any]] = {
        "CVIV_Decode": {"samples": latent, **DECODE},
        "VAEDecodeTiled": {
            "samples": latent, "tile_size": 64, "overlap": 0, "temporal_size": 8, "temporal_overlap": 4,
        },
        "CVIV_Encode": {"images": images, **ENCODE},
        "VAEEncode": {"pixels": images},
    }  # fmt: skip
    ran: list[int] = []

    def watch(number: int, layer: torch.nn.Module) -> None:
        original = layer.forward

        def forward(*args: Any, **keywords: Any) -> Any:
            ran.append(number)
            if number == 2:
                comfy.module("nodes").interrupt_processing(True)
            return original(*args, **keywords)

        monkeypatch.setattr(layer, "forward", forward)

    for number, step in enumerate(vae.codec.model.steps(direction)):
        watch(number, step.layer)
    with pytest.raises(CancelledRunError) as caught:
        comfy.call(node, vae=vae, **given[node])
    assert caught.value.node_type == node
    assert max(ran) == ran[-1] == 2
    assert direction == "encode" or comfy.progress == []  # an encode counts the frames that it has read


def test_cancel_in_the_middle_of_an_encode(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae, images = load_vae(SMALL["iv"]), picture(65, 16, 24)
    comfy.on_progress = lambda _report: comfy.module("nodes").interrupt_processing(True)
    with pytest.raises(CancelledRunError) as caught:
        encode(comfy, vae, images)
    assert caught.value.node_type == "CVIV_Encode"
    comfy.on_progress = None
    latent, _ = encode(comfy, vae, images)
    assert latent["samples"].shape[2] == 17


def test_a_cancelled_decode_frees_its_frames(comfy: Comfy, load_vae: LoadVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = load_vae(SMALL["cv"])
    latent, _ = encode(comfy, vae, picture(65, 16, 24))
    held: list[weakref.ref[torch.Tensor]] = []
    _watch(monkeypatch, vae, lambda made: held.append(weakref.ref(made)))
    comfy.on_progress = lambda _report: comfy.module("nodes").interrupt_processing(True)
    with pytest.raises(CancelledRunError):
        decode(comfy, vae, latent)
    gc.collect()
    assert held
    assert [one for one in held if one() is not None] == []


@pytest.mark.parametrize(("name", "frames", "width"), [("cv", 33, 96), ("iv", 9, 256)])
@pytest.mark.parametrize("node", ["CVIV_Decode", "VAEDecode"])
def test_out_of_memory_once(
    comfy: Comfy, load_vae: LoadVAE, monkeypatch: pytest.MonkeyPatch, name: str, frames: int, width: int, node: str
) -> None:
    """The failed chunk is done again in smaller tiles; frames that were finished are not decoded twice."""
    vae = load_vae(SMALL[name])
    latent, _ = encode(comfy, vae, picture(frames, 64, width))
    widgets = DECODE if node == "CVIV_Decode" else {}
    expected, *_ = comfy.call(node, vae=vae, samples=latent, **widgets)

    calls = 0

    def fail_at_second(_made: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("injected")

    _watch(monkeypatch, vae, fail_at_second)
    images, *rest = comfy.call(node, vae=vae, samples=latent, **widgets)
    assert calls >= 2
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=0)
    values = [report.value for report in comfy.progress]
    assert values == sorted(values)
    if node == "CVIV_Decode":
        assert "out of memory after" in rest[-1]
        assert "went on from there by a smaller plan: Exact " in rest[-1]  # strips or tiles
        assert " per chunk" in rest[-1]

    monkeypatch.undo()
    again, *rest = comfy.call(node, vae=vae, samples=latent, **widgets)
    torch.testing.assert_close(again, expected, atol=1e-3, rtol=0)
    if node == "CVIV_Decode":
        assert "memory ran out in an earlier run: begins with what worked then" in rest[-1]
        assert "Whole frames" not in rest[-1]
        _, _, report = decode(comfy, vae, latent, memory_budget_gb=16.0)
        assert "earlier run" not in report
        assert "Whole frames" in report
        _, _, report = decode(comfy, vae, latent)
        assert "earlier run" not in report  # forgotten for good


def test_out_of_memory_without_end(comfy: Comfy, load_vae: LoadVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the smallest tiles fail, too, the error reaches the user with the latent's file, and the next run works."""
    vae = load_vae(SMALL["iv"])
    latent, _ = encode(comfy, vae, picture(9, 32, 32))
    before = _rescued(comfy)
    _break(monkeypatch, vae, torch.OutOfMemoryError("injected"))
    with pytest.raises(
        NodeError, match=r"injected[\s\S]*The latent is saved as .*Load Video Latent reads it"
    ) as caught:
        decode(comfy, vae, latent)
    assert "OutOfMemory" in caught.value.exception_type
    (file,) = _rescued(comfy) - before
    assert str(file) in str(caught.value)

    monkeypatch.undo()
    label = file.relative_to(comfy.base).as_posix()
    (again, *_) = comfy.call("CVIV_LoadVideoLatent", file=label, **LOAD_LATENT)
    assert torch.equal(again["samples"], latent["samples"])
    images, *_ = decode(comfy, vae, again)
    assert images.shape == (9, 32, 32, 3)
    assert _rescued(comfy) - before == {file}


@pytest.mark.parametrize("wanted", [True, False])
def test_a_video_that_fails_keeps_its_latent(
    comfy: Comfy, load_vae: LoadVAE, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    """Any error counts, in the node that takes the VIDEO, too; and a latent that knows nothing of itself."""
    vae = load_vae(SMALL["cv"])
    latent = {"samples": torch.zeros(5, 4, 2, 3)}
    video = decode_to_video(comfy, vae, latent, save_latent_on_failure=wanted)
    before = _rescued(comfy)
    _break(monkeypatch, vae, RuntimeError("a kernel is missing"))
    with pytest.raises(NodeError, match="a kernel is missing") as caught:
        comfy.call("SaveVideo", video=video, filename_prefix="failed", **SAVE_VIDEO)
    assert len(_rescued(comfy) - before) == int(wanted)
    assert ("The latent is saved as" in str(caught.value)) is wanted


def test_a_latent_that_cannot_be_saved_hides_no_error(
    comfy: Comfy, load_vae: LoadVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = load_vae(SMALL["cv"])
    latent, _ = encode(comfy, vae, picture(5, 16, 16))
    monkeypatch.setattr(comfy.pack("nodes.clips.decode"), "RESCUED", "taken/undecoded")
    (comfy.base / "output" / "taken").touch()
    _break(monkeypatch, vae, RuntimeError("a kernel is missing"))
    with pytest.raises(NodeError, match=r"a kernel is missing\s+The latent is saved as") as caught:
        decode(comfy, vae, latent)
    assert f"{comfy.base / 'output' / 'undecoded_00001.latent.safetensors'}" in str(caught.value)
    folders = comfy.module("folder_paths")
    blocked = comfy.base / "output" / "taken"
    monkeypatch.setattr(folders, "get_output_directory", lambda: str(blocked))
    with pytest.raises(NodeError, match="is emptied when ComfyUI starts: move the file away"):
        decode(comfy, vae, latent)
    monkeypatch.setattr(folders, "get_temp_directory", lambda: str(blocked))
    with pytest.raises(NodeError, match=r"a kernel is missing\s+The latent could not be saved: The folder"):
        decode(comfy, vae, latent)


def test_a_cancel_saves_nothing(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae(SMALL["cv"])
    latent, _ = encode(comfy, vae, picture(33, 16, 24))
    before = _rescued(comfy)
    comfy.on_progress = lambda _report: comfy.module("nodes").interrupt_processing(True)
    with pytest.raises(CancelledRunError):
        decode(comfy, vae, latent)
    assert _rescued(comfy) == before


def test_the_report_names_blended_tiles(comfy: Comfy, load_vae: LoadVAE) -> None:
    """No widget chooses them; whoever does is told."""
    vae = load_vae(SMALL["cv"])
    run = comfy.pack("nodes.bridge.running").Run(5)
    tiles = comfy.pack("vae_core").ReferencePlan(64, 0.25)
    chunks = list(vae.decode_chunks(torch.randn(1, 4, 2, 8, 14), run, tiles=tiles))
    assert chunks[0].shape == (1, 5, 64, 112, 3)
    head, *details = run.finish().splitlines()
    assert head.startswith("5 frames")
    assert "not exact: blended" in head
    assert "Official tiles of 64 px, 2 per chunk" in details


# ---------------------------------------------------------------------------------------------------- session


def test_the_session_learns_from_the_chunks_that_reach_the_peak(comfy: Comfy) -> None:
    session = comfy.pack("nodes.bridge.session")
    slack, usual = comfy.pack("vae_core.plan.planner").SLACK, comfy.pack("vae_core.plan.planner").MARGIN
    facts, gib, in_use = session.Session(), 2**30, 0
    plan = SimpleNamespace(working_bytes=gib, waiting_bytes=gib)
    gauge = session.Gauge(facts, "cuda:0", plan=plan, chunks=2, peak=lambda: gib + in_use)
    in_use = gib // 4
    gauge.chunk_done()
    assert facts.margin("cuda:0") == usual
    in_use = 3 * gib
    gauge.chunk_done()
    assert facts.margin("cuda:0") == pytest.approx(3 * slack)
    in_use = 9 * gib
    gauge.chunk_done()
    assert facts.margin("cuda:0") == pytest.approx(3 * slack)
    assert facts.margin("cuda:1") == usual


def test_the_session_learns_nothing_from_a_spoilt_run_or_on_a_cpu(comfy: Comfy) -> None:
    session = comfy.pack("nodes.bridge.session")
    facts = session.Session()
    plan = SimpleNamespace(working_bytes=2**30, waiting_bytes=0)
    gauge = session.Gauge(facts, "cuda:0", plan=plan, chunks=1, peak=lambda: 2**40)
    gauge.spoil()
    gauge.chunk_done()
    assert session.peak_reader(torch.device("cpu")) is None
    session.Gauge(facts, "cpu", plan=plan, chunks=1, peak=None).chunk_done()
    assert facts.margin("cuda:0") == facts.margin("cpu") == comfy.pack("vae_core.plan.planner").MARGIN


def test_the_session_learns_how_long_chunks_take(comfy: Comfy) -> None:
    session, rates = comfy.pack("nodes.bridge.session"), comfy.pack("vae_core.plan.rates").NOMINAL
    facts, moments = session.Session(), iter([1.0, 4.0, 7.0, 10.0, 99.0])
    plan = SimpleNamespace(working_bytes=0, waiting_bytes=0, chunks=10, seconds=15.0)
    gauge = session.Gauge(facts, "cuda:0", plan=plan, chunks=1, peak=None, clock=lambda: next(moments))
    assert facts.rates("cuda:0", rates) is rates
    for _ in range(5):
        gauge.chunk_done()
    assert facts.rates("cuda:0", rates).flops == pytest.approx(rates.flops / 2)  # 3 s a chunk, and 1.5 were said
    assert not facts.rates("cuda:0", rates).guessed
    facts.clear()
    gauge = session.Gauge(facts, "cuda:0", plan=plan, chunks=1, peak=None)
    gauge.spoil()
    for _ in range(5):
        gauge.chunk_done()
    assert facts.rates("cuda:0", rates) is rates


def test_a_measured_margin_plans_smaller(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae, session = load_vae(SMALL["cv"]), comfy.pack("nodes.bridge.session").SESSION
    shape, budget = (1, 4, 5, 32, 32), 2**29
    limits = comfy.pack("nodes.bridge.limits").Limits(budget=budget)
    usual = vae.plan("decode", shape, limits)
    session.measured((str(vae.device), vae.vae_dtype, "cv-vae"), 20.0)
    measured = vae.plan("decode", shape, limits)
    assert measured.tiles != usual.tiles
    assert measured.device_bytes <= budget or not measured.fits


def _rescued(comfy: Comfy) -> set[Path]:
    return set((comfy.base / "output" / "latents").glob("undecoded_*"))


def _break(monkeypatch: pytest.MonkeyPatch, vae: Any, error: Exception) -> None:
    """Make every layer of the decoder fail."""

    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise type(error)(*error.args)

    for module in _deepest(vae):
        monkeypatch.setattr(module, "forward", fail)


def _watch(monkeypatch: pytest.MonkeyPatch, vae: Any, see: Any) -> None:
    """Call `see` with pixels that the decoder's last layer makes, each time it runs."""
    last = vae.codec.model.steps("decode")[-1].layer
    original = last.forward

    def watched(*args: Any, **keywords: Any) -> Any:
        made = original(*args, **keywords)
        see(made.tensors[-1])
        return made

    monkeypatch.setattr(last, "forward", watched)


def _deepest(vae: Any) -> list[torch.nn.Module]:
    """The decoder's modules without children, in order."""
    return [module for module in vae.codec.model.decoder.modules() if not list(module.children())]
