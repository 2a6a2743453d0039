"""Count FLOPs, bytes moved and peak live memory of a model without computing anything.

Runs on the meta device, so a 4K video costs nothing and the figures are the same on every machine:

    with torch.device("meta"):
        model, x = build(), torch.empty(1, 3, 17, 720, 1280, dtype=torch.bfloat16)
    with MetaProfile() as p:
        model(x)
    print(p.flops, p.bytes_moved, p.peak_bytes)

FLOPs are 2 x multiply-add of convolutions, matrix products and attention; bytes are what every operator that is not a
view reads and writes; the peak counts live storages (no allocator slack, no cuDNN workspace).
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Figures(NamedTuple):
    """Of a net frame, one that is delivered: TFLOP and GB (1e9) moved; and GiB at the peak. NaN is not known."""

    tflop: float
    gigabytes: float
    gibibytes: float


NAN = float("nan")
# 720x1280, bfloat16, whole frames; what the official programs take, and the most that ours may
OFFICIAL = {
    ("cv", "encode"): Figures(5.11, 31.1, 27.2),
    ("cv", "decode"): Figures(15.17, 36.9, 30.3),
    ("cv-sd3", "decode"): Figures(15.16, 36.3, 27.5),
    ("iv-64", "encode"): Figures(5.73, 48.2, 5.9),
    ("iv-64", "decode"): Figures(9.25, 72.1, 7.0),
    ("iv-96", "encode"): Figures(12.57, 67.7, 8.8),
    ("iv-96", "decode"): Figures(20.47, 103.6, 10.4),
}
TARGETS = {
    ("cv", "encode"): Figures(4.82, 12.4, 9.0),
    ("cv", "decode"): Figures(11.26, 21.8, 13.4),
    ("cv-sd3", "encode"): Figures(4.82, 12.6, 9.0),
    ("cv-sd3", "decode"): Figures(11.26, 22.1, 13.4),
    ("iv-64", "encode"): Figures(5.39, 23.5, 5.7),
    ("iv-64", "decode"): Figures(8.29, 23.5, 5.7),
}


def _nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class MetaProfile(TorchDispatchMode):
    """ignore: tensors from before, of which views may be taken, such as weights; they do not count as live."""

    def __init__(self, ignore: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._ignored = {t.untyped_storage()._cdata for t in ignore}
        self.flops = 0
        self.bytes_moved = 0
        self.peak_bytes = 0
        self.bytes_by_op: Counter[str] = Counter()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._live_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name()
        if "scaled_dot_product" in name:
            q, k, v = args[:3]
            self.flops += 4 * (q.numel() // q.shape[-1]) * k.shape[-2] * q.shape[-1]
            out = torch.empty_like(q)
            self._record(name, [q, k, v], [out])
            fused = any(kind in name for kind in ("flash", "efficient", "cpu"))
            return (out, torch.empty(1, device="meta")) if fused else out
        out = func(*args, **kwargs)
        outs = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, torch.Tensor)]
        ins = [a for a in args if isinstance(a, torch.Tensor)]
        ins += [t for a in args if isinstance(a, (list, tuple)) for t in a if isinstance(t, torch.Tensor)]
        if "convolution" in name:
            x, weight, transposed = args[0], args[1], args[6]
            self.flops += 2 * (x if transposed else outs[0]).numel() * weight[0].numel()
        elif name.startswith(("aten::mm", "aten::addmm", "aten::bmm")):
            a, b = ins[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        sources = {t.untyped_storage()._cdata for t in ins}
        in_place = name.split("::")[1].split(".")[0].endswith("_")
        if outs and (in_place or not all(o.untyped_storage()._cdata in sources for o in outs)):
            self._record(name, ins, outs)
        else:
            self._track(outs)
        return out

    def _record(self, name: str, ins: list[torch.Tensor], outs: list[torch.Tensor]) -> None:
        moved = _nbytes(ins) + _nbytes(outs)
        self.bytes_moved += moved
        self.bytes_by_op[name] += moved
        self._track(outs)

    def _track(self, tensors: list[torch.Tensor]) -> None:
        for t in tensors:
            storage = t.untyped_storage()
            if storage._cdata not in self._live and storage._cdata not in self._ignored:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self._live_bytes += storage.nbytes()
        if self._live_bytes > self.peak_bytes:  # dead storages may still be counted: look before raising the peak
            self._sweep()
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def _sweep(self) -> None:
        for key in [k for k, (ref, _) in self._live.items() if ref.expired()]:
            self._live_bytes -= self._live.pop(key)[1]
