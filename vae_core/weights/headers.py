"""What kind of file this is, and the header of a safetensors file; nothing is trusted and nothing large is read."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, cast

import safetensors
from torch import Tensor

HEADER_LIMIT = 16 << 20  # bytes; our largest checkpoint needs 45 kB, a workflow saved in the metadata a few MB
NAME_LIMIT = 1000  # characters of a tensor name
_MOST_QUOTES = 400_000  # of a header: 40,000 tensors, ten times as many as the largest full checkpoint has
_MOST_SIGNS = 4 << 20  # bytes of a header outside of its texts
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

# (first bytes, at offset, what it is)
_SIGNATURES: tuple[tuple[bytes, int, str], ...] = (
    (b"version https://git-lfs", 0, "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
    (b"GGUF", 0, "a GGUF file, a format of language models and quantized diffusion models"),
    (b"\x89PNG", 0, "a PNG image"),
    (b"\xff\xd8\xff", 0, "a JPEG image"),
    (b"RIFF", 0, "a WebP image or an AVI video"),
    (b"ftyp", 4, "a video (MP4 or MOV)"),
    (b"\x1aE\xdf\xa3", 0, "a video (Matroska or WebM)"),
    (b"\x89HDF", 0, "an HDF5 file (Keras or TensorFlow)"),
    (b"\x93NUMPY", 0, "a NumPy array"),
    (b"\x1f\x8b", 0, "a gzip archive: unpack it first"),
    (b"7z\xbc\xaf", 0, "a 7-Zip archive: unpack it first"),
    (b"Rar!", 0, "a RAR archive: unpack it first"),
    (b"ustar", 257, "a tar archive: unpack it first"),
)
_OLD_PICKLES = (  # of protocol 0, which is text, and 1, which says nothing of itself
    *(b"(dp", b"(lp", b"ccollections\n", b"ccopy_reg\n", b"cnumpy"),
    *(b"}q\x00", b"]q\x00", b"(K", b"(X", b"}.", b"]."),
)


class UnreadableError(Exception):
    """Why a file cannot be read, as the end of a sentence; the callers turn it into the error of their own field."""


class Slice(Protocol):
    """A tensor in an open safetensors file, of which parts are read by indexing the first axis."""

    def __getitem__(self, index: slice, /) -> Tensor: ...


class OpenFile(Protocol):
    """What is used of an open safetensors file."""

    def get_tensor(self, name: str, /) -> Tensor: ...

    def get_slice(self, name: str, /) -> Slice: ...


@dataclass(frozen=True, kw_only=True)
class Header:
    """Header of a safetensors file. dtypes: as the format spells them, such as "F16"; data_start: byte offset."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    data_start: int


def file_size(path: Path) -> int:
    """Size in bytes of the regular file `path`. Raises UnreadableError where there is none, naming similar ones."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UnreadableError(dangling(path) or _missing(path)) from None
    except (OSError, ValueError) as error:
        circle = dangling(path) if isinstance(error, OSError) and error.errno == errno.ELOOP else ""
        raise UnreadableError(circle or f"cannot be opened: {error}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise UnreadableError("is a folder, not a file.")
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError("is not a regular file.")
    if re.search("[\ud800-\udfff]", os.fspath(path)):
        raise UnreadableError("has a name that is no UTF-8, which the safetensors library cannot open: rename it.")
    if status.st_size == 0:
        raise UnreadableError("is empty (0 bytes), as an interrupted download leaves it: get it again.")
    return status.st_size


def sniff(path: Path) -> str:
    """ "safetensors", "zip" or "pickle", by the content of `path` alone.

    Raises UnreadableError, which says what the file seems to be, for anything else.
    """
    size = file_size(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UnreadableError(f"cannot be opened: {error}.") from error
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= HEADER_LIMIT:
        return "safetensors"
    for magic, offset, what in _SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            raise UnreadableError(f"is {what}.")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or head.startswith(_OLD_PICKLES):
        return "pickle"
    if head[8:9] == b"{" and not _is_text(head):
        raise UnreadableError(_bad_length(length, size))
    raise UnreadableError(_guess(head, size))


def read_header(path: Path) -> Header:
    """The header of the safetensors file `path`, checked against the size of the file before it is parsed.

    Raises UnreadableError when the header is damaged or promises more data than the file has.
    """
    size = file_size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(HEADER_LIMIT, size - 8):
                raise UnreadableError(_bad_length(length, size))
            raw = file.read(length)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error}.") from error
    _check_effort(raw)
    try:
        parsed: Any = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
        entries, metadata = _split(parsed)
        shapes, dtypes, end = _check_entries(entries)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, a number too long, our own
        raise UnreadableError(f"is damaged: its header cannot be read ({brief(error)}). Get it again.") from error
    promised = 8 + length + end
    if promised > size:
        raise UnreadableError(
            f"is truncated: its header says {promised:,} bytes, the file has {size:,}. The download was cut short: "
            "get it again."
        )
    if promised < size:
        raise UnreadableError(f"is damaged: its header says {promised:,} bytes, the file has {size:,}. Get it again.")
    return Header(shapes=shapes, dtypes=dtypes, metadata=metadata, data_start=8 + length)


def _check_effort(raw: bytes) -> None:
    """Raise UnreadableError for a header that would take long to parse, before it is parsed; long texts do not."""
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = bare.count(b'"')
    if quotes > _MOST_QUOTES or sum(map(len, bare.split(b'"')[::2])) > _MOST_SIGNS:
        raise UnreadableError(
            f"is no file of VAE weights or of a latent: its header of {len(raw):,} bytes lists more than "
            "40,000 things. Give another file."
        )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key[:80]!r} appears twice")
        result[key] = value
    return result


def _split(parsed: object) -> tuple[dict[str, object], dict[str, str]]:
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    entries = dict(cast("dict[str, object]", parsed))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is not a JSON object")
    texts = cast("dict[str, object]", metadata)
    if not all(isinstance(value, str) for value in texts.values()):
        raise ValueError("its metadata holds something that is not text")
    return entries, cast("dict[str, str]", texts)


def _check_entries(entries: dict[str, object]) -> tuple[dict[str, tuple[int, ...]], dict[str, str], int]:
    """Shapes, dtypes, and the bytes of data; the data of the entries must lie end to end."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in entries.items():
        if len(name) > NAME_LIMIT:
            raise ValueError(f"it has a tensor name of {len(name):,} characters")
        if not isinstance(entry, dict):
            raise ValueError(f"{name[:80]!r} is not described")
        fields = cast("dict[str, object]", entry)
        dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise ValueError(f"{name[:80]!r} has the unknown type {str(dtype)[:40]!r}")
        sizes, offsets = _whole_numbers(shape), _whole_numbers(span)
        if sizes is None or offsets is None or len(offsets) != 2:
            raise ValueError(f"{name[:80]!r} has no proper shape and data_offsets")
        if 8 * (offsets[1] - offsets[0]) != math.prod(sizes) * DTYPE_BITS[dtype]:
            raise ValueError(f"{name[:80]!r} has shape {sizes}, which its data_offsets {offsets} do not fit")
        shapes[name], dtypes[name] = sizes, dtype
        spans.append((offsets[0], offsets[1]))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = stop
    return shapes, dtypes, end


def _whole_numbers(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    whole = tuple(item for item in items if type(item) is int and 0 <= item < 1 << 62)
    return whole if len(whole) == len(items) <= 64 else None


def _bad_length(length: int, size: int) -> str:
    if length <= HEADER_LIMIT:
        return (
            f"is truncated: its header says it is {length:,} bytes long, the file has {size:,} in all. The download "
            "was cut short: get it again."
        )
    return (
        f"is not a safetensors file, or a damaged one: it would have a header of {length:,} bytes, more than the "
        f"{HEADER_LIMIT:,} that are read. Get it again."
    )


def _guess(head: bytes, size: int) -> str:
    if not head.strip(b"\0"):
        return "starts with nothing but zero bytes, as an interrupted download leaves it: get it again."
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")):
        return (
            "is an HTML page, as a download link saves it that needs a login or a confirmation: download the file "
            "itself."
        )
    if text.startswith((b"{", b"[")):
        return "is JSON text, such as a config.json: give the weights themselves, their folder, or their .index.json."
    if _is_text(head):
        return "is a text file."
    if size < 9:
        return f"is truncated: it has {size} bytes. The download was cut short: get it again."
    return "is of no known kind, or damaged at its very start: get it again."


def seen_as_text(path: Path) -> str:
    """What the file at `path` is where it begins as text or with nothing but zeros, as the end of a sentence."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return ""
    for magic, offset, what in _SIGNATURES:
        if head[offset : offset + len(magic)] == magic and _is_text(head):
            return f"is {what}."
    return _guess(head, len(head)) if head and (_is_text(head) or not head.strip(b"\0")) else ""


def _is_text(head: bytes) -> bool:
    return re.search(rb"[^\t\r\n -~]", head) is None


def dangling(path: Path) -> str:
    """Why `path` is not there, where it or a folder above it is a link to nothing; else nothing."""
    link = next((place for place in (path, *path.parents) if place.is_symlink() and not place.exists()), None)
    if link is None:
        return ""
    try:
        link.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return f"is reached by the link {link}, which leads back to itself: mend the link."
    what = "is" if link == path else f"is reached by {link},"
    return f"{what} a link to {os.path.realpath(link)}, which is not there: get that file again, or mend the link."


def _missing(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"does not exist, nor does its folder {path.parent}: check the path."
    near = get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"does not exist. {'Did you mean ' + ' or '.join(near) + '?' if near else 'Check the path.'}"


def brief(error: BaseException) -> str:
    """The text of `error` on one line of at most 160 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:160] + " ..."


def open_safetensors(path: Path) -> AbstractContextManager[OpenFile]:
    """`safetensors.safe_open` for torch on the CPU, typed; its tensors are views of one private mapping of the file."""
    opened: Any = safetensors.safe_open(path, framework="pt", device="cpu")
    return cast("AbstractContextManager[OpenFile]", opened)
