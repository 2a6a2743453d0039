"""The ComfyUI nodes: the only place that knows ComfyUI."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from comfy_api.latest import ComfyExtension, io

MODULES = (
    "loading.loader",
    "clips.encode",
    "clips.decode",
    "clips.sequence",
    "latents.layout",
    "latents.join",
    "latents.files",
    "clips.plan",
    "clips.composite",
    "sampling.preview",
    "compare.detail",
    "compare.videos",
    "compare.round_trip",
    "svd.conditioning",
    "svd.long",
    "svd.chunk_store",
    "svd.end_image",
    "svd.extend",
    "svd.loop",
    "svd.adapter",
    "svd.training",
)

_log = logging.getLogger("cviv-vae")


def _modules() -> Iterator[ModuleType]:
    """Every module of nodes; one that this version of ComfyUI breaks costs only its own."""
    for name in MODULES:
        try:
            yield importlib.import_module(f".{name}", __name__)
        except Exception as error:  # whatever moved in a new version of ComfyUI
            _log.warning("The nodes of %s cannot be used with this version of ComfyUI: %s", name, error)


_FOUND = list(_modules())
NODES: list[type[io.ComfyNode]] = [node for module in _FOUND for node in module.NODES]
# nodes that became another one, each with how to replace it, as keyword arguments of io.NodeReplace
OLD_NODES: list[tuple[type[io.ComfyNode], dict[str, Any]]] = [
    old for module in _FOUND for old in getattr(module, "OLD_NODES", ())
]
REPLACES = hasattr(io, "NodeReplace")  # since ComfyUI 0.14; before, the old nodes themselves stay


class Extension(ComfyExtension):
    """What ComfyUI loads: the nodes, each checked alone so that a broken one costs only itself."""

    async def on_load(self) -> None:
        """Old workflows then load by themselves. ComfyUI that cannot replace nodes does not call this."""
        from comfy_api.latest import ComfyAPI

        for _, replaced in OLD_NODES:
            await ComfyAPI().node_replacement.register(io.NodeReplace(**replaced))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        usable: list[type[io.ComfyNode]] = []
        for node in [*NODES, *(() if REPLACES else (old for old, _ in OLD_NODES))]:
            try:
                node.GET_SCHEMA()
            except Exception as error:  # whatever a new version of ComfyUI dislikes in one schema
                _log.warning("%s cannot be used with this version of ComfyUI: %s", node.__name__, error)
                continue
            usable.append(node)
        return usable
