"""Sound for a video file: from another file, copied where the container takes it, else re-encoded; or from samples."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from types import TracebackType

import av
import torch
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.error import InvalidDataError
from av.packet import Packet

from ..errors import VideoError

_MP4 = frozenset({"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"})
_COPIED = {"mp4": _MP4, "ipod": _MP4, "mov": _MP4 - {"opus", "flac"}, "webm": frozenset({"opus", "vorbis"})}
_LEAD_IN = Fraction(1, 10)  # seconds of encoder priming kept in front of the very start
_AHEAD = Fraction(1, 2)  # seconds of sound written ahead of the picture
_BLOCK = 1 << 16  # samples encoded at a time
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


class AudioTrack:
    """The first sound track of `source`, muxed into `output` in step with the picture; a context manager.

    `first` and `end` are seconds on the source's clock; `first` becomes 0 in the output. Sound is cut between packets
    (about 20 ms for AAC). Packets are copied unchanged where the container commonly holds their codec, else decoded and
    encoded as AAC (Opus in WebM). `copied` says which; a source without sound adds nothing.
    """

    def __init__(
        self, source: str | os.PathLike[str], output: OutputContainer, first: Fraction, end: Fraction | None
    ) -> None:
        self._output, self._first, self._end = output, first, end
        self.copied = False
        self._input = av.open(os.fspath(source), mode="r", metadata_errors="replace")
        streams = self._input.streams.audio
        self._packets: Iterator[Packet[AudioStream]] = iter(())
        self._next: Packet[AudioStream] | None = None
        if streams and streams[0].codec_context is not None:  # pyright: ignore[reportUnnecessaryComparison]
            try:
                self._packets = self._begin(streams[0])
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
        name = stream.codec_context.name
        allowed = _COPIED.get(self._output.format.name)
        self.copied = name in (self._output.supported_codecs if allowed is None else allowed)
        if self.copied:
            return self._copy(stream, self._output.add_stream_from_template(stream))
        target = _add_sound(self._output, stream.codec_context.sample_rate, 1 if stream.channels == 1 else 2)
        return self._encode(stream, target)

    def _in_range(self, stream: AudioStream) -> Iterator[Packet[AudioStream]]:
        """Packets whose time lies in [first, end), with times that begin at 0."""
        lead = _LEAD_IN if self._starts_at_beginning(stream) else Fraction(0)
        for packet in self._input.demux(stream):
            if packet.pts is None or not packet.size:
                continue
            time = packet.pts * packet.time_base
            if time < self._first - lead:
                continue
            if self._end is not None and time >= self._end:
                return
            shift = round(self._first / packet.time_base)
            packet.pts -= shift
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
        resampler = _resampler(target)
        for packet in self._in_range(stream):
            with contextlib.suppress(InvalidDataError):  # a damaged packet is a gap, not the end of the film
                for frame in packet.decode():
                    for part in resampler.resample(frame):
                        yield from target.encode(part)
        for part in resampler.resample(None):
            yield from target.encode(part)
        yield from target.encode(None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sound:
    """Sound in memory. samples: (channels, samples), floats in [-1, 1]; rate: samples per second.

    Raises `VideoError` for another shape, a number of channels that files do not hold, or values that are no numbers.
    """

    samples: torch.Tensor
    rate: int

    def __post_init__(self) -> None:
        shape = tuple(self.samples.shape)
        if len(shape) != 2 or shape[0] not in _LAYOUTS or self.rate < 1 or not self.samples.is_floating_point():
            raise VideoError(
                f"The sound has shape {shape}, {self.samples.dtype} and {self.rate} samples per second; needed are "
                f"floats (channels, samples) with {', '.join(map(str, _LAYOUTS))} channels."
            )
        if not torch.isfinite(self.samples).all():
            raise VideoError("The sound holds values that are no numbers (NaN or infinite); leave it out or repair it.")


class SoundTrack:
    """`sound` encoded into `output` in step with the picture: AAC, Opus in WebM."""

    def __init__(self, sound: Sound, output: OutputContainer) -> None:
        self._sound, self._output = sound, output
        self._stream = _add_sound(output, sound.rate, sound.samples.shape[0])
        self._resampler = _resampler(self._stream)
        self._done = 0

    def advance(self, time: Fraction) -> None:
        """Write the sound up to `time`, seconds in the output."""
        stop = min(round(time * self._sound.rate), self._sound.samples.shape[1])
        while self._done < stop:
            part = self._sound.samples[:, self._done : min(stop, self._done + _BLOCK)].float().clamp(-1, 1)
            frame = AudioFrame.from_ndarray(
                part.cpu().contiguous().numpy(), format="fltp", layout=_LAYOUTS[part.shape[0]]
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


def read_sound(path: str | os.PathLike[str], first: Fraction, end: Fraction | None) -> Sound | None:
    """The first sound track of a file from `first` to `end`, seconds of the file's clock, end None for all the rest.

    Its first sample is heard at `first`: silence stands for sound that begins later or has a gap. Channels other than
    mono, stereo, 5.1 and 7.1 are mixed to stereo. None where the file has no sound there.
    """
    with av.open(os.fspath(path), mode="r", metadata_errors="replace") as container:
        streams = [
            stream
            for stream in container.streams.audio
            if stream.codec_context is not None  # pyright: ignore[reportUnnecessaryComparison]
        ]
        if not streams:
            return None
        rate = streams[0].codec_context.sample_rate
        layout = None if streams[0].channels in _LAYOUTS else "stereo"
        collected = _Collected(first, rate, None if end is None else round((end - first) * rate))
        resampler = AudioResampler(format="fltp", layout=layout, rate=rate)
        for frame in _sound_frames(container, streams[0]):
            for part in resampler.resample(frame):
                collected.add(part)
            if collected.full:
                break
    return collected.sound()


def _sound_frames(container: InputContainer, stream: AudioStream) -> Iterator[AudioFrame | None]:
    """The decoded sound, then None."""
    for packet in container.demux(stream):
        with contextlib.suppress(InvalidDataError):  # a damaged packet is a gap, not the end of the film
            yield from packet.decode()
    yield None


class _Collected:
    """Samples put where their times say, from `first` on, at most `length` of them."""

    def __init__(self, first: Fraction, rate: int, length: int | None) -> None:
        self._first, self._rate, self._length = first, rate, length
        self._parts: list[torch.Tensor] = []
        self._next: int | None = None  # where the next frame is expected, in samples since `first`
        self._done = 0  # samples kept

    @property
    def full(self) -> bool:
        return self._length is not None and (self._next or 0) >= self._length

    def add(self, frame: AudioFrame) -> None:
        samples = torch.from_numpy(frame.to_ndarray())  # channels, samples
        start = self._next
        if frame.pts is not None and frame.time_base is not None:
            told = round((frame.pts * frame.time_base - self._first) * self._rate)
            if start is None or abs(told - start) > self._rate // 20:  # less is a time rounded by the container
                start = told
        start = start or 0
        self._next = start + samples.shape[1]
        samples = samples[:, max(0, self._done - start) :]
        if not samples.shape[1] or (self._length is not None and start >= self._length):
            return
        if start > self._done:
            self._parts.append(samples.new_zeros(samples.shape[0], start - self._done))
        self._parts.append(samples)
        self._done = self._next

    def sound(self) -> Sound | None:
        if not self._parts:
            return None
        samples = torch.cat(self._parts, dim=1)[:, : self._length]
        return Sound(samples=samples, rate=self._rate) if samples.shape[1] else None


def _add_sound(output: OutputContainer, rate: int, channels: int) -> AudioStream:
    """A new stream of AAC, in WebM of Opus, at the rate nearest to `rate` that the encoder takes."""
    webm = output.format.name == "webm"
    nearest = 48000 if webm else min(_AAC_RATES, key=lambda allowed: abs(allowed - rate))
    stream = output.add_stream("libopus" if webm else "aac", rate=nearest)
    assert isinstance(stream, AudioStream)
    stream.layout = _LAYOUTS[channels]
    stream.bit_rate = 96000 * channels
    return stream


def _resampler(target: AudioStream) -> AudioResampler:
    """What turns any sound into frames for the encoder of `target`, which is opened."""
    encoder: AudioCodecContext = target.codec_context
    encoder.open(strict=False)
    return AudioResampler(
        format=encoder.format, layout=target.layout, rate=target.rate, frame_size=encoder.frame_size or None
    )
