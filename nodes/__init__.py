"""The ComfyUI nodes: the only place that knows ComfyUI."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator

from comfy_api.latest import ComfyExtension, io

MODULES = (
    "loading.loader",
    "clips.encode",
    "clips.decode",
    "latents.layout",
    "latents.join",
    "latents.files",
    "clips.plan",
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


def _nodes() -> Iterator[type[io.ComfyNode]]:
    """The nodes of every module; one that this version of ComfyUI breaks costs only its own."""
    for name in MODULES:
        try:
            module = importlib.import_module(f".{name}", __name__)
        except Exception as error:  # whatever moved in a new version of ComfyUI
            _log.warning("The nodes of %s cannot be used with this version of ComfyUI: %s", name, error)
            continue
        yield from module.NODES


NODES = list(_nodes())

# nodes that were renamed, as keyword arguments of io.NodeReplace; old workflows then load by themselves (ComfyUI 0.14)
RENAMED: list[dict[str, object]] = []


class Extension(ComfyExtension):
    """What ComfyUI loads: the nodes, each checked alone so that a broken one costs only itself."""

    async def on_load(self) -> None:
        if not RENAMED:
            return
        from comfy_api.latest import ComfyAPI

        for renamed in RENAMED:
            await ComfyAPI().node_replacement.register(io.NodeReplace(**renamed))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        usable: list[type[io.ComfyNode]] = []
        for node in NODES:
            try:
                node.GET_SCHEMA()
            except Exception as error:  # whatever a new version of ComfyUI dislikes in one schema
                _log.warning("%s cannot be used with this version of ComfyUI: %s", node.__name__, error)
                continue
            usable.append(node)
        return usable
