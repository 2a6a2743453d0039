"""The choices of Load Video VAE: files of models/vae, bundled demo weights, and downloads that the user asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import folder_paths

from ...vae_core.door.downloads import OFFICIAL_FILES, OfficialFile, download
from ...vae_core.door.loading import DEMO_WEIGHTS

DOWNLOAD = "download "  # begins the choices that fetch a file
_BLOCK = 1 << 22

Report = Callable[[int, int | None], None]


def choices() -> list[str]:
    """Demo weights, the files that are there, and a download for each official file."""
    return [*DEMO_WEIGHTS, *folder_paths.get_filename_list("vae"), *map(download_choice, OFFICIAL_FILES.values())]


def download_choice(official: OfficialFile) -> str:
    """The choice that downloads a file: its name there, and about how large it is."""
    return f"{DOWNLOAD}{official.name} ({official.bytes / 1e6:.0f} MB)"


def chosen_download(vae_name: str) -> OfficialFile | None:
    """The official file that a choice downloads; None where it names a file. Raises ValueError for an unknown one."""
    if not vae_name.startswith(DOWNLOAD):
        return None
    name = vae_name.removeprefix(DOWNLOAD).partition(" ")[0]
    if name not in OFFICIAL_FILES:
        raise ValueError(f"There is no official file {name!r}; choose one of: {', '.join(OFFICIAL_FILES)}.")
    return OFFICIAL_FILES[name]


def path_of(vae_name: str) -> Path | None:
    """The file behind a choice; None: it is yet to be downloaded. Raises ValueError where there is none."""
    if vae_name in DEMO_WEIGHTS:
        return DEMO_WEIGHTS[vae_name]
    official = chosen_download(vae_name)
    found = folder_paths.get_full_path("vae", vae_name if official is None else official.target)
    if found is not None:
        return Path(found)
    if official is not None:
        return None
    raise ValueError(_missing(vae_name))


def fetch_official(official: OfficialFile, report: Report) -> tuple[Path, str]:
    """Download a file into models/vae and check it: its path and SHA-256. Raises what `report` raises, to cancel."""
    folder = Path(folder_paths.get_folder_paths("vae")[0])
    path = download(official.name, folder, report=report)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return path, digest.hexdigest()


def _missing(vae_name: str) -> str:
    """What to do about a file that is not there; for an official one, where it is and what to save it as."""
    name = vae_name.replace("\\", "/").rpartition("/")[2]
    for official in OFFICIAL_FILES.values():
        if official.target == name:
            return (
                f"Load Video VAE: there is no {vae_name!r} in models/vae. Download {official.file} from "
                f"{official.page}, save it as models/vae/{official.target} and press R; or choose "
                f"'{download_choice(official)}' here, and it is fetched."
            )
    return (
        f"Load Video VAE: there is no file {vae_name!r} in models/vae. Put the weights there and press R to read the "
        f"folder again, or choose a download or one of the bundled {', '.join(DEMO_WEIGHTS)}."
    )
