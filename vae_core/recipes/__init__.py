"""TOML files of training stages, to copy and change: `cviv-vae train --new NAME`."""

from __future__ import annotations

from pathlib import Path


def recipes() -> dict[str, Path]:
    """The file of each recipe by its name, such as cv-video-256."""
    return {name_of(path.name): path for path in sorted(Path(__file__).parent.glob("*.toml"))}


def name_of(file: str) -> str:
    """The name of a recipe from that of its file."""
    return file.removesuffix(".toml").replace("_", "-")


def first_sentence(text: str) -> str:
    """What a recipe says of itself, in one sentence."""
    lines = [line.removeprefix("#").strip() for line in text.partition("\n\n")[0].splitlines() if line.startswith("#")]
    return " ".join(lines).partition(". ")[0].rstrip(".")
