"""Where latent files lie: names from a widget that can never leave the output folder, and the list of what is there."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from .dates import fill_dates, passing_dates

SUFFIX = ".latent.safetensors"
_FOLDER = "latents"  # below a folder of this name, every .safetensors is listed
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f\x7f\ud800-\udfff]')
_LONGEST = 200  # bytes of a name; file systems take 255, and a number and the ending are added
DEVICE_NAME = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?", re.IGNORECASE)  # devices of Windows
_PASSING = ("%hour%", "%minute%", "%second%", "%width%", "%height%")


def check_prefix(prefix: str) -> list[str]:
    """The folders and, last, the name of a file name from a widget; dates are filled in.

    Raises ValueError where it could lie outside the output folder, or is no name that every system takes.
    """
    dated = fill_dates(prefix, time.localtime())
    parts = dated.replace("\\", "/").removesuffix(SUFFIX).split("/")
    shown = f"The file name {prefix[:200]!r}"
    if parts[0] == "" and len(parts) > 1:
        raise ValueError(f"{shown} is an absolute path: give one below the output folder, such as latents/video.")
    if not parts[-1]:
        raise ValueError(f"{shown} has no name: add one after the last /, such as latents/video.")
    for part in parts:
        if part in (".", ".."):
            raise ValueError(f"{shown} holds {part!r} as a folder: files stay below the output folder. Leave it out.")
        found = _FORBIDDEN.search(part)
        if found is not None:
            raise ValueError(f"{shown} holds {found.group()!r}, which not every system allows in names. Leave it out.")
        if len(part.encode()) > _LONGEST:
            raise ValueError(f"{shown} holds a name of {len(part.encode())} bytes; {_LONGEST} are allowed. Shorten it.")
        if not part or part[-1] in ". " or DEVICE_NAME.fullmatch(part):
            raise ValueError(
                f"{shown} holds {part!r}, which is no name on every system: empty, ending in a dot or a blank, or the "
                "name of a device. Choose another name."
            )
    return parts


def reused_path(prefix: str) -> Path:
    """The one file that `prefix` names, always the same. Raises ValueError as check_prefix, or for passing names."""
    passing = [token for token in _PASSING if token in prefix] + passing_dates(prefix)
    if passing:
        raise ValueError(
            f"The file name {prefix[:200]!r} holds {passing[0]}, which changes, so no file would be found again: leave "
            "it out, or choose 'number a new file'."
        )
    return _below_output(prefix, 0, 0, SUFFIX)


def numbered_path(prefix: str, *, width: int, height: int) -> Path:
    """The first free <prefix>_00001.latent.safetensors; its number is above all there are. Raises ValueError."""
    first = _below_output(prefix, width, height, f"_00001{SUFFIX}")
    name = first.name.removesuffix(f"_00001{SUFFIX}")
    pattern = re.compile(rf"{re.escape(name)}_(\d+){re.escape(SUFFIX)}", re.IGNORECASE)
    there = os.listdir(first.parent) if first.parent.is_dir() else []
    numbers = [int(match.group(1)) for match in map(pattern.fullmatch, there) if match]
    return first.with_name(f"{name}_{max(numbers, default=0) + 1:05}{SUFFIX}")


def make_folder(path: Path) -> None:
    """Make the folder of `path`. Raises ValueError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The folder {path.parent} cannot be made ({error.strerror}): choose another name.") from error


def subfolder(path: Path) -> str:
    """The folder of `path` below the output folder, as ComfyUI's front end wants it."""
    below = path.parent.relative_to(folder_paths.get_output_directory()).as_posix()
    return "" if below == "." else below


def listed() -> list[str]:
    """The latent files of the output and input folders as "output/..." and "input/...", newest first."""
    found = [entry for name, root in _roots().items() for entry in _files(name, root)]
    return [label for _, label in sorted(found, key=lambda entry: (-entry[0], entry[1]))]


def listed_path(label: str) -> Path:
    """The file behind an entry of the list. Raises ValueError where it is none, or not in those folders."""
    name, _, rest = label.replace("\\", "/").partition("/")
    root = _roots().get(name)
    if root is None or not rest or ".." in rest.split("/") or _FORBIDDEN.search(rest):
        raise ValueError(
            f"The file is {label[:200]!r}: choose one of the list, whose entries begin with output/ or input/."
        )
    path = root / rest
    if not inside(path, root):
        raise ValueError(f"{label!r} leads out of the {name} folder: copy the file into it.")
    if path.suffix.lower() == ".latent":
        raise ValueError(f"{label!r} was saved by ComfyUI's Save Latent: put it into input/ and use Load Latent.")
    if not path.is_file():
        raise ValueError(f"There is no file {label!r}: press R to read the folders again and choose another one.")
    return path


def _roots() -> dict[str, Path]:
    return {"output": Path(folder_paths.get_output_directory()), "input": Path(folder_paths.get_input_directory())}


def _files(name: str, root: Path) -> Iterator[tuple[float, str]]:
    """(time of the last change, label) of the latent files below `root`."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder around it
            folders.clear()
            continue
        seen.add(real)
        below = Path(folder).relative_to(root)
        for file in files:
            ending = ".safetensors" if _FOLDER in below.parts else SUFFIX
            if not file.lower().endswith(ending) or file.startswith("."):
                continue
            path = Path(folder, file)
            if path.is_file() and inside(path, root):
                yield path.stat().st_mtime, (name / below / file).as_posix()


def _below_output(prefix: str, width: int, height: int, ending: str) -> Path:
    now = time.localtime()
    tokens = {
        "%year%": f"{now.tm_year}",
        "%month%": f"{now.tm_mon:02}",
        "%day%": f"{now.tm_mday:02}",
        "%hour%": f"{now.tm_hour:02}",
        "%minute%": f"{now.tm_min:02}",
        "%second%": f"{now.tm_sec:02}",
        "%width%": str(width),
        "%height%": str(height),
    }
    *folders, name = check_prefix(prefix)
    for token, text in tokens.items():
        folders, name = [folder.replace(token, text) for folder in folders], name.replace(token, text)
    root = Path(folder_paths.get_output_directory())
    path = root.joinpath(*folders, name + ending)
    if not inside(path, root):
        raise ValueError(f"The file name {prefix[:200]!r} leads out of the output folder: choose another.")
    return path


def inside(path: Path, root: Path) -> bool:
    """Whether `path` lies below `root`. Links are the user's own: a folder may lie on another disk."""
    try:
        place, top = os.path.abspath(path), os.path.abspath(root)
        return os.path.commonpath((place, top)) == top
    except (OSError, ValueError):  # two drives of Windows
        return False
