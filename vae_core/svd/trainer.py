"""Training of SVD's output layer on features that its U-Net made: nothing runs back through the U-Net.

The network sees x = x0 + sigma * noise, scaled by c_in, and gives F; its estimate is c_skip * x + c_out * F. SVD weighs
the squared error of the estimate by (sigma^2 + 1) / sigma^2 = 1 / c_out^2, which makes it the plain squared error of F
against (noise - sigma * x0) / sqrt(sigma^2 + 1). F is linear in the weights of the output layer, so that gradient
descent and a closed form are both at hand.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AdapterError, CheckpointError
from ..weights.tensors import read_tensors, write_tensors
from .adapter import OutputLayer, output_layer

Method = Literal["gradient descent", "ridge regression"]
METHODS: tuple[Method, ...] = ("ridge regression", "gradient descent")
LATENT_SCALE = 0.18215  # x0 is the latent of the VAE times this
SIGMA = 0.7, 1.6  # mean and deviation of ln sigma, one for each clip
AUGMENTATION = -3.0, 0.5  # the same of the noise on the image that the model sees, whose values are -1 to 1
DROPPED = 0.1  # share of the steps without conditions, for classifier-free guidance
STATE_FORMAT = "cviv-vae svd output adapter training"
STATE_VERSION = "2"  # goes up when the same settings come to draw or to see something else
_LARGEST_STATE = 1 << 30  # bytes; ridge regression of the full model keeps 66 MB


def c_in(sigma: float) -> float:
    """What the noisy latent is multiplied by before the network."""
    return 1 / math.sqrt(sigma**2 + 1)


def c_skip(sigma: float) -> float:
    """The share of the noisy latent in the estimate."""
    return 1 / (sigma**2 + 1)


def c_out(sigma: float) -> float:
    """The share of the network's output in the estimate."""
    return -sigma / math.sqrt(sigma**2 + 1)


def loss_weight(sigma: float) -> float:
    """SVD's weight of the squared error of the estimate."""
    return (sigma**2 + 1) / sigma**2


def network_target(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """What the network should give for x0 + sigma * noise; x0 in the model's scale."""
    return (noise - sigma * x0) / math.sqrt(sigma**2 + 1)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What chance decides in one step. clip: its number. noise: of the latent, unit variance. dropped: whether the
    step goes without conditions. level: of the noise on the image, as SVD is told; image_seed: of that noise.
    """

    clip: int
    sigma: float
    noise: Tensor
    dropped: bool
    level: float
    image_seed: int

    def on_picture(self, first: Tensor) -> Tensor:
        """A first frame with its noise; values 0 to 1, so that `level`, which is told for -1 to 1, counts half."""
        generator = torch.Generator().manual_seed(self.image_seed)
        return first + self.level / 2 * torch.randn(first.shape, generator=generator)


def draw(seed: int, step: int, lengths: list[tuple[int, ...]]) -> Draw:
    """The draws of step `step` over clips of the shapes `lengths`; they depend on nothing else."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step * 7919 + 1) % 2**63)
    clip = int(torch.randint(len(lengths), (1,), generator=generator))
    sigma = math.exp(SIGMA[0] + SIGMA[1] * float(torch.randn(1, generator=generator)))
    dropped = float(torch.rand(1, generator=generator)) < DROPPED
    noise = torch.randn(lengths[clip], generator=generator)
    level = math.exp(AUGMENTATION[0] + AUGMENTATION[1] * float(torch.randn(1, generator=generator)))
    image_seed = int(torch.randint(2**40, (1,), generator=generator))
    return Draw(clip=clip, sigma=sigma, noise=noise, dropped=dropped, level=level, image_seed=image_seed)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. ridge: of the closed form, times the mean square of the features. fingerprint: of model and clips;
    a run is resumed only where it is the same.
    """

    method: Method
    learning_rate: float
    ridge: float
    seed: int
    fingerprint: str


class AdapterTrainer:
    """Training of one output layer, a step at a time, from the weights `old`.

    losses: mean squared error of every step, before its update; for ridge regression, whose weights come at the end,
    that of the old weights. Safe in and out of torch's inference mode.
    """

    def __init__(self, old: OutputLayer, settings: TrainSettings, device: torch.device | str = "cpu") -> None:
        self.old, self.settings, self.losses = old, settings, list[float]()
        self._device = torch.device(device)
        with torch.inference_mode(False):
            self._weight, self._bias = (t.clone().to(device) for t in (old.weight, old.bias))
            self._optimizer = self._make_optimizer()
            size = old.weight[0].numel() + 1
            ridge = settings.method == "ridge regression"
            self._gram = torch.zeros(size, size, dtype=torch.float64) if ridge else torch.zeros(0)
            self._moment = torch.zeros(size, old.weight.shape[0], dtype=torch.float64) if ridge else torch.zeros(0)

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.losses)

    def step(self, features: Tensor, target: Tensor) -> float:
        """One step on features (t, features, h, w), as they enter the layer, and what it should give (t, 4, h, w)."""
        with torch.inference_mode(False):
            total = 0.0
            for part, wanted in zip(features.split(1), target.split(1), strict=True):  # a frame at a time, for memory
                inputs, outputs = part.to(self._device, torch.float32).clone(), wanted.to(self._device).float().clone()
                if self.settings.method == "ridge regression":
                    total += self._gather(inputs, outputs)
                else:
                    total += self._descend(inputs, outputs, target.numel())
            loss = total / target.numel()
            if not math.isfinite(loss):
                raise AdapterError(
                    f"The loss of step {self.steps + 1} is {loss}: the model gave values that are not finite. Use a "
                    "smaller learning rate, or run the model in bf16 or fp32."
                )
            if self.settings.method == "gradient descent":
                self._optimizer.step()
                self._optimizer.zero_grad()
            self.losses.append(loss)
        return loss

    def result(self) -> OutputLayer:
        """The layer as trained so far."""
        with torch.inference_mode(False), torch.no_grad():
            if self.settings.method == "gradient descent" or not self.steps:
                return output_layer(self._weight, self._bias)
            return solve_ridge(self._gram, self._moment, self.old, self.settings.ridge)

    def save(self, path: Path) -> None:
        """Write all that `resume` needs; the file is complete or not there at all."""
        tensors = {
            "weight": self._weight,
            "bias": self._bias,
            "old_weight": self.old.weight,
            "old_bias": self.old.bias,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "gram": self._gram,
            "moment": self._moment,
        }
        for name, parameter in (("weight", self._weight), ("bias", self._bias)):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = value
        settings = json.dumps(asdict(self.settings))
        write_tensors(path, tensors, {"format": STATE_FORMAT, "version": STATE_VERSION, "settings": settings})

    @classmethod
    def resume(
        cls, path: Path, old: OutputLayer, settings: TrainSettings, device: torch.device | str = "cpu"
    ) -> AdapterTrainer:
        """The trainer that `save` wrote. Raises CheckpointError where it was another training, saying what differs."""
        tensors, metadata = read_tensors(path, _LARGEST_STATE)
        if metadata.get("format") != STATE_FORMAT:
            raise CheckpointError(f"{path}: is no state of an adapter training. Move it away, or choose another name.")
        if metadata.get("version") != STATE_VERSION:
            raise CheckpointError(
                f"{path}: was made by another version of this program, which trained otherwise. Train again under "
                "another name."
            )
        trainer = cls(old, settings, device)
        try:
            before = json.loads(metadata["settings"])
            _check_same(before, settings, path)
            same = torch.equal(tensors["old_weight"], old.weight) and torch.equal(tensors["old_bias"], old.bias)
            if not same:
                raise CheckpointError(f"{path}: belongs to another model. Use that one, or another name for this one.")
            trainer._restore(tensors)
        except (KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: is damaged ({error}). Remove it and train again.") from error
        return trainer

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._weight.copy_(tensors["weight"])
            self._bias.copy_(tensors["bias"])
            self.losses = [float(value) for value in tensors["losses"]]
            self._gram.copy_(tensors["gram"])
            self._moment.copy_(tensors["moment"])
            for name, parameter in (("weight", self._weight), ("bias", self._bias)):
                state = {key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
                         if f"{name}.{key}" in tensors}  # fmt: skip
                if state:
                    self._optimizer.state[parameter] = {
                        key: value.clone() if key == "step" else value.clone().to(self._device)
                        for key, value in state.items()
                    }

    def _make_optimizer(self) -> torch.optim.AdamW:
        self._weight.requires_grad_(True)
        self._bias.requires_grad_(True)
        return torch.optim.AdamW([self._weight, self._bias], lr=self.settings.learning_rate)

    def _descend(self, inputs: Tensor, outputs: Tensor, numbers: int) -> float:
        with torch.enable_grad():
            error = (F.conv2d(inputs, self._weight, self._bias, padding=1) - outputs).square().sum()
            (error / numbers).backward()
        return float(error.detach())

    def _gather(self, inputs: Tensor, outputs: Tensor) -> float:
        with torch.no_grad():
            rows, wanted = unfolded(inputs), outputs.flatten(2).transpose(1, 2).flatten(0, 1)
            self._gram += (rows.T @ rows).cpu().double()
            self._moment += (rows.T @ wanted).cpu().double()
            guess = F.conv2d(inputs, self._weight, self._bias, padding=1)
            return float((guess - outputs).square().sum())


def unfolded(features: Tensor) -> Tensor:
    """(t, features, h, w) to rows (t h w, 9 features + 1) whose product with weights and bias is the convolution."""
    rows = F.unfold(features, 3, padding=1).transpose(1, 2).flatten(0, 1)
    return torch.cat((rows, rows.new_ones(rows.shape[0], 1)), dim=1)


def solve_ridge(gram: Tensor, moment: Tensor, old: OutputLayer, ridge: float) -> OutputLayer:
    """The layer w with the least |U w - v|^2 + r |w - old|^2, of gram = U'U and moment = U'v.

    ridge: r over the mean of the diagonal of `gram`, above 0: where the clips say nothing, the old weights stay.
    """
    start = torch.cat((old.weight.flatten(1), old.bias[:, None]), dim=1).T.double()  # 9 features + 1, 4
    strength = ridge * float(gram.diagonal().mean())
    system = gram + strength * torch.eye(gram.shape[0], dtype=gram.dtype)
    found = start + torch.linalg.solve(system, moment - gram @ start)
    return output_layer(found[:-1].T.reshape(old.weight.shape), found[-1])


def _check_same(before: dict[str, object], settings: TrainSettings, path: Path) -> None:
    now = asdict(settings)
    for name, value in now.items():
        if before.get(name) == value:
            continue
        what = "other clips or another size" if name == "fingerprint" else f"{name} {before.get(name)!r}, not {value!r}"
        raise CheckpointError(
            f"{path}: that training had {what}. Set what it had to go on with it, or choose another name to begin anew."
        )
