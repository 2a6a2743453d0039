"""Weights of VAEs, damaged in whatever way: they are loaded, or refused with a CheckpointError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as to_safetensors
from torch import Tensor

import vae_core
from vae_core.errors import CheckpointError
from vae_core.families import FAMILIES

from .fuzzing import fuzz_models, mutations, torch_bytes


class _States(dict[str, dict[str, Tensor]]):
    def __repr__(self) -> str:
        return "a state dict of each family"  # Hypothesis prints the arguments of what fails


@pytest.fixture(scope="module")
def states(small_state: Callable[..., dict[str, Tensor]]) -> _States:
    """A small state dict of each family, made once."""
    return _States({family: small_state(family) for family in FAMILIES})


def _load_or_refuse(source: Path | dict[str, Tensor]) -> None:
    try:
        vae = vae_core.load(source)
    except CheckpointError:
        return
    assert all(parameter.device.type == "cpu" for parameter in vae.model.parameters())


def _huge(like: Tensor, size: int) -> Tensor:
    """A tensor with an axis of `size`, and without data because another has 0: a file of a few bytes can hold it."""
    if like.ndim < 2:
        return torch.zeros(0)
    return torch.zeros([0] * like.ndim).as_strided([size, 0, *like.shape[2:]], [1] * like.ndim)


@pytest.mark.parametrize("size", [2**31, 2**61, 2**63 - 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_impossible_widths_are_refused(family: str, size: int, axis: int, states: _States) -> None:
    state = dict(states[family])
    for name in [name for name in state if name.endswith(CONFIGURE)]:
        tensor = _huge(state[name], size)
        with pytest.raises(CheckpointError):
            vae_core.load({**state, name: tensor if axis == 0 else tensor.transpose(0, 1)})


# the tensors whose shapes a config is inferred from
CONFIGURE = ("conv_in.weight", ".0.conv1.weight", "conv1.conv_2d.weight", "decoder.conv1.conv.weight")


@fuzz_models
@given(data=st.data())
def test_state_dicts_with_changes_are_loaded_or_refused(data: st.DataObject, family: str, states: _States) -> None:
    state = dict(states[family])
    names = st.sampled_from(sorted(state)) | st.sampled_from(sorted(name for name in state if name.endswith(CONFIGURE)))
    for name in data.draw(st.lists(names, min_size=1, max_size=4)):
        tensor = state.pop(name, None)
        match data.draw(
            st.sampled_from(["drop", "rename", "shape", "none", "huge", "axes", "dtype", "scalar", "empty"])
        ):
            case "rename":
                state[data.draw(st.sampled_from([f"vae.{name}", f"loss.{name}", name[1:], name + "_", ""]))] = (
                    torch.ones(1)
                )
            case "shape" if tensor is not None:
                state[name] = torch.zeros([data.draw(st.integers(1, 70)) for _ in tensor.shape])
            case "none" if tensor is not None:
                state[name] = torch.zeros([data.draw(st.sampled_from([0, n])) for n in tensor.shape])
            case "huge" if tensor is not None:
                state[name] = _huge(tensor, data.draw(st.sampled_from([2**20, 2**40, 2**61])))
            case "axes" if tensor is not None:
                state[name] = tensor.reshape(-1) if data.draw(st.booleans()) else tensor[None]
            case "dtype" if tensor is not None:
                dtype = data.draw(
                    st.sampled_from([torch.int64, torch.bool, torch.complex64, torch.float16, torch.uint8])
                )
                state[name] = tensor.to(dtype)
            case "scalar":
                state[name] = torch.tensor(1.0)
            case "empty":
                state[name] = torch.zeros(0)
            case _:
                pass
    _load_or_refuse(state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@fuzz_models
@given(data=st.data())
def test_mutated_vae_files_are_loaded_or_refused(
    suffix: str, data: st.DataObject, states: _States, tmp_path: Path
) -> None:
    seed = tmp_path / f"seed{suffix}"
    if not seed.exists():
        state = {name: tensor.half() for name, tensor in states["iv-vae"].items()}
        seed.write_bytes(to_safetensors(state) if suffix == ".safetensors" else torch_bytes({"state_dict": state}))
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data.draw(mutations(seed.read_bytes())))
    _load_or_refuse(path)
