"""Help pages, node and command tell the same: defaults of every input, and what SVD's trainer takes."""

from __future__ import annotations

import inspect
import json
import re
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from vae_core.cli.svd_adapter import train_svd_adapter_command
from vae_core.errors import AdapterError
from vae_core.svd.files import check_latent, check_size

ROOT = Path(__file__).parents[2]
SCHEMAS: dict[str, dict[str, Any]] = json.loads(
    (ROOT / "tests" / "comfyui" / "snapshots" / "schemas.json").read_text(encoding="utf-8")
)
# with the brackets and semicolons of either language
LINE = re.compile(r"^- ((?:\*\*[^*]+\*\*(?:, | and |、|和)?)+) ?[(（]([^)）]*)[)）]", re.MULTILINE)  # noqa: RUF001
DEFAULT = re.compile(r"(?:default|默认)为? ?([^；]*)$")  # noqa: RUF001
SWITCHES = {"en": ("off", "on", "empty"), "zh": ("关", "开", "空")}
TRAINER = "CVIV_TrainSVDAdapter"


def told_defaults(node: str, language: str) -> dict[str, str]:
    """The default of each input that the help page of a node gives, as it is written."""
    folder = ROOT / "web" / "docs"
    path = folder / f"{node}.md" if language == "en" else folder / node / "zh.md"
    out: dict[str, str] = {}
    for bold, details in LINE.findall(path.read_text(encoding="utf-8")):
        found = DEFAULT.search(details)
        if found is None:
            continue
        names = re.findall(r"`(\w+)`", details) or re.findall(r"\*\*([\w ]+)\*\*", bold)
        each = re.split(r", | and |、|和", found[1]) if len(names) > 1 else [found[1]]
        out |= dict(zip(names, each if len(each) > 1 else each * len(names), strict=True))
    return out


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("node", SCHEMAS)
def test_help_has_the_defaults_of_the_node(node: str, language: str) -> None:
    told, (off, on, empty) = told_defaults(node, language), SWITCHES[language]
    for one in SCHEMAS[node]["inputs"]:
        if "default" not in one:
            continue
        name, default = one["id"] if language == "zh" else one.get("display_name") or one["id"], one["default"]
        if isinstance(default, bool):
            assert told[name] == (on if default else off), name
        elif isinstance(default, int | float):
            assert float(told[name].split()[0].replace(",", "")) == default, name
        else:
            assert told[name] == (default or empty), name


def test_node_and_command_train_alike() -> None:
    given = inspect.signature(train_svd_adapter_command).parameters
    hints = get_type_hints(train_svd_adapter_command, include_extras=True)
    node = {one["id"]: one for one in SCHEMAS[TRAINER]["inputs"]}
    for name in ("steps", "method", "learning_rate", "ridge", "seed", "frames", "width", "height"):
        default = getattr(given[name].default, "value", given[name].default)
        assert str(default).replace("-regression", " regression") == str(node[name]["default"]), name
        (option,) = hints[name].__metadata__
        assert option.min == node[name].get("min"), name


def test_sizes_that_the_u_net_takes() -> None:
    for width, height in product(range(16, 200), (64, 576)):
        if width % 64:
            with pytest.raises(AdapterError, match=f"The size is {width}x{height}; SVD is trained on multiples of 64"):
                check_size(width, height)
            with pytest.raises(AdapterError, match="The size is"):
                check_size(height, width)
            continue
        check_size(width, height)
        check_latent("a", "cv-vae", (1, 4, 3, height // 8, width // 8))
    with pytest.raises(AdapterError, match="The size is 0x64"):
        check_size(0, 64)
    with pytest.raises(AdapterError, match=r"a is a latent of 72x64 pixels.*scale the video"):
        check_latent("a", "cv-vae", (1, 4, 3, 8, 9))
    for family, channels in (("iv-vae", 4), ("cv-vae-sd3", 16), ("image-vae", 4)):
        with pytest.raises(AdapterError, match=f"a latent of {family} with {channels} channels"):
            check_latent("a", family, (1, channels, 3, 8, 8))
