"""What SVD's trainer makes of a video: cuts, clips without a cut, motion buckets, noise on the picture, no harm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vae_core.errors import AdapterError
from vae_core.svd import session, trainer
from vae_core.svd.scenes import Look, beginning_of, buckets_of, cuts_of, look_through, spans_of

from .clips import moving_picture

WIDTH = 6


def film(*lengths: int) -> Tensor:
    """(1, 3, t, 64, 96): a moving picture, another after each cut."""
    scenes = [moving_picture(frames, 64, 96) for frames in lengths]
    return torch.cat([scene.flip(3) * (1 if n % 2 else -0.8) for n, scene in enumerate(scenes)], dim=2)


def test_cuts_are_found_and_motion_is_none() -> None:
    look = look_through(film(13, 20, 9).split(7, dim=2))
    assert look.frames == 42
    assert cuts_of(look.changes) == [13, 33]
    fast = look_through([film(40)[:, :, ::3]])
    assert cuts_of(fast.changes) == []


def test_a_fade_is_no_cut() -> None:
    one, other = film(1), film(1, 1)[:, :, 1:]
    fade = torch.cat([torch.lerp(one, other, step / 20) for step in range(21)], dim=2)
    assert cuts_of(look_through([fade]).changes) == []


def test_clips_lie_between_cuts() -> None:
    changes = [0.01] * 41
    changes[12] = changes[32] = 0.5
    spans = spans_of(Look(frames=42, changes=changes, moves=[0.1] * 3 + [0.2] * 5 + [0.4] * 2), 9)
    assert [(span.start, span.frames) for span in spans] == [(0, 9), (13, 9), (22, 9), (33, 9)]
    assert spans[0].motion == pytest.approx(0.1)
    assert spans_of(Look(frames=4, changes=[0.0] * 3, moves=[]), 9) == []
    assert [(span.start, span.frames) for span in spans_of(Look(frames=7, changes=[0.0] * 6, moves=[]), 97)] == [(0, 5)]


def test_latents_are_used_up_to_the_first_cut() -> None:
    changes = [0.01, 0.01, 0.6, 0.01, 0.01, 0.01, 0.01]
    span = beginning_of(Look(frames=8, changes=changes, moves=[0.1] * 7), 6)
    assert (span.start, span.frames) == (0, 3)
    assert beginning_of(Look(frames=8, changes=[0.01] * 7, moves=[]), 6).frames == 6


def test_the_clip_in_the_middle_has_svds_usual_bucket() -> None:
    assert buckets_of([0.1, 0.2, 0.4, None]) == [64, 127, 254, 127]
    assert buckets_of([0.1, 0.1, 5.0, 0.0]) == [127, 127, 255, 1]
    assert buckets_of([None, None]) == [127, 127]


def test_faster_is_more_motion() -> None:
    pytest.importorskip("cv2", reason="opencv-python-headless measures motion")
    moving = moving_picture(17, 96, 128)
    still, slow, fast = (look_through([moving[:, :, frames]]) for frames in ([0] * 17, range(17), range(0, 17, 2)))
    assert max(still.moves) < 0.001
    assert sum(fast.moves) / len(fast.moves) > 1.5 * sum(slow.moves) / len(slow.moves) > 0


def test_the_noise_on_the_picture_is_that_which_is_told() -> None:
    """SVD is told a deviation of values of -1 to 1; pictures here are 0 to 1."""
    first = torch.full((1, 200, 200, 3), 0.5)
    levels = []
    for step in range(200):
        drawn = trainer.draw(3, step, [(1, 4, 2, 2)])
        levels.append(math.log(drawn.level))
        if step < 3:
            deviation = float((drawn.on_picture(first) * 2 - 1).std())
            assert deviation == pytest.approx(drawn.level, rel=0.02)
            assert torch.equal(drawn.on_picture(first), drawn.on_picture(first))
    middle = sum(levels) / len(levels)
    assert middle == pytest.approx(trainer.AUGMENTATION[0], abs=0.1)
    assert len(set(levels)) == 200


def _clip(name: str) -> session.TrainingClip:
    generator = torch.Generator().manual_seed(len(name))
    x0 = torch.randn(2, 4, 4, 4, generator=generator)
    first = torch.rand(1, 32, 32, 3, generator=generator).half()
    return session.TrainingClip(name=name, x0=x0, first=first, seen=torch.zeros(1, 1, 3), rate=6, motion=None)


def _training(clips: int) -> session.Training:
    old = trainer.output_layer(torch.zeros(4, WIDTH, 3, 3), torch.zeros(4))
    settings = trainer.TrainSettings(method="ridge regression", learning_rate=1e-5, ridge=1e-3, seed=1, fingerprint="")

    def features(clip: session.TrainingClip, drawn: trainer.Draw, image: Tensor) -> tuple[Tensor, Tensor]:
        assert image.shape == (1, 4, 4, 4)
        return torch.randn(2, WIDTH, 4, 4, generator=torch.Generator().manual_seed(drawn.image_seed)), clip.x0

    def encode(picture: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(picture.movedim(-1, 1), 8)[:, [0, 1, 2, 0]]

    made = [_clip("x" * (n + 1)) for n in range(clips)]
    return session.Training(trainer.AdapterTrainer(old, settings, torch.device("cpu")), made, features, encode)


def test_an_eighth_of_the_clips_is_held_out() -> None:
    assert [len(_training(count).held) for count in (2, 8, 17, 100)] == [1, 1, 2, 8]
    assert _training(1).held[0].name == "x"
    assert _training(1).report(1.0, 0.5, 1.0, "", [])[0].startswith("one clip, so the held-out loss")
    assert _training(9).report(1.0, 0.5, 1.0, "", [])[0] == "9 clips, 1 of them held out of the training"


def test_a_layer_that_harms_is_refused() -> None:
    training = _training(4)
    assert len(list(training.steps(3))) == 3
    old = training.trainer.old
    worse = trainer.output_layer(torch.full((4, WIDTH, 3, 3), 0.3), torch.ones(4))
    before, after = training.compare(worse, lambda: None)
    assert after > before
    with pytest.raises(AdapterError, match=r"rose from .* and it is not saved. Use more clips, a larger ridge"):
        training.check(before, after, "a.state.safetensors")
    training.check(*training.compare(old, lambda: None), "a.state.safetensors")
