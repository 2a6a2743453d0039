"""Keyframe detail: the high frequencies of sharp single images, carried to the frames of a softer video between them.

The latents of a CV-VAE can also be decoded one by one by the image VAE whose space they share. Latent 0 is frame 0 and
latent k stands for frames 4k - 3 to 4k; in training its image was held to a frame drawn from these four (Zhao et al.,
2024, "random"), so which of them a keyframe shows is found here by comparing. Frames are (1, 3, t, h, w) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from ..families import VIDEO, Windows
from ..metrics.motion import LEVELS, luma, optical_flow, require_opencv, warp
from ..run.windows import rechunk
from .agreement import gained, verified

FLOW_TOLERANCE = 2.0  # pixels by which a motion there and back may miss, at a confidence of 0.5
LIGHT_TOLERANCE = 16.0  # levels of 255 by which a moved frame may differ, at a confidence of 0.5
MOST_CONFIDENCE = 0.95
_LEAST_LIKENESS = 0.25  # correlation below which a keyframe shows another picture
_LEAST_SHARE = 0.05  # of its frame that a keyframe must sharpen, or it is left alone
_EDGE = 6  # pixels in which detail fades out at the edge of doubtful motion
_FLOW_BLUR = 2.0  # pixels; smooths the motion
_MATCH_BLUR = 4.0  # pixels; over which the match with and without motion is compared
_LIGHT_BLUR = 1.5  # pixels; what differs within less than this is detail, not another picture
_MATCH_BAND = (1.0, 6.0)  # pixels; both decoders agree on what lies between these blurs
_MATCH_MARGIN = 0.002  # correlation by which an earlier frame of a group must match better than a later one


@dataclass(frozen=True, kw_only=True)
class DetailSettings:
    """How detail is carried.

    strength: 0 keeps the video as it is, bit for bit; 1 gives it the keyframes' detail. radius: detail is what a
    Gaussian blur of this many pixels (its standard deviation) takes away. confidence: how sure motion and keyframes
    have to be: 0 trusts them everywhere, 0.5 lets detail fade out where the motion misses by more than 2 pixels or 16
    of 255 levels or keyframes differ by as much as they add, and 0.95 keeps it almost to what does not move. Raises
    ValueError for values that are not allowed.
    """

    strength: float
    radius: float
    confidence: float

    @property
    def caution(self) -> float:
        """How often a doubt counts: 0, 1 at a confidence of 0.5, 19 at 0.95."""
        return self.confidence / (1 - self.confidence)

    def __post_init__(self) -> None:
        allowed = {"strength": (0, 2), "radius": (0.5, 32), "confidence": (0, MOST_CONFIDENCE)}
        for name, (least, most) in allowed.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}; allowed is {least} to {most}. Choose a value in that range.")


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Frames with their detail.

    frames: (1, 3, t, h, w) in [-1, 1]. carried: for each, the share of the picture, 0 to 1, to which detail of at least
    one level of 255 was added. likeness: how well the keyframe that the last of these frames shows matches it, a
    correlation of -1 to 1; None where that frame shows no keyframe.
    """

    frames: Tensor
    carried: tuple[float, ...]
    likeness: float | None


@dataclass(frozen=True, kw_only=True)
class _Anchor:
    """A frame (3, h, w) that a keyframe shows, its number, the keyframe's detail, and how alike the two are.

    own: the frame's own detail. Both are means with those of the anchors around once they are checked. change: what the
    detail adds to this frame; None while that is not known, and where it is too little.
    """

    number: int
    frame: Tensor
    detail: Tensor
    own: Tensor
    likeness: float
    change: Tensor | None = None


_Span = tuple[Sequence[Tensor], _Anchor | None]


def check_counts(frames: int, keyframes: int) -> None:
    """Raise ValueError unless `keyframes` images are one for each latent of a video of `frames` frames."""
    if frames > 0 and keyframes == VIDEO.latent_frames(frames):
        return
    most = VIDEO.time * (keyframes - 1) + 1
    fit = f"{max(1, most - VIDEO.time + 1)} to {most}" if keyframes > 1 else str(keyframes)
    raise ValueError(
        f"Got {frames} frames and {keyframes} keyframes; {frames} frames need "
        f"{VIDEO.latent_frames(frames) if frames else 0} keyframes, and {keyframes} keyframes need {fit} frames (one "
        f"keyframe for frame 0 and one for every {VIDEO.time} frames after it: 97 frames, 25 keyframes). Decode the "
        "same latent with both VAEs."
    )


def fuse_detail(frames: Iterable[Tensor], keyframes: Iterable[Tensor], settings: DetailSettings) -> Iterator[Fused]:
    """Give the frames of a video the detail of its keyframes. Holds up to fifteen frames and four keyframes.

    frames: (1, 3, t, h, w) chunks of any t, on the CPU. keyframes: (1, 3, n, h, w) chunks, one image for each latent.
    First each keyframe is held against those before and after it: what they do not share is not taken. Then a frame
    between two keyframes takes from both, the nearer one more, moved by the optical flow of the video, where that adds
    energy to its own detail. Where the flow is not to be trusted, and where a keyframe would add to less than 5 % of
    its frame or shows another picture, the video stays as it is; so does a video with a single keyframe. Raises
    ValueError for counts or sizes that do not belong together (a stream's count is known only at its end:
    `check_counts` says it before) and without OpenCV, unless strength is 0.
    """
    if settings.strength == 0:
        for chunk in frames:
            yield Fused(frames=chunk, carried=(0.0,) * chunk.shape[2], likeness=None)
        return
    require_opencv()
    before: _Anchor | None = None
    start = 0
    for span, after in _checked(_spans(frames, keyframes, settings.radius), settings):
        yield _fuse_span(span, start, (before, after), settings)
        start, before = start + len(span), after


def _spans(frames: Iterable[Tensor], keyframes: Iterable[Tensor], radius: float) -> Iterator[_Span]:
    """The frames up to one that a keyframe shows, with its anchor; last, those after it."""
    waiting: list[Tensor] = []
    start = 0  # number of the first frame that waits
    for group, keyframe in _groups(frames, keyframes):
        found, likeness = _shown(group, keyframe)
        at = start + len(waiting) + found
        detail, own = _detail(keyframe, radius), _detail(group[found], radius)
        anchor = _Anchor(number=at, frame=group[found], detail=detail, own=own, likeness=likeness)
        yield [*waiting, *group[: found + 1]], anchor
        start, waiting = at + 1, list(group[found + 1 :])
    if waiting:
        yield waiting, None


def _checked(spans: Iterator[_Span], settings: DetailSettings) -> Iterator[_Span]:
    """The same spans, one later, with the detail of each anchor held against that of the anchors around it."""
    before: _Anchor | None = None
    given: _Anchor | None = None  # `before`, checked
    held: tuple[Sequence[Tensor], _Anchor] | None = None
    for span, after in chain(spans, [([], None)]):
        if held is not None:
            given = _verified(held[1], (before, after), settings, given)
            yield held[0], given
            before = held[1]
        held = None if after is None else (span, after)
        if after is None and span:
            yield span, None


def _verified(
    anchor: _Anchor,
    around: tuple[_Anchor | None, _Anchor | None],
    settings: DetailSettings,
    given: _Anchor | None,
) -> _Anchor:
    """Only what the detail of an anchor shares with that of its neighbours, where they lie in its frame.

    given: the anchor before, checked; where the video stands still, its detail stands still, too.
    """
    own = anchor.own
    moved = [_moved(anchor.frame, other, settings) for other in around if other is not None]
    if not moved or anchor.likeness < _LEAST_LIKENESS:
        return anchor  # a single keyframe, which nothing can be checked by, or one of another picture
    others, trust = _mixed(own, moved, [1.0] * len(moved))
    other, other_own = (own + trust * (detail - own) for detail in others.split(3))
    base = (own + other_own) / 2
    detail = verified(base, anchor.detail, other, settings.caution)
    if given is not None and given.change is not None:
        still = _still(anchor.frame, given.frame)
        detail, base = torch.lerp(detail, given.detail, still), torch.lerp(base, given.own, still)
    change = gained(own, detail, base, detail, detail)
    return replace(anchor, detail=detail, own=base, change=change if _share(change) >= _LEAST_SHARE else None)


def _still(frame: Tensor, other: Tensor) -> Tensor:
    """(1, h, w): 1 where two frames are equal, to half a level of 255; 0 where they differ by a level."""
    apart = blur((frame - other).square().mean(0, keepdim=True), _LIGHT_BLUR).sqrt() * (LEVELS / 2)
    return (2 - 2 * apart).clamp(0, 1)


def _share(change: Tensor) -> float:
    """Of a picture, 0 to 1, that a change (3, h, w) touches by a level of 255 and more."""
    return float((blur(change.square().mean(0, keepdim=True), _LIGHT_BLUR).sqrt() >= 2 / LEVELS).float().mean())


def blur(picture: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of (c, h, w) by `deviation` pixels, the edge repeated."""
    reach = max(1, round(3 * deviation))
    distance = torch.arange(-reach, reach + 1, dtype=picture.dtype, device=picture.device)
    kernel = torch.exp(-distance.square() / (2 * deviation**2))
    kernel = kernel / kernel.sum()
    rows = F.conv2d(F.pad(picture[:, None], (reach, reach, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(rows, (0, 0, reach, reach), mode="replicate"), kernel.view(1, 1, -1, 1))[:, 0]


def _groups(frames: Iterable[Tensor], keyframes: Iterable[Tensor]) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
    """The frames (3, h, w) of each latent with its keyframe. Raises ValueError where one side ends before the other."""
    images = (image for chunk in keyframes for image in chunk[0].unbind(1))
    count = groups = 0
    for chunk in rechunk(frames, Windows(first=1, step=VIDEO.time, overlap=0)):
        group = chunk[0].unbind(1)
        count += len(group)
        keyframe = next(images, None)
        if keyframe is None:
            raise ValueError(_uneven(f"at least {count} frames and only {groups} keyframes"))
        groups += 1
        if keyframe.shape != group[0].shape:
            raise ValueError(
                f"Keyframe {groups - 1} has (channels, height, width) {tuple(keyframe.shape)} and the frames "
                f"{tuple(group[0].shape)}; they must be equal. Decode the same latent with both VAEs."
            )
        yield group, keyframe
    surplus = sum(1 for _ in images)
    if surplus:
        raise ValueError(_uneven(f"{count} frames and {groups + surplus} keyframes"))


def _uneven(got: str) -> str:
    return (
        f"Got {got}; needed is one keyframe for frame 0 and one for every {VIDEO.time} frames after it: 97 frames, 25 "
        "keyframes. Decode the same latent with both VAEs."
    )


def _shown(group: Sequence[Tensor], keyframe: Tensor) -> tuple[int, float]:
    """Which frame of its group a keyframe shows, the last where several match, and the correlation of the two."""
    theirs = _band(keyframe)
    likeness = [_correlation(_band(frame), theirs) for frame in group]
    best = max(likeness)
    found = max(number for number, value in enumerate(likeness) if value >= best - _MATCH_MARGIN)
    return found, likeness[found]


def _band(picture: Tensor) -> Tensor:
    """(1, h, w): what both decoders should agree on: neither the finest detail nor slow changes of colour."""
    grey = luma(picture)[None]
    narrow, wide = _MATCH_BAND
    return blur(grey, narrow) - blur(grey, wide)


def _correlation(a: Tensor, b: Tensor) -> float:
    """Of two pictures whose mean is about 0; 0 where one is flat."""
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt().clamp(min=1e-12))


def _detail(picture: Tensor, radius: float) -> Tensor:
    return picture - blur(picture, radius)


def _fuse_span(
    span: Sequence[Tensor], start: int, anchors: tuple[_Anchor | None, _Anchor | None], settings: DetailSettings
) -> Fused:
    """The frames from number `start` on, which lie between two anchors, the second one included."""
    fused: list[Tensor] = []
    carried: list[float] = []
    for number, frame in enumerate(span, start):
        change = _change(frame, number, [anchor for anchor in anchors if anchor is not None], settings)
        fused.append(frame if change is None else (frame + change).clamp(-1, 1))
        carried.append(0.0 if change is None else _share(change))
    likeness = None if anchors[1] is None else anchors[1].likeness
    return Fused(frames=torch.stack(fused, dim=1)[None], carried=tuple(carried), likeness=likeness)  # 1 c t h w


def _change(frame: Tensor, number: int, near: Sequence[_Anchor], settings: DetailSettings) -> Tensor | None:
    """What the detail of the anchors around a frame adds to it, (3, h, w); None where they give nothing.

    Towards an anchor that gives nothing it fades out.
    """
    shares = _shares(number, near)
    giving = [
        (anchor, share) for anchor, share in zip(near, shares, strict=True) if share and anchor.change is not None
    ]
    if not giving:
        return None
    level = settings.strength * sum(share for _, share in giving)
    exact = giving[0][0]
    if exact.number == number and exact.change is not None:
        return level * exact.change
    own = _detail(frame, settings.radius)
    moved = [_moved(frame, anchor, settings) for anchor, _ in giving]
    mixed, trust = _mixed(own, moved, [share for _, share in giving])
    mean, base = mixed.split(3)
    first, second = (mean + trusted * (detail[:3] - mean) for detail, trusted in (moved[0], moved[-1]))
    return level * trust * gained(own, mean, base, first, second)


def _shares(number: int, near: Sequence[_Anchor]) -> list[float]:
    """How much each anchor counts for a frame: the nearer one more, 1 in all."""
    gap = near[-1].number - near[0].number if near else 0
    return [1 - abs(number - anchor.number) / gap if gap else 1.0 for anchor in near]


def _mixed(own: Tensor, moved: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The mean of moved details (6, h, w) by trust and share, `own` where there is no trust, and the best trust."""
    mean, total = 1e-6 * torch.cat([own, own]), torch.full_like(own[:1], 1e-6)
    best = torch.zeros_like(own[:1])
    for (detail, trust), share in zip(moved, shares, strict=True):
        mean, total, best = mean + share * trust * detail, total + share * trust, torch.maximum(best, trust)
    return mean / total, best


def _moved(frame: Tensor, anchor: _Anchor, settings: DetailSettings) -> tuple[Tensor, Tensor]:
    """An anchor's detail where it lies in `frame`, and how far the motion is to be trusted, (1, h, w) in 0..1."""
    ours, theirs = (frame + 1) * (LEVELS / 2), (anchor.frame + 1) * (LEVELS / 2)
    back, there = _steady(ours, theirs), _steady(theirs, ours)
    detail = warp(torch.cat([anchor.detail, anchor.own]), back, "bicubic")
    missed = (back + warp(there, back)).square().sum(0, keepdim=True) / FLOW_TOLERANCE**2
    differs = blur(ours - warp(theirs, back), _LIGHT_BLUR).square().mean(0, keepdim=True) / LIGHT_TOLERANCE**2
    trust = torch.exp(-(missed + differs) * settings.caution**2 / 2)
    doubted = F.max_pool2d(1 - trust, 2 * _EDGE + 1, 1, _EDGE)
    return detail, 1 - blur(doubted, _EDGE / 2)  # soft edges, within what is trusted


def _steady(source: Tensor, target: Tensor) -> Tensor:
    """Optical flow without its tremble: smoothed, and none where the pictures match as well without motion."""
    flow = blur(optical_flow(source, target), _FLOW_BLUR)
    unmoved, moved = (
        blur((source - other).square().mean(0, keepdim=True), _MATCH_BLUR) for other in (target, warp(target, flow))
    )
    return flow * (unmoved / moved.clamp(min=1e-3) - 1).clamp(0, 1)
