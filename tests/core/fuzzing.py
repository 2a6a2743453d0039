"""How files are damaged on purpose."""

from __future__ import annotations

import io
import os
import struct

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))


def _settings(examples: int) -> settings:
    """The same examples in every run, unless FUZZ_EXAMPLES asks for many, in search of new ones."""
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples, deadline=None, database=None, derandomize=EXAMPLES <= 500, suppress_health_check=slow
    )


fuzz = _settings(EXAMPLES)
fuzz_models = _settings(EXAMPLES // 2)  # each example builds a model


def torch_bytes(thing: object, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


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
