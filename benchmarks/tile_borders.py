"""What tile borders cost: exact tiles and blended ones against whole frames, as a table and a picture.

    python benchmarks/tile_borders.py [CLIP] [--picture docs/tile_borders.png]

The first frames of a real clip are encoded whole by the demo weights, and decoded three ways: whole; in our exact
tiles; and in the way stock ComfyUI decodes in tiles, where overlapping tiles are decoded alone and blended by ramps
over what they share. Difference: from the whole decode, in levels of 8 bits. Seam meter: 1 means that borders show no
more than any other place; the reading of the whole decode at the same places stands beside it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import vae_core  # noqa: E402
from vae_core.media.video import read_frames  # noqa: E402
from vae_core.metrics import Borders, SeamMeter  # noqa: E402
from vae_core.nn.region import split  # noqa: E402

CLIP = ROOT / "vae_core" / "demo" / "demo_clip.mp4"
SIZE, FRAMES = (224, 320), 5  # 28 x 40 latents
TILE, OVERLAP = 16, 4  # latents: 128 px and 32 px
LEVELS = 127.5  # from [-1, 1] to 8 bits
Span = tuple[int, int]


def stock_spans(size: int) -> list[Span]:
    """(start, stop) of overlapping tiles over `size` latents; the last is moved inwards."""
    starts = range(0, max(1, size - OVERLAP), TILE - OVERLAP)
    return [(max(0, min(start, size - TILE)), min(size, max(0, min(start, size - TILE)) + TILE)) for start in starts]


def stock_decode(vae: vae_core.VideoVAE, latent: torch.Tensor) -> torch.Tensor:
    """Every tile decoded alone; a mean weighted by linear ramps, as wide as the overlap, at every side of a tile."""
    height, width = latent.shape[-2:]
    total, weights = torch.zeros(()), torch.zeros(1, 1, 1, 8 * height, 8 * width)
    for top, bottom in stock_spans(height):
        for left, right in stock_spans(width):
            y = vae.decode(latent[..., top:bottom, left:right])
            ramps = [_ramp(n) for n in y.shape[-2:]]
            weight = ramps[0][:, None] * ramps[1]
            around = (8 * left, 8 * (width - right), 8 * top, 8 * (height - bottom))
            total = total + F.pad(y * weight, around)
            weights += F.pad(weight[None, None, None], around)
    return total / weights


def _ramp(length: int) -> torch.Tensor:
    feather = 8 * OVERLAP
    ramp = (torch.arange(length) + 1) / feather
    return torch.minimum(ramp, ramp.flip(0)).clamp(max=1)


def borders(exact: bool) -> Borders:
    """Where the tiles meet, in pixels."""
    both: list[tuple[Span, ...]] = []
    for side in SIZE:
        spans = split((0, side // 8), TILE) if exact else stock_spans(side // 8)
        both.append(tuple((8 * after[0], 8 * before[1]) for before, after in itertools.pairwise(spans)))
    return Borders(rows=both[0], columns=both[1])


def seams(decoded: torch.Tensor, original: torch.Tensor, where: Borders) -> float:
    meter = SeamMeter(where)
    meter.update(decoded, original)
    return meter.reading.space


def read_clip(path: Path) -> torch.Tensor:
    """(1, 3, t, h, w): the first frames, the middle of the picture, shrunk by area to SIZE."""
    video = torch.cat(list(read_frames(path, frames=FRAMES)), dim=2)
    scale = max(SIZE[0] / video.shape[-2], SIZE[1] / video.shape[-1])
    shrunk = [max(n, round(scale * side)) for n, side in zip(SIZE, video.shape[-2:], strict=True)]
    frames = F.interpolate(video[0].transpose(0, 1).float(), size=shrunk, mode="area")
    top, left = (shrunk[0] - SIZE[0]) // 2, (shrunk[1] - SIZE[1]) // 2
    return frames[..., top : top + SIZE[0], left : left + SIZE[1]].transpose(0, 1)[None].contiguous()


def heat(difference: torch.Tensor, most: float) -> Image.Image:
    """(h, w) in levels as colours: black, red, yellow, white at `most`."""
    x = (difference / most).clamp(0, 1)[..., None] * 3 - torch.arange(3)
    return Image.fromarray((x.clamp(0, 1) * 255).round().byte().numpy())


def draw(rows: list[tuple[str, list[tuple[str, Image.Image]]]], most: float) -> Image.Image:
    """Pictures side by side, a row for each model, and the colour scale."""
    gap, line = 16, 24
    height, width = SIZE
    columns = max(len(panels) for _, panels in rows)
    page = Image.new(
        "RGB", (gap + columns * (width + gap), len(rows) * (height + 2 * line + gap) + 3 * line), (24, 26, 30)
    )
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for i, (name, panels) in enumerate(rows):
        top = gap // 2 + i * (height + 2 * line + gap)
        pen.text((gap, top), name, fill=(228, 230, 235), font=font)
        for j, (label, panel) in enumerate(panels):
            left = gap + j * (width + gap)
            pen.text((left, top + line), label, fill=(170, 175, 185), font=font)
            page.paste(panel, (left, top + 2 * line))
    below = page.height - 2 * line
    scale = heat(torch.linspace(0, most, width).expand(12, width), most)
    page.paste(scale, (gap, below))
    pen.text((gap + width + gap, below - 3), f"0 to {most:.1f} levels of 8 bits, mean over frames and colours",
             fill=(170, 175, 185), font=font)  # fmt: skip
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", nargs="?", type=Path, default=CLIP)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "tile_borders.png")
    options = parser.parse_args()
    original = read_clip(options.clip)
    print(f"torch {torch.__version__}; {options.clip.name}: {FRAMES} frames of {SIZE[1]}x{SIZE[0]}; tiles of {TILE} "
          f"latents, stock ones overlap by {OVERLAP}\n")  # fmt: skip
    print("| weights | decode | most, levels | mean, levels | seam meter | whole decode there |")
    print("|---|---|---|---|---|---|")
    found: list[tuple[str, torch.Tensor, list[tuple[str, torch.Tensor]]]] = []
    for name in ("demo-cv-vae", "demo-iv-vae"):
        vae = vae_core.load(name)
        with torch.inference_mode():
            latent = vae.encode(original)
            whole = vae.decode(latent)
            ways = {
                "exact tiles": (vae.decode(latent, plan=vae_core.TilePlan(tile=TILE)), True),
                "stock tiles": (stock_decode(vae, latent), False),
            }
        panels: list[tuple[str, torch.Tensor]] = []
        for way, (decoded, exact) in ways.items():
            levels = (decoded - whole).abs() * LEVELS
            where = borders(exact)
            meter = f"{seams(decoded, original, where):.2f} | {seams(whole, original, where):.2f}"
            print(f"| {name} | {way} | {levels.max():.2g} | {levels.mean():.2g} | {meter} |", flush=True)
            panels.append((f"{way}: difference from whole, most {levels.max():.2g}", levels.mean((0, 1, 2))))
        found.append((name, whole, panels))
    most = max(float(panel.max()) for _, _, panels in found for _, panel in panels)
    rows: list[tuple[str, list[tuple[str, Image.Image]]]] = []
    for name, whole, panels in found:
        frame = ((whole[0, :, -1] + 1) * LEVELS).clamp(0, 255).round().byte().movedim(0, -1)
        decoded_frame = ("decoded whole", Image.fromarray(frame.numpy()))
        rows.append((name, [decoded_frame, *((label, heat(panel, most)) for label, panel in panels)]))
    draw(rows, most).save(options.picture, optimize=True)


if __name__ == "__main__":
    main()
