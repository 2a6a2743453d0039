"""Files of many kinds, made by ffmpeg, against what ffprobe says of them and what is seen and heard in a copy.

    python benchmarks/media_files.py [--count 320] [--keep FOLDER]

Each file has two seconds of picture with a flash, and sound with a beep, both from the first second on. It is read by
`timeline_of`, its frames and times are compared with ffprobe's, it is written again with its sound as the commands do
it, and its sound is read as the nodes do it; flash and beep are compared with where ffprobe and ffmpeg have them. One
line for each file that differs, then a table. In program streams ffprobe has a few frames off an even rate, and the
timeline puts them on it: those are counted apart. ffmpeg and ffprobe are needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from vae_core.cli.outputs import Form
from vae_core.cli.work import open_clip
from vae_core.media.sound import read_sound
from vae_core.media.video import read_frames, timeline_of

FLASH = Fraction(1)  # seconds at which flash and beep begin
LATE = 0.02  # seconds by which sound may be off
STUMBLES = 0.04  # of the frames, by two frames at the most
RATES = ("24", "25", "30", "50", "12.5", "30000/1001", "24000/1001", "60000/1001", "vfr")
LOOKS = {
    "bt709": ("yuv420p", "-colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv"),
    "untagged": ("yuv420p", ""),
    "bt601 full": ("yuv420p", "-colorspace smpte170m -color_range pc"),
    "4:2:2 10 bits": ("yuv422p10le", "-colorspace bt709"),
    "4:4:4": ("yuv444p", "-colorspace bt709"),
}
PICTURES = {  # options, pixel formats it takes beside yuv420p, containers
    "h264": ("-c:v libx264 -bf 2 -g 12", "422p10 444p", "mp4 mov mkv ts flv avi m4v h264"),
    "h264 no B": ("-c:v libx264 -bf 0 -g 50", "422p10 444p", "mp4 mkv ts avi nut"),
    "h264 open": ("-c:v libx264 -bf 3 -g 10 -x264-params open-gop=1", "", "mp4 mkv ts"),
    "h264 interlaced": ("-c:v libx264 -flags +ildct+ilme -top 1", "", "mp4 ts mkv"),
    "hevc": ("-c:v libx265 -x265-params log-level=none", "422p10 444p", "mp4 mov mkv ts"),
    "av1": ("-c:v libaom-av1 -cpu-used 8 -row-mt 1", "444p", "mp4 mkv webm"),
    "vp8": ("-c:v libvpx -auto-alt-ref 1 -lag-in-frames 10 -b:v 300k -deadline realtime", "", "webm mkv"),
    "vp9": ("-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -lag-in-frames 12", "444p", "webm mkv mp4"),
    "mpeg4": ("-c:v mpeg4 -bf 2 -q:v 3", "", "mp4 avi mkv mov"),
    "mpeg4 no B": ("-c:v mpeg4 -bf 0 -q:v 3", "", "avi mp4"),
    "mpeg2": ("-c:v mpeg2video -bf 2 -q:v 3", "", "mpg ts mkv vob"),
    "mpeg1": ("-c:v mpeg1video -q:v 3", "", "mpg mkv"),
    "mjpeg": ("-c:v mjpeg -q:v 3 -strict unofficial", "", "avi mov mkv"),
    "prores": ("-c:v prores_ks", "422p10", "mov mkv"),
    "dnxhr": ("-c:v dnxhd -profile:v dnxhr_sq -s 256x120", "", "mov"),
    "ffv1": ("-c:v ffv1", "422p10 444p", "mkv avi nut"),
    "theora": ("-c:v libtheora -q:v 8", "444p", "ogv"),
    "wmv2": ("-c:v wmv2 -q:v 3", "", "wmv"),
    "flv1": ("-c:v flv -q:v 3", "", "flv"),
    "huffyuv": ("-c:v huffyuv", "", "avi mkv"),
    "raw": ("-c:v rawvideo", "", "avi mkv nut"),
    "qtrle": ("-c:v qtrle", "", "mov"),
    "gif": ("-c:v gif", "", "gif"),
    "apng": ("-c:v apng", "", "apng"),
}
ONLY = {
    "prores": "yuv422p10le",
    "dnxhr": "yuv422p",
    "huffyuv": "yuv422p",
    "qtrle": "rgb24",
    "apng": "rgb24",
    "mjpeg": "yuvj420p",
    "gif": "rgb8",
}
SOUNDS = {
    "aac": ("-c:a aac", "mp4 mov mkv ts flv m4v mpg"),
    "mp3": ("-c:a libmp3lame", "mp4 mov mkv ts flv avi mpg"),
    "opus": ("-c:a libopus", "mp4 mkv ts webm"),
    "vorbis": ("-c:a libvorbis", "mkv webm ogv"),
    "flac": ("-c:a flac", "mp4 mkv ogv"),
    "pcm": ("-c:a pcm_s16le", "mov mkv avi nut wmv"),
    "ac3": ("-c:a ac3", "mp4 mov mkv ts mpg vob"),
    "eac3": ("-c:a eac3", "mp4 mkv ts"),
    "mp2": ("-c:a mp2", "mpg ts vob mkv"),
    "alac": ("-c:a alac", "mp4 mov"),
    "wma": ("-c:a wmav2", "wmv"),
    "5.1": ("-c:a aac -ac 6", "mp4 mkv ts"),
    "none": ("-an", "mp4 mov mkv webm ts avi h264 gif apng ogv wmv flv mpg nut vob m4v"),
}
RAW = ("h264", "gif", "apng")


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    picture: str
    container: str
    rate: str
    look: str
    sound: str

    def __str__(self) -> str:
        return f"{self.picture}, .{self.container}, {self.rate}, {self.look}, {self.sound}"


def kinds(count: int, seed: int = 0) -> list[Kind]:
    """As many kinds, every picture codec and container and sound among them about equally often."""
    chooser = random.Random(seed)
    every = [
        Kind(picture, container, rate, look, sound)
        for picture, (_, formats, containers) in PICTURES.items()
        for container, rate, look, sound in itertools.product(containers.split(), RATES, LOOKS, SOUNDS)
        if container in SOUNDS[sound][1].split()
        and (LOOKS[look][0] == "yuv420p" or LOOKS[look][0].removeprefix("yuv").removesuffix("le") in formats.split())
        and not (picture in ONLY and look not in ("bt709", "4:2:2 10 bits"))
        and not (rate == "vfr" and container in ("h264", "mpg", "vob"))
        and not (rate == "12.5" and picture in ("mpeg1", "mpeg2", "dnxhr"))
        and not (container == "gif" and Fraction(rate if rate != "vfr" else 30) > 50)  # its unit is 0.01 s
    ]
    chooser.shuffle(every)
    seen: Counter[str] = Counter()
    chosen: list[Kind] = []
    while len(chosen) < count and every:
        kind = min(every, key=lambda k: max(seen[k.picture], seen[k.container]) + seen[k.sound] / 4 + seen[k.rate] / 4)
        every.remove(kind)
        chosen.append(kind)
        seen.update((kind.picture, kind.container, kind.sound, kind.rate))
    return chosen


def make(kind: Kind, path: Path) -> str:
    """Write the file; returns what ffmpeg complained of, empty for none."""
    rate = "30" if kind.rate == "vfr" else kind.rate
    flash = f"drawbox=c=white:t=fill:enable='between(t,{float(FLASH)},{float(FLASH) + 0.3})'"
    picture = f"color=c=black:s=128x96:r={rate}:d=2,{flash},noise=alls=8:allf=t"
    if kind.rate == "vfr":
        picture += ",select='not(eq(mod(n,7),3)+eq(mod(n,11),5)+between(n,12,15))'"
    sound = f"aevalsrc='if(gte(t,{float(FLASH)})*lt(t,1.3),0.8*sin(2*PI*1000*t),0)':s=48000:d=2"
    options, _, _ = PICTURES[kind.picture]
    pix_fmt = ONLY.get(kind.picture, LOOKS[kind.look][0])
    command = ["ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", sound]
    command += ["-map", "0:v", *([] if kind.sound == "none" else ["-map", "1:a"])]
    command += [*options.split(), "-pix_fmt", pix_fmt, *LOOKS[kind.look][1].split()]
    command += ["-vsync", "vfr" if kind.rate == "vfr" else "cfr", *SOUNDS[kind.sound][0].split(), "-strict", "-2"]
    if kind.container == "m4v":
        command += ["-f", "ipod"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False, timeout=120)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def by_ffprobe(path: Path) -> list[float]:
    """Times of the frames that ffprobe decodes; empty for a raw stream."""
    entries = "frame=best_effort_timestamp_time,pts_time"
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", entries, "-of", "json", str(path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    return [float(frame.get("best_effort_timestamp_time", "nan")) for frame in found["frames"]]


def beep_by_ffmpeg(path: Path) -> float:
    """When the beep begins, on the file's own clock."""
    chain = "aresample=48000:async=1:min_hard_comp=0.01:first_pts=0,aformat=channel_layouts=mono"
    command = ["ffmpeg", "-v", "error", "-copyts", "-i", str(path), "-map", "0:a:0", "-af", chain, "-f", "f32le", "-"]
    found = subprocess.run(command, capture_output=True, check=True, timeout=120).stdout
    wave = torch.frombuffer(bytearray(found), dtype=torch.float32).abs()
    return int(torch.nonzero(wave > 0.3 * wave.max())[0]) / 48000


def flash_of(path: Path) -> int:
    """The first frame of the flash."""
    levels = torch.cat([chunk.mean((0, 1, 3, 4)) for chunk in read_frames(path)])
    return int(torch.nonzero(levels > (levels.min() + levels.max()) / 2)[0])


def beep_of(path: Path) -> float | None:
    """Seconds from the first frame to the beep; None without sound."""
    timeline = timeline_of(path)
    sound = read_sound(path, timeline.time(0), None, timeline.shifts)
    if sound is None:
        return None
    wave = sound.samples.abs().amax(0)
    return int(torch.nonzero(wave > 0.3 * wave.max())[0]) / sound.rate


def since_first(path: Path, frame: int) -> float:
    """Seconds from the first frame to another."""
    timeline = timeline_of(path)
    return float(timeline.time(frame) - timeline.time(0))


def compare(kind: Kind, path: Path, copy: Path) -> tuple[list[str], bool]:
    """What differs, and whether the file stumbles."""
    wrong: list[str] = []
    expected, timeline = by_ffprobe(path), timeline_of(path)
    ours = [float(time) for time in timeline.times()]
    theirs = [
        (time - expected[0]) if expected[0] == expected[0] else ours[n] - ours[0] for n, time in enumerate(expected)
    ]
    stumbles = False
    if len(ours) != len(expected):
        wrong.append(f"{len(ours)} frames, ffprobe has {len(expected)}")
        theirs = [time - ours[0] for time in ours]
    elif kind.container not in RAW[:1]:
        offsets = [abs(a - ours[0] - b) for a, b in zip(ours, theirs, strict=True)]
        off = [offset for offset in offsets if offset >= 0.002]  # of some frames ffprobe has no time (NaN)
        frame = 1 / float(timeline.fps)
        stumbles = bool(off) and timeline.even and len(off) <= STUMBLES * len(ours) and max(off) < 2.1 * frame
        if off and not stumbles:
            wrong.append(f"{len(off)} times off by up to {max(off):.4f} s")
    rate = None if kind.rate == "vfr" else Fraction(kind.rate)
    if rate is not None and kind.container not in ("gif",) and abs(timeline.fps - rate) > rate / 5000:
        wrong.append(f"rate {timeline.fps} for {rate}")
    if timeline.damaged() or timeline.cut or timeline.lead:
        wrong.append(f"said damaged: {timeline.told()}")
    flash, beep = flash_of(path), beep_of(path)
    if (beep is None) != (kind.sound == "none"):
        wrong.append("sound is missing" if beep is None else "sound out of nothing")
        return wrong, stumbles
    clip = open_clip(path)
    with clip.writer(copy, Form(crf=1)) as writer:
        for chunk in clip.read():
            writer.write(chunk)
    seen, again, heard = since_first(path, flash), since_first(copy, flash_of(copy)), beep_of(copy)
    if abs(again - seen) > 0.002:
        wrong.append(f"flash at {seen:.3f} s, in the copy at {again:.3f} s")
    if beep is not None:
        right = theirs[flash] - (beep_by_ffmpeg(path) - expected[0])
        if abs(seen - beep - right) > LATE:
            wrong.append(f"read: flash {seen:.3f} s, beep {beep:.3f} s, apart {seen - beep:.3f} for {right:.3f}")
        if heard is None or abs(again - heard - right) > LATE:
            wrong.append(f"copied: flash {again:.3f} s, beep {heard}, for {right:.3f} apart")
    return wrong, stumbles


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--count", type=int, default=320)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--keep", type=Path)
    asked = options.parse_args()
    torch.set_num_threads(1)
    tried, unmade, differ, stumbling = Counter[str](), 0, Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        place = asked.keep or Path(folder)
        place.mkdir(exist_ok=True)
        for number, kind in enumerate(kinds(asked.count, asked.seed)[asked.first :], asked.first):
            path, copy = place / f"{number:03d}.{kind.container}", place / "copy.mp4"
            problem = make(kind, path)
            if problem:
                unmade += 1
                print(f"ffmpeg cannot make {kind}: {problem}")
                continue
            tried[kind.picture] += 1
            try:
                wrong, stumbles = compare(kind, path, copy)
                stumbling += stumbles
            except Exception as error:
                wrong = [f"{type(error).__name__}: {error}"]
            if wrong:
                differ[kind.picture] += 1
                print(f"{path.name} {kind}: {'; '.join(wrong)}", flush=True)
            if asked.keep is None:
                path.unlink()
    print(
        f"\n{sum(tried.values())} files, {sum(differ.values())} differ; {stumbling} stumble; {unmade} could not be made"
    )
    print("| codec | files | differ |\n|---|---|---|")
    for name, count in tried.items():
        print(f"| {name} | {count} | {differ[name]} |")


if __name__ == "__main__":
    main()
