"""What latent-space regularization does: the same short training without it and with each mapping, one seed each.

    python benchmarks/regularization.py vae_core/recipes/demo_cv_vae.toml --out runs/regularization --steps 200

Prints one table of the last validations: PSNR of the video VAE, and PSNR of what the frozen image VAE decodes
from its latents. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from vae_core.training.config import RegularizationConfig, TrainConfig, read_config
from vae_core.training.journal import Watch, read_log
from vae_core.training.loop import Trainer
from vae_core.training.regularization import MAPPINGS
from vae_core.training.sources import frozen_image_vae
from vae_core.training.validation import validate

Figures = Mapping[str, float]


def variants(config: TrainConfig) -> dict[str, RegularizationConfig | None]:
    """Without; the decoder's term with each mapping; the encoder's and both with the config's mapping."""
    asked = config.regularization
    if asked is None:
        raise SystemExit("The config has no [regularization] to compare: name its image_vae there.")
    found: dict[str, RegularizationConfig | None] = {"none": None}
    found |= {f"decoder, {mapping}": replace(asked, decoder=1.0, encoder=0.0, mapping=mapping) for mapping in MAPPINGS}
    found["encoder"] = replace(asked, decoder=0.0, encoder=1.0)
    found["both"] = replace(asked, decoder=1.0, encoder=1.0)
    return found


def trained(config: TrainConfig) -> Trainer:
    """A run at its end, on the CPU; one that was stopped goes on where it was."""
    trainer = Trainer(config, torch.device("cpu"))
    if trainer.checkpoints.newest() is not None:
        trainer.resume()
    quiet = Watch(step=lambda *_: None, validation=lambda *_: None, should_stop=lambda: False)
    trainer.run(quiet)
    trainer.batches.close()
    return trainer


def train(config: TrainConfig, image_vae: str) -> Figures:
    """The figures of the last validation, `compatible_psnr` included also where nothing was regularized."""
    trainer = trained(config)
    if config.regularization is not None:
        return [line for line in read_log(config.out / "log.jsonl") if line["group"] == "validation"][-1]
    return validate(trainer.best_coder, trainer.clips, trainer.device, frozen_image_vae(image_vae), None).figures


def main() -> None:
    """Train each variant and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/regularization"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--set", nargs="+", default=[], help="values in place of the config's: section.key=value ...")
    arguments = parser.parse_args()
    config = read_config(arguments.config, arguments.set)
    if config.validation is None:
        raise SystemExit("The config has no [validation], from which the figures come.")
    compared = variants(config)
    image_vae = config.regularization.image_vae if config.regularization else ""
    steps = arguments.steps or config.run.steps
    print("| regularization | PSNR (dB) | SSIM | PSNR by the frozen image VAE (dB) |\n|---|---|---|---|")
    for name, regularization in compared.items():
        out = arguments.out / name.replace(", ", "_")
        run = replace(config.run, steps=steps, device="cpu")
        figures = train(replace(config, out=out, regularization=regularization, run=run), image_vae)
        values = [f"{figures['psnr']:.2f}", f"{figures['ssim']:.3f}", f"{figures['compatible_psnr']:.2f}"]
        print(f"| {name} | {' | '.join(values)} |", flush=True)


if __name__ == "__main__":
    main()
