"""Fetching the official weights: from their authors' pages, resumable, checked before they get their name."""

import contextlib
import hashlib
import http
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..atomic import atomic_write, give_name
from ..errors import CheckpointError
from .loading import load

MODELSCOPE = "https://www.modelscope.cn/models"
HUGGINGFACE = "https://huggingface.co"
_CHUNK = 1 << 20
_TIMEOUT = 30  # seconds without a byte


class DownloadError(OSError):
    """A file could not be fetched; the text says where to get it by hand."""


@dataclass(frozen=True, kw_only=True)
class OfficialFile:
    """One published set of weights: where it is, what must be in it, and under which licence it stands."""

    name: str
    family: str
    latent_channels: int
    parameters: int
    host: str
    repository: str
    file: str
    licence: str

    @property
    def target(self) -> str:
        """The file name it gets here."""
        return self.file if self.host == "modelscope" else f"cv-vae_{self.name}.safetensors"

    @property
    def url(self) -> str:
        """The address of the file itself; HF_ENDPOINT names a mirror of Hugging Face, as for its own tools."""
        if self.host == "modelscope":
            return f"{MODELSCOPE}/{self.repository}/resolve/master/{self.file}"
        return f"{os.environ.get('HF_ENDPOINT') or HUGGINGFACE}/{self.repository}/resolve/main/{self.file}"

    @property
    def bytes(self) -> int:
        """About how large the file is: its numbers are float32."""
        return 4 * self.parameters

    @property
    def page(self) -> str:
        """The web page to download it from by hand."""
        if self.host == "modelscope":
            return f"{MODELSCOPE}/{self.repository}/files"
        return f"{HUGGINGFACE}/{self.repository}/tree/main/{self.file.rsplit('/', 1)[0]}"


def _cv(name: str, family: str, latent_channels: int, parameters: int) -> OfficialFile:
    return OfficialFile(
        name=name,
        family=family,
        latent_channels=latent_channels,
        parameters=parameters,
        host="huggingface",
        repository="AILab-CVC/CV-VAE",
        file=f"{name}/diffusion_pytorch_model.safetensors",
        licence="Apache-2.0",
    )


def _iv(latent_channels: int, dim: int, parameters: int) -> OfficialFile:
    return OfficialFile(
        name=f"ivvae_z{latent_channels}_dim{dim}",
        family="iv-vae",
        latent_channels=latent_channels,
        parameters=parameters,
        host="modelscope",
        repository="wpy1999/iv-vae",
        file=f"ivvae_z{latent_channels}_dim{dim}.pth",
        licence="the official code is MIT; see the page for the weights",
    )


OFFICIAL_FILES: Mapping[str, OfficialFile] = {
    file.name: file
    for file in (
        _cv("vae3d", "cv-vae", 4, 182_446_475),
        _cv("vae3d_v1-1", "cv-vae", 4, 182_446_475),
        _cv("vae3d_sd3", "cv-vae-sd3", 16, 181_892_515),
        _iv(4, 64, 107_170_842),
        _iv(8, 64, 107_379_150),
        _iv(16, 64, 107_798_550),
        _iv(16, 96, 241_854_742),
    )
}

Report = Callable[[int, int | None], None]


def download(name: str, folder: str | os.PathLike[str], *, report: Report | None = None) -> Path:
    """Fetch one of `OFFICIAL_FILES` into `folder`, which is made, and return its path there.

    A file already there is checked and not fetched again. What arrived before an interruption is kept in a hidden
    `.part` in that folder and continued, as long as the file there is the same. Before it gets its name the file is
    opened and every tensor's name and shape compared with the published model. Where it came from, its revision and its
    SHA-256 are written beside it, for `changed_since`. `report` is called with (bytes here, bytes in all or None).

    Raises CheckpointError for an unknown name or for a file that is not the published model, `DownloadError` when it
    cannot be fetched, OSError when the disk is full.
    """
    official = OFFICIAL_FILES.get(name)
    if official is None:
        raise CheckpointError(f"{name!r} is not a published file; choose one of {', '.join(OFFICIAL_FILES)}.")
    target = Path(folder) / official.target
    if target.exists():
        check(target, official)
        return target
    made = not target.parent.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".part.{target.name}")  # its ending tells how it is read
    try:
        revision = fetch(official.url, part, report=report)
        _accept(part, target, official, revision)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        if made:
            with contextlib.suppress(OSError):
                target.parent.rmdir()  # where nothing arrived
        raise _unreachable(official, target, error) from error
    return target


def check(path: Path, official: OfficialFile) -> None:
    """Raise CheckpointError unless `path` holds exactly the tensors of `official`; no weight is copied into memory."""
    info = load(path, dtype=None).info
    found = info.family, info.latent_channels, info.parameters
    wanted = official.family, official.latent_channels, official.parameters
    if found != wanted:
        raise CheckpointError(
            f"{path} holds {_model(*found)}, where {official.name} is {_model(*wanted)}; delete it and download again."
        )


def _model(family: str, latent_channels: int, parameters: int) -> str:
    return f"{family} with {latent_channels} latent channels and {parameters:,} parameters"


def changed_since(path: Path) -> str:
    """A sentence on whether `path` is what was downloaded; "" where nothing was written down about that.

    Raises CheckpointError where it is not.
    """
    try:
        noted: dict[str, str] = json.loads(_note_of(path).read_text(encoding="utf-8"))
        wanted, revision = noted["sha256"], noted["revision"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    found = _sha256(path)
    if found != wanted:
        raise CheckpointError(
            f"{path} is not what was downloaded: its SHA-256 is {found[:16]}..., and was {wanted[:16]}...; delete it "
            "and download again."
        )
    return f"{wanted}, as downloaded{f' (revision {revision})' if revision else ''}"


def _note_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.source.json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, part: Path, *, report: Report | None = None) -> str:
    """Stream `url` to `part`, continuing where an earlier attempt ended; complete when this returns.

    Returns the revision that the server names, else its tag of the file, else "".

    Raises urllib.error.URLError, http.client.HTTPException, TimeoutError or ConnectionError when it breaks off.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "cviv-vae", "Accept-Encoding": "identity"}
    tag = part.with_name(f"{part.name}.tag")
    known = tag.read_text(encoding="utf-8") if have and tag.exists() else ""
    if have:
        headers["Range"] = f"bytes={have}-"
        if known:
            headers["If-Range"] = known  # of another file, all is sent
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        if error.headers.get("Content-Range", "").rsplit("/", 1)[-1] != str(have):
            part.unlink()  # of another file than the one there now
            return fetch(url, part, report=report)
        tag.unlink(missing_ok=True)
        return known.strip('"')
    with answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0
        named = answer.headers.get("ETag", "")
        if named.startswith('"') and not have:
            tag.write_text(named, encoding="utf-8")
        revision = answer.headers.get("X-Repo-Commit") or named.strip('"')
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with part.open("ab" if have else "wb") as file:
            while block := answer.read(_CHUNK):
                file.write(block)
                have += len(block)
                if report is not None:
                    report(have, total)
    if total is not None and have < total:
        raise http.client.IncompleteRead(b"", total - have)
    tag.unlink(missing_ok=True)
    return revision


def _accept(part: Path, target: Path, official: OfficialFile, revision: str) -> None:
    try:
        check(part, official)
    except CheckpointError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise CheckpointError(f"What was downloaded is not {official.name}, and was deleted: {error}") from error
    noted = {"from": official.url, "revision": revision, "sha256": _sha256(part)}
    with atomic_write(_note_of(target)) as note:
        note.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
    give_name(part, target)


def _unreachable(official: OfficialFile, target: Path, error: BaseException) -> DownloadError:
    reason = getattr(error, "reason", None) or error
    words = getattr(reason, "strerror", None) or str(reason).strip() or type(reason).__name__
    first = re.sub(r"^\[Errno -?\d+\] ", "", words.splitlines()[0]).rstrip(".")
    return DownloadError(
        f"{official.name} could not be downloaded ({first}). Try again to continue where it stopped, or download "
        f"{official.file} from {official.page} by hand and save it as {target}."
    )
