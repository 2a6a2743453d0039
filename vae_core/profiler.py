"""Peak memory of a computation that is not carried out: tensors on the meta device, counted as they come and go."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Ledger:
    """Live storages and the most bytes they ever had together."""

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
            self.sweep()
            self.peak = max(self.peak, self._bytes)

    def holds(self, x: Tensor) -> bool:
        """Whether the storage of `x` is counted here."""
        found = self._live.get(StorageWeakRef(x.untyped_storage()).cdata)
        return found is not None and not found[0].expired()

    def sweep(self) -> None:
        """Forget storages that are gone."""
        for key in [k for k, (reference, _) in self._live.items() if reference.expired()]:
            self._drop(key)

    def _drop(self, key: int) -> None:
        self._bytes -= self._live.pop(key)[1]


class _FusedAttention(TorchFunctionMode):
    """Attention without a table of scores, as fused kernels do it, whatever this torch has for the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):
    def __init__(self, profile: MemoryProfile) -> None:
        super().__init__()
        self.profile = profile

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]
        self.profile.see(str(func), args, made)
        return out


class MemoryProfile:
    """Counts while it is entered; gradients and inference mode are off inside.

    device.peak: most bytes of tensors made inside that lived at one time. Not counted: what existed before, allocator
    slack, workspaces of kernels. host.peak: the same for tensors made under `on_host`. largest_convolution: elements of
    the largest input or output of a convolution.
    """

    def __init__(self) -> None:
        self.device = Ledger()
        self.host = Ledger()
        self.largest_convolution = 0
        self._modes = ExitStack()
        self._on_host = False

    def see(self, name: str, args: Sequence[Any], made: list[Tensor]) -> None:
        """Note what an operator made."""
        if "convolution" in name:
            self.largest_convolution = max(self.largest_convolution, args[0].numel(), made[0].numel())
        for x in made:
            if self._on_host or self.host.holds(x):
                self.host.enter(x)
            else:
                self.device.enter(x)

    @contextmanager
    def on_host(self) -> Generator[None]:
        """Count tensors made meanwhile as RAM, and what is made of them in place or as views."""
        self._on_host = True
        try:
            yield
        finally:
            self._on_host = False

    def __enter__(self) -> MemoryProfile:
        for mode in (torch.inference_mode(False), torch.no_grad(), _FusedAttention(), _Watch(self)):
            self._modes.enter_context(mode)
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()
