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
LINE = re.compile(r"^- ((?:\*\*[\w ]+\*\*(?:, | and )?)+) \(([^)]*)\)", re.MULTILINE)
TRAINER = "CVIV_TrainSVDAdapter"


def told_defaults(node: str) -> dict[str, str]:
    """The default of each input that the help page of a node gives, as it is written."""
    page = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    out: dict[str, str] = {}
    for bold, details in LINE.findall(page.partition("\n## Inputs\n")[2].partition("\n## ")[0]):
        names = re.findall(r"\*\*([\w ]+)\*\*", bold)
        _, _, values = details.partition("default ")
        each = re.split(r", | and ", values) if len(names) > 1 else [values]
        out |= dict(zip(names, each if len(each) > 1 else each * len(names), strict=True))
    return out


def written(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default) or "empty"


@pytest.mark.parametrize("node", SCHEMAS)
def test_help_has_the_defaults_of_the_node(node: str) -> None:
    told = told_defaults(node)
    for one in SCHEMAS[node]["inputs"]:
        if "default" not in one:
            continue
        name, default = one.get("display_name") or one["id"], one["default"]
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert float(told[name].split()[0].replace(",", "")) == default, name
        else:
            assert told[name] == written(default), name


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
