"""Sound for a video file: from another file, copied where the container takes it, else re-encoded; or from samples."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.error import FFmpegError
from av.packet import Packet

from ..atomic import atomic_write
from .opening import media_url, open_media, sound_stream
from .scanning import moved_sound
from .sound import LAYOUTS, Sound, finely_timed
from .timeline import Shifts

_MP4 = frozenset({"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"})
_COPIED = {  # what players expect in each; what is missing here (Matroska) takes what its muxer takes
    "mp4": _MP4,
    "ipod": frozenset({"aac", "ac3", "alac"}),
    "mov": _MP4 - {"opus", "flac"},
    "webm": frozenset({"opus", "vorbis"}),
}
_PCM_IN_MOV = "pcm_"
_NAMES = {"ipod": "M4V", "matroska": "Matroska"}
_LEAD_IN = Fraction(1, 10)  # seconds of encoder priming kept in front of the very start
_AHEAD = Fraction(1, 2)  # seconds of sound written ahead of the picture
_BLOCK = 1 << 16  # samples encoded at a time
_ENCODED_LAYOUTS = {**LAYOUTS, 3: "3.0", 4: "4.0", 5: "5.0"}
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_NO_SHIFTS: Mapping[int, Shifts] = {}
SIDECAR_START = Fraction(1)  # seconds on the clock of a sound file that stand for the start of the picture


class AudioTrack:
    """The first sound track of `source`, muxed into `output` in step with the picture; a context manager.

    `first` and `end` are seconds on the source's clock, which `shifts` of its timeline may join; `first` becomes
    `start` in the output. Sound is cut between packets (about 20 ms for AAC). Packets are copied unchanged where the
    container holds their codec, else decoded and encoded as AAC (Opus in WebM). `told` says what was done to them; a
    source without sound adds nothing.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        output: OutputContainer,
        first: Fraction,
        end: Fraction | None,
        shifts: Mapping[int, Shifts] = _NO_SHIFTS,
        *,
        start: Fraction = Fraction(0),
    ) -> None:
        self._source, self._output, self._first, self._end, self._start = Path(source), output, first, end, start
        self.copied = False
        self.told: list[str] = []
        self._input = open_media(self._source)
        self._packets: Iterator[Packet[AudioStream]] = iter(())
        self._next: Packet[AudioStream] | None = None
        stream = sound_stream(self._input)
        self._shifts = () if stream is None else shifts.get(stream.index, ())
        if stream is not None:
            try:
                self._packets = self._begin(stream)
            except BaseException:
                self._input.close()
                raise

    def __enter__(self) -> AudioTrack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._packets = iter(())
        self._input.close()

    def advance(self, time: Fraction) -> None:
        """Mux the sound up to a little after `time`, seconds in the output."""
        self._mux_until(time + _AHEAD)

    def finish(self) -> None:
        """Mux what is left, up to `end`."""
        self._mux_until(None)

    def _mux_until(self, time: Fraction | None) -> None:
        while True:
            packet = self._next or next(self._packets, None)
            self._next = None
            if packet is None:
                return
            if time is not None and packet.pts is not None and packet.pts * packet.time_base > time:
                self._next = packet
                return
            self._output.mux(packet)

    def _begin(self, stream: AudioStream) -> Iterator[Packet[AudioStream]]:
        context = stream.codec_context
        name, form = context.codec.canonical_name, self._output.format.name
        allowed = _COPIED.get(form, self._output.supported_codecs)
        listed = name in allowed or (form == "mov" and name.startswith(_PCM_IN_MOV))
        self.copied = listed and _takes(self._output, self._source)
        if self.copied:
            return self._copy(stream, self._output.add_stream_from_template(stream))
        layout = _ENCODED_LAYOUTS.get(stream.channels, "stereo")
        target = _add_sound(self._output, context.sample_rate or 48000, layout)
        container = _NAMES.get(form, form.upper())
        self.told.append(
            f"the sound ({name}) is re-encoded as {target.codec_context.name}, for {container} does not hold it"
        )
        if stream.channels not in _ENCODED_LAYOUTS:
            self.told.append(f"the {stream.channels} channels of the sound are mixed to stereo")
        return self._encode(stream, target)

    def _in_range(self, stream: AudioStream) -> Iterator[Packet[AudioStream]]:
        """Packets whose time lies in [first, end), with times that begin at 0."""
        lead = _LEAD_IN if self._starts_at_beginning(stream) else Fraction(0)
        last: int | None = None
        with contextlib.suppress(FFmpegError):  # a damaged container ends here, the picture is written all the same
            for packet in moved_sound(self._input, stream, self._shifts):
                if packet.pts is None:
                    continue
                time = packet.pts * packet.time_base
                if time < self._first - lead or (last is not None and packet.pts <= last):
                    continue
                if self._end is not None and time >= self._end:
                    return
                last = packet.pts
                packet.pts -= round((self._first - self._start) / packet.time_base)
                packet.dts = packet.pts
                yield packet

    def _starts_at_beginning(self, stream: AudioStream) -> bool:
        if stream.start_time is None or stream.time_base is None:
            return self._first <= 0
        return self._first <= stream.start_time * stream.time_base + _LEAD_IN

    def _copy(self, stream: AudioStream, target: AudioStream) -> Iterator[Packet[AudioStream]]:
        for packet in self._in_range(stream):
            packet.stream = target
            yield packet

    def _encode(self, stream: AudioStream, target: AudioStream) -> Iterator[Packet[AudioStream]]:
        resampler, form = _resampler(target), None
        for packet in self._in_range(stream):
            frames: list[AudioFrame] = []
            with contextlib.suppress(FFmpegError):  # a damaged packet is a gap, not the end of the film
                frames = stream.codec_context.decode(packet)
            for frame in frames:
                now = frame.format.name, frame.layout.name, frame.sample_rate
                if form not in (None, now):
                    resampler = _resampler(target)  # the sound changes on the way; what is less than a block is lost
                form = now
                for part in resampler.resample(finely_timed(frame)):
                    yield from target.encode(part)
        for part in resampler.resample(None):
            yield from target.encode(part)
        yield from target.encode(None)


class SoundTrack:
    """`sound` encoded into `output` in step with the picture: AAC, Opus in WebM."""

    def __init__(self, sound: Sound, output: OutputContainer) -> None:
        self._sound, self._output = sound, output
        self._stream = _add_sound(output, sound.rate, LAYOUTS[sound.samples.shape[0]])
        self._resampler = _resampler(self._stream)
        self._done = 0
        self.told: list[str] = []

    def advance(self, time: Fraction) -> None:
        """Write the sound up to `time`, seconds in the output."""
        stop = min(round(time * self._sound.rate), self._sound.samples.shape[1])
        while self._done < stop:
            part = self._sound.samples[:, self._done : min(stop, self._done + _BLOCK)].float().clamp(-1, 1)
            frame = AudioFrame.from_ndarray(
                part.cpu().contiguous().numpy(), format="fltp", layout=LAYOUTS[part.shape[0]]
            )
            frame.sample_rate, frame.pts, frame.time_base = self._sound.rate, self._done, Fraction(1, self._sound.rate)
            self._encode(frame)
            self._done += part.shape[1]

    def finish(self) -> None:
        """Write what the encoder still holds."""
        self._encode(None)
        self._output.mux(self._stream.encode(None))

    def _encode(self, frame: AudioFrame | None) -> None:
        for part in self._resampler.resample(frame):
            self._output.mux(self._stream.encode(part))


def save_sound(source: Path, first: Fraction, end: Fraction | None, shifts: Mapping[int, Shifts], target: Path) -> bool:
    """Copy the sound of a file from `first` to `end` into a Matroska file of its own, in which it starts at
    SIDECAR_START; False, and no file, where there is none.

    Raises VideoError where the source cannot be read, OSError where the disk fails.
    """
    with open_media(source) as looked:
        if sound_stream(looked) is None:
            return False
    with (
        atomic_write(target) as part,
        av.open(media_url(part), mode="w", format="matroska") as output,
        AudioTrack(source, output, first, end, shifts, start=SIDECAR_START) as track,
    ):
        track.finish()
    return True


def _takes(output: OutputContainer, source: Path) -> bool:
    """Whether the muxer really takes the sound: some codecs fit only at some rates, or with headers they lack."""
    try:
        with open_media(source) as again, av.open(io.BytesIO(), mode="w", format=output.format.name) as trial:
            stream = sound_stream(again)
            assert stream is not None
            target = trial.add_stream_from_template(stream)
            full = (packet for packet in again.demux(stream) if packet.size and packet.pts is not None)
            for packet in itertools.islice(full, 3):
                packet.dts = packet.pts
                packet.stream = target
                trial.mux(packet)
    except (FFmpegError, ValueError, OSError):
        return False
    return True


def _add_sound(output: OutputContainer, rate: int, layout: str) -> AudioStream:
    """A new stream of AAC, in WebM of Opus, at the rate nearest to `rate` that the encoder takes."""
    webm = output.format.name == "webm"
    nearest = 48000 if webm else min(_AAC_RATES, key=lambda allowed: abs(allowed - rate))
    stream = output.add_stream("libopus" if webm else "aac", rate=nearest)
    assert isinstance(stream, AudioStream)
    stream.layout = layout
    stream.bit_rate = 96000 * stream.codec_context.channels
    return stream


def _resampler(target: AudioStream) -> AudioResampler:
    """What turns any sound into frames for the encoder of `target`, which is opened."""
    encoder: AudioCodecContext = target.codec_context
    encoder.open(strict=False)
    return AudioResampler(
        format=encoder.format, layout=target.layout, rate=target.rate, frame_size=encoder.frame_size or None
    )
