"""What the registry checks and packs, and the pack installed from that archive."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .calls import LOAD_VAE
from .checkout import ROOT
from .place import make_base
from .server import serve
from .test_pack import IDS
from .weights import SMALL

NOT_PACKED = ("tests/", "benchmarks/", "docs/", ".ci/", ".github/", "__pycache__/")


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
    assert archive.stat().st_size < 40 << 20


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
