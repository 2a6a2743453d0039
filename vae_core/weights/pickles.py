"""Files of `torch.save`, read without torch's unpickler: nothing in them is called, nothing grows beyond them.

What torch.save writes is a pickle that says how tensors lie in blocks of bytes ("storages"), and those blocks. Here the
pickle is read by a machine that knows no more than dicts, lists, numbers, texts and "a tensor lies there"; a name of
anything else ends it. The legacy format, from before PyTorch 1.6, has several pickles and then the blocks in a row.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import torch
from torch import Tensor

from .headers import UnreadableError, brief

PICKLE_LIMIT = 4 << 20  # bytes; that of a training checkpoint with its optimizer has some hundred kB
_MOST_ARGUMENTS, _MOST_AXES = 16, 32
_DEPTH = 8  # of dicts within dicts
_MAGIC = 0x1950A86A20F9469CFC6C  # the first thing in a file of the legacy format
_ZIP_HEAD = struct.Struct("<4s22xHH")  # of a record's own header: signature, lengths of name and extra field
_STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
_PASSED_OVER = frozenset(  # values of a training that are no tensors, and that are not made
    {
        "builtins.set", "builtins.frozenset", "builtins.complex", "__builtin__.set", "__builtin__.frozenset",
        "__builtin__.complex", "torch.Size", "torch.device", "collections.Counter", "_codecs.encode",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Storage:
    """A block of bytes. nbytes: what the pickle says of it."""

    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor that is not read yet. offset, stride: in elements."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """A name in a pickle that has a meaning here. call: what is done where the pickle calls it."""

    name: str
    call: Callable[..., object] | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class _Block:
    """Where a storage lies in the file, in bytes."""

    start: int
    nbytes: int


def read_zip(path: Path, records: list[zipfile.ZipInfo]) -> object:
    """What a file of torch.save holds, with every tensor mapped from it privately.

    records: the contents of the archive, checked to lie stored within the file. Raises UnreadableError.
    """
    by_name = {record.filename: record for record in records}
    main = next(name for name in by_name if name.endswith("/data.pkl"))
    folder = main.removesuffix("data.pkl")
    size = path.stat().st_size
    with path.open("rb") as file:
        order = by_name.get(f"{folder}byteorder")
        if order is not None and _content(file, order, size) == b"big":
            raise UnreadableError("was saved on a big-endian machine: save it again on one of today's.")
        content = _content(file, by_name[main], size)
        blocks = {
            name.removeprefix(f"{folder}data/"): _block(file, record, size)
            for name, record in by_name.items()
            if name.startswith(f"{folder}data/")
        }
    return _with_tensors(_Reader(io.BytesIO(content)).load(), path, blocks, size, copied=False)


def read_legacy(path: Path) -> object:
    """The same of the format before PyTorch 1.6; its tensors are read, not mapped."""
    size = path.stat().st_size
    blocks: dict[str, _Block] = {}
    with path.open("rb") as file:
        pickles = io.BytesIO(file.read(PICKLE_LIMIT))
        if _first(pickles) != _MAGIC:
            raise UnreadableError(
                "is a plain Python pickle, not a file of torch.save, and is refused, because loading it could run "
                "anything: convert it to .safetensors in an environment that you trust with it."
            )
        version, system = (_Reader(pickles).load() for _ in range(2))
        if version != 1001 or not isinstance(system, Mapping):
            raise UnreadableError("is of a version of PyTorch's old format that is not known. Save it again.")
        if cast("Mapping[object, object]", system).get("little_endian") is False:
            raise UnreadableError("was saved on a big-endian machine: save it again on one of today's.")
        reader = _Reader(pickles)
        loaded, keys = reader.load(), _Reader(pickles).load()
        at = pickles.tell()
        for key in cast("list[object]", keys) if isinstance(keys, list) else ():
            storage = reader.storages.get(key) if isinstance(key, str) else None
            file.seek(at)
            head = file.read(8)
            count = int.from_bytes(head, "little")
            if storage is None or storage.key in blocks or count * storage.dtype.itemsize != storage.nbytes:
                raise _damaged("its list of tensors is wrong")
            blocks[storage.key] = _Block(at + 8, storage.nbytes)
            at += 8 + storage.nbytes
    return _with_tensors(loaded, path, blocks, size, copied=True)


def _first(pickles: io.BytesIO) -> object:
    try:
        return _Reader(pickles).load()
    except UnreadableError:
        return None


def _damaged(why: str) -> UnreadableError:
    return UnreadableError(f"is a truncated or damaged PyTorch file ({why}). Get it again.")


# ---------------------------------------------------------------------------------------------------- the pickle

_PICKLE: Any = pickle
_PythonUnpickler: Any = _PICKLE._Unpickler
_OPCODES = (  # of the protocols 2 to 4, but for what makes objects and sets
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("APPEND", "APPENDS", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL"),
    "BINPERSID",
)


class _Reader(_PythonUnpickler):
    """Reads one pickle of torch.save. Raises UnreadableError for whatever else it may hold."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="utf-8")
        self._input = file
        self.storages: dict[str, _Storage] = {}

    def load(self) -> object:
        try:
            return super().load()
        except UnreadableError:
            raise
        except Exception as error:  # damage shows as nearly every exception there is
            if isinstance(error, EOFError) and self._input.tell() >= PICKLE_LIMIT:
                raise _too_long() from error
            raise _damaged(f"{type(error).__name__}: {brief(error)}") from error

    def find_class(self, module: str, name: str, /) -> _Known:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return _Known(full, _ordered)
        if full in _PASSED_OVER:
            return _Known(full, _nothing)
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Known(full, dtype=_STORAGES[name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return _Known(full, dtype=getattr(torch, name))
        if full in _MAKERS:
            return _Known(full, _MAKERS[full])
        raise UnreadableError(
            f"holds pickled code ({full[:80]}) and is refused, because loading it could run anything: convert it to "
            ".safetensors in an environment that you trust with it."
        )

    def persistent_load(self, pid: object) -> _Storage:
        """("storage", type, key, device, elements) and, in the legacy format, a view, which is not known here."""
        if not isinstance(pid, tuple) or not 5 <= len(cast("tuple[object, ...]", pid)) <= 6:
            raise _damaged("a tensor lies nowhere")
        word, kind, key, _, count, *view = cast("tuple[Any, ...]", pid)
        if (
            word != "storage"
            or not isinstance(kind, _Known)
            or kind.dtype is None
            or not isinstance(key, str)
            or type(count) is not int
            or not 0 <= count < 1 << 48
            or any(part is not None for part in view)
        ):
            raise _damaged("a tensor lies nowhere")
        storage = _Storage(key, kind.dtype, count * kind.dtype.itemsize)
        if self.storages.setdefault(key, storage).nbytes != storage.nbytes:
            raise _damaged("two sizes of one tensor")
        return storage

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], arguments)

    def load_build(self) -> None:
        """Attributes of a dict, as `_metadata` of a state dict, are not kept."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise _damaged("attributes of what has none")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    @staticmethod
    def _set(target: object, items: list[Any]) -> None:
        if not isinstance(target, dict):
            raise _damaged("a name without a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str):  # weights have names; to compare other keys may take very long
                cast("dict[object, object]", target)[key] = value

    def load_empty_set(self) -> None:
        self.stack.append(None)

    def load_additems(self) -> None:
        self.pop_mark()

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.stack.append(None)

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{getattr(pickle, name)[0]: _PythonUnpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES},
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.EMPTY_SET[0]: load_empty_set,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
    }


def _called(known: object, arguments: object) -> object:
    if not isinstance(known, _Known) or known.call is None or not isinstance(arguments, tuple):
        raise _damaged("something is called that cannot be")
    given = cast("tuple[Any, ...]", arguments)
    if len(given) > _MOST_ARGUMENTS:
        raise _damaged(f"something is called with {len(given)} arguments")
    return known.call(*given)


def _ordered(pairs: object = (), *rest: object) -> OrderedDict[object, object]:
    """An OrderedDict: empty, or of a list of pairs, as Python 2 wrote it."""
    if rest or not isinstance(pairs, (list, tuple)):
        raise _damaged("a dict that is made of something else than pairs")
    found: OrderedDict[object, object] = OrderedDict()
    for pair in cast("list[object]", pairs):
        if not isinstance(pair, (list, tuple)) or len(cast("list[object]", pair)) != 2:
            raise _damaged("a dict that is made of something else than pairs")
        key, value = cast("tuple[object, object]", tuple(cast("list[object]", pair)))
        if not isinstance(key, (str, int)):
            raise _damaged("a dict with a key that is neither a text nor a number")
        found[key] = value
    return found


def _nothing(*_: object) -> None:
    return None


def _place(storage: object, offset: object, size: object, stride: object, *rest: object) -> _Place:
    """A tensor as torch._utils._rebuild_tensor_v2 is told of it; rest: gradients and hooks, and a dtype in v3."""
    dtype = next((value.dtype for value in rest if isinstance(value, _Known) and value.dtype is not None), None)
    if (
        not isinstance(storage, _Storage)
        or not isinstance(offset, int)
        or not isinstance(size, tuple)
        or not isinstance(stride, tuple)
        or not len(size) == len(stride) <= _MOST_AXES
        or any(type(value) is not int or not 0 <= value < 1 << 48 for value in (offset, *size, *stride))
    ):
        raise _damaged("a tensor without a proper shape")
    return _Place(storage, dtype or storage.dtype, offset, tuple(size), tuple(stride))


def _same(data: object, *_: object) -> object:
    return data


def _of_type(maker: object, _: object, arguments: object, __: object = None) -> object:
    """A tensor of a subclass, or with attributes, as torch._tensor._rebuild_from_type_v2 is told of it."""
    if isinstance(maker, _Known) and maker.call is _of_type:
        raise _damaged("a tensor of no kind")
    return _called(maker, arguments)


_MAKERS: dict[str, Callable[..., object] | None] = {
    "torch._utils._rebuild_tensor": _place,
    "torch._utils._rebuild_tensor_v2": _place,
    "torch._utils._rebuild_tensor_v3": _place,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.nn.parameter.Parameter": None,
    "torch.Tensor": None,
}


# ---------------------------------------------------------------------------------------------------- the tensors


def _with_tensors(loaded: object, path: Path, blocks: Mapping[str, _Block], size: int, *, copied: bool) -> object:
    """`loaded` with a tensor in every place; containers are made once, however often they are referred to."""
    whole = torch.UntypedStorage.from_file(str(path), False, size) if size else torch.UntypedStorage(0)
    storages: dict[str, torch.UntypedStorage] = {}
    made: dict[int, object] = {}

    def storage_of(place: _Place) -> torch.UntypedStorage:
        key = place.storage.key
        if key not in storages:
            block = blocks.get(key)
            if block is None or block.nbytes != place.storage.nbytes or block.start + block.nbytes > size:
                raise _damaged("a tensor is cut")
            found = cast("torch.UntypedStorage", whole[block.start : block.start + block.nbytes])
            storages[key] = found.clone() if copied else found
        return storages[key]

    def tensor(place: _Place) -> Tensor:
        used = place.offset + sum((n - 1) * step for n, step in zip(place.size, place.stride, strict=True)) + 1
        wide, needed = place.dtype.itemsize, math.prod(place.size)
        if needed and (used * wide > place.storage.nbytes or needed * wide > place.storage.nbytes):
            raise UnreadableError(
                f"is damaged: a tensor has shape {place.size}, more than the file holds. Get it again."
            )
        empty = torch.empty(0, dtype=place.dtype)
        return empty.set_(cast("Any", storage_of(place)), place.offset if needed else 0, place.size, place.stride)

    def filled(item: object, depth: int) -> object:
        if isinstance(item, _Place):
            if id(item) not in made:
                made[id(item)] = tensor(item)
            return made[id(item)]
        if not isinstance(item, dict) or depth == 0:
            return item if isinstance(item, (str, int, float, bool)) else None
        if id(item) not in made:
            made[id(item)] = {}
            items = cast("dict[object, object]", item).items()
            made[id(item)] = {name: filled(value, depth - 1) for name, value in items}
        return made[id(item)]

    return filled(loaded, _DEPTH) if isinstance(loaded, (dict, _Place)) else loaded


def _too_long() -> UnreadableError:
    return UnreadableError(
        f"is no weight file: its list of contents takes more than the {PICKLE_LIMIT:,} bytes that are read. Save only "
        "the state dict."
    )


def _content(file: BinaryIO, record: zipfile.ZipInfo, size: int) -> bytes:
    if record.file_size >= PICKLE_LIMIT:
        raise _too_long()
    block = _block(file, record, size)
    file.seek(block.start)
    return file.read(block.nbytes)


def _block(file: BinaryIO, record: zipfile.ZipInfo, size: int) -> _Block:
    """Where the content of a stored record lies; its own header may be longer than the list at the end says."""
    file.seek(record.header_offset)
    head = file.read(_ZIP_HEAD.size)
    if len(head) < _ZIP_HEAD.size or head[:4] != b"PK\x03\x04":
        raise _damaged("its records do not fit the file")
    _, name, extra = _ZIP_HEAD.unpack(head)
    start = record.header_offset + _ZIP_HEAD.size + name + extra
    if start + record.file_size > size:
        raise _damaged("its records do not fit the file")
    return _Block(start, record.file_size)
