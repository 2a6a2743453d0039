"""Damaged and hostile files: reading them ends in a result or in our error, and runs nothing that they hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as to_safetensors
from torch import Tensor

import vae_core
from vae_core.errors import CheckpointError, LatentFileError
from vae_core.families import FAMILIES
from vae_core.media.latents import LatentMeta, open_latent, save_latent
from vae_core.weights.files import read_weights, strip_foreign

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
ROOT = Path(__file__).parent.parent.parent


def _settings(examples: int) -> settings:
    """The same examples in every run, unless FUZZ_EXAMPLES asks for many, in search of new ones."""
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples, deadline=None, database=None, derandomize=EXAMPLES <= 500, suppress_health_check=slow
    )


fuzz = _settings(EXAMPLES)
fuzz_models = _settings(EXAMPLES // 2)  # each example builds a model


def _weights() -> dict[str, Tensor]:
    return {
        "decoder.conv_in.weight": torch.ones(8, 4, 3, 3, 3, dtype=torch.float16),
        "decoder.conv_in.bias": torch.zeros(8, dtype=torch.float16),
        "encoder.norm_out.weight": torch.arange(6.0).reshape(2, 3),
    }


def _torch_bytes(thing: object, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _checkpoint() -> dict[str, Any]:
    return {"epoch": 3, "state_dict": _weights(), "optimizer_states": [{"lr": 0.1}], "note": "x"}


SEEDS: dict[str, tuple[str, bytes]] = {
    "safetensors": ("weights.safetensors", to_safetensors(_weights(), metadata={"family": "cv-vae"})),
    "zip": ("weights.pth", _torch_bytes(_weights())),
    "legacy": ("weights.pth", _torch_bytes(_weights(), legacy=True)),
    "nested": ("weights.ckpt", _torch_bytes(_checkpoint())),
    "nested-legacy": ("weights.ckpt", _torch_bytes(_checkpoint(), legacy=True)),
}


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` after one to four of: cut, bytes flipped, a chunk moved, removed, repeated, overwritten."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        size = len(result)
        if size < 2:
            break
        # half of the places lie in the first or last kilobyte, where headers and lists of contents are
        near = draw(st.sampled_from(["any", "start", "end"]))
        low, high = {"any": (0, size - 1), "start": (0, min(size, 1024) - 1), "end": (max(0, size - 1024), size - 1)}[
            near
        ]
        at = draw(st.integers(low, high))
        length = draw(st.integers(1, 64))
        match draw(st.sampled_from(["cut", "flip", "set", "move", "remove", "repeat", "number"])):
            case "cut":
                del result[at:]
            case "flip":
                result[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                result[at : at + length] = draw(st.binary(min_size=1, max_size=8))
            case "move":
                chunk = result[at : at + length]
                del result[at : at + length]
                to = draw(st.integers(0, max(0, len(result))))
                result[to:to] = chunk
            case "remove":
                del result[at : at + length]
            case "repeat":
                result[at:at] = result[at : at + length]
            case _:
                number = draw(st.sampled_from([0, 1, 255, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]))
                result[at : at + 8] = struct.pack("<Q", number)
    return bytes(result)


def _use(tensors: dict[str, Tensor]) -> None:
    """Touch every value, so that what a damaged file maps is really read."""
    for tensor in tensors.values():
        tensor.to(torch.float64).sum()


def _reads_or_refuses(path: Path) -> None:
    try:
        _use(strip_foreign(read_weights(path).tensors))
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
        assert len(str(error)) < 1500  # noqa: PT017


@pytest.mark.parametrize("kind", list(SEEDS))
@fuzz
@given(data=st.data())
def test_mutated_weight_files_are_read_or_refused(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    name, seed = SEEDS[kind]
    path = tmp_path / name
    path.write_bytes(data.draw(mutations(seed)))
    _reads_or_refuses(path)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.ckpt"])
@fuzz
@given(content=st.binary(max_size=600))
def test_arbitrary_bytes_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    for start in (b"", b"\x80\x02", b"PK\x03\x04", struct.pack("<Q", len(content)) + b"{"):
        path.write_bytes(start + content)
        _reads_or_refuses(path)
        with pytest.raises(LatentFileError):
            open_latent(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NUMBERS = st.one_of(st.integers(-2, 900), st.sampled_from([2**31, 2**40, 2**62, 2**63, 2**64]), JSON)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F16", "F32", "BF16", "F64", "I8", "F8_E4M3", "F4", "BOOL", "C64", "X", 7]),
        "shape": st.lists(NUMBERS, max_size=6) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    },
)


@fuzz
@given(
    entries=st.dictionaries(st.sampled_from(["decoder.conv_in.weight", "latent_tbchw", "a", "b", ""]), ENTRIES | JSON),
    metadata=st.none() | JSON | st.dictionaries(st.text(max_size=6), st.text(max_size=6)),
    size=st.integers(0, 2000),
)
def test_invented_headers_are_read_or_refused(entries: Any, metadata: Any, size: int, tmp_path: Path) -> None:
    header = {**entries, **({} if metadata is None else {"__metadata__": metadata})}
    raw = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(size))
    _reads_or_refuses(path)
    with pytest.raises(LatentFileError):
        open_latent(path)


def _latent_bytes(folder: Path) -> bytes:
    path = folder / "seed.safetensors"
    meta = LatentMeta(family="cv-vae", fps=Fraction(24), frames=9, height=16, width=24, audio="a.mp4")
    save_latent(path, torch.ones(1, 4, 3, 2, 3), meta)
    return path.read_bytes()


@fuzz
@given(data=st.data())
def test_mutated_latent_files_are_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "latent.safetensors"
    path.write_bytes(data.draw(mutations(_latent_bytes(tmp_path))))
    try:
        file = open_latent(path)
        assert torch.cat(list(file.chunks(2)), dim=2).shape == file.read().shape == file.shape
    except LatentFileError as error:
        assert str(path) in str(error)  # noqa: PT017


@fuzz
@given(
    changes=st.dictionaries(
        st.sampled_from(
            ["format", "family", "fps", "frames", "height", "width", "channels", "scaled", "start", "layout"]
        ),
        st.one_of(
            st.text(max_size=20),
            st.integers().map(str),
            st.sampled_from(["1/0", "0", "-1", "9/0x1", "٣", "1e9", "9" * 5000]),
        ),
        min_size=1,
    )
)
def test_latent_files_with_other_metadata_are_read_or_refused(changes: dict[str, str], tmp_path: Path) -> None:
    seed = _latent_bytes(tmp_path)
    length = int.from_bytes(seed[:8], "little")
    header = json.loads(seed[8 : 8 + length])
    header["__metadata__"].update(changes)
    raw = json.dumps(header).encode()
    path = tmp_path / "latent.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + seed[8 + length :])
    try:
        file = open_latent(path)
        assert 5 <= file.meta.frames <= 9
        assert (file.meta.height + 7) // 8 == 2
        assert file.read().shape == (1, 4, 3, 2, 3)
    except LatentFileError as error:
        assert str(path) in str(error)  # noqa: PT017


class _Runs:
    """Unpickling this would run `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def _attacks(marker: Path) -> dict[str, object]:
    command = f"echo run > {marker}"
    return {
        "os.system": _Runs(os.system, command),  # pyright: ignore[reportDeprecated]
        "exec": _Runs(exec, f"open({str(marker)!r}, 'w').write('run')"),
        "eval": _Runs(eval, f"open({str(marker)!r}, 'w').write('run')"),
        "getattr": _Runs(getattr, _Runs(__import__, "os"), "system"),
        "open": _Runs(open, str(marker), "w"),
        "torch.load": _Runs(torch.load, str(marker)),
        "popen": _Runs(subprocess.Popen, ["sh", "-c", command]),
    }


@pytest.mark.parametrize("name", list(_attacks(Path("x"))))
@pytest.mark.parametrize("place", ["alone", "beside", "nested", "key"])
@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".bin", ".safetensors"])
def test_pickled_code_is_refused_and_never_run(name: str, place: str, suffix: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    attack = _attacks(marker)[name]
    thing: object = {
        "alone": attack,
        "beside": {**_weights(), "extra": attack},
        "nested": {"state_dict": _weights(), "callbacks": [attack]},
        "key": {"state_dict": {**_weights(), (1, attack): 0}},
    }[place]
    raw = pickle.dumps(thing if place == "alone" else {"x": attack}, protocol=2)
    contents = [_torch_bytes(thing), _torch_bytes(thing, legacy=True), raw, _hidden_in_tar(raw)]
    path = tmp_path / f"evil{suffix}"
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_weights(path)
        assert str(path) in str(caught.value)
        assert not marker.exists()
    if suffix != ".safetensors":
        for content in contents[:2]:
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=r"holds pickled code .*refused.*safetensors"):
                read_weights(path)


def _hidden_in_tar(raw: bytes) -> bytes:
    """A tar file, the oldest format of PyTorch, that starts like a pickle and has no magic number."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name in ("\udc80\x02 first", "sys_info", "storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    data = bytearray(buffer.getvalue())
    data[257:265] = bytes(8)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def test_the_tar_file_of_these_tests_is_one(tmp_path: Path) -> None:
    """Which torch's own reader would take for one, and open; this one refuses it, as a pickle that it is not."""
    path = tmp_path / "x.pth"
    path.write_bytes(_hidden_in_tar(b"x"))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert tarfile.is_tarfile(path)
    with pytest.raises(CheckpointError, match="and is refused, because loading it could run"):
        read_weights(path)


def test_a_huge_tensor_that_the_file_does_not_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for legacy in (False, True):
        path.write_bytes(_torch_bytes({"a": torch.zeros(1).expand(2**40)}, legacy=legacy))
        with pytest.raises(CheckpointError, match="more than the file holds"):
            read_weights(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(io.BytesIO(SEEDS["zip"][1])) as seed, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in seed.namelist():
            bomb.writestr(name, seed.read(name) + bytes(50_000_000 if name.endswith("/data/0") else 0))
    with pytest.raises(CheckpointError, match="damaged PyTorch file"):
        read_weights(path)


def test_other_kinds_of_tensor_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    kinds = [
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
        torch.ones(2) * 1j,
    ]
    for tensor in (*kinds, torch.empty(3, device="meta")):
        path.write_bytes(_torch_bytes({"a": tensor}))
        with pytest.raises(CheckpointError, match=r"and is refused|not a tensor of plain numbers"):
            read_weights(path)


def test_a_checkpoint_that_contains_itself_is_read(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"a": torch.ones(2)}
    loop["state_dict"] = loop
    path = tmp_path / "x.pth"
    path.write_bytes(_torch_bytes(loop))
    assert list(read_weights(path).tensors) == ["a"]


@pytest.mark.parametrize("length", [2**20, 2**26, 2**40, 2**63, 2**64 - 1])
def test_a_huge_header_is_refused_without_being_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"' + bytes(100))
    with pytest.raises(CheckpointError, match=r"(is truncated|would have a header of)"):
        read_weights(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":' * 20000 + b"1" + b"}" * 20000,
        b'{"a":' + b"[" * 100_000,
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 6000 + b'],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"' + b"a" * 2000 + b'":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"a":1},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_damaged_headers_are_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match="header cannot be read"):
        read_weights(path)


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
        seed.write_bytes(to_safetensors(state) if suffix == ".safetensors" else _torch_bytes({"state_dict": state}))
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data.draw(mutations(seed.read_bytes())))
    _load_or_refuse(path)


def test_hundreds_of_damaged_zip_files_do_not_crash_the_interpreter(tmp_path: Path) -> None:
    """A crash would take pytest with it, so these are read in a process of their own."""
    generator = random.Random(0)
    for name, seed in (SEEDS["zip"], SEEDS["legacy"]):
        for i in range(100):
            content = bytearray(seed)
            for _ in range(generator.randint(1, 12)):
                content[generator.randrange(len(content))] = generator.randrange(256)
            (tmp_path / f"{len(seed)}_{i}_{name}").write_bytes(content)
    code = (
        "import sys, pathlib\n"
        "from vae_core.weights.files import read_weights\n"
        "from vae_core.errors import CheckpointError\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try:\n"
        "        [t.double().sum() for t in read_weights(path).tensors.values()]\n"
        "    except CheckpointError:\n"
        "        pass\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
