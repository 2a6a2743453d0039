"""The TOML files of training: what is read, what is refused and in which words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from textwrap import dedent

import pytest
from typer.testing import CliRunner

from vae_core.cli.app import app
from vae_core.training.advice import advice
from vae_core.training.config import TrainConfig, read_config
from vae_core.training.tables import ConfigError, as_table, changes

CONFIGS = Path(__file__).parents[2] / "vae_core" / "recipes"
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
        ("colour=1", r"stage.toml: the file has no key 'colour'. Allowed are stage, out, model, data"),
        ("run.steps=1.5", r"run.steps is 1.5; needed is a whole number"),
        ("run.steps=true", r"run.steps is True; needed is a whole number"),
        ("run.checkpointing=1", r"run.checkpointing is 1; needed is true or false"),
        ("optimizer.betas=[0.9]", r"optimizer.betas is too short: it needs a value number 2"),
        ("model.family=od-vae", r"model.family is 'od-vae'; allowed are 'cv-vae', 'cv-vae-sd3' or 'iv-vae'"),
        ("loss=3", r"loss is 3; needed is a table"),
        ("data.sources=[]", r"\[data\] give either sources .* or a table camera_moves"),
        ("model.weights=[]", r"\[model\] init is 'weights', which needs one file in weights; got 0"),
        ("model.init=fresh", r"\[model\] init is 'fresh', and widths, blocks_per_level, latent_channels must say"),
        ("regularization.decoder=1", r"\[regularization\] needs image_vae"),
        ("regularization={image_vae='x', decoder=0}", r"\[regularization\] decoder or encoder must be above 0"),
        ("run.ema=1", r"run.ema is 1; needed is less than 1"),
        ("optimizer.learning_rate=0", r"optimizer.learning_rate is 0; needed is more than 0"),
        ("run.keep=0", r"run.keep is 0; needed is 1 or more"),
        ("optimizer.betas=[0.9, 2]", r"optimizer.betas\[2\] is 2; needed is less than 1"),
        ("discriminator={width=40}", r"discriminator.width is 40; needed is a multiple of 32"),
        ("out=3", r"out is 3; needed is a text in quotes"),
        ("stage=image", r"stage is 'image', which has frames = 1 everywhere"),
        ("validation={sources=['x'], size=[60, 64], every=1}", r"clips of 17 frames of 60 x 64 cannot be encoded"),
        ("validation={sources=['x'], size=[64, 64], every=1, frames=21}", r"cv-vae handles 17 frames in one call"),
        (
            "data.batches=[{kind='video', batch=1, size=[64, 64], frames=8}]",
            r"toml: \[\[data.batches\]\] number 1: A clip has 1 \+ 4N frames",
        ),
    ],
)
def test_what_is_not_understood_is_refused(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read_config(_write(tmp_path, SMALL), [override])


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    text = SMALL.replace("lpips_weight = 0", "lpips_weight = -1\n    typo = 3").replace("learning_rate = 1e-4", "")
    text += """
    [[data.batches]]
    kind = "film"
    batch = 0
    size = [64, 60]
    """
    with pytest.raises(ConfigError) as caught:
        read_config(_write(tmp_path, text))
    name, _, found = str(caught.value).partition(": ")
    assert name.endswith("stage.toml")
    first, *lines = found.split("\n  ")
    assert first == "5 things are wrong."
    assert set(lines) == {
        "data.batches[2].kind is 'film'; allowed are 'image' or 'video'.",
        "data.batches[2].batch is 0; needed is 1 or more.",
        "loss.lpips_weight is -1; needed is 0 or more.",
        "[loss] has no key 'typo'. Allowed are reconstruction, lpips_weight, lpips, kl_weight.",
        "[optimizer] needs learning_rate.",
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.steps=40", "optimizer.warm_up is 1000 and run.steps 40: the learning rate stays below 4.0% of what"),
        ("discriminator.start=2000", "discriminator.start is 2000 and run.steps 2000: there will be no adversarial"),
        ("model.dim=12", "model.dim is not looked at: the weights say their size"),
        ("model.scale_factor=2", "model.scale_factor is not looked at: cv-vae has none"),
        ("loss.lpips=x.pth", "loss.lpips is not looked at, since loss.lpips_weight is 0"),
        ("data={camera_moves={procedural=1}, workers=2, batches=[{kind='image', batch=1, size=[8, 8]}]}",
         "data.workers is not looked at: camera_moves are made in the training process"),
        ("validation={sources=['demo-clip'], size=[64, 64], every=3000}", "validation.every is 3000 and run.steps"),
        ("data.batches=[{kind='image', batch=1, size=[8, 8], stride=[1, 8]}]", "number 1: stride is not looked at"),
    ],
)  # fmt: skip
def test_what_will_have_no_effect_is_said(override: str, words: str, tmp_path: Path) -> None:
    path = _write(tmp_path, SMALL)
    assert advice(read_config(path, ["run.steps=2000"])) == []
    found = advice(read_config(path, ["run.steps=2000", override]))
    assert len(found) == 1
    assert words in found[0]


def test_the_schema_for_editors(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--schema"])
    assert result.exit_code == 0
    table = json.loads(result.stdout)
    assert set(table["required"]) == {"stage", "out", "model", "data", "loss", "optimizer", "run"}
    run = table["$defs"]["RunConfig"]
    assert run["additionalProperties"] is False
    assert run["properties"]["keep"]["minimum"] == 1
    assert table["$defs"]["ModelConfig"]["properties"]["family"]["enum"] == ["cv-vae", "cv-vae-sd3", "iv-vae"]


def test_a_new_file_from_a_recipe(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["train", "--list"])
    assert listed.exit_code == 0
    for path in CONFIGS.glob("*.toml"):
        assert re.search(rf"^{path.stem.replace('_', '-')} +\S", listed.stdout, re.M), path.stem
    for name in ("cv-video-256", "cv_video_256", "cv_video_256.toml"):
        result = CliRunner().invoke(app, ["train", "--new", name])
        assert result.stdout == (CONFIGS / "cv_video_256.toml").read_text()
    wrong = CliRunner().invoke(app, ["train", "--new", "cv"])
    assert wrong.exit_code == 2
    assert "no file and no recipe cv; there are ablation-iv-vae, cv-image," in wrong.stderr
    assert "no file and no recipe cv;" in CliRunner().invoke(app, ["train", str(tmp_path / "cv")]).stderr
    nothing = CliRunner().invoke(app, ["train"])
    assert nothing.exit_code == 2
    assert "give the TOML file of a stage, or --new RECIPE, --list or --schema" in nothing.stderr


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage.toml is not TOML"):
        read_config(_write(tmp_path, "stage = video"))


def test_differences_are_named(tmp_path: Path) -> None:
    path = _write(tmp_path, SMALL)
    before = as_table(read_config(path))
    now = as_table(read_config(path, ["run.steps=20", "data.sources=['other']"]))
    assert changes(before, before) == []
    assert changes(before, now) == ["data.sources: ['clips'], now ['other']", "run.steps: 10, now 20"]
