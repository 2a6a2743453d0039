"""The ComfyUI nodes: the only place that knows ComfyUI."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io

from . import decode, encode, latent_files, latent_join, latent_layout, loader, plan, svd_conditioning, svd_long

NODES: list[type[io.ComfyNode]] = [
    *loader.NODES,
    *encode.NODES,
    *decode.NODES,
    *latent_layout.NODES,
    *latent_join.NODES,
    *latent_files.NODES,
    *plan.NODES,
    *svd_conditioning.NODES,
    *svd_long.NODES,
]

# nodes that were renamed, as keyword arguments of io.NodeReplace; old workflows then load by themselves (ComfyUI 0.14)
RENAMED: list[dict[str, object]] = []

_log = logging.getLogger("cviv-vae")


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
