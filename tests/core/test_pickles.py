"""Files of torch.save: everything that torch writes is read as torch reads it; bombs and code are refused, at once."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch

from vae_core.errors import CheckpointError
from vae_core.weights.files import read_weights

GLOBAL, REDUCE, STOP = b"c%s\n%s\n", b"R", b"."


def _error(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    return str(caught.value)


def _zip(path: Path, content: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in records.items():
            archive.writestr(f"archive/data/{name}", data)
    return path


def _int(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _call(module: str, name: str, arguments: bytes) -> bytes:
    return GLOBAL % (module.encode(), name.encode()) + arguments + REDUCE


# ------------------------------------------------------------------------------------------------ what torch writes


def _everything(*, zipped: bool) -> dict[str, object]:
    base = torch.arange(24.0).reshape(2, 3, 4)
    state = OrderedDict(
        whole=base,
        view=base[:, 1:, ::2],
        turned=base.transpose(0, 2),
        scalar=torch.tensor(3.5),
        empty=torch.empty(0, 5),
        half=torch.ones(3).half(),
        brain=torch.ones(3).bfloat16(),
        double=torch.ones(3).double(),
        whole_numbers=torch.arange(4),
        small=torch.arange(4, dtype=torch.uint8),
        flags=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(torch.ones(2)),
    )
    if zipped:
        state |= {"eighth": torch.ones(4).to(torch.float8_e4m3fn), "wide": torch.ones(2, dtype=torch.uint16)}
    state._metadata = OrderedDict(version=1)  # pyright: ignore[reportAttributeAccessIssue]
    groups = [{"lr": 1e-4, "betas": (0.9, 0.95)}]
    training = {"optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": groups}}
    others = {
        "epoch": 3,
        "sets": [{1, 2}, frozenset((3,))],
        "complex": 1j,
        "bytes": b"x" * 300,
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "counter": Counter("ab"),
        "big": 1 << 200,
        "none": None,
        "dtype": torch.float16,
    }
    return {"state_dict": state, **training, **others}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_writes_is_read_as_torch_reads_it(tmp_path: Path, zipped: bool, protocol: int) -> None:
    path = tmp_path / "a.ckpt"
    content = _everything(zipped=zipped)
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found = read_weights(path).tensors
    expected = torch.load(path, weights_only=False)["state_dict"]
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape, found[name].stride()) == (
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
        )
        assert torch.equal(found[name].double(), tensor.detach().double()), name


def test_tensors_that_share_memory_are_one_mapping(tmp_path: Path) -> None:
    base = torch.ones(1000)
    torch.save({"a": base, "b": base[:10]}, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth").tensors
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


# --------------------------------------------------------------------------------------------------- what is refused

BOMBS = {
    "bytearray": _call("builtins", "bytearray", _int(2**30) + b"\x85"),
    "bytearray of Python 2": _call("__builtin__", "bytearray", _int(2**30) + b"\x85"),
    "storage": _call("torch", "FloatStorage", _int(2**30) + b"\x85"),
    "tensor": _call("torch", "FloatTensor", _int(2**30) + b"\x85"),
    "quantized": _call("torch._utils", "_rebuild_qtensor", b")"),
    "memo": b"N" + b"r" + struct.pack("<I", 2**31 - 1),
    "long text": b"X" + struct.pack("<I", 2**32 - 1) + b"abc",
    "dict of pairs": b"]q\x00(" + b"K\x01K\x02\x86" * 9 + b"e0" + _call("collections", "OrderedDict", b"h\x00\x85"),
    "many axes": b"("
    + b"K\x01" * 50_000
    + b"tq\x000"
    + _call("torch._utils", "_rebuild_tensor_v2", b"(NK\x00h\x00h\x00t"),
    "deep key": b"}N" + b"\x85" * 200_000 + b"K\x01s",
}


@pytest.mark.parametrize("name", list(BOMBS))
@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_bombs_are_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "a.pth"
    content = b"\x80\x02" + BOMBS[name] + STOP
    if kind == "zip":
        _zip(path, content)
    elif kind == "legacy":
        start = b"".join(pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        path.write_bytes(start + content + pickle.dumps([], 2))
    else:
        path.write_bytes(content)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    said = _error(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert time.process_time() - began < 5
    if kind == "plain":
        assert "is a plain Python pickle, not a file of torch.save" in said


def test_values_without_tensors_are_not_made(tmp_path: Path) -> None:
    """Thousands of sets of one long list would take gigabytes."""
    many = b"]q\x00(" + b"K\x01" * 100_000 + b"e0" + GLOBAL % (b"builtins", b"set") + b"q\x010"
    content = b"\x80\x02}X\x01\x00\x00\x00a" + many + b"(" + b"h\x01h\x00\x85R" * 100_000 + b"ts."
    path = _zip(tmp_path / "a.pth", content)
    began = time.process_time()
    assert "holds no tensors" in _error(path)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("content", [{"a": 1}, [1, 2]])
def test_a_plain_pickle_is_called_what_it_is(tmp_path: Path, protocol: int, content: object) -> None:
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=protocol))
        assert "is a plain Python pickle, not a file of torch.save, and is refused" in _error(tmp_path / name)


class _Runs:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("open('ran', 'w').close()",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_never_runs(tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1), "b": _Runs()}, "a.pth", _use_new_zipfile_serialization=zipped)
    assert "holds pickled code (__builtin__.exec) and is refused" in _error(Path("a.pth"))
    Path("b.pth").write_bytes(pickle.dumps(_Runs()))
    assert "plain Python pickle" in _error(Path("b.pth"))
    assert not Path("ran").exists()


def test_what_is_called_is_never_ours_to_change(tmp_path: Path) -> None:
    """Attributes are not set on what a pickle names, nor is a name called that stands for a type alone."""
    for content in (
        GLOBAL % (b"collections", b"OrderedDict") + b"}b",
        _call("torch", "float32", b")"),
        _call("torch.nn.parameter", "Parameter", b")"),
        b"K\x01)R",
    ):
        assert "is a truncated or damaged PyTorch file" in _error(
            _zip(tmp_path / "a.pth", b"\x80\x02" + content + STOP)
        )


def test_a_tensor_that_the_file_does_not_hold_is_refused(tmp_path: Path) -> None:
    def one(elements: int, size: int, stride: int, offset: int = 0) -> bytes:
        place = (
            b"(X\x07\x00\x00\x00storage"
            + GLOBAL % (b"torch", b"FloatStorage")
            + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        )
        place += _int(elements) + b"tQ"
        tensor = b"(" + place + _int(offset) + _int(size) + b"\x85" + _int(stride) + b"\x85\x89" + _call(
            "collections", "OrderedDict", b")") + b"t"  # fmt: skip
        return b"\x80\x02}X\x01\x00\x00\x00a" + _call("torch._utils", "_rebuild_tensor_v2", tensor) + b"s."

    path = tmp_path / "a.pth"
    data = {"0": bytes(16)}
    assert read_weights(_zip(path, one(4, 4, 1), **data)).tensors["a"].shape == (4,)
    for wrong in (one(4, 5, 1), one(4, 4, 2), one(4, 4, 1, 1), one(5, 4, 1), one(4, 2**30, 0), one(-1, 1, 1)):
        assert "damaged" in _error(_zip(path, wrong, **data))
    assert "a tensor is cut" in _error(_zip(path, one(4, 4, 1)))


def test_a_list_of_contents_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    _zip(path, b"\x80\x02" + b"]" * (5 << 20) + STOP)
    assert "its list of contents takes more than the 4,194,304 bytes" in _error(path)
    start = b"".join(pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    path.write_bytes(start + b"\x80\x02" + b"N0" * (5 << 20))
    assert "its list of contents takes more than the 4,194,304 bytes" in _error(path)


def test_torchs_own_unpickler_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "load", None)
    assert torch.equal(read_weights(tmp_path / "a.pth").tensors["a"], torch.ones(3))


def test_a_big_endian_file_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/byteorder", b"big")
    assert "was saved on a big-endian machine" in _error(tmp_path / "a.pth")
    buffer = io.BytesIO()
    for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}, {}, []):
        pickle.dump(item, buffer, 2)
    (tmp_path / "b.pth").write_bytes(buffer.getvalue())
    assert "was saved on a big-endian machine" in _error(tmp_path / "b.pth")
