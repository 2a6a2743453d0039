"""SVD Chunk Store: finished chunks in a folder of their own, and one of them made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..bridge.running import report_ui
from ..bridge.schema import before_run, describe, field
from .model import check_svd
from .names import check_name
from .store import STORE, StoreSettings, parse_seeds

FOLDER = "svd_chunks"  # below the output folder


class SVDChunkStore(io.ComfyNode):
    """Where SVD Long Video keeps its chunks, and which of them are made anew."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_SVDChunkStore",
            display_name="SVD Chunk Store",
            description="Keeps the finished chunks of SVD Long Video (continuation) in a folder, also when ComfyUI "
            "ends, and makes single chunks anew with another seed. Without this node they are kept until ComfyUI ends.",
            search_aliases=["resume sampling", "reroll chunk", "continue after crash", "regenerate segment"],
            inputs=[
                field(io.Model, "model", tooltip="SVD, before or after SVD Long Video."),
                field(
                    io.String,
                    "name",
                    default="clip",
                    tooltip="Name of the folder, below output/svd_chunks. One for each clip.",
                ),
                field(
                    io.Int,
                    "regenerate_from",
                    default=1,
                    min=1,
                    max=100_000,
                    tooltip="Chunks before this one, counted from 1, stay as the latest run left them, even if seed or "
                    "settings are others now. 1 = none is held so: chunks are used again where nothing that made them "
                    "has changed.",
                ),
                field(
                    io.String,
                    "seeds",
                    default="",
                    tooltip="Seeds of single chunks, such as 3: 77, 4: 1234. All others take the sampler's.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler or SVD Long Video."),
                io.String.Output(display_name="report", tooltip="Where the chunks lie, and which have their own seed."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None, seeds: str | None = None) -> bool | str:
        return before_run((store_folder, name), (parse_seeds, seeds))

    @classmethod
    def execute(cls, model: Any, name: str, regenerate_from: int, seeds: str) -> io.NodeOutput:
        check_svd(model)
        folder, own = store_folder(name), parse_seeds(seeds)
        patched = model.clone()
        settings = StoreSettings(folder=str(folder), keep=regenerate_from - 1, seeds=own)
        patched.model_options.setdefault("transformer_options", {})[STORE] = settings
        report = "\n".join(_report(folder, regenerate_from, own))
        return io.NodeOutput(patched, report, ui=report_ui(report))


def store_folder(name: str) -> Path:
    """The folder of a store. Raises ValueError for a name that is no plain one on every system."""
    check_name("name", name, "clip_1", "it is a folder in output/svd_chunks, not a path")
    return Path(folder_paths.get_output_directory()) / FOLDER / name


def _report(folder: Path, regenerate_from: int, seeds: dict[int, int]) -> list[str]:
    lines = [f"chunks lie in output/{FOLDER}/{folder.name}, about 4 MB each at 1024x576; delete them when done"]
    if regenerate_from > 1:
        lines.append(f"the first {regenerate_from - 1} stay as the latest run left them")
    else:
        lines.append("chunks are used again where nothing that made them has changed")
    lines += [f"chunk {number} has the seed {seed}" for number, seed in sorted(seeds.items())]
    if seeds:
        lines.append("a chunk after one that was made anew is made anew, too, since it goes on from it")
    return lines


NODES = [SVDChunkStore]
