"""The I3D network (Inflated Inception-v1, Carreira and Zisserman 2017), whose logits FVD compares.

Names and shapes are those of the published PyTorch files (`rgb_imagenet.pt`, `i3d_pretrained_400.pt`).
"""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..weights.files import read_weights

SIDE = 224  # pixels, what the network was trained on
LEAST_FRAMES = 9
CLASSES = 400
_MIXED: dict[str, tuple[int, ...]] = {  # 1x1; reduce, 3x3; reduce, 3x3; pooled
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def _pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Zeros around (b, c, t, h, w) so that every stride-th place has an output, the odd zero at the end."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class _Unit(nn.Module):
    def __init__(self, source: int, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(source, width, kernel, stride=stride, bias=False)
        self.bn = nn.BatchNorm3d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(_pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))))


class _Pool(nn.Module):
    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(_pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class _Mixed(nn.Module):
    def __init__(self, source: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = _Unit(source, widths[0], 1)
        self.b1a, self.b1b = _Unit(source, widths[1], 1), _Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = _Unit(source, widths[3], 1), _Unit(widths[3], widths[4], 3)
        self.pool = _Pool((3, 3, 3), (1, 1, 1))
        self.b3b = _Unit(source, widths[5], 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.pool(x)))
        return torch.cat(parts, 1)


class _Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1024, CLASSES, 1)


class I3D(nn.Module):
    """(b, 3, t, 224, 224) in [-1, 1], t at least 9, to (b, 400) logits, averaged over time."""

    def __init__(self) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {
            "Conv3d_1a_7x7": _Unit(3, 64, 7, 2),
            "MaxPool3d_2a_3x3": _Pool((1, 3, 3), (1, 2, 2)),
            "Conv3d_2b_1x1": _Unit(64, 64, 1),
            "Conv3d_2c_3x3": _Unit(64, 192, 3),
            "MaxPool3d_3a_3x3": _Pool((1, 3, 3), (1, 2, 2)),
        }
        channels = 192
        for name, widths in _MIXED.items():
            if name == "Mixed_4b":
                layers["MaxPool3d_4a_3x3"] = _Pool((3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                layers["MaxPool3d_5a_2x2"] = _Pool((2, 2, 2), (2, 2, 2))
            layers[name] = _Mixed(channels, widths)
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.order = tuple(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.logits = _Logits()

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), 1)
        return self.logits.conv3d(x).mean((2, 3, 4))


class VideoFeatures:
    """Clips to the features that FVD compares."""

    def __init__(self, network: Callable[..., Tensor], device: torch.device | str = "cpu") -> None:
        self.network = network
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, clip: Tensor) -> Tensor:
        """(b, 3, t, h, w) in [-1, 1] to (b, 400) on the CPU; frames are resized to 224x224, bilinear.

        Raises ValueError below 9 frames.
        """
        if clip.shape[2] < LEAST_FRAMES:
            raise ValueError(f"FVD looks at {LEAST_FRAMES} frames or more at a time; got {clip.shape[2]}.")
        frames = clip.to(self.device).float().clamp(-1, 1).transpose(1, 2).flatten(0, 1)  # (b t) c h w
        small = F.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False)
        x = small.unflatten(0, (clip.shape[0], clip.shape[2])).transpose(1, 2)
        if not isinstance(self.network, I3D):
            return self.network(x, rescale=False, resize=False, return_features=True).float().cpu()
        return self.network(x).float().cpu()


def load_i3d(path: str | Path, device: torch.device | str = "cpu") -> VideoFeatures:
    """The network from a file: tensors under the published names, or the TorchScript file `i3d_torchscript.pt`.

    A TorchScript file is a program; it runs in torch's own interpreter, which knows tensors only. Raises
    CheckpointError where the file holds something else.
    """
    if _is_script(Path(path)):
        try:
            return VideoFeatures(torch.jit.load(str(path), map_location=device).eval(), device)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: cannot be read as TorchScript; download it again.") from error
    model, tensors = I3D(), read_weights(path).tensors
    names = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    if not names <= tensors.keys():
        raise CheckpointError(
            f"{path}: holds no I3D network; FVD needs i3d_torchscript.pt, or i3d_pretrained_400.pt or another file of "
            f"I3D with {CLASSES} Kinetics classes."
        )
    try:
        model.load_state_dict({name: tensors[name] for name in names}, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its shapes are not those of I3D with {CLASSES} classes.") from error
    return VideoFeatures(model.eval().requires_grad_(False).to(device), device)


def _is_script(path: Path) -> bool:
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())
