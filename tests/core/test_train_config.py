"""The TOML files of training: what is read, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from vae_core.training.config import TrainConfig, read_config
from vae_core.training.tables import ConfigError, as_table, changes

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = """
    stage = "video"
    out = "runs/x"
    [model]
    family = "cv-vae"
    init = "weights"
    weights = ["demo-cv-vae"]
    [data]
    sources = ["clips"]
    [[data.batches]]
    kind = "video"
    batch = 2
    size = [64, 128]
    frames = 9
    [loss]
    lpips_weight = 0
    [optimizer]
    learning_rate = 1e-4
    [run]
    steps = 10
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "stage.toml"
    path.write_text(dedent(text))
    return path


def test_a_small_config_is_read(tmp_path: Path) -> None:
    config = read_config(_write(tmp_path, SMALL))
    assert config.out == Path("runs/x")
    assert config.data.batches[0].size == (64, 128)
    assert config.loss.lpips_weight == 0.0
    assert config.loss.kl_weight == 1e-6
    assert config.optimizer.betas == (0.9, 0.98)  # as published
    assert config.regularization is None


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_that_comes_with_the_project_is_read(path: Path) -> None:
    assert isinstance(read_config(path), TrainConfig)


def test_other_values_from_the_command_line(tmp_path: Path) -> None:
    path = _write(tmp_path, SMALL)
    config = read_config(path, ["run.steps=20", "model.weights=['a b.safetensors']", "out=runs/y=z", "run.ema=0"])
    assert config.run.steps == 20
    assert config.model.weights == ("a b.safetensors",)
    assert config.out == Path("runs/y=z")
    added = read_config(path, ["regularization.image_vae=sd.safetensors", "regularization.mapping=slice"])
    assert added.regularization is not None
    assert added.regularization.mapping == "slice"
    for text in ("run.steps", "=3", "run..x=1"):
        with pytest.raises(ConfigError, match=r"is not understood: write section.key=value, such as run.steps=100"):
            read_config(path, [text])
    with pytest.raises(ConfigError, match=r"--set out.x=1: out is no table of the config"):
        read_config(path, ["out.x=1"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=1", r"stage.toml: \[optimizer\] has no key 'lr'. Allowed are learning_rate, kind, warm_up"),
        ("colour=1", r"stage.toml: has no key 'colour'. Allowed are stage, out, model, data"),
        ("run.steps=1.5", r"run.steps is 1.5; needed is a whole number"),
        ("run.steps=true", r"run.steps is True; needed is a whole number"),
        ("run.checkpointing=1", r"run.checkpointing is 1; needed is true or false"),
        ("optimizer.betas=[0.9]", r"optimizer.betas is \[0.9\]; needed is a list of 2, each a number"),
        ("model.family=od-vae", r"model.family is 'od-vae'; allowed are 'cv-vae', 'cv-vae-sd3', 'iv-vae'"),
        ("loss=3", r"loss is 3; needed is a table"),
        ("data.sources=[]", r"\[data\] give either sources .* or a table camera_moves"),
        ("model.weights=[]", r"\[model\] init is 'weights', which needs one file in weights; got 0"),
        ("model.init=fresh", r"\[model\] init is 'fresh', and widths, blocks_per_level, latent_channels must say"),
        ("regularization.decoder=1", r"\[regularization\] needs image_vae"),
        ("regularization={image_vae='x', decoder=0}", r"\[regularization\] decoder and encoder must be 0 or more"),
        ("run.ema=1", r"\[run\] ema is 1; needed is 0 \(none\) or a share below 1"),
        ("optimizer.learning_rate=0", r"learning_rate and clip must be above 0"),
        ("stage=image", r"stage is 'image', which has frames = 1 everywhere"),
        ("validation={sources=['x'], size=[60, 64], every=1}", r"clips of 17 frames of 60 x 64 cannot be encoded"),
        ("validation={sources=['x'], size=[64, 64], every=1, frames=21}", r"cv-vae handles 17 frames in one call"),
        (
            "data.batches=[{kind='video', batch=1, size=[64, 64], frames=8}]",
            r"\[data.batches\] A clip has 1 \+ 4N frames",
        ),
    ],
)
def test_what_is_not_understood_is_refused(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read_config(_write(tmp_path, SMALL), [override])


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage.toml is not TOML"):
        read_config(_write(tmp_path, "stage = video"))


def test_differences_are_named(tmp_path: Path) -> None:
    path = _write(tmp_path, SMALL)
    before = as_table(read_config(path))
    now = as_table(read_config(path, ["run.steps=20", "data.sources=['other']"]))
    assert changes(before, before) == []
    assert changes(before, now) == ["data.sources: ['clips'], now ['other']", "run.steps: 10, now 20"]
