"""The decoder trained alone."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from vae_core.training.coders import make_coder
from vae_core.training.config import ModelConfig
from vae_core.training.loop import Trainer

from .small_training import SIZES, Squares, small_config, watching


@pytest.mark.parametrize("family", ["cv-vae", "iv-vae"])
def test_the_encoder_stays_as_it_is(family: Literal["cv-vae", "iv-vae"], tmp_path: Path) -> None:
    config = small_config(tmp_path, model=ModelConfig(family=family, init="fresh", train="decoder", **SIZES[family]))
    before = make_coder(config).state_dict()
    trainer = Trainer(config, torch.device("cpu"), Squares(1, 5))
    assert trainer.run(watching())
    after = trainer.coder.state_dict()
    changed = {name.split(".")[1] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == ({"decoder", "from_latent"} if family == "iv-vae" else {"decoder"})
