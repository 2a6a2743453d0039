"""Weight files: what is read, what is unwrapped and dropped, and what is said of files that are no weights."""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import vae_core
from vae_core.errors import CheckpointError
from vae_core.weights.files import FOREIGN, read_weights, strip_foreign

CV, IV = "decoder.conv_in.weight", "encoder.conv1.conv_2d.weight"


def _weights() -> dict[str, Tensor]:
    return {CV: torch.arange(24.0).reshape(2, 4, 3).half(), "encoder.norm_out.bias": torch.ones(3)}


def _same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[k], expected[k]) for k in expected)


def _error(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def test_safetensors_are_read_with_their_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(_weights(), path, metadata={"family": "cv-vae"})
    file = read_weights(str(path))
    assert _same(file.tensors, _weights())
    assert file.tensors[CV].dtype == torch.float16
    assert (file.metadata, file.config, file.path) == ({"family": "cv-vae"}, None, path)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read(suffix: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    torch.save(OrderedDict(_weights()), path, _use_new_zipfile_serialization=zipped)
    assert _same(read_weights(path).tensors, _weights())


def test_parameters_come_as_plain_tensors(tmp_path: Path) -> None:
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "a.pth")
    tensor = read_weights(tmp_path / "a.pth").tensors["a"]
    assert type(tensor) is Tensor
    assert not tensor.requires_grad


def test_a_safetensors_file_under_another_suffix_is_read_by_its_content(tmp_path: Path) -> None:
    save_file(_weights(), tmp_path / "a.ckpt")
    assert _same(read_weights(tmp_path / "a.ckpt").tensors, _weights())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_reading_takes_no_memory_and_writing_does_not_reach_the_file(suffix: str, tmp_path: Path) -> None:
    def anonymous_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    path = tmp_path / f"a{suffix}"
    state = {"a": torch.ones(16_000_000)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    del state
    before = anonymous_bytes()
    tensor = read_weights(path).tensors["a"]
    assert tensor.sum() == 16_000_000
    assert anonymous_bytes() - before < 16_000_000  # a copy would be 64 MB
    tensor[0] = 7
    assert read_weights(path).tensors["a"][0] == 1


@pytest.mark.parametrize("names", [["state_dict"], ["model"], ["state_dict", "module"], ["params_ema"], ["a", "b"]])
def test_nested_weights_are_unwrapped(names: list[str], tmp_path: Path) -> None:
    thing: dict[str, object] = dict(_weights())
    for name in reversed(names):
        thing = {"epoch": 3, "global_step": torch.tensor(5), "optimizer_states": [{"lr": 1.0}], name: thing}
    torch.save(thing, tmp_path / "a.ckpt")
    found = read_weights(tmp_path / "a.ckpt").tensors
    if names == ["a", "b"]:  # no name under which weights are kept: nothing is guessed
        assert _same(found, {"global_step": torch.tensor(5)})
    else:
        assert _same(found, _weights())


def test_entries_that_are_no_tensors_are_left_out(tmp_path: Path) -> None:
    torch.save({**_weights(), "epoch": 3, "note": "x", "lr": [1.0], "loss_config": {"a": 1}}, tmp_path / "a.pth")
    assert _same(read_weights(tmp_path / "a.pth").tensors, _weights())


def test_the_weights_are_preferred_to_their_averages(tmp_path: Path) -> None:
    torch.save({"ema": {"a": torch.zeros(1)}, "state_dict": {"a": torch.ones(1)}}, tmp_path / "a.ckpt")
    assert read_weights(tmp_path / "a.ckpt").tensors["a"] == 1


@pytest.mark.parametrize("name", [CV, IV])
@pytest.mark.parametrize(
    "prefix",
    ["", "first_stage_model.", "vae.", "module.", "model.", "autoencoder.", "module._orig_mod.", "model.vae.", "mine."],
)
def test_a_prefix_is_stripped(prefix: str, name: str) -> None:
    tensors = {f"{prefix}{name}": torch.ones(1), f"{prefix}decoder.x": torch.ones(1), "other": torch.ones(1)}
    assert list(strip_foreign(tensors)) == (
        [name, "decoder.x", "other"] if not prefix else ["other", name, "decoder.x"]
    )


def test_two_models_in_one_state_dict_are_left_as_they_are() -> None:
    tensors = {f"student.{CV}": torch.ones(1), f"teacher.{CV}": torch.ones(1)}
    assert strip_foreign(tensors).keys() == tensors.keys()


def test_a_name_is_never_overwritten_by_stripping() -> None:
    tensors = {f"vae.{CV}": torch.ones(1), "vae.a": torch.zeros(1), "a": torch.ones(1)}
    stripped = strip_foreign(tensors)
    assert set(stripped) == {CV, "vae.a", "a"}
    assert stripped["a"] == 1


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize(
    "foreign",
    [
        "loss.logvar",
        "loss.discriminator.main.0.weight",
        "loss.perceptual_loss.lin0.model.1.weight",
        "discriminator.blocks.0.weight",
        "discriminator_3d.main.0.weight",
        "perceptual_loss.net.slice1.0.weight",
        "lpips.lin0.weight",
        "optimizer.state.0",
        f"ema.{CV}",
    ],
)
def test_parts_of_a_training_are_dropped_by_name(foreign: str, prefix: str) -> None:
    tensors = {f"{prefix}{CV}": torch.ones(1), f"{prefix}{foreign}": torch.ones(1), "model_ema.decay": torch.ones(1)}
    assert list(strip_foreign(tensors)) == [CV]


def test_only_whole_parts_of_a_name_count_as_foreign() -> None:
    kept = {CV: torch.ones(1), "encoder.loss.weight": torch.ones(1), **{f"{f}x": torch.ones(1) for f in FOREIGN}}
    assert strip_foreign(kept).keys() == kept.keys()


def _folder(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "vae3d"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "CVVAEModel", "scaling_factor": 0.18215}))
    for i, name in enumerate(names):
        state = {"a": torch.full((1,), float(i))}
        if name.endswith(".safetensors"):
            save_file(state, folder / name)
        else:
            torch.save(state, folder / name)
    return folder


def test_a_folder_gives_its_config_and_its_safetensors_first(tmp_path: Path) -> None:
    stem = "diffusion_pytorch_model"
    names = [f"{stem}.ckpt", f"{stem}.bin", f"{stem}.fp16.safetensors", f"{stem}.safetensors"]
    folder = _folder(tmp_path, *names)
    for i in reversed(range(4)):
        file = read_weights(folder)
        assert file.path.name == names[i]
        assert file.tensors["a"] == i
        assert file.config == {"_class_name": "CVVAEModel", "scaling_factor": 0.18215}
        file.path.unlink()


def test_a_folder_with_one_file_of_another_name_is_read(tmp_path: Path) -> None:
    assert read_weights(_folder(tmp_path, "vae.ckpt")).path.name == "vae.ckpt"


def test_a_folder_with_several_files_asks_for_one(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "a.safetensors", "b.safetensors")
    assert "several weights (a.safetensors, b.safetensors): give one of them" in _error(folder)


def test_a_folder_without_weights_says_what_was_looked_for_and_where_there_are_some(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    assert "holds no weights; looked for diffusion_pytorch_model.safetensors" in _error(folder)
    assert "sub-folders" not in _error(folder)
    for name in ("vae3d_v1-1", "vae3d_sd3", "docs"):
        (folder / name).mkdir()
        (folder / name / ("x.txt" if name == "docs" else "x.safetensors")).touch()
    assert "Its sub-folders vae3d_sd3, vae3d_v1-1 have some: give one of them." in _error(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\0", "[" * 100_000])
def test_a_damaged_config_is_named(text: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path, "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json is (damaged|not a JSON object)"):
        read_weights(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 365000000\n"
NOT_WEIGHTS = [
    (b"", r"is empty \(0 bytes\).*get it again"),
    (b"12345", "is a text file"),
    (b"\1\2\3", "is truncated: it has 3 bytes"),
    (POINTER, "is a Git LFS pointer, not the file itself.*git lfs pull"),
    (b"\n<!DOCTYPE html><html><body>login</body></html>", "is an HTML page.*download the file itself"),
    (b'{"error": "not found"}', "is JSON text.*give the weights themselves"),
    (b"Just some words, not weights.", "is a text file"),
    (bytes(4096), "nothing but zero bytes"),
    (b"GGUF" + bytes(100), "is a GGUF file"),
    (b"\x89PNG\r\n\x1a\n" + bytes(100), "is a PNG image"),
    (b"\0\0\0\x20ftypisom" + bytes(600), "is a video"),
    (b"\x1f\x8b\x08\0\0\0\0\0\0\3" + bytes(50), "is a gzip archive: unpack it"),
    (b"\x9c\xf3" * 300, "is of no known kind"),
]


@pytest.mark.parametrize(("content", "said"), NOT_WEIGHTS, ids=[said for _, said in NOT_WEIGHTS])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_other_files_are_named_for_what_they_are(content: bytes, said: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        read_weights(path)


@pytest.mark.parametrize("length", [100, 0x8B1F])
def test_a_header_of_any_length_is_recognized(length: int, tmp_path: Path) -> None:
    """0x8B1F, the second one, spells the first bytes of a gzip file."""
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\7")
    assert read_weights(tmp_path / "a.safetensors").tensors["a"] == 7


ENTRY = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
HEADERS: dict[str, tuple[Callable[[], bytes], bool]] = {  # and whether it is read
    "tensors": (
        lambda: b"{" + b'"l":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * 280_000 + ENTRY, False,
    ),
    "nested": (lambda: b'{"a":' + b"[" * 8_000_000 + b"]" * 8_000_000 + b"}", False),
    "axes": (lambda: b'{"a":{"dtype":"F32","shape":[' + b"1," * 8_000_000 + b'1],"data_offsets":[0,4]}}', False),
    "digits": (lambda: b'{"a":{"dtype":"F32","shape":[' + b"1" * 15_000_000 + b'],"data_offsets":[0,4]}}', False),
    "blanks": (lambda: b"{" + b" " * 16_000_000 + ENTRY, False),
    "long text": (lambda: b'{"__metadata__":{"workflow":"' + b"x" * 16_000_000 + b'"},' + ENTRY, True),
    "escapes": (lambda: b'{"__metadata__":{"workflow":"' + b"\\u0041" * 2_600_000 + b'"},' + ENTRY, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(HEADERS))
def test_a_header_of_16_mb_costs_little(tmp_path: Path, kind: str) -> None:
    make, taken = HEADERS[kind]
    header = make()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if taken:
        assert list(read_weights(path).tensors) == ["a"]
    else:
        assert "lists more than 40,000 things" in _error(path)
    assert time.process_time() - began < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("kept", [9, 100, 0.3, 0.9, 0.999])
def test_a_truncated_safetensors_file_gives_both_sizes(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    content = path.read_bytes()
    size = int(kept if kept > 1 else kept * len(content))
    path.write_bytes(content[:size])
    text = _error(path)
    assert "is truncated: its header says" in text
    assert f"the file has {size:,}" in text
    assert "get it again" in text
    if size > 100:
        assert f"says {len(content):,} bytes" in text


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.3, 0.5, 0.99])
def test_a_truncated_torch_file_is_named(kept: float, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert "is a truncated or damaged PyTorch file" in _error(path)


def test_a_zip_archive_and_a_torchscript_program_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vae/diffusion_pytorch_model.safetensors", b"x")
    assert "is a zip archive, not a PyTorch file: unpack it" in _error(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"a/{name}", b"x")
    assert "is a TorchScript program, which holds code and is refused" in _error(path)


def test_a_torch_file_named_safetensors_is_told_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for zipped in (True, False):
        torch.save(_weights(), path, _use_new_zipfile_serialization=zipped)
        assert "is not a safetensors file but one of PyTorch" in _error(path)
        assert "rename it to .pth" in _error(path)


def test_what_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"epoch": 1}, path)
    assert "holds no tensors" in _error(path)
    torch.save(torch.ones(3), path)
    assert "holds one Tensor, not weights by name" in _error(path)
    torch.save([_weights()], path)
    assert "holds one list, not weights by name" in _error(path)


class Callback:
    """What a training framework leaves in its checkpoints."""


def test_a_checkpoint_with_an_object_in_it_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    Callback.__module__, module = "some_framework", sys.modules.get("some_framework")
    assert module is None
    sys.modules["some_framework"] = type(sys)("some_framework")
    sys.modules["some_framework"].Callback = Callback  # pyright: ignore[reportAttributeAccessIssue]
    try:
        torch.save({"state_dict": _weights(), "callbacks": [Callback()]}, path)
    finally:
        del sys.modules["some_framework"]
    text = _error(path)
    assert "holds pickled code (some_framework.Callback) and is refused" in text
    assert "convert it to .safetensors" in text


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    save_file(_weights(), tmp_path / "cv_vae_v1-1.safetensors")
    assert "does not exist. Did you mean cv_vae_v1-1.safetensors?" in _error(tmp_path / "cv-vae_v1.1.safetensors")
    assert "does not exist. Check the path." in _error(tmp_path / "zzz")
    assert f"nor does its folder {tmp_path / 'no'}" in _error(tmp_path / "no" / "a.pth")


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_a_dangling_link_names_its_target(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to("/mnt/models/cv-vae.safetensors")
    assert "is a link to /mnt/models/cv-vae.safetensors, which is not there" in _error(tmp_path / "a.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_saved_weights_may_be_read_as_any_new_file(tmp_path: Path, small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    before = os.umask(0o027)
    try:
        for name in ("a.safetensors", "a.pth"):
            vae_core.save(small_vae("iv-vae", torch.float32), tmp_path / name)
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"(cannot be|does not exist)"):
        read_weights(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pth")
    assert "is not a regular file" in _error(tmp_path / "a.pth")
