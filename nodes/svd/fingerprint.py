"""What a chunk was made of, as one hash: tensors, settings, model patches and functions by their content.

The same graph gives the same hash after a restart. What cannot be looked into (objects of other packs without
attributes, networks without weights) counts as itself: it is the same only while this process keeps it.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import itertools
import types
import uuid
import weakref
from collections.abc import Mapping, Set
from typing import Any

import comfy.model_patcher
import numpy as np
import torch
from torch import Tensor, nn

_SAMPLES = 64  # values of each weight of a network
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_VOLATILE = ("to_load_options", "uuid", "sample_sigmas", "sigmas", "multigpu_clones", "multigpu_thread_pool")
_SESSION = uuid.uuid4().hex
_numbers = itertools.count()
_known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def fingerprint(*values: Any) -> str:
    """A hash of everything that `values` hold."""
    reader = _Reader()
    for value in values:
        reader.read(value)
    return reader.hash.hexdigest()


def model_fingerprint(patcher: Any) -> str:
    """A hash of a MODEL: samples of its weights, and all of its patches."""
    reader = _Reader()
    reader.patcher(patcher)
    return reader.hash.hexdigest()


class _Reader:
    def __init__(self) -> None:
        self.hash = hashlib.blake2b(digest_size=32)
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # while this lives no other object gets the id of one that was seen

    def read(self, value: Any) -> None:
        """Add a value and all that it holds."""
        if isinstance(value, _PLAIN):
            self._say(type(value).__name__, repr(value))
        elif isinstance(value, enum.Enum):
            self._say(type(value).__qualname__, value.name)
        elif isinstance(value, uuid.UUID):  # ComfyUI draws them anew in every run
            self._say("uuid")
        elif isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
            self._say(getattr(value, "__module__", None) or "", getattr(value, "__qualname__", value.__name__))
        elif isinstance(value, np.ndarray | np.generic):
            self.read(torch.from_numpy(np.ascontiguousarray(value)))
        elif id(value) in self._seen:
            self._say("again", str(self._seen[id(value)]))
        else:
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
            self._read_object(value)

    def _read_object(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, Mapping):
            self._mapping(value)
        elif isinstance(value, list | tuple):
            self._say(type(value).__name__, str(len(value)))
            for item in value:
                self.read(item)
        elif isinstance(value, Set):
            self._say("set", *sorted(fingerprint(item) for item in value))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._say("method", value.__func__.__qualname__)
            self.read(value.__self__)
        elif isinstance(value, functools.partial):
            self.read(("partial", value.func, value.args, value.keywords))
        elif isinstance(value, comfy.model_patcher.ModelPatcher):
            self.patcher(value)
        elif isinstance(value, nn.Module):
            self._network(value)
        else:
            self._other(value)

    def patcher(self, patcher: Any) -> None:
        """Add a MODEL, as its checkpoint has it and with its patches; not what is loaded where."""
        network = getattr(patcher.model, "diffusion_model", patcher.model)
        self._say("model", type(patcher.model).__qualname__, type(network).__qualname__)
        if next(network.parameters(), None) is None:
            self._itself(network)
        for name, (weight, *patches) in patcher.get_key_patches().items():
            self._say(name)
            self._sample(weight[0] if isinstance(weight, tuple) else weight)
            self.read(patches)
        self.read(dict(sorted(patcher.object_patches.items())))
        self.read(getattr(patcher, "hook_patches", None))

    def _network(self, network: nn.Module) -> None:
        self._say("network", type(network).__module__, type(network).__qualname__)
        tensors = list(network.state_dict().items())
        for name, tensor in tensors:
            self._say(name)
            self._sample(tensor)
        if not tensors:
            self._itself(network)

    def _sample(self, tensor: Any) -> None:
        """Shape and evenly spaced values of a weight; a kind of tensor that gives no values counts by its shape."""
        self._say(str(tensor.dtype), str(tuple(tensor.shape)))
        try:
            flat = tensor.detach().reshape(-1)
            step = max(1, flat.shape[0] // _SAMPLES)
            self.hash.update(flat[::step][:_SAMPLES].float().cpu().numpy().tobytes())
        except (RuntimeError, NotImplementedError, TypeError):
            self._say(type(tensor).__qualname__)

    def _tensor(self, tensor: Tensor) -> None:
        self._say("tensor", str(tensor.dtype), str(tuple(tensor.shape)))
        held = tensor.detach().cpu().contiguous()
        self.hash.update(held.reshape(-1).view(torch.uint8).numpy().tobytes())

    def _mapping(self, mapping: Mapping[Any, Any]) -> None:
        kept = {key: value for key, value in mapping.items() if key not in _VOLATILE}
        self._say("mapping", str(len(kept)))
        for key, value in kept.items():
            self.read(key)
            self.read(value)

    def _function(self, function: types.FunctionType) -> None:
        code = function.__code__
        self._say("function", function.__module__ or "", function.__qualname__, repr(code.co_names))
        self.hash.update(code.co_code)
        self.read([item for item in code.co_consts if not isinstance(item, types.CodeType)])
        self.read((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                self.read(cell.cell_contents)
            except ValueError:  # a cell that was never filled
                self._say("empty")

    def _other(self, value: Any) -> None:
        held = dict(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__:
            slots = getattr(kind, "__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, name):
                    held[name] = getattr(value, name)
        self._say("object", type(value).__module__, type(value).__qualname__)
        if held or type(value).__module__.split(".")[0] in ("comfy", "comfy_extras"):
            self._mapping(held)
        else:
            self._itself(value)

    def _itself(self, value: Any) -> None:
        try:
            number = _known.get(value)
            if number is None:
                number = _known[value] = next(_numbers)
        except TypeError:  # neither hashed nor held weakly: never the same again
            number = next(_numbers)
        self._say(_SESSION, str(number))

    def _say(self, *words: str) -> None:
        for word in words:
            held = word.encode("utf-8", "surrogatepass")
            self.hash.update(len(held).to_bytes(8, "little") + held)
