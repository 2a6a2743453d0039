"""The latent file: what goes in comes out, in chunks too; nothing half-written is left; disagreement is refused."""

from __future__ import annotations

import errno
import json
import struct
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vae_core.errors import LatentFileError
from vae_core.media.latents import LatentMeta, LatentWriter, open_latent, save_latent

META = LatentMeta(
    family="cv-vae", fps=Fraction(24000, 1001), frames=17, height=31, width=41, audio="clip é.mp4", start=7
)
SETTINGS: dict[str, Any] = {"family": "cv-vae", "fps": Fraction(25), "height": 32, "width": 48}


def _latent(t: int = 5, dtype: torch.dtype = torch.float32, b: int = 2) -> Tensor:
    return torch.randn(b, 4, t, 4, 6, generator=torch.Generator().manual_seed(t)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_latent_comes_back_with_what_was_said_of_it(dtype: torch.dtype, tmp_path: Path) -> None:
    path, latent = tmp_path / "a.safetensors", _latent(dtype=dtype)
    save_latent(path, latent, META)
    file = open_latent(path)
    assert (file.meta, file.shape, file.dtype) == (META, latent.shape, dtype)
    assert torch.equal(file.read(), latent)
    assert file.read().is_contiguous()
    assert list(tmp_path.iterdir()) == [path]


FAMILIES = [("cv-vae", 4), ("cv-vae-sd3", 16), ("iv-vae", 8), ("iv-vae", 4), ("image-vae", 4), ("image-vae", 16)]


@pytest.mark.parametrize(("family", "channels"), FAMILIES)
def test_every_family_is_kept_with_whether_its_latents_are_scaled(family: Any, channels: int, tmp_path: Path) -> None:
    meta = replace(META, family=family, audio=None, start=0)
    latents = meta.compression.latent_frames(meta.frames)
    save_latent(tmp_path / "a.safetensors", torch.zeros(1, channels, latents, 4, 6), meta)
    assert open_latent(tmp_path / "a.safetensors").meta == meta
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata()["scaled"] == ("true" if family == "iv-vae" else "false")


def test_it_is_a_safetensors_file_with_time_first(tmp_path: Path) -> None:
    path, latent = tmp_path / "a.safetensors", _latent()
    save_latent(path, latent, META)
    assert torch.equal(load_file(path)["latent_tbchw"], latent.permute(2, 0, 1, 3, 4))
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["latent_tbchw"]
        assert file.metadata() == {
            "format": "cviv-vae latent",
            "format_version": "1",
            "layout": "t b c h w",
            "family": "cv-vae",
            "channels": "4",
            "scaled": "false",
            "fps": "24000/1001",
            "frames": "17",
            "height": "31",
            "width": "41",
            "start": "7",
            "audio": "clip é.mp4",
        }
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # so that values are aligned in a mapped file


@pytest.mark.parametrize("cuts", [[5], [1, 4], [1, 1, 1, 1, 1], [2, 0, 3]])
def test_pieces_add_up_to_the_same_file(cuts: list[int], tmp_path: Path) -> None:
    latent = _latent()
    save_latent(tmp_path / "whole.safetensors", latent, META)
    path = tmp_path / "cut.safetensors"
    with LatentWriter(
        path, family="cv-vae", fps=META.fps, height=META.height, width=META.width, audio=META.audio, start=META.start
    ) as writer:
        for chunk in latent.split(cuts, dim=2):
            writer.write(chunk)
        assert writer.finish(frames=17) == META
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("size", [1, 2, 4, 5, 100])
def test_pieces_are_read_in_order_and_own_their_memory(size: int, tmp_path: Path) -> None:
    latent = _latent()
    save_latent(tmp_path / "a.safetensors", latent, META)
    chunks = list(open_latent(tmp_path / "a.safetensors").chunks(size))
    assert [p.shape[2] for p in chunks] == [min(size, 5 - i) for i in range(0, 5, size)]
    assert torch.equal(torch.cat(chunks, dim=2), latent)
    assert all(p.untyped_storage().nbytes() == p.numel() * 4 for p in chunks)
    (tmp_path / "a.safetensors").unlink()
    assert torch.equal(torch.cat(chunks, dim=2), latent)


def test_every_piece_goes_to_disk_at_once(tmp_path: Path) -> None:
    with LatentWriter(tmp_path / "a.safetensors", family="cv-vae", fps=Fraction(25), height=1024, width=1024) as writer:
        for i in range(1, 9):
            writer.write(torch.full((1, 4, 4, 128, 128), float(i)))  # 1 MB
            (part,) = tmp_path.iterdir()
            assert part.name != "a.safetensors"
            assert part.stat().st_size >= i << 20
        writer.finish(frames=125)
    values = [chunk.unique().item() for chunk in open_latent(tmp_path / "a.safetensors").chunks(4)]
    assert values == [1, 2, 3, 4, 5, 6, 7, 8]


def test_texts_and_layout_of_another_program_are_kept(tmp_path: Path) -> None:
    path, meta = tmp_path / "a.safetensors", replace(META, clip_layout="frames", extra={"prompt": '{"ä": "\n"}'})
    save_latent(path, _latent(), meta)
    assert open_latent(path).meta == meta
    assert open_latent(_rewritten(path, clip_layout="spiral", later="1")).meta == replace(
        meta, clip_layout=None, extra={**meta.extra, "later": "1"}
    )


@pytest.mark.parametrize("channels", [1, 5, 16])
def test_any_number_of_channels_is_kept(channels: int, tmp_path: Path) -> None:
    latent = torch.randn(1, channels, 5, 4, 6)
    save_latent(tmp_path / "a.safetensors", latent, META)
    assert torch.equal(open_latent(tmp_path / "a.safetensors").read(), latent)


@pytest.mark.parametrize(
    ("first", "count", "frames", "start"),
    [
        (0, None, 15, 7),
        (0, 5, 15, 7),
        (0, 4, 13, 7),
        (0, 1, 1, 7),
        (1, None, 11, 11),
        (1, 3, 9, 11),
        (3, 2, 3, 19),
        (4, 1, 1, 23),
    ],
)
def test_a_part_is_read_alone_and_says_what_it_is(
    first: int, count: int | None, frames: int, start: int, tmp_path: Path
) -> None:
    latent = _latent()
    save_latent(tmp_path / "a.safetensors", latent, replace(META, frames=15))  # 2 of 17 are padding
    file = open_latent(tmp_path / "a.safetensors")
    part = file.read(first, count)
    assert torch.equal(part, latent[:, :, first : 5 if count is None else first + count])
    assert part.untyped_storage().nbytes() == part.numel() * 4
    assert file.part_meta(first, count) == replace(META, frames=frames, start=start)
    save_latent(tmp_path / "part.safetensors", part, file.part_meta(first, count))


@pytest.mark.parametrize(("first", "count"), [(5, None), (-1, 1), (0, 6), (3, 3), (0, 0), (2, -1)])
def test_a_part_that_is_not_there_is_refused(first: int, count: int | None, tmp_path: Path) -> None:
    save_latent(tmp_path / "a.safetensors", _latent(), META)
    with pytest.raises(LatentFileError, match=r"has 5 latent frames, numbered from 0; .* Give a smaller range"):
        open_latent(tmp_path / "a.safetensors").read(first, count)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_an_interrupted_file_is_removed_and_an_older_one_kept(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"older")
    with pytest.raises(error), LatentWriter(path, **SETTINGS) as writer:  # noqa: PT012
        writer.write(_latent())
        assert len(list(tmp_path.iterdir())) == 2
        raise error
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"older"


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """/dev/full stands in for the disk: every write to it fails as on a full one."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    path = tmp_path / "a.safetensors"
    writer = LatentWriter(path, **SETTINGS)
    part = writer._part  # pyright: ignore[reportPrivateUsage]
    part.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught, writer:  # noqa: PT012
        for _ in range(100):
            writer.write(_latent())
        writer.finish(frames=1997)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_written_without_finish(tmp_path: Path) -> None:
    with (
        pytest.raises(LatentFileError, match=r"was not written: finish\(frames=...\) was not called"),
        LatentWriter(tmp_path / "a.safetensors", **SETTINGS) as writer,
    ):
        writer.write(_latent())
    with pytest.raises(LatentFileError, match="was not written"), LatentWriter(tmp_path / "a.safetensors", **SETTINGS):
        pass
    with (
        pytest.raises(LatentFileError, match="no latent to save: write at least one chunk"),
        LatentWriter(tmp_path / "a.safetensors", **SETTINGS) as writer,
    ):
        writer.finish(frames=1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_after_finish(tmp_path: Path) -> None:
    with LatentWriter(tmp_path / "a.safetensors", **SETTINGS) as writer:
        writer.write(_latent())
        writer.finish(frames=17)
        with pytest.raises(LatentFileError, match="is finished"):
            writer.write(_latent())
    assert open_latent(tmp_path / "a.safetensors").shape[2] == 5


@pytest.mark.parametrize(
    ("chunk", "said"),
    [
        (
            torch.zeros(2, 4, 1, 4, 5),
            r"\(2, 4, 1, 4, 5\) and torch.float32; the first one asks for \(2, 4, any, 4, 6\)",
        ),
        (torch.zeros(1, 4, 1, 4, 6), "the first one asks for"),
        (torch.zeros(2, 4, 1, 4, 6).half(), "torch.float16; the first one asks for .* and torch.float32"),
        (torch.zeros(2, 4, 4, 6), "the first one asks for"),
    ],
)
def test_pieces_that_do_not_belong_together_are_refused(chunk: Tensor, said: str, tmp_path: Path) -> None:
    with pytest.raises(LatentFileError, match=said), LatentWriter(tmp_path / "a.safetensors", **SETTINGS) as writer:  # noqa: PT012
        writer.write(_latent())
        writer.write(chunk)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("latent", "changes", "said"),
    [
        (torch.zeros(4, 5, 4, 6), {}, r"has shape \(b, z, t, h, w\).*got \(4, 5, 4, 6\)"),
        (torch.zeros(1, 4, 5, 4, 6, dtype=torch.int32), {}, "float16, bfloat16, float32 or float64; got .*int32"),
        (torch.zeros(1, 4, 0, 4, 6), {}, r"got \(1, 4, 0, 4, 6\)"),
        (
            torch.zeros(1, 4, 5, 4, 6),
            {"family": "wan"},
            "family 'wan' is not known: give one of cv-vae, cv-vae-sd3, iv-vae, image-vae",
        ),
        (
            torch.zeros(1, 4, 5, 4, 6),
            {"frames": 13},
            "5 latent frames make 17 frames, 3 of which may be padding.*have 13",
        ),
        (torch.zeros(1, 4, 5, 4, 6), {"frames": 18}, "is said to have 18"),
        (torch.zeros(1, 4, 5, 4, 6), {"height": 33}, "A latent of 6x4 makes pictures of 48x32.*said to be 41x33"),
        (torch.zeros(1, 4, 5, 4, 6), {"height": 24}, "up to 7 of each side may be padding; .* 41x24"),
        (torch.zeros(1, 4, 5, 4, 6), {"width": 40}, "said to be 40x31"),
        (torch.zeros(1, 4, 5, 4, 6), {"fps": Fraction(0)}, "are above 0.*got fps 0"),
        (torch.zeros(1, 4, 5, 4, 6), {"start": -1}, "start is not negative.*start -1"),
        (torch.zeros(1, 4, 5, 4, 6), {"audio": "\udc80"}, "its name has no path"),
        (torch.zeros(1, 4, 5, 4, 6), {"audio": "../clip.mka"}, "its name has no path"),
        (
            torch.zeros(1, 4, 5, 4, 6),
            {"extra": {"frames": "9"}},
            "'frames' cannot be saved: it has a name of the format",
        ),
        (torch.zeros(1, 4, 5, 4, 6), {"extra": {"prompt": "\ud800"}}, "'prompt' cannot be saved.* not valid text"),
        (torch.zeros(1, 4, 5, 4, 6), {"extra": {"prompt": "x" * (17 << 20)}}, "16,777,216 are allowed. Leave some out"),
    ],
)
def test_latents_that_disagree_with_their_description_are_refused(
    latent: Tensor, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(LatentFileError, match=said):
        save_latent(tmp_path / "a.safetensors", latent, replace(META, **changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("frames", [14, 15, 16, 17])
def test_up_to_three_padded_frames_are_kept_apart(frames: int, tmp_path: Path) -> None:
    save_latent(tmp_path / "a.safetensors", _latent(), replace(META, frames=frames))
    assert open_latent(tmp_path / "a.safetensors").meta.frames == frames


def test_one_image_is_a_latent_of_one_frame(tmp_path: Path) -> None:
    save_latent(tmp_path / "a.safetensors", _latent(1), replace(META, frames=1))
    assert open_latent(tmp_path / "a.safetensors").shape[2] == 1
    with pytest.raises(LatentFileError, match="above 0"):
        save_latent(tmp_path / "a.safetensors", _latent(1), replace(META, frames=0))


def test_bad_places_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(LatentFileError, match=r"end the name a.pt in .safetensors"):
        LatentWriter(tmp_path / "a.pt", **SETTINGS)
    with pytest.raises(LatentFileError, match="does not exist: make it first"):
        LatentWriter(tmp_path / "no" / "a.safetensors", **SETTINGS)
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(LatentFileError, match="is a folder: give the name of a file"):
        LatentWriter(tmp_path / "b.safetensors", **SETTINGS)


def _refused(path: Path) -> str:
    with pytest.raises(LatentFileError) as caught:
        open_latent(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def test_other_files_are_named_for_what_they_are(tmp_path: Path, small_state: Any) -> None:
    path = tmp_path / "a.safetensors"
    assert "does not exist" in _refused(path)
    assert "is a folder" in _refused(tmp_path)
    path.write_text("<html>login</html>")
    assert "is an HTML page" in _refused(path)
    torch.save({"latent": torch.ones(1)}, path)
    assert "is a PyTorch or zip file, not a latent file: give one that `encode` wrote" in _refused(path)
    save_file({"latent_tensor": torch.ones(1, 4, 8, 8), "latent_format_version_0": torch.tensor([])}, path)
    assert "is a latent saved by ComfyUI's SaveLatent, of shape (1, 4, 8, 8)" in _refused(path)
    save_file({"decoder.conv_in.weight": torch.ones(8, 4, 3, 3)}, path)
    assert "is not a latent file. It seems to be a 2-D Stable Diffusion VAE" in _refused(path)
    save_file(small_state("iv-vae"), path)
    assert "holds the weights of a VAE (iv-vae), not a latent" in _refused(path)
    save_file({"latent_tbchw": torch.ones(5, 1, 4, 4, 6)}, path)
    assert "is not a latent file: its format is missing" in _refused(path)


def _rewritten(path: Path, shape: list[int] | None = None, dtype: str | None = None, **texts: str | None) -> Path:
    """The latent file `path` with other things in its header."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, text in texts.items():
        if text is None:
            del header["__metadata__"][name]
        else:
            header["__metadata__"][name] = text
    header["latent_tbchw"]["shape"] = shape or header["latent_tbchw"]["shape"]
    header["latent_tbchw"]["dtype"] = dtype or header["latent_tbchw"]["dtype"]
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"format_version": "3"},
            "has version '3' of the latent format; versions 1 and 2 are known here. Update cviv-vae.",
        ),
        ({"format": "other"}, "its format is 'other'"),
        ({"layout": "b c t h w"}, "has its axes in the order 'b c t h w'"),
        ({"family": "wan"}, "is of the family 'wan'; known are cv-vae, cv-vae-sd3, iv-vae, image-vae"),
        ({"family": None}, "is of the family missing"),
        ({"scaled": "true"}, "says scaled = 'true', which latents of cv-vae never are"),
        ({"frames": "many"}, "frames is 'many', not a whole number"),
        ({"frames": None}, "frames is missing, not a whole number"),
        ({"frames": "12"}, "5 latent frames make 17 frames"),
        ({"width": "49"}, "makes pictures of 48x32"),
        ({"fps": "1/0"}, "fps has a denominator of 0"),
        ({"fps": "24.5"}, "fps is '24.5', not a whole number"),
        ({"channels": "16"}, "It says it has 16 channels, and has 4"),
        ({"shape": [5, 2, 4, 24]}, "A latent has five axes"),
        ({"shape": [5, 4, 2, 4, 6]}, "It says it has 4 channels, and has 2"),
        ({"dtype": "I32"}, "has a latent of type I32; known are F16, BF16, F32, F64"),
    ],
)
def test_altered_files_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_latent(path, _latent(), META)
    assert open_latent(_rewritten(path)).meta == META
    assert said in _refused(_rewritten(path, **changes))


@pytest.mark.parametrize("kept", [0.2, 0.9])
def test_a_truncated_file_gives_both_sizes(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_latent(path, _latent(), META)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert f"is truncated: its header says {len(content):,} bytes" in _refused(path)


def test_a_file_that_goes_away_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_latent(path, _latent(), META)
    chunks = open_latent(path).chunks(1)
    next(chunks)
    path.unlink()
    with pytest.raises(LatentFileError, match="can no longer be read"):
        next(chunks)


def test_pieces_of_no_frames_are_refused(tmp_path: Path) -> None:
    save_latent(tmp_path / "a.safetensors", _latent(), META)
    with pytest.raises(LatentFileError, match="The size of a chunk is 0"):
        next(open_latent(tmp_path / "a.safetensors").chunks(0))
