"""What the registry checks and packs, and the pack installed from that archive."""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from .calls import LOAD_VAE
from .checkout import ROOT
from .place import make_base
from .server import serve
from .test_pack import IDS
from .weights import SMALL

NOT_PACKED = ("tests/", ".ci/", ".github/", "__pycache__/", "vae_core/demo/demo_image_vae")


def git(*arguments: str, cwd: Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout


def comfy_node(command: str, pack: Path) -> subprocess.CompletedProcess[str]:
    """Run `comfy node COMMAND` in a pack; its own files go beside it."""
    homes = {name: str(pack.parent) for name in ("HOME", "USERPROFILE", "XDG_CONFIG_HOME", "APPDATA")}
    return subprocess.run(
        [sys.executable, "-m", "comfy_cli", "--no-json", "--skip-prompt", "node", command],
        cwd=pack,
        env={**os.environ, **homes, "DO_NOT_TRACK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the working tree that git does not ignore, tracked in a repository of their own."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and the project's repository")
    target = tmp_path_factory.mktemp("clone") / "cviv-vae"
    for name in git("ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    git("init", "--quiet", cwd=target)
    git("add", "--all", cwd=target)
    return target


@pytest.fixture(scope="module")
def archive(clone: Path) -> Path:
    """What `comfy node pack` writes."""
    pytest.importorskip("comfy_cli")
    result = comfy_node("pack", clone)
    assert (clone / "node.zip").is_file(), result.stdout + result.stderr
    return clone / "node.zip"


def test_the_rules_of_the_registry(clone: Path) -> None:
    """`comfy node validate` always succeeds, so the rules it only prints are checked here."""
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "S102,S307,E702", "."]
    result = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_validate_has_no_complaint(clone: Path) -> None:
    pytest.importorskip("comfy_cli")
    result = comfy_node("validate", clone)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert "warning" not in said.lower(), said


def test_the_archive_holds_what_users_need(archive: Path) -> None:
    names = zipfile.ZipFile(archive).namelist()
    assert [name for name in names if name.startswith(NOT_PACKED) or "/__pycache__/" in name] == []
    assert [name for name in names if name.endswith((".pyc", ".latent", ".webm", ".mkv"))] == []
    assert [name for name in names if name.endswith(".mp4")] == ["vae_core/demo/demo_clip.mp4"]
    for needed in (
        "__init__.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "nodes/__init__.py",
        "vae_core/__init__.py",
        "web/docs/CVIV_Decode.md",
        "locales/en/nodeDefs.json",
        "locales/zh/nodeDefs.json",
        "example_workflows/Reconstruct a video.json",
        "example_workflows/Reconstruct a video.jpg",
    ):
        assert needed in names
    assert [name for name in names if name.endswith(".py") and name.startswith(("benchmarks/", "docs/"))] == []
    assert (
        sum(name.startswith("vae_core/recipes/") for name in names) == 14
    )  # of the guide docs/training.md, which is there
    assert archive.stat().st_size < 19 << 20


def test_no_link_in_the_archive_is_broken(archive: Path) -> None:
    """README and guide as a user of the registry reads them; what is not packed is linked by nothing."""
    with zipfile.ZipFile(archive) as file:
        names = set(file.namelist())
        pages = {
            name: file.read(name).decode()
            for name in names
            if name.endswith(".md") and not name.startswith(("web/docs/", "benchmarks/"))
        }
    assert {"README.md", "docs/python.md", "docs/training.md", "CHANGELOG.md"} <= set(pages)
    links = [(page, link) for page, text in pages.items() for link in _local_links(text)]
    assert len([page for page, _ in links if page == "README.md"]) > 10
    broken = [(page, link) for page, link in links if _target(page, link) not in names]
    assert broken == []


def test_the_manager_reads_the_archive(archive: Path, loaded: object, tmp_path: Path) -> None:
    """By the functions that ComfyUI-Manager lists installed packs with; it unpacks, and adds a list of the files."""
    reader = pytest.importorskip("comfyui_manager.common.cnr_utils", reason="comfyui-manager is not installed")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "cviv-vae")
        (tmp_path / "cviv-vae" / ".tracking").write_text("\n".join(file.namelist()), encoding="utf-8")
    told = reader.read_cnr_info(str(tmp_path / "cviv-vae"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert told == {
        "id": "cviv-vae",
        "original_name": "cviv-vae",
        "version": project["version"],
        "url": project["urls"]["Repository"],
    }


def test_the_version_is_the_package_s_own(loaded: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == loaded.pack("vae_core").__version__
    assert "dynamic" not in project["project"]


def test_the_owner_s_lines_stand_in_one_place() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    places = [number for number, line in enumerate(lines) if "OWNER" in line and not line.startswith("#")]
    if not places:  # filled in
        return
    assert len(places) == 5
    assert places[-1] - places[0] <= 6
    comment = [line for line in lines[: places[0]] if "only the owner can fill in" in line]
    assert comment


def test_the_pack_from_the_archive_loads_and_works(archive: Path, models: Path, loaded: object, tmp_path: Path) -> None:
    pack = tmp_path / "unpacked"
    zipfile.ZipFile(archive).extractall(pack)
    with serve(make_base(tmp_path / "base", models=models, pack=pack)) as server:
        known = server.get("/object_info")
        assert [name for name in IDS if name not in known] == []
        assert "IMPORT FAILED" not in server.printed()
        ended = server.run(
            {
                "vae": {
                    "class_type": "CVIV_LoadVideoVAE",
                    "inputs": {**LOAD_VAE, "vae_name": SMALL["cv"]},
                },
                "info": {"class_type": "CVIV_VideoVAEInfo", "inputs": {"vae": ["vae", 0]}},
            }
        )
        assert ended["status"]["status_str"] == "success"
        assert "cv-vae" in ended["outputs"]["info"]["text"][0]
        assert server.fetch(f"/extensions/cviv-vae/docs/{IDS[0]}.md")


def _local_links(markdown: str) -> list[str]:
    """Addresses of pictures and pages that are files, without what follows a #."""
    found = re.findall(r"\]\(([^)\s]+)", markdown) + re.findall(r'(?:src|href)="([^"]+)"', markdown)
    return [link.partition("#")[0] for link in found if not re.match(r"[a-z]+:|#|//", link)]


def _target(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link.replace("%20", " ")))
