"""Charts as SVG and maps as PNG, in colours that the page around them decides."""

import base64
import io
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

SERIES = 8  # colours in the style sheet
_INK, _FAINT = "#010203", "#040506"  # stand for colours of the page
_DASHES = ("-", "--", "-.", ":")


def line_chart(
    lines: Mapping[str, Sequence[float]],
    *,
    title: str,
    unit: str,
    across: str,
    marks: Sequence[int] = (),
    first: int = 0,
) -> str:
    """One line for each VAE over frames or positions; marks: chunk borders, as thin upright lines."""
    figure, axes = _axes(title, unit, across)
    for index, (name, values) in enumerate(lines.items()):
        shown = [value if math.isfinite(value) else math.nan for value in values]
        x = range(first, first + len(shown))
        style = "--" if "+" in name else _DASHES[index // SERIES % len(_DASHES)]  # tiled: over the line of untiled
        marker = "o" if len(shown) <= 6 else None
        axes.plot(x, shown, style, color=_series(index), linewidth=1.8, marker=marker, markersize=5, label=name)
    for mark in marks:
        axes.axvline(mark - 0.5, color=_FAINT, linewidth=0.8, linestyle=":")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    return _svg(figure, f"{title}: {', '.join(lines)}")


def heat_map(path: Path, borders: Mapping[str, Sequence[Sequence[int]]], block: int = 8, widest: int = 480) -> str:
    """The seam meter's map as a PNG data address; borders in pixels are drawn as light lines."""
    heat = np.load(path, allow_pickle=False)
    if heat.size == 0:
        return ""
    scaled = np.clip(np.nan_to_num(heat) / 4, 0, 1)  # 4 times the median and more is brightest
    colours = np.asarray(mpl.colormaps["magma"](scaled))
    image = Image.fromarray((colours[..., :3] * 255).astype(np.uint8))
    factor = max(1, widest // image.width)
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    pixels = np.asarray(image).copy()
    for axis, name in enumerate(("rows", "columns")):
        for at in {edge for border in borders.get(name, ()) for edge in border}:
            place = round(at / block * factor)
            if 0 < place < pixels.shape[axis]:
                lines = pixels[place : place + 2] if axis == 0 else pixels[:, place : place + 2].swapaxes(0, 1)
                lines[:, ::6] = lines[:, 1::6] = (120, 220, 232)
    return png_address(Image.fromarray(pixels))


def png_address(image: Image.Image) -> str:
    """A picture as a data address."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return address(buffer.getvalue(), "image/png")


def address(data: bytes, kind: str) -> str:
    """Bytes as a data address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _axes(title: str, unit: str, across: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=12, color=_INK, loc="left", fontweight="bold")
    axes.set_ylabel(unit, fontsize=11, color=_FAINT)
    axes.set_xlabel(across, fontsize=11, color=_FAINT)
    axes.tick_params(colors=_FAINT, labelsize=10.5, length=3)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color=_FAINT, alpha=0.22, linewidth=0.7)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_FAINT)
    return figure, axes


def _series(index: int) -> str:
    return f"#0a0b{index % SERIES:02x}"


def _svg(figure: Figure, text: str) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": text, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r"#0a0b(\d\d)", lambda found: f"var(--s{int(found[1])})", drawn)
    drawn = drawn.replace(_INK, "var(--ink)").replace(_FAINT, "var(--faint)")
    drawn = re.sub(r"font: [^;\"]*?([\d.]+)px[^;\"]*", r"font: \1px var(--font)", drawn)
    drawn = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawn, count=1)
    drawn = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawn, count=1)
    unique = f"c{zlib.crc32(text.encode()):08x}"  # ids must not meet those of another chart
    drawn = re.sub(r'id="([^"]+)"', rf'id="{unique}-\1"', drawn)
    drawn = re.sub(r'(url\(#|href="#)', rf"\g<1>{unique}-", drawn)
    return drawn.replace("<svg", f'<svg role="img" aria-label="{_plain(text)}"', 1)


def _plain(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
