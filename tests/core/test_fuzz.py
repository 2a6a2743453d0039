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
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as to_safetensors
from torch import Tensor

from vae_core.errors import CheckpointError, LatentFileError
from vae_core.media.latents import LatentMeta, open_latent, save_latent
from vae_core.weights.files import read_weights, strip_foreign

from .fuzzing import fuzz, mutations, torch_bytes

ROOT = Path(__file__).parent.parent.parent


def _weights() -> dict[str, Tensor]:
    return {
        "decoder.conv_in.weight": torch.ones(8, 4, 3, 3, 3, dtype=torch.float16),
        "decoder.conv_in.bias": torch.zeros(8, dtype=torch.float16),
        "encoder.norm_out.weight": torch.arange(6.0).reshape(2, 3),
    }


def _checkpoint() -> dict[str, Any]:
    return {"epoch": 3, "state_dict": _weights(), "optimizer_states": [{"lr": 0.1}], "note": "x"}


SEEDS: dict[str, tuple[str, bytes]] = {
    "safetensors": ("weights.safetensors", to_safetensors(_weights(), metadata={"family": "cv-vae"})),
    "zip": ("weights.pth", torch_bytes(_weights())),
    "legacy": ("weights.pth", torch_bytes(_weights(), legacy=True)),
    "nested": ("weights.ckpt", torch_bytes(_checkpoint())),
    "nested-legacy": ("weights.ckpt", torch_bytes(_checkpoint(), legacy=True)),
}


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
    contents = [torch_bytes(thing), torch_bytes(thing, legacy=True), raw, _hidden_in_tar(raw)]
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
        path.write_bytes(torch_bytes({"a": torch.zeros(1).expand(2**40)}, legacy=legacy))
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
        path.write_bytes(torch_bytes({"a": tensor}))
        with pytest.raises(CheckpointError, match=r"and is refused|not a tensor of plain numbers"):
            read_weights(path)


def test_a_checkpoint_that_contains_itself_is_read(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"a": torch.ones(2)}
    loop["state_dict"] = loop
    path = tmp_path / "x.pth"
    path.write_bytes(torch_bytes(loop))
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
