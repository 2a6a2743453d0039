"""IV-VAE's ablation at a small scale: five networks, each from several seeds, the same steps on the same data.

    python benchmarks/ablation.py vae_core/recipes/ablation_iv_vae.toml --out runs/ablation --seeds 0 1 2 --steps 120

Prints one table of the last validations, mean and standard error over the seeds: PSNR and SSIM, how far apart the SSIM
of the four positions in a group of frames is, what is gained over the first row with the same seed, and the parameters.
The seed sets the weights and the order of the data, which is the same for all rows. A run that was stopped goes on
where it was; finished ones are not run again.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from regularization import trained

from vae_core import VideoVAE, load
from vae_core.families.iv_vae import IVParts
from vae_core.metrics import frame_quality
from vae_core.training.config import TrainConfig, read_config
from vae_core.training.loop import FINAL
from vae_core.training.validation import validation_clips

GROUP = 4
ROWS: Mapping[str, IVParts] = {
    "causal, one branch": IVParts(temporal_conv="causal", branches=1, motion_perception=False),
    "+ grouped causal": IVParts(branches=1, motion_perception=False),
    "+ keyframe branch": IVParts(temporal_conv="causal", motion_perception=False),
    "+ both": IVParts(motion_perception=False),
    "+ motion perception (published)": IVParts(),
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one run. psnr: dB. spread: largest less smallest SSIM of the positions 1 to 4 of a group, without frame 0."""

    psnr: float
    ssim: float
    spread: float


def train(config: TrainConfig) -> VideoVAE:
    """The trained VAE of one run, from its folder if it was finished before."""
    final = config.out / FINAL
    if not final.exists():
        trained(config)
    return load(final)


def measure(vae: VideoVAE, clips: list[torch.Tensor]) -> Figures:
    """Reconstruction of the clips, each (1, 3, 1 + 4n, h, w), through the posterior mean."""
    psnrs: list[torch.Tensor] = []
    ssims: list[torch.Tensor] = []
    for clip in clips:
        psnr, ssim = frame_quality(vae.decode(vae.encode(clip)), clip)
        psnrs.append(psnr.flatten())
        ssims.append(ssim.flatten())
    positions = torch.stack(ssims)[:, 1:].unflatten(1, (-1, GROUP)).mean((0, 1))
    return Figures(
        psnr=float(torch.stack(psnrs).mean()),
        ssim=float(torch.stack(ssims).mean()),
        spread=float(positions.max() - positions.min()),
    )


def row(name: str, runs: list[Figures], baseline: list[Figures], parameters: int) -> str:
    """One line of the table; what is gained over the baseline is taken seed by seed."""

    def cell(values: list[float], digits: int) -> str:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"

    cells = [cell([run.psnr for run in runs], 2), cell([run.ssim for run in runs], 4)]
    cells.append(cell([run.spread for run in runs], 4))
    cells.append(cell([run.psnr - base.psnr for run, base in zip(runs, baseline, strict=True)], 2))
    single = " ".join(f"{run.psnr:.2f}" for run in runs)
    return f"| {name} | {' | '.join(cells)} | {single} | {parameters:,} |"


def main() -> None:
    """Train what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    config = read_config(arguments.config)
    if config.validation is None or config.model.family != "iv-vae":
        raise SystemExit("Needed is a config of family iv-vae with a [validation], from which the figures come.")
    run = replace(config.run, steps=arguments.steps or config.run.steps, device="cpu")
    clips = validation_clips(config.validation, images=False)
    found: dict[str, list[Figures]] = {name: [] for name in ROWS}
    parameters: dict[str, int] = {}
    for seed in arguments.seeds:  # all rows of a seed first, so that a run that is cut short can be compared
        for i, (name, parts) in enumerate(ROWS.items()):
            model = replace(
                config.model,
                temporal_conv=parts.temporal_conv,
                branches=parts.branches,
                motion_perception=parts.motion_perception,
            )
            out = arguments.out / f"row{i + 1}_seed{seed}"
            vae = train(replace(config, model=model, run=run, seed=seed, out=out))
            found[name].append(measure(vae, clips))
            parameters[name] = sum(p.numel() for p in vae.model.parameters())
            print(f"seed {seed}, {name}: {found[name][-1]}", flush=True)
    print(
        "\n| | PSNR (dB) | SSIM | SSIM spread in a group | PSNR over the first row | PSNR, each seed | parameters |"
        "\n|---|---|---|---|---|---|---|"
    )
    for name, runs in found.items():
        print(row(name, runs, next(iter(found.values())), parameters[name]))


if __name__ == "__main__":
    main()
