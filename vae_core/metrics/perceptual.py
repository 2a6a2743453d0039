"""LPIPS: distance between two pictures as a trained image network sees them (Zhang et al. 2018), frame by frame.

The network is torchvision's AlexNet or VGG-16, of which only the file is needed; the five trained heads come with
torchmetrics, or lie in the file itself (the lpips package saves both together).
"""

import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..weights.files import read_weights
from .frames import check_pair

LEAST_SIDE = 32  # pixels; below, AlexNet's last layers have nothing to see
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_ALEX_TAPS, _VGG_TAPS = (1, 4, 7, 9, 11), (3, 8, 15, 22, 29)
_VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def _alexnet() -> nn.Sequential:
    relu = nn.ReLU
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), relu(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), relu(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), relu(),
        nn.Conv2d(384, 256, 3, padding=1), relu(),
        nn.Conv2d(256, 256, 3, padding=1), relu(),
    )  # fmt: skip


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for level in _VGG_WIDTHS:
        if layers:
            layers.append(nn.MaxPool2d(2, 2))
        for width in level:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


class LPIPS(nn.Module):
    """The LPIPS distance, version 0.1. kind: "alex" (which papers print) or "vgg"."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.features = _alexnet() if kind == "alex" else _vgg16()
        self.taps = _ALEX_TAPS if kind == "alex" else _VGG_TAPS
        widths = (64, 192, 384, 256, 256) if kind == "alex" else (64, 128, 256, 512, 512)
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))

    @torch.no_grad()
    def forward(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """(b,) distances of two batches (b, 3, h, w) in [-1, 1]."""
        return self.distances(ours, theirs)

    def distances(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """The same with a gradient, for training."""
        x = (torch.cat([ours, theirs]) - self.get_buffer("shift")) / self.get_buffer("scale")
        total = x.new_zeros(len(ours))
        heads = iter(self.heads)
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                unit = x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()
                a, b = unit.chunk(2)
                total = total + next(heads)((a - b).square()).mean((1, 2, 3))
        return total

    def frames(self, reconstruction: Tensor, original: Tensor) -> Tensor:
        """LPIPS of each frame of two clips (b, 3, t, h, w) in [-1, 1], as (b * t,) float32 on the CPU.

        NaN where a side is below 32 pixels. Raises ValueError for unequal shapes.
        """
        check_pair(reconstruction, original)
        if min(original.shape[-2:]) < LEAST_SIDE:
            return torch.full((original.shape[0] * original.shape[2],), torch.nan)
        weight = next(self.parameters())
        pairs = [clip.detach().transpose(1, 2).flatten(0, 1).clamp(-1, 1) for clip in (reconstruction, original)]
        values = [self(a[None].to(weight), b[None].to(weight)) for a, b in zip(*pairs, strict=True)]
        return torch.cat(values).float().cpu()


def load_lpips(path: str | Path, heads: str | Path | None = None) -> LPIPS:
    """LPIPS from a file of torchvision's AlexNet or VGG-16, or of the lpips package.

    heads: a file of the five trained heads; None takes them from `path`, or else from torchmetrics. Raises
    CheckpointError where the file holds something else.
    """
    tensors = read_weights(path).tensors
    layers = {_layer(name): tensor for name, tensor in tensors.items() if _layer(name)}
    first = layers.get("0.weight")
    if first is None or tuple(first.shape[1:]) not in ((3, 11, 11), (3, 3, 3)):
        raise CheckpointError(
            f"{path}: holds no AlexNet or VGG-16; LPIPS needs torchvision's alexnet-owt-7be5be79.pth or "
            "vgg16-397923af.pth, or a file that the lpips package saved."
        )
    kind = "alex" if first.shape[-1] == 11 else "vgg"
    trained = _heads(tensors)
    if not trained:
        trained = _heads(read_weights(heads or _torchmetrics_heads(kind)).tensors)
    model = LPIPS(kind)
    state = {f"features.{name}": tensor for name, tensor in layers.items()}
    state |= {f"heads.{index}.weight": tensor for index, tensor in trained.items()}
    state |= {"shift": model.get_buffer("shift"), "scale": model.get_buffer("scale")}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: is no complete {kind} network for LPIPS; download it again.") from error
    return model.eval().requires_grad_(False)


def _layer(name: str) -> str:
    """`0.weight` for `features.0.weight` and `net.slice1.0.weight`; empty for anything else."""
    found = re.fullmatch(r"(?:features|(?:net\.)?slice\d)\.(\d+\.(?:weight|bias))", name)
    return found[1] if found else ""


def _heads(tensors: dict[str, Tensor]) -> dict[int, Tensor]:
    found = ((re.fullmatch(r"lin(\d)\.model\.\d\.weight", name), tensor) for name, tensor in tensors.items())
    return {int(match[1]): tensor for match, tensor in found if match}


def _torchmetrics_heads(kind: str) -> Path:
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        raise CheckpointError(
            "The trained heads of LPIPS come with torchmetrics, which is not installed: "
            'pip install -e ".[evaluation]" in the folder of cviv-vae, or give a file that the lpips package saved.'
        )
    return Path(spec.origin).parent / "functional" / "image" / "lpips_models" / f"{kind}.pth"
