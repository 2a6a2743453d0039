"""Finding the networks of LPIPS and FVD: a named file, torch's cache, or a download that was asked for."""

import hashlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar

import torch

from ..atomic import atomic_write
from ..door.downloads import DownloadError, fetch
from ..errors import CheckpointError
from ..metrics import load_i3d, load_lpips
from .measure import Networks

ALEXNET = "alexnet-owt-7be5be79.pth"  # the name ends in the first digits of its SHA-256
ALEXNET_PAGE = f"https://download.pytorch.org/models/{ALEXNET}"
I3D_NAMES = ("i3d_torchscript.pt", "i3d_pretrained_400.pt", "rgb_imagenet.pt")
T = TypeVar("T")


def find_networks(
    *, lpips: Path | None = None, fvd: Path | None = None, fetch_lpips: bool = False, device: torch.device | str = "cpu"
) -> Networks:
    """The networks that are at hand, and one sentence on each that is not.

    lpips, fvd: files; None looks in torch's cache (`torch.hub.get_dir()`/checkpoints). fetch_lpips: download AlexNet
    (244 MB) where it is not there. Raises CheckpointError for a named file that is wrong.
    """
    missing: list[str] = []
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    file = lpips or _cached(cache, (ALEXNET,))
    if file is None and fetch_lpips:
        try:
            file = fetch_alexnet(cache)
        except (OSError, HTTPException) as error:
            missing.append(f"LPIPS is left out: its network could not be fetched ({error}).")
    elif file is None:
        missing.append(
            f"LPIPS is left out: its network is not here. Get {ALEXNET_PAGE} and name the file with --lpips, or add "
            "--fetch-networks."
        )
    found = None if file is None else _loaded(load_lpips, file, named=lpips is not None, missing=missing)
    video = fvd or _cached(cache, I3D_NAMES)
    if video is None:
        missing.append(
            f"FVD is left out: its network is not here. Name a file of I3D ({' or '.join(I3D_NAMES[:2])}) with --fvd."
        )
    features = (
        None
        if video is None
        else _loaded(lambda path: load_i3d(path, device), video, named=fvd is not None, missing=missing)
    )
    if found is not None:
        found.to(device)
    return Networks(
        lpips=found,
        video=features,
        missing=tuple(missing),
        lpips_file="" if found is None or file is None else _hash(file),
        video_file="" if features is None or video is None else _hash(video),
    )


def fetch_alexnet(folder: Path) -> Path:
    """Download torchvision's AlexNet and check it; returns the file. Raises DownloadError."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / ALEXNET) as part:
        try:
            fetch(ALEXNET_PAGE, part)
        finally:
            part.with_name(f"{part.name}.tag").unlink(missing_ok=True)
        if not hashlib.sha256(part.read_bytes()).hexdigest().startswith(ALEXNET.removesuffix(".pth").rsplit("-", 1)[1]):
            raise DownloadError(f"{ALEXNET_PAGE} came damaged; try again.")
    return folder / ALEXNET


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _cached(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _loaded(load: Callable[[Path], T], path: Path, *, named: bool, missing: list[str]) -> T | None:
    """A file that was found in the cache and is wrong is a note; a file that was named is an error."""
    try:
        return load(path)
    except CheckpointError as error:
        if named:
            raise
        missing.append(str(error))
        return None
