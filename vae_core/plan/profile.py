"""Work and memory of a computation that is not carried out: tensors on the meta device, counted as they come and go."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Ledger:
    """Live storages, their bytes together, and the most there ever were."""

    def __init__(self) -> None:
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bytes = 0

    def enter(self, x: Tensor) -> None:
        """Count the storage of `x`, once."""
        storage = x.untyped_storage()
        reference = StorageWeakRef(storage)
        key = reference.cdata
        if key in self._live:
            if not self._live[key][0].expired():
                return
            self._drop(key)
        self._live[key] = (reference, storage.nbytes())
        self._bytes += storage.nbytes()
        if self._bytes > self.peak:  # dead storages may still be counted: look before raising the peak
            self.peak = max(self.peak, self.live())

    def live(self) -> int:
        """Bytes that are held now."""
        for key in [k for k, (reference, _) in self._live.items() if reference.expired()]:
            self._drop(key)
        return self._bytes

    def _drop(self, key: int) -> None:
        self._bytes -= self._live.pop(key)[1]


class Profile(TorchDispatchMode):
    """Counts while it is entered; gradients and inference mode are off inside.

    device.peak: most bytes of tensors made inside that lived at one time. Not counted: what existed before, allocator
    slack, workspaces of kernels. host.peak: the same for tensors made under `on_host`. flops: twice the multiplications
    of convolutions, matrix products and attention. moved: bytes that all operators read and write that are no views.
    largest_convolution: elements of the largest input or output of a convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = Ledger()
        self.host = Ledger()
        self.flops = 0
        self.moved = 0
        self.largest_convolution = 0
        self._modes = ExitStack()
        self._on_host = False

    @contextmanager
    def on_host(self) -> Generator[None]:
        """Count tensors made meanwhile as RAM, and what is made of them in place or as views."""
        self._on_host = True
        try:
            yield
        finally:
            self._on_host = False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        name: str = func.name()  # type: ignore[attr-defined]
        if name.startswith("aten::scaled_dot_product"):  # without a table of scores, as fused kernels do it
            out: Any = torch.empty_like(args[0])
        else:
            out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]
        given = [x for a in args for x in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(x, Tensor)]
        self._note_work(name, args, given, made)
        written = [x for x in (kwargs or {}).values() if isinstance(x, Tensor)]  # `out`
        for x in made:
            if not _is_view(x, [*given, *written]):  # else it is counted, or was there before
                (self.host if self._on_host else self.device).enter(x)
        return out

    def _note_work(self, name: str, args: Sequence[Any], given: list[Tensor], made: list[Tensor]) -> None:
        if "convolution" in name:
            x, weight, transposed = args[0], args[1], "mkldnn" not in name and args[6]
            self.flops += 2 * (x if transposed else made[0]).numel() * weight[0].numel()
            self.largest_convolution = max(self.largest_convolution, x.numel(), made[0].numel())
        elif "scaled_dot_product" in name:
            self.flops += 4 * args[0].numel() * args[1].shape[-2]
        elif name.startswith(("aten::mm", "aten::addmm", "aten::bmm")):
            self.flops += 2 * given[-2].numel() * given[-1].shape[-1]
        if made and not all(_is_view(x, given) for x in made):
            self.moved += sum(x.numel() * x.element_size() for x in (*given, *made))

    def __enter__(self) -> Profile:
        for mode in (torch.inference_mode(False), torch.no_grad()):
            self._modes.enter_context(mode)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[arg-type]
        self._modes.close()


def _is_view(x: Tensor, of: list[Tensor]) -> bool:
    own = StorageWeakRef(x.untyped_storage()).cdata
    return any(StorageWeakRef(other.untyped_storage()).cdata == own for other in of)
