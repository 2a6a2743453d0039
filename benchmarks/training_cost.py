"""What a training step of each stage config costs: floating-point operations and peak memory. Nothing is computed.

    python benchmarks/training_cost.py vae_core/recipes/cv_video_256.toml ...

The step runs on tensors without data (torch's fake tensors), forward, backward and optimizer, in the config's precision
and with its checkpointing; torch counts operations of convolutions, products and attention, and the bytes alive. So the
memory leaves out what cuDNN takes as working space and what the allocator loses, and the image VAE is that of Stable
Diffusion's size. Hours are operations / (TERAFLOPS * 10^12 * SHARE): a guess, not a measurement.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vae_core.families import FAMILIES, VIDEO, Network
from vae_core.families.image_vae import IMAGE_VAE, OUR_EPS, ImageVAEConfig
from vae_core.metrics import LPIPS
from vae_core.training.clips import BatchKind
from vae_core.training.coders import Coder, FrameByFrame, HalvesCoder, VideoCoder, video_config
from vae_core.training.config import ModelConfig, TrainConfig, read_config
from vae_core.training.discriminator import PatchDiscriminator
from vae_core.training.draws import Draws
from vae_core.training.iv_image import IVImageConfig, IVImageVAE
from vae_core.training.objective import Objective, Trained

TERAFLOPS = 165.0  # bfloat16 with float32 sums, of one RTX 4090, as its maker says
SHARE = 0.35  # of that, which convolutions of this kind may reach
SD_WIDTHS, SD_BLOCKS, SD_CHANNELS = (128, 256, 512, 512), 2, 4


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors that are alive, and the most that they ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def meet(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, until it goes."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._part, key, size)

    def _part(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.meet(leaf)
        return result


def coder_of(config: TrainConfig) -> Coder:
    """The model of a config at published size, where the config takes its size from weights."""
    model = config.model
    z = model.latent_channels or (16 if model.family == "iv-vae" else SD_CHANNELS)
    if config.stage == "image" and model.family == "iv-vae":
        return HalvesCoder(IVImageVAE(IVImageConfig(dim=model.dim or 64, latent_channels=z, halves=model.halves or 1)))
    if config.stage == "image":
        network = image_network(model.widths or SD_WIDTHS, model.blocks_per_level or SD_BLOCKS, z, attention=False)
        return VideoCoder(network, checkpointing=config.run.checkpointing)
    sized = ModelConfig(
        family=model.family, init="fresh", widths=SD_WIDTHS, blocks_per_level=SD_BLOCKS, latent_channels=z, dim=64
    )
    network = FAMILIES[model.family].network(video_config(sized))
    return VideoCoder(network, checkpointing=config.run.checkpointing)


def image_network(widths: tuple[int, ...], blocks: int, channels: int, *, attention: bool) -> Network:
    """An image VAE; attention: in the decoder, as Stable Diffusion has it, and the image stage not."""
    size = ImageVAEConfig(
        widths=widths,
        blocks_per_level=blocks,
        latent_channels=channels,
        quantized=(False, False),
        decoder_attention=attention,
        norm_eps=OUR_EPS,
        scale_factor=1.0,
        shift_factor=0.0,
    )
    return IMAGE_VAE.network(size)


def sd_image_vae() -> FrameByFrame:
    """Of the size of Stable Diffusion's."""
    return FrameByFrame(image_network(SD_WIDTHS, SD_BLOCKS, SD_CHANNELS, attention=True)).requires_grad_(False)


def step_cost(config: TrainConfig, kind: BatchKind) -> tuple[float, float]:
    """(operations in 10^12, peak memory in GiB) of one generator step on one batch of `kind`."""
    with FakeTensorMode():
        trained = Trained(coder_of(config), config.regularization)
        averaged = [torch.empty_like(p) for p in trained.parameters()] if config.run.ema else []
        objective = Objective(loss=config.loss, regularization=config.regularization)
        objective.image_vae = sd_image_vae() if config.regularization else None
        objective.lpips = LPIPS("vgg").requires_grad_(False) if config.loss.lpips_weight else None
        if config.discriminator is not None:
            objective.discriminator = PatchDiscriminator(config.discriminator.width).requires_grad_(False)
            objective.adversarial_weight = config.discriminator.weight
        optimizer = torch.optim.AdamW(trained.parameters())
        video = torch.empty(kind.batch, 3, kind.frames, *kind.size)
        length = VIDEO.latent_frames(kind.frames)
        cells = (VIDEO.cells(side) for side in kind.size)
        noise = torch.empty(kind.batch, trained.coder.latent_channels, length, *cells)
        draws = Draws(noise=noise, frames=torch.zeros(kind.batch, length - 1, dtype=torch.long))
        counter, live = FlopCounterMode(display=False), LiveBytes()
        nets = (trained, objective.image_vae, objective.lpips, objective.discriminator)
        for tensor in [p for net in nets if net is not None for p in net.parameters()] + averaged:
            live.meet(tensor)
        with live, counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.run.precision == "bfloat16"):
                total = objective(trained, video, draws, adversarial=objective.discriminator is not None)
            total.backward()
            operations = counter.get_total_flops()
            optimizer.step()
    return operations / 1e12, live.peak / 2**30


def main() -> None:
    """Print one line for each kind of batch of each config, and the hours of each stage."""
    print("| config | batch | 10^12 operations | peak GiB |\n|---|---|---|---|")
    for path in map(Path, sys.argv[1:]):
        config = read_config(path)
        config = replace(config, loss=replace(config.loss, lpips=None))
        weights = [kind.weight for kind in config.data.batches]
        mean = 0.0
        for kind in config.data.batches:
            operations, peak = step_cost(config, kind)
            mean += operations * kind.weight / sum(weights)
            size = f"{kind.batch} x {kind.frames} x {kind.size[0]} x {kind.size[1]}"
            print(f"| {path.stem} | {size} | {operations:.1f} | {peak:.1f} |")
        steps = config.run.steps * config.run.accumulation
        hours = mean * steps / (TERAFLOPS * SHARE) / 3600
        print(f"| {path.stem} | all {config.run.steps:,} steps | {mean * steps:,.0f} | computed: {hours:,.0f} h |")


if __name__ == "__main__":
    main()
