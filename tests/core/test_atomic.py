"""Files are complete or not there; a finished file is never lost, even where its name is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vae_core import atomic
from vae_core.atomic import atomic_write, hidden


def _write(path: Path, text: str = "whole") -> None:
    with atomic_write(path) as part:
        part.write_text(text)


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as part:
        part.write_text("half")
        assert path.read_text() == "old"
    assert path.read_text() == "half"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_block_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_write(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_has_the_permissions_that_any_new_file_has(tmp_path: Path) -> None:
    """Some libraries write files that nobody else may read."""
    before = os.umask(0o027)
    try:
        for name in ("new.txt", "old.txt"):
            path = tmp_path / name
            if name == "old.txt":
                path.touch(0o600)
            with atomic_write(path) as part:
                part.write_text("whole")
                part.chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "new.txt").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "old.txt").stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["new.txt", "old.txt"]


def test_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(atomic.os, "fsync", lambda n: (seen.append("fsync"), fsync(n)))
    monkeypatch.setattr(atomic.os, "replace", lambda a, b: (seen.append("replace"), replace(a, b)))
    _write(tmp_path / "a.txt")
    assert seen == ["fsync", "replace"]


def test_a_name_that_is_refused_for_a_moment_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, refusals, pauses = os.replace, [PermissionError(13, "in use")] * 3, []

    def refused(a: Path, b: Path) -> None:
        if refusals:
            raise refusals.pop()
        replace(a, b)

    monkeypatch.setattr(atomic.os, "replace", refused)
    monkeypatch.setattr(atomic.time, "sleep", pauses.append)
    _write(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert pauses == list(atomic.PAUSES[:3])


@pytest.mark.parametrize("error", [PermissionError(13, "in use"), OSError(18, "cross-device link")])
def test_a_finished_file_is_kept_where_its_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def refused(a: Path, b: Path) -> None:
        raise error

    monkeypatch.setattr(atomic.os, "replace", refused)
    monkeypatch.setattr(atomic.time, "sleep", lambda _: None)
    path = tmp_path / "render.mp4"
    with pytest.raises(OSError, match=r"could not take its name .* it is kept as .*render.*mp4\. Close what uses"):
        _write(path)
    (kept,) = tmp_path.iterdir()
    assert kept.suffix == ".mp4"
    assert kept.read_text() == "whole"


def test_a_disk_that_is_full_at_the_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path / "a.txt")
    assert not os.listdir(tmp_path)


def test_the_longest_name_fits(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 125 + "a.mp4")
    assert len(os.fsencode(path.name)) == atomic.LONGEST_NAME
    _write(path)
    assert path.read_text() == "whole"
    assert hidden(path).suffix == ".mp4"
