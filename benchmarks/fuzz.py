"""Damaged and hostile files by the thousand: read in processes that are watched for crashes, code, memory and time.

    python benchmarks/fuzz.py [--count 1000] [--kinds media latents weights] [--seed 0] [--keep FOLDER]

Every file is a good one, or a hostile pickle, after one to four random changes. It must be read, or refused by one of
the package's own errors, within 10 s of processor time and 1 GiB of memory in all; nothing that it holds may run. One
line for each file that does otherwise, which --keep keeps, then a table. ffmpeg is needed for the media files.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import pickle
import random
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

SECONDS, MEMORY, PATIENCE = 10.0, 1 << 30, 300.0  # of processor time; bytes; of waiting
ROOM = 16 << 30  # bytes of address space
KINDS = ("media", "latents", "weights")
MUXED = "-c:a {} -b:a 64k -shortest"
MEDIA = {
    "h264.mp4": "-c:v libx264 -g 6 -bf 2 " + MUXED.format("aac"),
    "hevc.mov": "-c:v libx265 -x265-params log-level=none -g 6 " + MUXED.format("pcm_s16le"),
    "vp9.webm": "-c:v libvpx-vp9 -cpu-used 8 -g 6 " + MUXED.format("libopus"),
    "vp8.mkv": "-c:v libvpx -g 6 " + MUXED.format("libvorbis"),
    "av1.mkv": "-c:v libaom-av1 -cpu-used 8 -g 6 " + MUXED.format("flac"),
    "h264.ts": "-c:v libx264 -g 6 " + MUXED.format("ac3"),
    "mpeg2.mpg": "-c:v mpeg2video -g 6 " + MUXED.format("mp2"),
    "mpeg4.avi": "-c:v mpeg4 -g 6 -bf 2 " + MUXED.format("libmp3lame"),
    "h264.flv": "-c:v libx264 -g 6 -ar 44100 " + MUXED.format("libmp3lame"),
    "theora.ogv": "-c:v libtheora " + MUXED.format("libvorbis"),
    "prores.mov": "-c:v prores_ks -an",
    "ffv1.mkv": "-c:v ffv1 -an",
    "wmv2.wmv": "-c:v wmv2 " + MUXED.format("wmav2"),
    "huffyuv.nut": "-c:v huffyuv -pix_fmt yuv422p -an",
    "mjpeg.avi": "-c:v mjpeg -an",
    "raw.h264": "-c:v libx264 -g 6 -an",
    "a.gif": "-an",
    "a.apng": "-an -plays 0",
}
PICTURES = ("png", "jpg", "webp", "tiff", "bmp")


def media_seeds(folder: Path) -> dict[str, bytes]:
    """Small files of many formats."""
    from PIL import Image

    found: dict[str, bytes] = {}
    for name, options in MEDIA.items():
        source = ["-f", "lavfi", "-i", "testsrc=s=64x48:r=25:d=0.6", "-f", "lavfi", "-i", "sine=440:d=0.6"]
        path = folder / name
        command = ["ffmpeg", "-v", "error", "-y", *source, *options.split()]
        form = [] if "pix_fmt" in options or name in ("a.gif", "a.apng", "prores.mov") else ["-pix_fmt", "yuv420p"]
        subprocess.run([*command, *form, "-strict", "-2", str(path)], check=True, timeout=120)
        found[name] = path.read_bytes()
    pictures = [Image.effect_noise((64, 48), 40 + n).convert("RGB") for n in range(4)]
    for suffix in PICTURES:
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        pictures[0].save(buffer, "jpeg" if suffix == "jpg" else suffix, **({} if suffix == "bmp" else {"exif": exif}))
        found[f"still.{suffix}"] = buffer.getvalue()
    buffer = io.BytesIO()
    pictures[0].save(buffer, "webp", save_all=True, append_images=pictures[1:], duration=40)
    found["animated.webp"] = buffer.getvalue()
    return found


def latent_seeds(folder: Path) -> dict[str, bytes]:
    """Latent files of several lengths, types and contents."""
    import torch

    from vae_core.media.latents import LatentMeta, save_latent

    found: dict[str, bytes] = {}
    for name, dtype, times in (
        ("plain", torch.float32, False),
        ("half", torch.bfloat16, False),
        ("timed", torch.float16, True),
    ):
        meta = LatentMeta(
            family="cv-vae",
            fps=Fraction(24000, 1001),
            frames=9,
            height=31,
            width=40,
            times=tuple(Fraction(n, 20) for n in range(10)) if times else None,
            audio="sound.mka",
            extra={"note": "a text"},
        )
        path = folder / f"{name}.safetensors"
        save_latent(path, torch.randn(1, 4, 3, 4, 5).to(dtype), meta)
        found[path.name] = path.read_bytes()
    return found


class _Call:
    """Pickles to a call."""

    def __init__(self, what: Callable[..., object], *words: object) -> None:
        self._made = what, words

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._made


def weight_seeds(folder: Path) -> dict[str, bytes]:
    """Weight files of every kind, and pickles that would run code."""
    import torch
    from safetensors.torch import save

    sentinel = folder / "CODE_WAS_RUN"
    tensors = {
        "decoder.conv_in.weight": torch.ones(8, 4, 3, 3, 3, dtype=torch.float16),
        "encoder.conv_in.weight": torch.ones(8, 3, 3, 3),
        "encoder.norm_out.weight": torch.arange(6.0).reshape(2, 3),
    }
    hostile = _Call(os.system, f"touch {sentinel}")
    things: dict[str, object] = {
        "plain": tensors,
        "nested": {"epoch": 3, "state_dict": tensors, "optimizer_states": [{"lr": 0.1}], "note": "x"},
        "hostile": {"state_dict": tensors, "hook": hostile},
        "evil": {**tensors, "x": _Call(eval, f"open({str(sentinel)!r}, 'w')")},
    }
    found = {"plain.safetensors": save(tensors, metadata={"family": "cv-vae"})}
    for name, thing in things.items():
        for legacy in (False, True):
            buffer = io.BytesIO()
            torch.save(thing, buffer, _use_new_zipfile_serialization=not legacy)
            found[f"{name}{'_legacy' * legacy}.pth"] = buffer.getvalue()
    found["raw.pth"] = pickle.dumps(hostile)
    found["raw.ckpt"] = pickle.dumps({"a": [1, 2.0, "x"], "b": hostile}, protocol=2)
    return found


def mutated(data: bytes, chooser: random.Random) -> bytes:
    """`data` after one to four changes, half of them in its first or last kilobyte."""
    result = bytearray(data)
    for _ in range(chooser.randint(1, 4)):
        size = len(result)
        if size < 2:
            break
        low, high = chooser.choice(((0, size), (0, size), (0, min(size, 1024)), (max(0, size - 1024), size)))
        at, length = chooser.randrange(low, high), chooser.randint(1, 64)
        match chooser.choice(("cut", "flip", "flip", "set", "move", "remove", "repeat", "number", "big")):
            case "cut":
                del result[at:]
            case "flip":
                result[at] ^= 1 << chooser.randrange(8)
            case "set":
                result[at : at + length] = chooser.randbytes(chooser.randint(1, 8))
            case "move":
                block = result[at : at + length]
                del result[at : at + length]
                to = chooser.randint(0, len(result))
                result[to:to] = block
            case "remove":
                del result[at : at + length]
            case "repeat":
                result[at:at] = result[at : at + length]
            case kind:
                number = chooser.choice((0, 1, 255, 2**15, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
                form = "<Q" if kind == "number" else ">I"
                packed = struct.pack(form, number % 2 ** (64 if kind == "number" else 32))
                result[at : at + len(packed)] = packed
    return bytes(result)


def reader(kind: str) -> Callable[[Path, int], None]:
    """What reads a file of a kind whole, as the commands do; the number of the file chooses what of it."""
    import torch
    from PIL import Image

    import vae_core
    from vae_core.media.latents import open_latent
    from vae_core.media.sound import read_sound
    from vae_core.media.video import probe, read_frames, timeline_of
    from vae_core.weights.files import read_weights, strip_foreign

    torch.set_num_threads(1)
    Image.init()  # what is imported late compiles something

    def media(path: Path, number: int) -> None:
        probe(path)
        timeline = timeline_of(path)
        for _ in read_frames(path, skip_damage=number % 4 != 0):
            pass
        read_sound(path, timeline.time(0), None, timeline.shifts)

    def latents(path: Path, number: int) -> None:
        for chunk in open_latent(path).chunks():
            chunk.double().sum()

    def weights(path: Path, number: int) -> None:
        if number % 50 == 0:
            vae_core.load(str(path))
        for tensor in strip_foreign(read_weights(path).tensors).values():
            tensor.double().sum()

    return {"media": media, "latents": latents, "weights": weights}[kind]


def work(kind: str, folder: Path, first: int, stop: int, seed: int) -> None:
    """Read the files `first` to `stop` - 1; a line with its number before each, one with what happened after it."""
    from vae_core.errors import CheckpointError, LatentFileError, VideoError

    faulthandler.enable()
    seeds = {path.name: path.read_bytes() for path in sorted((folder / kind).iterdir())}
    read, place = reader(kind), Path(tempfile.mkdtemp(dir=folder))
    ran: list[str] = []
    watched = False

    def hook(event: str, words: tuple[object, ...]) -> None:
        if watched and event in _EVENTS and not (event == "compile" and words[0] == _CYTHON):
            ran.append(event)

    sys.addaudithook(hook)
    for name, content in seeds.items():  # once as they are, so that what is imported late is there
        (place / name).write_bytes(content)
        with contextlib.suppress(CheckpointError, LatentFileError, VideoError):
            read(place / name, 0)
    resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
    for number in range(first, stop):
        chooser = random.Random(f"{seed} {kind} {number}")
        name = chooser.choice(list(seeds))
        path = place / name
        path.write_bytes(mutated(seeds[name], chooser))
        print(json.dumps([number, name]), flush=True)
        began, outcome, watched = time.process_time(), "read", True
        try:
            read(path, number)
        except (CheckpointError, LatentFileError, VideoError):
            outcome = "refused"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {str(error)[:200]}"
        watched = False
        used = time.process_time() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if ran:
            outcome = f"runs code: {ran}"
        print(json.dumps([outcome, used, peak]), flush=True)
        if peak > MEMORY or ran:
            return  # a fresh process, so that the next peak is its own


_CYTHON = b"_getframe()"  # compiled by what Cython made, for tracebacks
_EVENTS = frozenset({"compile", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn"}) | {
    "os.fork", "socket.connect", "pickle.find_class", "shutil.rmtree", "ctypes.dlopen", "os.remove",
}  # fmt: skip


class Run:
    """Processes, one after another, until all files of a kind are read."""

    def __init__(self, kind: str, folder: Path, seed: int, keep: Path | None) -> None:
        self._kind, self._folder, self._seed, self._keep = kind, folder, seed, keep
        self.outcomes: Counter[str] = Counter()
        self.slowest, self.largest = 0.0, 0

    def all(self, first: int, stop: int) -> None:
        while first < stop:
            first = self._some(first, stop)

    def _some(self, first: int, stop: int) -> int:
        words = ["--work", self._kind, str(self._folder), str(first), str(stop), str(self._seed)]
        errors = self._folder / "errors.txt"
        with errors.open("wb") as file:
            child = subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE, stderr=file)
        assert child.stdout is not None
        lines, number, name, done = _Lines(child.stdout.fileno()), first, "", True
        while True:
            line = lines.next(child, waiting=done)
            if line is None:
                break
            found = json.loads(line)
            if len(found) == 2:
                number, name = found
                done = False
                continue
            done = True
            self._note(number, name, *found)
        code = child.wait()
        if not done:
            trace = " | ".join(errors.read_text(errors="replace").strip().splitlines()[-12:])
            self._bad(number, name, f"hangs: {lines.why}" if lines.why else f"ends with code {code}: {trace[-700:]}")
        elif code:
            raise RuntimeError(errors.read_text(errors="replace")[-2000:])
        return number + 1

    def _note(self, number: int, name: str, outcome: str, used: float, peak: int) -> None:
        self.slowest, self.largest = max(self.slowest, used), max(self.largest, peak)
        if outcome not in ("read", "refused"):
            self._bad(number, name, outcome)
        elif used > SECONDS or peak > MEMORY:
            self._bad(number, name, f"{outcome}, but takes {used:.1f} s and {peak / 2**20:.0f} MiB")
        else:
            self.outcomes[outcome] += 1

    def _bad(self, number: int, name: str, what: str) -> None:
        self.outcomes["wrong"] += 1
        print(f"{self._kind} {number} ({name}): {what}", flush=True)
        if self._keep is not None:
            self._keep.mkdir(exist_ok=True, parents=True)
            chooser = random.Random(f"{self._seed} {self._kind} {number}")
            seeds = {path.name: path for path in sorted((self._folder / self._kind).iterdir())}
            chosen = chooser.choice(list(seeds))
            (self._keep / f"{self._kind}_{number}_{chosen}").write_bytes(mutated(seeds[chosen].read_bytes(), chooser))


class _Lines:
    """Lines of a child that is ended when one file takes too long."""

    def __init__(self, source: int) -> None:
        self._source, self._rest, self.why = source, b"", ""

    def next(self, child: subprocess.Popen[bytes], *, waiting: bool) -> bytes | None:
        began, used = time.monotonic(), _used(child.pid)
        while b"\n" not in self._rest:
            if select.select([self._source], [], [], 1)[0]:
                got = os.read(self._source, 1 << 16)
                if not got:
                    return None
                self._rest += got
            elif (not waiting and _used(child.pid) - used > 3 * SECONDS) or time.monotonic() - began > PATIENCE:
                self.why = f"{_used(child.pid) - used:.0f} s of processor time"
                child.kill()
                return None
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def _used(process: int) -> float:
    """Seconds of processor time of a process."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        kind, folder, first, stop, seed = sys.argv[2:]
        work(kind, Path(folder), int(first), int(stop), int(seed))
        return
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--count", type=int, default=1000, help="files of each kind")
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--keep", type=Path)
    asked = options.parse_args()
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in asked.kinds:
            (folder / kind).mkdir()
            made = {"media": media_seeds, "latents": latent_seeds, "weights": weight_seeds}[kind](folder)
            for path in folder.iterdir():
                if path.is_file():
                    path.unlink()
            for file, content in made.items():
                (folder / kind / file).write_bytes(content)
            run, began = Run(kind, folder, asked.seed, asked.keep), time.monotonic()
            run.all(asked.first, asked.first + asked.count)
            if (folder / "CODE_WAS_RUN").exists():
                run.outcomes["code was run"] += 1
            found = run.outcomes
            rows.append(
                f"| {kind} | {len(made)} | {asked.count} | {found['read']} | {found['refused']} | "
                f"{found['wrong'] + found['code was run']} | {run.slowest:.1f} | {run.largest / 2**20:.0f} | "
                f"{time.monotonic() - began:.0f} |"
            )
            print(rows[-1], flush=True)
    print("\n| kind | good files | changed files | read | refused | wrong | slowest, s | memory, MiB | took, s |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
