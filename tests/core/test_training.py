"""Training data without a data set, the optimizer of short runs, and the demo weights that came of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vae_core
from vae_core.door.loading import DEMO_FOLDER
from vae_core.media.video import read_frames
from vae_core.training.camera_moves import CameraMoves
from vae_core.training.clips import BatchKind
from vae_core.training.config import CameraMovesConfig
from vae_core.training.data import ImagePool, TrainingDataError, procedural_images, read_photographs
from vae_core.training.figures import centre_square, psnr, shrunk_and_enlarged
from vae_core.training.optimizer import orthogonalised


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other make these small convolutions many times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_computes_what_use_does_and_reaches_every_weight(
    family: str, checkpointing: bool, small_vae: Callable[..., vae_core.VideoVAE]
) -> None:
    """At a size at which layers cut time into several runs, unlike the very small clips of other tests."""
    vae = small_vae(family)
    video = torch.rand(1, 3, 9, 80, 64, dtype=torch.float64) * 2 - 1
    expected = vae.moments(video)
    latent = torch.randn_like(expected[0])
    frames = vae.decode(vae.model.family.from_network(vae.model.config, latent))
    model = vae.model.requires_grad_(True)
    found = model.encode(video, checkpointing=checkpointing)
    decoded = model.decode(latent, checkpointing=checkpointing)
    for ours, theirs in ((found[0], expected[0]), (found[1], expected[1]), (decoded, frames)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.std()))
    (found[0].square().mean() + found[1].square().mean() + decoded.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_data_is_the_same_for_the_same_seed() -> None:
    images = procedural_images(6, 96, seed=3)
    again = procedural_images(6, 96, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))
    assert not torch.equal(images[0], procedural_images(1, 96, seed=4)[0])
    pool = ImagePool([], images, photo_share=0.5)
    clips = [pool.clips(3, 9, 48, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(clips[0], clips[1])
    assert clips[0].shape == (3, 3, 9, 48, 48)
    assert clips[0].min() >= -1
    assert clips[0].max() <= 1


def test_clips_move_and_some_stand_still() -> None:
    pool = ImagePool([], procedural_images(4, 128, seed=0), photo_share=0.0)
    clips = pool.clips(40, 5, 48, torch.Generator().manual_seed(0))
    moved = (clips[:, :, -1] - clips[:, :, 0]).abs().amax(dim=(1, 2, 3))
    assert (moved == 0).any()
    assert (moved > 0.1).sum() > 10


def test_photographs_are_read_with_their_half_sizes(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, size=(400, 500, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "large.png")
    Image.fromarray(picture[:50, :50]).save(tmp_path / "too_small.png")
    (tmp_path / "notes.txt").write_text("not an image")
    photographs = read_photographs(tmp_path)
    assert [tuple(x.shape) for x in photographs] == [(3, 400, 500), (3, 200, 250)]
    blocks = picture.reshape(200, 2, 250, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(photographs[1].numpy() - blocks).max() <= 0.5


def test_a_camera_moves_over_the_photographs_of_a_package() -> None:
    kinds = [BatchKind(kind="video", batch=2, size=(96, 96), frames=5)]
    bundled = CameraMovesConfig(procedural=1, photographs=Path("scikit-image"))
    batches = [next(iter(CameraMoves(config, kinds, seed=0, rank=0))).video
               for config in (bundled, bundled, CameraMovesConfig(procedural=1))]  # fmt: skip
    assert batches[0].shape == (2, 3, 5, 96, 96)
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match=r"No image of at least 96 x 96 pixels in .*put photographs there"):
        read_photographs(tmp_path)
    with pytest.raises(TrainingDataError, match="nothing to train on: give photographs, procedural images or both"):
        ImagePool([], [], photo_share=0.5)
    pool = ImagePool([], procedural_images(1, 64, seed=0), photo_share=0.5)
    with pytest.raises(TrainingDataError, match="holds a square of 96 pixels: give larger images or train on smaller"):
        pool.crops(1, 96, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (12, 12)])
def test_orthogonalised_evens_out_the_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    before, after = torch.linalg.svdvals(matrix), torch.linalg.svdvals(orthogonalised(matrix))
    assert before.max() / before.min() > 2
    assert after.min() > 0.5
    assert after.max() < 1.3
    # and it keeps the directions: the product with the polar factor is near the identity
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.trace((u @ vh).T @ orthogonalised(matrix)) > 0.7 * min(shape)


@pytest.mark.parametrize(("name", "margin"), [("demo-cv-vae", 1.0), ("demo-iv-vae", 0.5)])
def test_the_bundled_weights_beat_shrinking_on_the_bundled_clip(name: str, margin: float) -> None:
    frames = torch.cat(list(read_frames(DEMO_FOLDER / "demo_clip.mp4", frames=5)), dim=2)
    assert frames.shape == (1, 3, 5, 192, 320)
    baseline, value = psnr(vae_core.load(name), frames[..., 32:160, 96:224])
    assert 20 < baseline < 30
    assert value > baseline + margin


def test_the_square_that_figures_are_taken_of() -> None:
    video = torch.zeros(1, 3, 2, 512, 900)
    video[..., 194:706] = torch.linspace(-1, 1, 512)
    square = centre_square(video)
    assert square.shape == (1, 3, 2, 256, 256)
    assert square[0, 0, 0, 0, 0] == pytest.approx(-1, abs=0.01)  # nothing from beyond the square's left edge
    assert square[0, 0, 0, 0, -1] == pytest.approx(1, abs=0.01)
    assert ((square + 1) * 127.5).frac().minimum(1 - ((square + 1) * 127.5).frac()).max() < 1e-3  # 8-bit steps
    flat = torch.full((1, 3, 1, 64, 64), 0.25)
    assert torch.allclose(shrunk_and_enlarged(flat), flat)
