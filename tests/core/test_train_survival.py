"""What a run survives: values that are not finite, full disks, memory and processes that end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vae_core
from vae_core.training import loop
from vae_core.training.checkpoint import Checkpoints, TrainingError, read_checkpoint
from vae_core.training.clips import Batch
from vae_core.training.config import ValidationConfig
from vae_core.training.journal import read_log
from vae_core.training.loop import BEST, FINAL, Trainer

from .small_training import CPU, Squares, same_checkpoints, small_config, watching


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(small_config(tmp_path), CPU, Squares(1, 5, poisoned_at=(2,)))
    before: list[dict[str, Tensor]] = []
    watch = replace(watching(), step=lambda *_: before.append({k: v.clone() for k, v in _weights(trainer).items()}))
    assert trainer.run(watch)
    assert all(torch.equal(before[1][name], tensor) for name, tensor in before[2].items())
    assert any(not torch.equal(before[2][name], tensor) for name, tensor in before[3].items())
    assert re.search(r"Step 3 gave values that are not finite \(.*l1.*\), and changes nothing", caplog.text)
    log = read_log(tmp_path / "log.jsonl", "training")
    assert [line["skipped"] for line in log] == [0, 0, 1, 1, 1, 1]
    assert "l1" not in log[2]
    for _, path in trainer.checkpoints.all():
        state = read_checkpoint(path)
        assert state["skipped"] == 1
        assert all(torch.isfinite(tensor).all() for tensor in state["trained"].values())


def test_many_steps_that_are_not_finite_go_back_to_the_last_good_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = replace(small_config(tmp_path).run, most_skipped=1)
    trainer = Trainer(small_config(tmp_path, run=run), CPU, Squares(1, 5, poisoned_at=(3, 4)))
    assert trainer.run(watching())
    assert "2 steps in a row gave values that are not finite" in caplog.text
    assert "Back to step_00000002.ckpt, and on from there with other batches" in caplog.text
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl", "training")] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]  # of the second way
    assert trainer.batches.state_dict() == {"index": 9}  # 5 steps, back to 2, and 4 more
    again = Trainer(small_config(tmp_path / "again", run=run), CPU, Squares(1, 5, poisoned_at=tuple(range(4, 99))))
    with pytest.raises(TrainingError, match=r"Step 6: 2 steps .* checkpoint is .*step_00000004.ckpt: go on with"):
        again.run(watching())
    first = Trainer(small_config(tmp_path / "first", run=run), CPU, Squares(1, 5, poisoned_at=(0, 1)))
    with pytest.raises(TrainingError, match=r"Step 2: .*There is none yet, with a smaller rate \(--set optimizer"):
        first.run(watching())
    assert all(torch.isfinite(parameter).all() for parameter in first.networks.trained.parameters())


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return trainer.coder.state_dict()


def test_a_checkpoint_is_checked_before_it_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = small_config(
        tmp_path, validation=ValidationConfig(sources=("demo-clip",), size=(16, 16), frames=5, clips=1, every=100)
    )
    trainer = Trainer(config, CPU, Squares(1, 5))
    broken = [False]

    def spoil(done: int, total: int, figures: Mapping[str, float]) -> None:
        if done == 4 and not broken[0]:
            broken[0] = True  # finite weights whose output is not
            with torch.no_grad():
                for parameter in trainer.networks.best_coder.last_layer:
                    parameter.fill_(3e38)

    assert trainer.run(replace(watching(), step=spoil))
    assert (
        "Step 4: weights, or what they make of a validation clip, are not finite. Back to step_00000002" in caplog.text
    )
    assert trainer.networks.are_finite()
    assert [step for step, _ in trainer.checkpoints.all()] == [4, 6]


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        validation=ValidationConfig(sources=("demo-clip",), size=(16, 16), frames=5, clips=1, every=1),
        run=replace(small_config(tmp_path).run, ema=0.0),
    )
    trainer = Trainer(config, CPU, Squares(1, 5))
    kept: dict[int, dict[str, Tensor]] = {}
    watch = replace(watching(), validation=lambda done, _: kept.update({done: _copy(trainer)}))
    trainer.run(watch)
    psnrs = {x["step"]: x["psnr"] for x in read_log(tmp_path / "log.jsonl", "validation")}
    best = max(psnrs, key=lambda step: psnrs[step])
    assert trainer.best == (best, psnrs[best])
    found = vae_core.load(tmp_path / BEST).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept[best].items())
    resumed = Trainer(config, CPU, Squares(1, 5))
    resumed.resume()
    assert resumed.best == trainer.best


def _copy(trainer: Trainer) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor.clone() for name, tensor in trainer.coder.state_dict().items()}


def test_what_ends_a_run_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    class Failing(Squares):
        error: Exception | None = None

        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                if self.error is not None and batch.index == 3:
                    raise self.error
                yield batch

    run = replace(small_config(tmp_path).run, save_every=100)
    whole = Trainer(small_config(tmp_path / "whole", run=run), CPU, Squares(1, 5))
    assert whole.run(watching())
    for number, (error, words) in enumerate(
        (
            (
                MemoryError(),
                r"Step 4: memory ran out .*docs/training.md.*Go on from .*step_00000003.ckpt with --resume",
            ),
            (
                RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
                "a process that decodes clips ended",
            ),
            (OSError("a cable"), "a cable"),
        )
    ):
        out = tmp_path / str(number)
        failing = Failing(1, 5)
        failing.error = error
        with pytest.raises((TrainingError, OSError), match=words):
            Trainer(small_config(out, run=run), CPU, failing).run(watching())
        resumed = Trainer(small_config(out, run=run), CPU, Squares(1, 5))
        resumed.resume()
        assert resumed.step == 3
        assert resumed.run(watching())
        same_checkpoints(tmp_path / "whole/checkpoints/step_00000006.ckpt", out / "checkpoints/step_00000006.ckpt")


def test_a_full_disk_is_said_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resource = pytest.importorskip("resource")
    run = replace(small_config(tmp_path).run, steps=8)
    trainer = Trainer(small_config(tmp_path, run=run), CPU, Squares(1, 5))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(done: int, total: int, figures: Mapping[str, float]) -> None:
        size = 100_000 if done in (3, 4, 5, 6) else before[0]  # nothing larger can be written
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    try:
        assert trainer.run(replace(watching(), step=limit))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(
        r"disk of .*checkpoints is full, and the checkpoint of step 4 is not written; the last one is .*_00000002.ckpt",
        caplog.text,
    )
    assert [step for step, _ in trainer.checkpoints.all()] == [2, 8]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert (tmp_path / FINAL).exists()


def test_at_the_end_of_a_run_it_is_waited_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    run = replace(small_config(tmp_path).run, steps=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(done: int, total: int, figures: Mapping[str, float]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    def room(_: float) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(loop.time, "sleep", room)
    try:
        assert Trainer(small_config(tmp_path, run=run), CPU, Squares(1, 5)).run(replace(watching(), step=limit))
        assert (tmp_path / FINAL).exists()
        monkeypatch.setattr(loop.time, "sleep", lambda _: None)
        stopping = Trainer(small_config(tmp_path / "b", run=run), CPU, Squares(1, 5))
        with pytest.raises(TrainingError, match=r"is full, and the checkpoint of step 2 is not written; there is none"):
            stopping.run(replace(watching(stop_at=2), step=limit, should_stop=lambda: stopping.step == 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_finished_leaves_the_old_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(folder=tmp_path, keep=1)
    checkpoints.save(1, {"x": torch.ones(2)})
    with pytest.raises((AttributeError, TypeError)):
        checkpoints.save(2, {"x": lambda: 1})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.ckpt"]
    assert torch.equal(read_checkpoint(checkpoints.save(10, {"x": torch.zeros(2)}))["x"], torch.zeros(2))
    assert checkpoints.all() == [(10, tmp_path / "step_00000010.ckpt")]
    (tmp_path / "step_00000010.ckpt").write_bytes(b"cut off")
    with pytest.raises(TrainingError, match=r"step_00000010.ckpt is no checkpoint .* Remove it to go on from the one"):
        read_checkpoint(tmp_path / "step_00000010.ckpt")
