"""The pack as ComfyUI loads it: every node is there, says what it is, and has its help and translations."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from .checkout import ROOT
from .inprocess import Comfy, records
from .place import PACK

SNAPSHOT = Path(__file__).parent / "snapshots" / "schemas.json"
IDS = sorted(json.loads(SNAPSHOT.read_text(encoding="utf-8")))
OLD_IDS = ["CVIV_EncodeVideo"]  # nodes only where ComfyUI cannot replace them by others
# what both versions of ComfyUI keep of an input; choices that depend on the files of a folder are left out
KEPT = ("default", "min", "max", "step", "round", "multiline", "options", "tooltip")
FROM_FOLDERS = {("CVIV_LoadVideoVAE", "vae_name"), ("CVIV_LoadVideoLatent", "file")}


def schema_of(comfy: Comfy, node_id: str) -> dict[str, Any]:
    """A node's schema as plain data that is the same in every version of ComfyUI."""
    schema = comfy.nodes[node_id].GET_SCHEMA()
    inputs = []
    for one in schema.inputs:
        told = one.as_dict()
        kept = {name: told[name] for name in KEPT if told.get(name) is not None}
        if (node_id, one.id) in FROM_FOLDERS:
            kept.pop("options", None)
            kept.pop("default", None)
        inputs.append({"id": one.id, "type": one.get_io_type(), "optional": bool(one.optional), **kept})
    return {
        "title": schema.display_name,
        "category": schema.category,
        "output_node": bool(schema.is_output_node),
        "inputs": inputs,
        "outputs": [{"name": one.display_name, "type": one.get_io_type()} for one in schema.outputs],
    }


def ours(comfy: Comfy) -> list[str]:
    """The ids of all nodes of this pack."""
    return sorted(name for name in comfy.nodes if name.startswith("CVIV_"))


def test_every_node_is_registered(comfy: Comfy) -> None:
    replaces = hasattr(comfy.module("comfy_api.latest").io, "NodeReplace")
    assert ours(comfy) == sorted([*IDS, *([] if replaces else OLD_IDS)])
    assert {comfy.nodes[name].RELATIVE_PYTHON_MODULE for name in IDS} == {f"custom_nodes.{PACK}"}


def test_loading_is_silent(comfy: Comfy) -> None:
    def from_us(record: logging.LogRecord) -> bool:
        return PACK in record.getMessage() or record.name == "cviv-vae" or PACK in record.pathname

    warnings = [record.getMessage() for record in comfy.log if from_us(record) and record.levelno >= logging.WARNING]
    assert warnings == []
    assert [record.getMessage() for record in comfy.log if record.name == "cviv-vae"] == []  # nor anything else
    assert not [record.getMessage() for record in comfy.log if "IMPORT FAILED" in record.getMessage()]


def test_a_broken_class_costs_only_itself(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    io = comfy.module("comfy_api.latest").io

    class Broken(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> Any:
            twice = [io.Int.Input("same", default=0), io.Int.Input("same", default=1)]
            return io.Schema(node_id="CVIV_Broken", inputs=twice, outputs=[io.Int.Output()])

    pack_nodes = comfy.pack("nodes")
    monkeypatch.setattr(pack_nodes, "NODES", [Broken, *pack_nodes.NODES])
    registered = {name: comfy.nodes.pop(name) for name in ours(comfy)}
    stock = comfy.module("nodes")
    try:
        with records() as log:
            assert comfy.loop.run_until_complete(stock.load_custom_node(str(comfy.base / "custom_nodes" / PACK)))
        assert ours(comfy) == sorted(registered)
    finally:
        comfy.nodes.update(registered)
    warnings = [record.getMessage() for record in log if record.levelno >= logging.WARNING]
    assert len(warnings) == 1, warnings
    assert "Broken cannot be used with this version of ComfyUI" in warnings[0]


@pytest.mark.parametrize("node_id", IDS)
def test_every_input_and_output_is_explained(comfy: Comfy, node_id: str) -> None:
    schema = comfy.nodes[node_id].GET_SCHEMA()
    assert schema.description
    assert schema.category == "video vae"
    silent = [one.id for one in schema.inputs if not one.tooltip]
    silent += [one.display_name for one in schema.outputs if not one.tooltip]
    assert silent == []


def test_schemas_are_those_of_the_snapshot(comfy: Comfy) -> None:
    """A changed id, type or default breaks saved workflows. CVIV_WRITE_SNAPSHOTS=1 writes the file anew."""
    now = {name: schema_of(comfy, name) for name in ours(comfy) if name not in OLD_IDS}
    if os.environ.get("CVIV_WRITE_SNAPSHOTS"):
        SNAPSHOT.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert now == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("node_id", IDS)
def test_every_node_has_its_help(comfy: Comfy, node_id: str) -> None:
    docs = ROOT / "web" / "docs"
    schema = comfy.nodes[node_id].GET_SCHEMA()
    for page in (docs / f"{node_id}.md", docs / node_id / "zh.md"):
        text = page.read_text(encoding="utf-8")
        missing = [one.display_name or one.id for one in schema.inputs if (one.display_name or one.id) not in text]
        assert missing == [] or page.name == "zh.md", f"{page} does not name {missing}"
        for picture in _pictures(text):
            assert (docs / picture).is_file(), f"{page} shows {picture}, which is not in web/docs"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("node_id", IDS)
def test_every_node_is_translated(comfy: Comfy, node_id: str, language: str) -> None:
    path = ROOT / "locales" / language / "nodeDefs.json"
    told = json.loads(path.read_text(encoding="utf-8"))[node_id]
    schema = comfy.nodes[node_id].GET_SCHEMA()
    assert told["display_name"]
    assert told["description"]
    assert sorted(told.get("inputs", {})) == sorted(one.id for one in schema.inputs)
    assert sorted(told.get("outputs", {})) == [str(index) for index in range(len(schema.outputs))]
    for one in (*told.get("inputs", {}).values(), *told.get("outputs", {}).values()):
        assert one["name"]
        assert one["tooltip"]


def test_english_titles_are_those_of_the_code(comfy: Comfy) -> None:
    told = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert {name: told[name]["display_name"] for name in IDS} == {
        name: comfy.nodes[name].GET_SCHEMA().display_name for name in IDS
    }


def test_english_words_are_those_of_the_code(comfy: Comfy) -> None:
    """The page shows the translation, also where the language is English."""
    told = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    for node_id in ours(comfy):
        schema, words = comfy.nodes[node_id].GET_SCHEMA(), told[node_id]
        assert words["description"] == schema.description
        assert {name: one["tooltip"] for name, one in words.get("inputs", {}).items()} == {
            one.id: one.tooltip for one in schema.inputs
        }
        assert [one["tooltip"] for one in words.get("outputs", {}).values()] == [one.tooltip for one in schema.outputs]


def _pictures(markdown: str) -> list[str]:
    """Relative addresses of the pictures in a page."""
    parts = [part.partition(")")[0] for part in markdown.split("](")[1:]]
    return [part for part in parts if part.rpartition(".")[2] in ("png", "jpg", "gif", "webp", "mp4")]
