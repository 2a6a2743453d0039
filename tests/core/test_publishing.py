"""What stands between a commit and users: workflows, the oldest versions, the wheel, links, figures."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MEASURED = re.compile(r"benchmarks/\w+_20\d\d-\d\d-\d\d\.md")


def workflow(name: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_may_only_read(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    used = re.findall(r"uses: (\S+)", text)
    assert used
    assert [one for one in used if not one.startswith("./") and not re.search(r"@[0-9a-f]{40}$", one)] == []
    assert workflow(path.name)["permissions"] == {"contents": "read"}
    assert "permissions: write-all" not in text
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")


def test_the_suite_runs_in_the_oldest_and_newest_comfyui_before_anything_is_published() -> None:
    jobs = workflow("checks.yml")["jobs"]
    tags = [one["tag"] for one in jobs["comfyui"]["strategy"]["matrix"]["include"]]
    oldest = PROJECT["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    assert tags[0] == f"v{oldest}"
    assert len(tags) == 2
    assert any("tests/comfyui/run.py" in step.get("run", "") for step in jobs["comfyui"]["steps"])
    publish = workflow("publish.yml")["jobs"]
    assert publish["checks"]["uses"] == "./.github/workflows/checks.yml"
    assert publish["publish"]["needs"] == "checks"


def test_the_floor_is_what_pyproject_allows() -> None:
    """The job `floor` installs the lower bounds, and nothing in pyproject.toml is left without one."""
    steps = workflow("checks.yml")["jobs"]["floor"]["steps"]
    assert any("constraints-floor.txt" in step.get("run", "") for step in steps)
    lines = (ROOT / "constraints-floor.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    project = PROJECT["project"]
    allowed = dict(line.split(">=") for line in (*project["dependencies"], *project["optional-dependencies"]["cli"]))
    assert sorted(pinned) == sorted(allowed)
    for name, bound in allowed.items():
        assert pinned[name].split(".")[: len(bound.split("."))] == bound.split("."), name
    python = next(
        step["with"]["python-version"] for step in steps if "with" in step and "python-version" in step["with"]
    )
    assert project["requires-python"] == f">={python}"


def test_dependabot_and_the_issue_form_ask_for_what_is_needed() -> None:
    asked = (ROOT / ".github" / "ISSUE_TEMPLATE" / "problem.yml").read_text(encoding="utf-8")
    assert "report on the node" in asked
    assert "cviv-vae info" in asked
    kinds = re.findall(r"package-ecosystem: (\S+)", (ROOT / ".github" / "dependabot.yml").read_text(encoding="utf-8"))
    assert kinds == ["github-actions", "pip"]
    assert "Report a weakness in private" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_the_guide_and_its_recipes_travel_together() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    guide = (ROOT / "docs/training.md").read_text()
    names = {path.stem.replace("_", "-") for path in (ROOT / "vae_core/recipes").glob("*.toml")}
    named = set(re.findall(r"\b(?:cv|iv|demo|ablation)(?:-\w+)+", guide)) & names
    assert named == names
    assert setuptools["package-data"]["vae_core.recipes"] == ["*.toml"]
    assert "docs/training.md" in setuptools["data-files"]["share/cviv-vae"]


@pytest.mark.parametrize("name", ["README.md", "docs/python.md", "docs/training.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_local_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)", text) if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in links if not ((ROOT / name).parent / link.replace("%20", " ")).exists()] == []


def test_every_named_result_is_there_and_every_picture_is_shown() -> None:
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("web/docs/**/*.md"),
        *ROOT.glob("vae_core/**/*.md"),
    ]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert sorted({name for name in MEASURED.findall(text) if not (ROOT / name).is_file()}) == []
    kept = [path for path in (ROOT / "docs").iterdir() if path.suffix in (".png", ".jpg", ".webp")]
    assert [path.name for path in kept if path.name not in text and path.name != "icon.png"] == []


def test_every_speed_or_quality_figure_in_the_readme_names_its_result() -> None:
    """A number of dB, or of times as fast, stands in a paragraph with a link to the file that holds it."""
    paragraphs = re.split(r"\n\s*\n|\n(?=- )", (ROOT / "README.md").read_text(encoding="utf-8"))
    claims = [one for one in paragraphs if re.search(r"\d\s*dB\b|times\s+as\s+fast", one)]
    assert claims
    assert [one[:60] for one in claims if not MEASURED.search(one)] == []
