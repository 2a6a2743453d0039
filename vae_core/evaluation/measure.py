"""All meters on one clip at once, chunk by chunk."""

import importlib.util
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..media.video import to_uint8
from ..metrics import (
    LPIPS,
    Borders,
    FlickerMeter,
    SeamMeter,
    VideoFeatures,
    WarpMeter,
    frame_quality,
    multiscale_ssim,
    phase_means,
    phase_spread,
)

FVD_FRAMES = 16  # how many frames FVD looks at together
SMALL = 224  # pixels, the side to which frames wait for FVD
PICTURES = (
    "psnr", "ssim", "ms_ssim", "lpips", "psnr_phase_spread", "ssim_phase_spread", "seam", "seam_line", "seam_step",
    "seam_time", "flicker", "flicker_excess", "warp_error", "warp_excess",
)  # fmt: skip
Watch = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Networks:
    """The networks that are at hand. missing: for each that is not, one sentence that says what to do. lpips_file,
    video_file: a hash of the file that each came from, "" where it came from none.
    """

    lpips: LPIPS | None = None
    video: VideoFeatures | None = None
    missing: tuple[str, ...] = ()
    lpips_file: str = ""
    video_file: str = ""


@dataclass(frozen=True, kw_only=True)
class ClipFigures:
    """What was measured on one clip; NaN where a figure does not exist.

    figures: by the names in PICTURES. frames: per-frame values. phases: means at the four positions of a group.
    heat: the seam meter's map. features: of original and reconstruction, (n, 400) each, for FVD.
    """

    figures: dict[str, float]
    frames: dict[str, list[float]]
    phases: dict[str, list[float]]
    heat: Tensor
    features: tuple[Tensor, Tensor] | None


class NotNumbersError(ValueError):
    """A result holds NaN or infinity: the end of a sentence that begins with the name of the VAE."""


@dataclass
class ClipMeters:
    """Every meter over one clip; memory does not grow with its length but for a few numbers per frame."""

    borders: Borders = field(default_factory=Borders)
    networks: Networks = field(default_factory=Networks)

    def __post_init__(self) -> None:
        self._seams = SeamMeter(self.borders)
        self._flicker = FlickerMeter()
        self._warp = WarpMeter() if importlib.util.find_spec("cv2") is not None else None  # NaN without OpenCV
        self._frames: dict[str, list[float]] = {"psnr": [], "ssim": [], "ms_ssim": [], "lpips": []}
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._features: tuple[list[Tensor], list[Tensor]] = ([], [])

    def update(self, reconstruction: Tensor, original: Tensor) -> None:
        """Two (1, 3, t, h, w) chunks in [-1, 1]; what lies outside is clamped."""
        psnr, ssim = frame_quality(reconstruction, original)
        self._frames["psnr"] += psnr.tolist()
        self._frames["ssim"] += ssim.tolist()
        self._frames["ms_ssim"] += multiscale_ssim(reconstruction, original).tolist()
        if self.networks.lpips is not None:
            self._frames["lpips"] += self.networks.lpips.frames(reconstruction, original).tolist()
        self._seams.update(reconstruction, original)
        self._flicker.update(reconstruction, original)
        if self._warp is not None:
            self._warp.update(reconstruction, original)
        if self.networks.video is not None:
            self._see(self.networks.video, reconstruction, original)

    def _see(self, network: VideoFeatures, reconstruction: Tensor, original: Tensor) -> None:
        for ours, theirs in zip(reconstruction[0].unbind(1), original[0].unbind(1), strict=True):
            self._waiting.append((_small(ours), _small(theirs)))
            if len(self._waiting) == FVD_FRAMES:
                for side, kept in enumerate(self._features):
                    clip = torch.stack([pair[side] for pair in self._waiting], 1)[None]  # 1 c t h w
                    kept.append(network(clip))
                self._waiting.clear()

    @property
    def result(self) -> ClipFigures:
        """Over all chunks so far."""
        frames = {name: values for name, values in self._frames.items() if values}
        seams = self._seams.reading
        warp, source = (math.nan, math.nan) if self._warp is None else self._warp.means
        figures = {name: mean(values) for name, values in frames.items()}
        figures |= {
            "psnr_phase_spread": phase_spread(frames["psnr"]),
            "ssim_phase_spread": phase_spread(frames["ssim"]),
            "seam": seams.space,
            "seam_line": seams.line,
            "seam_step": seams.step,
            "seam_time": seams.time,
            "flicker": self._flicker.flicker,
            "flicker_excess": mean(self._flicker.excess),
            "warp_error": warp,
            "warp_excess": warp - source,
        }
        ours, theirs = self._features
        return ClipFigures(
            figures={name: figures.get(name, math.nan) for name in PICTURES},
            frames=frames
            | {"flicker": self._flicker.change}
            | ({} if self._warp is None else {"warp_error": self._warp.ours}),
            phases={name: phase_means(frames[name]) for name in ("psnr", "ssim")},
            heat=seams.heat,
            features=(torch.cat(theirs), torch.cat(ours)) if ours else None,
        )


def measure(
    original: Iterable[Tensor],
    reconstruct: Callable[[Iterable[Tensor]], Iterator[Tensor]],
    meters: ClipMeters,
    watch: Watch | None = None,
) -> int:
    """Send a stream through `reconstruct` and both through the meters; returns the number of frames.

    Holds the frames that were read and did not come back yet. watch: called with (index of the first, originals,
    reconstructions) for every chunk. Raises ValueError where fewer frames come back, or values that are no numbers.
    """
    waiting, done = deque[Tensor](), 0

    def kept() -> Iterator[Tensor]:
        for chunk in original:
            waiting.extend(chunk.unbind(2))
            yield chunk

    with torch.no_grad():
        for chunk in reconstruct(kept()):
            count = min(chunk.shape[2], len(waiting))  # at the end, frames that only padded the clip follow
            if not count:
                continue
            source = torch.stack([waiting.popleft() for _ in range(count)], dim=2)  # 1 c t h w
            result = chunk[:, :, :count].float().cpu()
            if not torch.isfinite(result).all():
                raise NotNumbersError(
                    f"gives NaN or infinity between frames {done} and {done + count - 1}; in float16 choose another "
                    "precision, else the weights are damaged."
                )
            meters.update(result, source)
            if watch is not None:
                watch(done, source, result)
            done += count
    if waiting:
        raise ValueError(f"{len(waiting)} of {done + len(waiting)} frames did not come back; this VAE cannot be used.")
    return done


class Pictures:
    """The worst frame of a clip and a small side-by-side of its beginning, kept while it goes by."""

    def __init__(self, widest: int = 320, most_frames: int = 96) -> None:
        self.widest, self.most_frames = widest, most_frames
        self.worst: tuple[float, int, Tensor, Tensor] | None = None  # error, frame, original, reconstruction
        self.beside: list[Tensor] = []  # (3, h, 2 w) uint8

    def __call__(self, first: int, original: Tensor, reconstruction: Tensor) -> None:
        for index in range(original.shape[2]):
            ours, theirs = reconstruction[0, :, index].clamp(-1, 1), original[0, :, index]
            error = float((ours - theirs).square().mean())
            if self.worst is None or error > self.worst[0]:
                self.worst = error, first + index, theirs.clone(), ours.clone()
            if len(self.beside) < self.most_frames:
                pair = torch.cat([_at_most(theirs, self.widest), _at_most(ours, self.widest)], dim=-1)
                self.beside.append(to_uint8(pair))


def mean(values: Iterable[float]) -> float:
    """Mean of those that are numbers; NaN of none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _small(frame: Tensor) -> Tensor:
    """(3, h, w) as FVD sees it."""
    return F.interpolate(frame[None].float(), (SMALL, SMALL), mode="bilinear", align_corners=False)[0]


def _at_most(frame: Tensor, width: int) -> Tensor:
    """(3, h, w) with even sides, no wider than `width`."""
    scale = min(1.0, width / frame.shape[-1])
    size = [max(16, round(side * scale) // 2 * 2) for side in frame.shape[-2:]]
    return F.interpolate(frame[None], size, mode="bilinear", antialias=scale < 1, align_corners=False)[0]
