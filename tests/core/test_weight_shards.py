"""Weights in several files: their folder, their index and every one of them give the same; what is missing is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vae_core
from vae_core.errors import CheckpointError
from vae_core.weights.files import read_weights

STEM = "diffusion_pytorch_model"


def _error(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    return str(caught.value)


def _sharded(folder: Path, state: dict[str, torch.Tensor], count: int = 3, *, index: bool = True) -> Path:
    """`state` in shards; returns the index."""
    folder.mkdir(exist_ok=True)
    names = [f"{STEM}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    table = {name: names[place % count] for place, name in enumerate(state)}
    for file in names:
        save_file({name: state[name] for name, at in table.items() if at == file}, folder / file, {"format": "pt"})
    path = folder / f"{STEM}.safetensors.index.json"
    if index:
        path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return path


@pytest.mark.parametrize("index", [True, False])
def test_folder_index_and_every_shard_give_the_same(tmp_path: Path, index: bool) -> None:
    state = {f"layer.{n}": torch.full((2,), float(n)) for n in range(7)}
    path = _sharded(tmp_path / "vae", state, index=index)
    (tmp_path / "vae" / "config.json").write_text('{"scale_factor": 1.5}')
    sources = [tmp_path / "vae", *sorted((tmp_path / "vae").glob("*.safetensors")), *([path] if index else [])]
    assert len(sources) == 4 + index
    for source in sources:
        found = read_weights(source)
        assert found.tensors.keys() == state.keys()
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.items())
        assert found.config == {"scale_factor": 1.5}


def test_a_vae_in_shards_loads(tmp_path: Path, small_state: object) -> None:
    state = small_state("iv-vae")  # pyright: ignore[reportCallIssue]
    index = _sharded(tmp_path / "vae", state, 2)
    assert vae_core.load(index).family == vae_core.load(tmp_path / "vae").family == "iv-vae"


def test_a_missing_shard_is_named_whatever_is_given(tmp_path: Path) -> None:
    index = _sharded(tmp_path / "vae", {f"a{n}": torch.ones(1) for n in range(4)})
    (tmp_path / "vae" / f"{STEM}-00002-of-00003.safetensors").unlink()
    for source in (tmp_path / "vae", index, tmp_path / "vae" / f"{STEM}-00003-of-00003.safetensors"):
        said = _error(source)
        assert "belongs to weights in 3 shards, of which" in said
        assert f"{STEM}-00002-of-00003.safetensors is not in the folder of" in said


@pytest.mark.parametrize("index", [True, False])
def test_shards_of_a_variant_are_found_from_everywhere(tmp_path: Path, index: bool) -> None:
    """As diffusers names them: the variant stands in the shards before the number, and in the index before .json."""
    folder = tmp_path / "vae"
    path = _sharded(folder, {f"a{n}": torch.full((1,), float(n)) for n in range(4)}, 2)
    table = path.read_text().replace(STEM, f"{STEM}.fp16")
    path.unlink()
    for shard in list(folder.iterdir()):
        shard.rename(folder / shard.name.replace(STEM, f"{STEM}.fp16"))
    given = [folder, *folder.glob("*.safetensors")]
    if index:
        given.append(folder / f"{STEM}.safetensors.index.fp16.json")
        given[-1].write_text(table)
    for source in given:
        assert sorted(read_weights(source).tensors) == ["a0", "a1", "a2", "a3"]


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_a_link_to_nothing_is_named_wherever_it_is(tmp_path: Path) -> None:
    index = _sharded(tmp_path / "vae", {f"a{n}": torch.ones(1) for n in range(4)}, 2)
    gone = tmp_path / "vae" / f"{STEM}-00002-of-00002.safetensors"
    gone.unlink()
    gone.symlink_to(tmp_path / "blobs" / "ab12")
    for source in (tmp_path / "vae", index, gone.with_name(f"{STEM}-00001-of-00002.safetensors"), gone):
        assert f"is a link to {tmp_path}/blobs/ab12, which is not there" in _error(source)
    (tmp_path / "models").symlink_to("/mnt/gone")
    assert "is reached by" in _error(tmp_path / "models" / "vae.safetensors")
    assert "a link to /mnt/gone, which is not there" in _error(tmp_path / "models" / "vae.safetensors")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "a.safetensors").symlink_to(tmp_path / "models")
    assert "holds no weights; a.safetensors is a link to /mnt/gone" in _error(tmp_path / "alone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "which leads back to itself" in _error(tmp_path / "loop")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no index of weights, or a damaged one"),
        ('{"weight_map": {}}', "is an index that names no files"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "is not the name of a weight file in the same folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "is not the name of a weight file in the same folder"),
        ('{"weight_map": {"a": 3}}', "is not the name of a weight file in the same folder"),
        ('{"weight_map": ["a"]}', "is no index of weights"),
        ("[" * 100_000, "is no index of weights"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "a.safetensors.index.json"
    path.write_text(content)
    assert said in _error(path)


def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    index = _sharded(tmp_path / "vae", {"a": torch.ones(1), "b": torch.ones(1)}, 2)
    save_file({"a": torch.zeros(1), "b": torch.ones(1)}, tmp_path / "vae" / f"{STEM}-00002-of-00002.safetensors")
    assert "holds 'a', as another shard of these weights does" in _error(index)


def test_two_sets_of_shards_in_a_folder_ask_for_one(tmp_path: Path) -> None:
    _sharded(tmp_path / "vae", {"a": torch.ones(1)}, 1)
    (tmp_path / "vae" / f"{STEM}.safetensors.index.json").rename(tmp_path / "vae" / "one.safetensors.index.json")
    (tmp_path / "vae" / "two.safetensors.index.json").write_text("{}")
    assert "several weights (one.safetensors.index.json, two.safetensors.index.json)" in _error(tmp_path / "vae")
