"""The training loop, run for real on very small models: going on after a stop, many processes, and what is written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vae_core
from vae_core.cli.app import app
from vae_core.training.checkpoint import Checkpoints, TrainingError, read_checkpoint
from vae_core.training.clips import BatchKind
from vae_core.training.coders import VideoCoder
from vae_core.training.config import (
    DataConfig,
    DiscriminatorConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RegularizationConfig,
    TrainConfig,
    ValidationConfig,
    read_config,
)
from vae_core.training.journal import LABEL, read_log, sample_grid
from vae_core.training.loop import FINAL, Trainer

from .image_vae_2d import our_image_vae
from .small_training import CPU, SIDE, Squares, same_checkpoints, small_config, watching


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _image_file(folder: Path) -> str:
    torch.manual_seed(3)
    path = folder / "image.safetensors"
    VideoCoder(our_image_vae().model, checkpointing=False).save(path)
    return str(path)


def test_a_stopped_and_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    def config(name: str) -> TrainConfig:
        return small_config(
            tmp_path / name,
            regularization=RegularizationConfig(image_vae=_image_file(tmp_path), mapping="random"),
            discriminator=DiscriminatorConfig(start=2, width=32),
            run=replace(small_config(tmp_path).run, accumulation=2),
        )

    assert Trainer(config("whole"), CPU, Squares(1, 5)).run(watching())
    assert not Trainer(config("parts"), CPU, Squares(1, 5)).run(watching(stop_at=3))
    torch.manual_seed(99)  # nothing may depend on it
    second = Trainer(config("parts"), CPU, Squares(1, 5))
    second.resume()
    assert second.step == 3
    assert second.run(watching())
    same_checkpoints(
        tmp_path / "whole/checkpoints/step_00000006.ckpt", tmp_path / "parts/checkpoints/step_00000006.ckpt"
    )
    logs = [read_log(tmp_path / name / "log.jsonl", "training", "validation") for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    whole, parts = (vae_core.load(tmp_path / name / FINAL).model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    steps = logs[0]
    assert ["discriminator" in line for line in steps] == [False, False, True, False, True, False]
    assert {"adversarial", "adaptive_weight", "decoder_regularization", "nll", "kl"} <= steps[-1].keys()
    kept = sorted(path.name for path in (tmp_path / "whole/checkpoints").iterdir())
    assert kept == [f"step_0000000{n}.{kind}" for n in (4, 6) for kind in ("ckpt", "safetensors")]


@pytest.mark.parametrize("family", ["cv-vae", "iv-vae"])
@pytest.mark.parametrize("stage", ["image", "video"])
def test_a_few_steps_lower_the_error(stage: str, family: str, tmp_path: Path) -> None:
    size = {"widths": (32, 32, 32, 32), "blocks_per_level": 1} if family == "cv-vae" else {"dim": 4, "halves": 2}
    config = small_config(
        tmp_path,
        stage=stage,
        model=ModelConfig(family=family, init="fresh", latent_channels=4, **size),
        data=DataConfig(batches=(BatchKind(kind="image", batch=1, size=(SIDE, SIDE)),), sources=("none",)),
        loss=LossConfig(lpips_weight=0.0, kl_weight=0.1),
        optimizer=OptimizerConfig(learning_rate=0.01, kind="muon", warm_up=2),
        run=replace(small_config(tmp_path).run, steps=16, save_every=100, checkpointing=True, ema=0.0),
    )
    seen: list[Mapping[str, float]] = []
    Trainer(config, CPU, Squares(1, 5 if stage == "video" else 1, again=True)).run(watching(seen=seen))
    for name in ("l1", "nll", "total"):
        values = [figures[name] for figures in seen]
        assert sum(values[-4:]) < 0.8 * sum(values[:4]), name
    if stage == "video":
        assert vae_core.load(tmp_path / FINAL).family == family
    else:  # what the image stage writes is what inflation takes
        inflated = replace(
            config,
            stage="video",
            model=ModelConfig(family=family, init="inflate", weights=(str(tmp_path / FINAL),)),
            out=tmp_path / "inflated",
            run=replace(config.run, steps=0),
        )
        assert Trainer(inflated, CPU, Squares(1, 5)).run(watching())
        begun = replace(config, model=ModelConfig(family=family, init="weights", weights=(str(tmp_path / FINAL),)))
        still = torch.rand(1, 3, 1, 16, 16) * 2 - 1
        found = vae_core.load(tmp_path / "inflated" / FINAL).moments(still)[0]
        assert torch.allclose(found, Trainer(begun, CPU, Squares(1, 1)).coder.moments(still)[0], atol=1e-4)


def test_the_log_has_the_means_of_both_sides(tmp_path: Path) -> None:
    """Every second step is the discriminator's: logged every fourth alone, they would never be seen."""
    config = small_config(
        tmp_path,
        discriminator=DiscriminatorConfig(start=0, width=32),
        run=replace(small_config(tmp_path).run, steps=8, log_every=4, save_every=3, keep=9),
    )
    seen: list[Mapping[str, float]] = []
    trainer = Trainer(config, CPU, Squares(1, 5))
    plain = trainer._one_step
    trainer._one_step = lambda batches: seen.append(plain(batches)) or seen[-1]  # type: ignore[method-assign]
    assert trainer.run(watching())
    log = read_log(tmp_path / "log.jsonl", "training")
    assert [line["step"] for line in log] == [4, 8]
    for line, steps in zip(log, (seen[:4], seen[4:]), strict=True):
        for name in ("l1", "nll", "discriminator", "score_gap", "gradient_norm"):
            values = [figures[name] for figures in steps if name in figures]
            assert len(values) == 2
            assert line[name] == pytest.approx(sum(values) / 2)
    (tmp_path / "checkpoints/step_00000008.ckpt").unlink()
    resumed = Trainer(config, CPU, Squares(1, 5))
    resumed.resume()  # in the middle of a window
    assert resumed.step == 6
    assert resumed.run(watching())
    assert read_log(tmp_path / "log.jsonl", "training") == log


def test_a_run_goes_on_with_other_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a discriminator, a moving average or another batch that the checkpoint does not know."""
    run = replace(small_config(tmp_path).run, steps=2, ema=0.0)
    assert Trainer(small_config(tmp_path, run=run), CPU, Squares(1, 5)).run(watching())
    more = small_config(tmp_path, discriminator=DiscriminatorConfig(start=2, width=32))
    resumed = Trainer(more, CPU, Squares(2, 5))
    resumed.resume()
    assert resumed.step == 2
    assert "no moving average: it begins with the weights" in caplog.text
    assert "no discriminator: it begins fresh" in caplog.text
    ours, averaged = resumed.coder.state_dict(), resumed.best_coder.state_dict()
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in ours.items())
    assert resumed.run(watching())
    assert any("discriminator" in line for line in read_log(tmp_path / "log.jsonl"))


def test_validation_and_samples_are_written(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        regularization=RegularizationConfig(image_vae=_image_file(tmp_path)),
        validation=ValidationConfig(sources=("demo-clip",), size=(16, 24), frames=5, clips=2, every=4),
        run=replace(small_config(tmp_path).run, steps=4),
    )
    told: list[int] = []
    watch = replace(watching(), validation=lambda done, figures: told.append(done))
    Trainer(config, CPU, Squares(1, 5)).run(watch)
    assert told == [0, 4]
    lines = read_log(tmp_path / "log.jsonl", "validation")
    assert {
        "psnr",
        "psnr_worst",
        "phase_spread",
        "ssim",
        "compatible_psnr",
        "latent_mean",
        "latent_deviation",
    } <= lines[0].keys()
    with Image.open(tmp_path / "samples/step_00000004.png") as image:
        assert image.size == (5 * 24, 6 * (LABEL + 16))  # two clips: original, reconstruction, frozen decoder
        rows = [np.asarray(image)[row * (LABEL + 16) :][:LABEL] for row in range(6)]
    assert all((row > 200).any() and (row < 100).any() for row in rows)  # a name above each
    (running,) = read_log(tmp_path / "log.jsonl", "running")[-1:]
    assert running["step"] == 4
    assert running["seconds_left"] == 0
    assert running["steps_per_second"] > 0
    assert 0 <= running["data_wait"] < 1
    assert 0.05 < running["memory_gib"] < 64
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["config"]["run"]["steps"] == 4
    assert about["versions"]["torch"] == torch.__version__
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_grid_spreads_short_clips_under_long_ones() -> None:
    long = torch.linspace(-1, 1, 9).view(1, 9, 1, 1).expand(3, 9, 2, 2)
    short = torch.tensor([-0.5, 0.5]).view(1, 2, 1, 1).expand(3, 2, 2, 2)
    labelled = sample_grid([("long", long), ("short", short)])
    assert labelled.shape == (3, 4 + 2 * LABEL, 12)
    grid = torch.cat((labelled[:, LABEL : LABEL + 2], labelled[:, 2 * LABEL + 2 :]), dim=1)
    assert grid[0, 0, ::2].tolist() == pytest.approx([-1, -0.5, -0.25, 0.25, 0.5, 1], abs=0.26)
    assert grid[0, 2, ::2].tolist() == [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5]


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_resuming_what_does_not_fit_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TrainingError, match=r"no checkpoint in .*checkpoints to resume from: leave --resume out"):
        Trainer(small_config(tmp_path), CPU, Squares(1, 5)).resume()
    Trainer(small_config(tmp_path, run=replace(small_config(tmp_path).run, steps=2)), CPU, Squares(1, 5)).run(
        watching()
    )
    wider = replace(small_config(tmp_path).model, latent_channels=8)
    with pytest.raises(TrainingError, match=r"step_00000002.ckpt does not fit this config .* another folder"):
        Trainer(small_config(tmp_path, model=wider), CPU, Squares(1, 5)).resume()
    caplog.clear()
    Trainer(small_config(tmp_path, seed=5), CPU, Squares(1, 5)).resume()
    assert "step_00000002.ckpt was written with run.steps: 2, now 6." in caplog.text
    assert "seed: 0, now 5" in caplog.text


def test_a_run_of_no_steps_writes_the_scale_into_the_file(tmp_path: Path) -> None:
    """What docs/training.md says to do after the last stage of IV-VAE."""
    run = replace(small_config(tmp_path).run, steps=0)
    fresh = ModelConfig(family="iv-vae", init="fresh", dim=4, latent_channels=4)
    assert Trainer(small_config(tmp_path / "a", model=fresh, run=run), CPU, Squares(1, 5)).run(watching())
    weights = str(tmp_path / "a" / FINAL)
    scaled = ModelConfig(family="iv-vae", init="weights", weights=(weights,), scale_factor=0.5, shift_factor=0.25)
    assert Trainer(small_config(tmp_path / "b", model=scaled, run=run), CPU, Squares(1, 5)).run(watching())
    before, after = (vae_core.load(tmp_path / name / FINAL) for name in "ab")
    assert (after.model.config.scale_factor, after.model.config.shift_factor) == (0.5, 0.25)
    clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    assert torch.allclose(after.encode(clip), 0.5 * (before.encode(clip) - 0.25), atol=1e-6)


def test_a_run_may_begin_or_go_on(tmp_path: Path) -> None:
    config = tmp_path / "stage.toml"
    config.write_text(COMMAND.replace("steps = 6", "steps = 1"))
    command = ["train", str(config), "--resume-if-any", "--set", f"out={tmp_path / 'out'}"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.stderr
    assert "from step 0 to 1" in first.stdout
    assert "optimizer.warm_up is 1 and run.steps 1: the learning rate stays below 100.0%" in first.stderr
    again = CliRunner().invoke(app, [*command, "--set", "run.steps=2"])
    assert again.exit_code == 0, again.stderr
    assert "from step 1 to 2" in again.stdout


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    model = ModelConfig(family="cv-vae", init="weights", weights=("demo-iv-vae",))
    with pytest.raises(ValueError, match=r"scale_factor|holds a iv-vae, and model.family is cv-vae"):
        Trainer(small_config(tmp_path, model=model), CPU, Squares(1, 5))


# ------------------------------------------------------------------------------------------------ as a command

COMMAND = """
stage = "video"
seed = 1
[model]
family = "cv-vae"
init = "fresh"
latent_channels = 4
widths = [32, 32, 32, 32]
blocks_per_level = 1
[data]
camera_moves = { procedural = 1 }
[[data.batches]]
kind = "video"
batch = 2
size = [16, 16]
frames = 5
[[data.batches]]
kind = "image"
batch = 2
size = [16, 16]
[loss]
lpips_weight = 0
[discriminator]
start = 1
width = 32
[optimizer]
learning_rate = 1e-3
warm_up = 1
[run]
steps = 6
device = "cpu"
precision = "float32"
save_every = 100
"""


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(vae_core.__file__).parents[1])}


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    family = "iv-vae"  # of which images leave some layers without a gradient
    script, torchrun = str(Path(__file__).parent / "small_training.py"), ("-m", "torch.distributed.run", "--standalone")
    runs = {
        "one": [sys.executable, script, str(tmp_path / "one"), family, "2"],
        "two": [sys.executable, *torchrun, "--nproc-per-node", "2", script, str(tmp_path / "two"), family, "2"],
    }
    started = [subprocess.Popen(command, env=_environment(), stderr=subprocess.PIPE) for command in runs.values()]
    for process in started:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors.decode()
    one, two = (read_checkpoint(tmp_path / name / "checkpoints/step_00000004.ckpt") for name in runs)
    for part in ("trained", "averaged", "discriminator"):
        for name, tensor in one[part].items():
            assert tensor.dtype in (torch.float64, torch.int64), name
            assert torch.allclose(tensor, two[part][name], rtol=0, atol=1e-9), f"{part}.{name}"
    logs = [read_log(tmp_path / name / "log.jsonl", "training") for name in runs]
    for first, second in zip(*logs, strict=True):
        assert first.pop("group") == second.pop("group")
        assert first == pytest.approx(second, rel=1e-5, abs=1e-6)  # the log has float32
    assert {"discriminator", "adaptive_weight"} <= logs[0][1].keys() | logs[0][2].keys()


def test_sigterm_saves_and_the_resumed_run_is_thesame_checkpoints(tmp_path: Path) -> None:
    config = tmp_path / "stage.toml"
    config.write_text(COMMAND)
    command = ["train", str(config), "--set", f"out={tmp_path / 'parts'}"]
    program = [sys.executable, "-m", "vae_core", *command]
    stopped = subprocess.Popen(
        program, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert stopped.stdout is not None
    assert "from step 0 to 6 on cpu" in stopped.stdout.readline()
    stopped.send_signal(signal.SIGTERM)
    _, errors = stopped.communicate(timeout=600)
    assert stopped.returncode == 128 + signal.SIGTERM, errors
    assert "with --resume" in errors
    ((step, _),) = Checkpoints(folder=tmp_path / "parts/checkpoints", keep=1).all()
    assert step < 6
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    assert "holds a run already" in again.stderr
    resumed = CliRunner().invoke(app, [*command, "--resume"])
    assert resumed.exit_code == 0, resumed.stderr
    whole = read_config(config, [f"out={tmp_path / 'whole'}"])
    assert Trainer(whole, CPU).run(watching())
    same_checkpoints(
        tmp_path / "whole/checkpoints/step_00000006.ckpt", tmp_path / "parts/checkpoints/step_00000006.ckpt"
    )
