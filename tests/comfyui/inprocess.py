"""ComfyUI inside this process, without HTTP: its own loader, its own validation, its own executor."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .checkout import ROOT, checkouts, on_cpu
from .place import PACK

Prompt = dict[str, dict[str, Any]]
_names = itertools.count()


class NodeError(Exception):
    """What a user sees when a node fails: type and message of the exception, and the node's class."""

    def __init__(self, event: dict[str, Any]) -> None:
        super().__init__(event["exception_message"].strip())
        self.exception_type: str = event["exception_type"]
        self.node_type: str = event["node_type"]


class RefusedError(Exception):
    """ComfyUI's validation refused the prompt."""


class CancelledRunError(Exception):
    """The run was cancelled."""

    def __init__(self, event: dict[str, Any]) -> None:
        super().__init__(f"interrupted in {event['node_type']}")
        self.node_type: str = event["node_type"]


@dataclass
class Progress:
    """One progress report of a node."""

    value: float
    total: float
    preview: Any
    node_id: str | None


@dataclass(repr=False)
class Comfy:
    """ComfyUI as loaded into this process.

    base: its base directory. version: "0.3.64". log: what was logged while it loaded. progress: what nodes reported, of
    the latest run. on_progress: called with each report, for tests that cancel.
    """

    base: Path
    version: str
    log: list[logging.LogRecord]
    progress: list[Progress] = field(default_factory=list)
    on_progress: Callable[[Progress], None] | None = None
    given: dict[str, Any] = field(default_factory=dict)
    taken: dict[str, Any] = field(default_factory=dict)
    ui: dict[str, dict[str, Any]] = field(default_factory=dict)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    @property
    def nodes(self) -> dict[str, Any]:
        """All node classes by id."""
        return self.module("nodes").NODE_CLASS_MAPPINGS

    @property
    def pack_name(self) -> str:
        """The name under which ComfyUI imported the pack."""
        return str(self.base / "custom_nodes" / PACK).replace(".", "_x_")

    def module(self, name: str) -> ModuleType:
        """A module of ComfyUI."""
        return importlib.import_module(name)

    def pack(self, name: str) -> ModuleType:
        """A module of the pack, such as "vae_core", as ComfyUI imported it."""
        return importlib.import_module(f"{self.pack_name}.{name}")

    def executor(self) -> Any:
        """A fresh prompt executor with an empty cache."""
        execution = self.module("execution")
        keywords: dict[str, Any] = {"cache_type": execution.CacheType.CLASSIC}
        known = inspect.signature(execution.PromptExecutor.__init__).parameters
        if "cache_args" in known:
            keywords["cache_args"] = {"lru": 0, "ram": 0, "ram_inactive": 0}
        else:
            keywords["cache_size"] = 0
        return execution.PromptExecutor(self.module("server").PromptServer.instance, **keywords)

    def validate(self, prompt: Prompt) -> list[str]:
        """Ids of the output nodes. Raises RefusedError with ComfyUI's messages."""
        execution = self.module("execution")
        valid, error, outputs, node_errors = self.loop.run_until_complete(
            execution.validate_prompt("validate", prompt, None)
        )
        details = [
            f"{prompt[node]['class_type']}: {item['message']}: {item['details']}"
            for node, found in node_errors.items()
            for item in found["errors"]
        ]
        if not valid or details:
            raise RefusedError("\n".join([str(error and error["message"]), *details]))
        return outputs

    def run(self, prompt: Prompt, executor: Any | None = None, extra: dict[str, Any] | None = None) -> None:
        """Validate and execute. Raises RefusedError, NodeError or CancelledRunError."""
        outputs = self.validate(prompt)
        executor = executor or self.executor()
        self.progress.clear()
        self.loop.run_until_complete(
            executor.execute_async(prompt, f"prompt-{next(_names)}", {"extra_pnginfo": {}, **(extra or {})}, outputs)
        )
        self.ui = executor.history_result["outputs"]
        for name, event in executor.status_messages:
            if name == "execution_error":
                raise NodeError(event) from RuntimeError("".join(event["traceback"]))
            if name == "execution_interrupted":
                raise CancelledRunError(event)
        assert executor.success

    def call(self, node: str, executor: Any | None = None, **inputs: Any) -> tuple[Any, ...]:
        """Execute one node in a prompt of its own and return its outputs.

        Plain values are widget values; tensors, dicts and other objects reach the node through a link.
        """
        prompt: Prompt = {"1": {"class_type": node, "inputs": {}}}
        for name, value in inputs.items():
            prompt["1"]["inputs"][name] = value if isinstance(value, str | int | float) else self.give(prompt, value)
        count = len(self.nodes[node].RETURN_TYPES)
        keys = [self.take(prompt, ["1", i]) for i in range(count)]
        self.run(prompt, executor)
        return tuple(self.taken.pop(key) for key in keys)

    def give(self, prompt: Prompt, value: Any, *, each: bool = False) -> list[Any]:
        """Add a node that outputs `value`, or each item of it as one of a list; returns the link to it."""
        key = f"given-{next(_names)}"
        self.given[key] = value
        prompt[key] = {"class_type": "TestGiveEach" if each else "TestGive", "inputs": {"key": key}}
        return [key, 0]

    def take(self, prompt: Prompt, link: list[Any], *, each: bool = False) -> str:
        """Add a node that keeps what arrives through `link`, or all items of it; returns the key in `taken`."""
        key = f"taken-{next(_names)}"
        kind = "TestTakeEach" if each else "TestTake"
        prompt[key] = {"class_type": kind, "inputs": {"value": link, "key": key}}
        return key


class _AnyType(str):
    """A wire type that fits every other."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


def _test_nodes(comfy: Comfy) -> dict[str, type]:
    """Nodes that carry objects of the tests into and out of a graph."""
    any_type = _AnyType("*")

    class Give:
        RETURN_TYPES = (any_type,)
        FUNCTION = "execute"
        CATEGORY = "test"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, ComfyUI's name
            return {"required": {"key": ("STRING", {})}}

        def execute(self, key: str) -> tuple[Any]:
            return (comfy.given[key],)

    class Take:
        RETURN_TYPES = ()
        FUNCTION = "execute"
        CATEGORY = "test"
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, ComfyUI's name
            return {"required": {"value": (any_type, {}), "key": ("STRING", {})}}

        def execute(self, value: Any, key: str) -> dict[str, Any]:
            comfy.taken[key] = value
            return {}

    class GiveEach(Give):
        OUTPUT_IS_LIST = (True,)

    class TakeEach(Take):
        INPUT_IS_LIST = True

        def execute(self, value: Any, key: Any) -> dict[str, Any]:
            return super().execute(value, key[0])

    return {"TestGive": Give, "TestTake": Take, "TestGiveEach": GiveEach, "TestTakeEach": TakeEach}


def start(base: Path) -> Comfy:
    """Load ComfyUI with `base` as its base directory, its extra nodes and the packs in custom_nodes."""
    path = checkouts()[0]
    sys.path[:] = [str(path), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    options = importlib.import_module("comfy.options")
    options.enable_args_parsing(False)
    args = importlib.import_module("comfy.cli_args").args
    args.cpu, args.disable_api_nodes = on_cpu(), True
    args.base_directory, args.front_end_root = str(base), str(base)
    # as main.py does: before nodes.py puts ComfyUI/comfy, with another `utils`, at the front of sys.path
    importlib.import_module("utils.extra_config")
    with records() as log:
        comfy = Comfy(base=base, version=importlib.import_module("comfyui_version").__version__, log=log)
        comfy.module("server").PromptServer(comfy.loop)
        nodes = comfy.module("nodes")
        comfy.loop.run_until_complete(nodes.init_extra_nodes(init_custom_nodes=True, init_api_nodes=False))
    nodes.NODE_CLASS_MAPPINGS.update(_test_nodes(comfy))
    comfy.module("comfy.utils").set_progress_bar_global_hook(_progress_hook(comfy))
    return comfy


def _progress_hook(comfy: Comfy) -> Callable[..., None]:
    management = comfy.module("comfy.model_management")
    context = comfy.module("comfy_execution.utils").get_executing_context

    def hook(
        value: float, total: float, preview: Any, prompt_id: str | None = None, node_id: str | None = None
    ) -> None:
        management.throw_exception_if_processing_interrupted()
        now = context()
        report = Progress(value, total, preview, node_id or (now and now.node_id))
        comfy.progress.append(report)
        if comfy.on_progress is not None:
            comfy.on_progress(report)

    return hook


@contextmanager
def records() -> Iterator[list[logging.LogRecord]]:
    """Everything logged inside the block."""
    kept: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record)

    root, handler = logging.getLogger(), Keep()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield kept
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
