"""Loading and saving weights under their official names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..families import Direction, Family, Network, recognize
from ..weights.detect import describe_foreign
from ..weights.files import read_weights, strip_foreign
from ..weights.writing import write_safetensors, write_torch
from .vae import VideoVAE

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
DEMO_WEIGHTS = {f"demo-{name}-vae": DEMO_FOLDER / f"demo_{name}_vae.safetensors" for name in ("cv", "iv", "image")}
STORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TOLD = ("scale_factor", "shift_factor", "scaling_factor", "norm_eps", "norm_num_groups")  # of itself, by a file


def load(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    scale_factor: float | None = None,
    shift_factor: float | None = None,
) -> VideoVAE:
    """A VAE from official weights; family and every width are inferred from names and shapes.

    source: a .safetensors, .pth, .pt, .ckpt or .bin file, a Hugging Face folder, a state dict, or the name of bundled
    demo weights: "demo-cv-vae", "demo-iv-vae" or "demo-image-vae". Pickled code is never run. Weights that have only an
    encoder, or only a decoder, make a VAE that can do only that; `info.halves` says so.
    dtype: of the weights in use; None keeps what the file has. Tensors are converted one by one, and where nothing
    changes they stay mapped from the file (or shared with the state dict), so there is no second copy in RAM.
    scale_factor, shift_factor: for IV-VAE, latent = scale_factor * (mean - shift_factor); None takes what the file says
    of itself, else the published numbers for its widths, else 1 and 0. Not for the others, whose latents are unscaled.

    The model is in eval mode and needs no gradients; `vae.model.requires_grad_(True)` makes it trainable.
    Raises CheckpointError when the source is not a complete set of weights of a known family, and says what it seems
    to be.
    """
    metadata: dict[str, Any] = {}
    if isinstance(source, Mapping):
        origin, tensors = "The state dict", dict(source)
        _check_state_dict(tensors)
    else:
        path = DEMO_WEIGHTS.get(os.fspath(source), Path(source))
        file = read_weights(path)
        origin, tensors = f"The file {path}", file.tensors
        metadata = {**file.metadata, **(file.config or {})}
    tensors = strip_foreign(tensors)
    found = recognize(tensors)
    if found is None:
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        raise CheckpointError(f"{origin} holds no VAE of a known family. {describe_foreign(shapes)}")
    family, halves, tensors = found
    given = {"scale_factor": scale_factor, "shift_factor": shift_factor}
    asked = {name: value for name, value in given.items() if value is not None}
    config = _configure(family, tensors, {**_told(metadata, asked, origin), **asked}, origin)
    if asked and not family.scaled:
        raise CheckpointError(
            f"scale_factor and shift_factor were given for {family.id}, whose latents are unscaled here: the diffusion "
            "model scales them. Leave them out."
        )
    network = _meta_network(family, config, halves, origin)
    _assign(network, tensors, origin, torch.device(device), dtype)
    return VideoVAE(network.eval().requires_grad_(False))


def official_state(network: Network) -> dict[str, Tensor]:
    """The state dict of a network under official names and shapes; views of its weights where the layout allows."""
    names = network.family.key_map(network)
    return {names[ours][0]: tensor.detach().reshape(names[ours][1]) for ours, tensor in network.state_dict().items()}


def _told(metadata: Mapping[str, Any], asked: Mapping[str, float], origin: str) -> dict[str, float]:
    """What a file says of itself, but for what the caller says."""
    told: dict[str, float] = {}
    for name in TOLD:
        if name not in metadata or name in asked or metadata[name] is None:
            continue
        try:
            told[name] = float(metadata[name])
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{origin} gives {name} as {metadata[name]!r}, which is not a number. Pass {name}=... to load instead."
            ) from error
    return told


def _configure(family: Family, tensors: Mapping[str, Tensor], told: Mapping[str, float], origin: str) -> Any:
    try:
        return family.configure({name: tuple(tensor.shape) for name, tensor in tensors.items()}, told)
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{origin} looks like {family.id} weights, but {error} is missing or has too few dimensions, so the widths "
            "cannot be read. The file is incomplete or was altered: download it again."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{origin} looks like {family.id} weights, but is impossible: {error}") from error


def save(vae: VideoVAE, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write the weights under official names, which the official code loads.

    path: ends in .safetensors, or in .pth for torch.save of the bare state dict. dtype: None keeps the model's.
    The file appears under its name only when it is complete. Raises CheckpointError for another ending or a folder that
    does not exist, OSError where the disk does not take it.
    """
    target = Path(path)
    if target.suffix not in (".safetensors", ".pth"):
        raise CheckpointError(f"Cannot save weights as {target.name}: give a name that ends in .safetensors or .pth.")
    if not target.parent.is_dir():
        raise CheckpointError(f"Cannot save {target.name}: the folder {target.parent} does not exist. Make it first.")
    state = {
        name: tensor.to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in official_state(vae.model).items()
    }
    if target.suffix == ".pth":
        write_torch(target, state)
    else:
        write_safetensors(target, state, _metadata(vae))


def _metadata(vae: VideoVAE) -> dict[str, str]:
    told = vae.model.family.told(vae.model.config)
    return {"format": "pt", "family": vae.family, **{name: repr(value) for name, value in told.items()}}


def _check_state_dict(tensors: Mapping[Any, Any]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"The state dict holds {name!r}: {type(tensor).__name__}; needed are tensors by name. If the weights "
                'are nested, pass the inner dict, such as checkpoint["state_dict"].'
            )


def _meta_network(family: Family, config: Any, halves: tuple[Direction, ...], origin: str) -> Network:
    try:
        with torch.device("meta"):
            return family.network(config, halves)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise CheckpointError(f"{origin} implies impossible widths, {config}: the file is damaged.") from error


def _assign(
    network: Network, tensors: Mapping[str, Tensor], origin: str, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Give a network its weights, checked strictly against the official names and shapes."""
    family = network.family.id
    names = network.family.key_map(network)
    expected = {theirs: (ours, shape) for ours, (theirs, shape) in names.items()}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{origin} looks like {family} weights, but {_few(missing, 'is missing', 'are missing')}"
            f"{' and ' if missing and unknown else ''}{_few(unknown, 'is unknown', 'are unknown')}. It is incomplete "
            "or altered, or of another version: download it again, or save only the VAE's own tensors."
        )
    state: dict[str, Tensor] = {}
    for theirs, (ours, shape) in expected.items():
        tensor = tensors[theirs]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{origin} looks like {family} weights, but {theirs} has shape {tuple(tensor.shape)} where the other "
                f"tensors ask for {shape}. The file is damaged or mixes two models: download it again."
            )
        if tensor.dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{origin} has {theirs} as {tensor.dtype}; read are float16, bfloat16, float32 and float64. Take the "
                "file that was not quantized."
            )
        ours_shape = network.get_parameter(ours).shape
        state[ours] = tensor.to(device, dtype or tensor.dtype).reshape(ours_shape)
    network.load_state_dict(state, strict=True, assign=True)


def _few(names: list[str], one: str, many: str) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {one if len(names) == 1 else many}"
