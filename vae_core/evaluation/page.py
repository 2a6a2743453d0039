"""The report: one HTML page with everything in it, light and dark, for wide and narrow screens."""

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from ..atomic import atomic_write
from ..metrics import chunk_borders
from .plots import SERIES, address, heat_map, line_chart
from .published import PUBLISHED
from .records import Record, by_video
from .runner import Outcome
from .summary import FVD_ENOUGH, Row, rows

MOST_FRAMES = 400  # points of a chart


@dataclass(frozen=True)
class Column:
    """A figure of the tables: its heading, digits, whether more is better (None: neither), and what it says."""

    key: str
    heading: str
    digits: int
    more: bool | None
    says: str


COLUMNS = (
    Column("psnr", "PSNR dB", 2, True, "Mean over frames, then over videos."),
    Column("ssim", "SSIM", 4, True, "11x11 Gaussian window, mean over channels."),
    Column("ms_ssim", "MS-SSIM", 4, True, "Five scales; needs sides of 161 pixels."),
    Column("lpips", "LPIPS", 4, False, "AlexNet unless another file was named."),
    Column("fvd", "FVD", 2, False, "I3D logits of windows of 16 frames."),
    Column("ssim_phase_spread", "SSIM spread", 4, False, "Best less worst of the four positions in a group of frames."),
    Column("seam", "Seams", 2, None, "Change of the error at tile borders, over that inside tiles. 1: nothing to see."),
    Column("seam_time", "Seams in time", 2, None, "The same at every 16th frame, where CV-VAE's chunks meet."),
    Column("flicker", "Flicker", 2, False, "Change of the error from frame to frame, root mean square, levels of 255."),
    Column(
        "warp_excess",
        "Warp error",
        2,
        None,
        "Difference to the frame before, moved along the original's optical flow, beyond that of the original itself. "
        "Above 0: restless. Below 0: blurred.",
    ),
    Column("distance", "Latent distance", 3, False, "To the image VAE's latents, as a share of their size."),
    Column("nearest", "Nearest frame", 3, False, "The same, to the nearest frame of each group."),
    Column("video_to_image", "Video > image dB", 2, True, "The video VAE's latents, decoded by the image VAE."),
    Column("image_to_video", "Image > video dB", 2, True, "The image VAE's latents, decoded by the video VAE."),
    Column("frames_per_second", "Frames/s", 2, None, "Encoding, decoding and measuring, on this machine."),
)


def write_page(outcome: Outcome, folder: Path, *, clips: int = 4) -> Path:
    """Write report.html, with pictures, charts and clips of the `clips` videos of lowest PSNR."""
    table = rows(outcome)
    shown = _worst_videos(outcome.records, clips)
    parts = [
        _head(outcome, table),
        _notices(outcome),
        _summary(table),
        _phases(table),
        *(_video(name, records, outcome, folder) for name, records in shown),
        _all_videos(outcome),
        _published(),
        _glossary(table),
    ]
    colours = _legend_style()
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>Video VAEs compared</title>'
        f"<style>{style}{colours}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )
    path = folder / "report.html"
    with atomic_write(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def _head(outcome: Outcome, table: Sequence[Row]) -> str:
    videos = len({record.video for record in outcome.records})
    count = f"{videos} video{'s' * (videos != 1)}, {len(table)} row{'s' * (len(table) != 1)}"
    note = f"<p class=faint>{_e(outcome.protocol.note)}</p>" if outcome.protocol.note else ""
    return (
        f"<header><h1>Video VAEs compared</h1><p>{count}. Protocol <b>{_e(outcome.protocol.name)}</b>: "
        f"{_e(str(outcome.protocol))}. {date.today().isoformat()}.</p>{note}</header>"
    )


def _notices(outcome: Outcome) -> str:
    items = [f"<li>{_e(note)}</li>" for note in outcome.notes]
    out = (
        f'<section class="notice"><h2>Left out of the figures</h2><ul>{"".join(items)}</ul></section>' if items else ""
    )
    if outcome.broken:
        lines = "".join(f"<li><b>{_e(name)}</b>: {_e(why)}</li>" for name, why in outcome.broken.items())
        out += f'<section class="notice bad"><h2>Videos left out</h2><ul>{lines}</ul></section>'
    return out


def _summary(table: Sequence[Row]) -> str:
    if not table:
        return "<section><p>Nothing was measured.</p></section>"
    columns = [column for column in COLUMNS if any(not math.isnan(row.figures[column.key]) for row in table)]
    best = {column.key: _best(column, [row.figures[column.key] for row in table]) for column in columns}
    head = "".join(f'<th title="{_e(c.says)}">{_e(c.heading)}{_arrow(c)}</th>' for c in columns)
    body = ""
    for index, row in enumerate(table):
        cells = ""
        for column in columns:
            value = row.figures[column.key]
            bold = len(table) > 1 and not math.isnan(value) and value == best[column.key]
            cells += f"<td{' class=best' * bold}>{_figure(value, column.digits)}</td>"
        facts = " &middot; ".join(_fact(key, value) for key, value in row.facts.items() if key != "runs in")
        body += f"<tr><th scope=row>{_name(index, row.name)}<small>{facts}</small></th>{cells}</tr>"
    few = [row.clips for row in table if 0 < row.clips < FVD_ENOUGH]
    warn = (
        f"<p class=faint>FVD of {few[0]} clips is far from its value on a large set: compare it only within this "
        f"table. From about {FVD_ENOUGH} clips on it begins to settle.</p>"
        if few
        else ""
    )
    return (
        "<section><h2>Means over the set</h2><div class=scroll><table><thead><tr><th></th>"
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>{warn}</section>"
    )


def _fact(key: str, value: str) -> str:
    return _e(f"{value} parameters" if key == "parameters" else value)


def _phases(table: Sequence[Row]) -> str:
    charts = ""
    for key, unit in (("psnr", "dB"), ("ssim", "SSIM")):
        lines = {row.name: row.phases[key] for row in table if any(math.isfinite(v) for v in row.phases[key])}
        if lines:
            title = f"{key.upper()} by position in the group of 4 frames"
            charts += f"<figure>{line_chart(lines, title=title, unit=unit, across='position', first=1)}</figure>"
    if not charts:
        return ""
    return f"<section><h2>Frames between the latents</h2>{_legend(table)}<div class=two>{charts}</div></section>"


def _video(name: str, records: Sequence[Record], outcome: Outcome, folder: Path) -> str:
    order = {vae: index for index, vae in enumerate(outcome.names)}
    records = sorted(records, key=lambda record: order[record.vae])
    marks = chunk_borders(records[0].count)
    charts = ""
    for key, title, unit in (
        ("psnr", "PSNR of each frame", "dB"),
        ("ssim", "SSIM of each frame", "SSIM"),
        ("lpips", "LPIPS of each frame", "LPIPS"),
        ("flicker", "Flicker of each frame", "levels"),
        ("warp_error", "Warp error of each frame", "levels"),
    ):
        lines = {record.vae: _thinned(record.frames[key]) for record in records if key in record.frames}
        lines = {vae: values for vae, values in lines.items() if any(math.isfinite(v) for v in values)}
        step = max(1, math.ceil(records[0].count / MOST_FRAMES))
        if lines and records[0].count > 1:
            label = f"{title}, {name}"
            chart = line_chart(
                lines,
                title=title,
                unit=unit,
                across="frame" if step == 1 else f"frame / {step}",
                marks=[mark // step for mark in marks],
            )
            charts += f"<figure>{chart.replace(_e(title) + ':', _e(label) + ':', 1)}</figure>"
    pictures = "".join(_pictures(record, order[record.vae], folder) for record in records)
    height, width = records[0].size
    legend = "".join(_name(order[record.vae], record.vae) for record in records)
    return (
        f"<section><h2>{_e(name)}</h2><p class=faint>{records[0].count} frames of {width}x{height}. "
        f"Dotted lines: where CV-VAE's chunks meet. Seam maps: how much the error changes over each place, black for "
        f"nothing, white for 4 times the median and more; borders of the official tiles are dotted.</p>"
        f"<p class=legend>{legend}</p><div class=two>{charts}</div>"
        f"<div class=cards>{pictures}</div></section>"
    )


def _pictures(record: Record, index: int, folder: Path) -> str:
    out = ""
    clip = folder / record.pictures.get("clip", "-")
    if clip.is_file():
        video = address(clip.read_bytes(), "video/mp4")
        first = folder / record.pictures.get("poster", "-")
        poster = f" poster={address(first.read_bytes(), 'image/jpeg')}" if first.is_file() else ""
        out += (
            f"<figure><video controls loop muted playsinline preload=metadata{poster} src={video}></video>"
            "<figcaption>Original, reconstruction</figcaption></figure>"
        )
    worst = folder / record.pictures.get("worst", "-")
    if worst.is_file():
        psnr = _figure(record.frames["psnr"][record.worst], 2)
        image = address(worst.read_bytes(), "image/png")
        out += (
            f'<figure><img alt="Worst frame of {_e(record.vae)}" src={image}>'
            f"<figcaption>Worst frame: {record.worst}, {psnr} dB</figcaption></figure>"
        )
    heat = folder / record.pictures.get("heat", "-")
    image = heat_map(heat, record.borders) if heat.is_file() else ""
    if image:
        seam = _figure(record.figures["seam"], 2)
        out += (
            f'<figure class=heat><img alt="Seam map of {_e(record.vae)}" src={image}>'
            f"<figcaption>Seam map. Seams {seam}</figcaption></figure>"
        )
    return f"<article><h3>{_name(index, record.vae)}</h3>{out}</article>" if out else ""


def _all_videos(outcome: Outcome) -> str:
    wanted = ("psnr", "ssim", "lpips", "ssim_phase_spread", "seam", "seam_time", "flicker", "warp_excess")
    columns = [
        c
        for c in COLUMNS
        if c.key in wanted and any(not math.isnan(r.figures.get(c.key, math.nan)) for r in outcome.records)
    ]
    head = "".join(f"<th>{_e(c.heading)}{_arrow(c)}</th>" for c in columns)
    body = ""
    for record in outcome.records:
        cells = "".join(f"<td>{_figure(record.figures.get(c.key, math.nan), c.digits)}</td>" for c in columns)
        body += f"<tr><th scope=row>{_e(record.video)}<small>{_e(record.vae)}</small></th>{cells}</tr>"
    return (
        f"<section><details><summary>Every video ({len(outcome.records)} rows)</summary><div class=scroll><table>"
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div></details></section>"
    )


def _published() -> str:
    body = ""
    for line in PUBLISHED:
        cells = "".join(f"<td>{value or '-'}</td>" for value in (line.psnr, line.ssim, line.lpips, line.fvd))
        what = f"{line.channels} channels, {_e(line.videos)}"
        body += f"<tr><th scope=row>{_e(line.vae)}<small>{what}</small></th>{cells}</tr>"
    return (
        "<section><details><summary>Published figures, to stand beside</summary><p class=faint>As the papers print "
        "them, on their sets and with their networks. They compare with the table above only on the same set and "
        "protocol.</p><div class=scroll><table><thead><tr><th></th><th>PSNR dB</th><th>SSIM</th><th>LPIPS</th>"
        f"<th>FVD</th></tr></thead><tbody>{body}</tbody></table></div></details></section>"
    )


def _glossary(table: Sequence[Row]) -> str:
    items = "".join(
        f"<dt>{_e(c.heading)}</dt><dd>{_e(c.says)}</dd>"
        for c in COLUMNS
        if any(not math.isnan(row.figures[c.key]) for row in table)
    )
    return f"<section><details open><summary>What the figures say</summary><dl>{items}</dl></details></section>"


def _worst_videos(records: Sequence[Record], most: int) -> list[tuple[str, list[Record]]]:
    groups = list(by_video(records))
    lowest = {name: min(record.figures["psnr"] for record in group) for name, group in groups}
    return sorted(groups, key=lambda pair: lowest[pair[0]])[:most]


def _legend(table: Sequence[Row]) -> str:
    return f"<p class=legend>{''.join(_name(index, row.name) for index, row in enumerate(table))}</p>"


def _legend_style() -> str:
    return "".join(f".k{index}{{background:var(--s{index})}}" for index in range(SERIES))


def _name(index: int, name: str) -> str:
    return f'<span class=key><i class="k{index % SERIES}"></i>{_e(name)}</span>'


def _thinned(values: Sequence[float]) -> list[float]:
    step = max(1, math.ceil(len(values) / MOST_FRAMES))
    return [sum(part) / len(part) for part in _spans(values, step)]


def _spans(values: Sequence[float], step: int) -> Iterator[Sequence[float]]:
    for start in range(0, len(values), step):
        yield values[start : start + step]


def _best(column: Column, values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    if not known or column.more is None:
        return math.nan
    return max(known) if column.more else min(known)


def _arrow(column: Column) -> str:
    return {True: "&nbsp;&uarr;", False: "&nbsp;&darr;", None: ""}[column.more]


def _figure(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else "&infin;" if math.isinf(value) else f"{value:.{digits}f}"


def _e(text: str) -> str:
    return html.escape(text)
