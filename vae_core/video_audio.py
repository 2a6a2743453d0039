"""Carrying the sound of one file into another: copied as it is where the container takes it, else re-encoded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from types import TracebackType

import av
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.error import InvalidDataError
from av.packet import Packet

_MP4 = frozenset({"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"})
_COPIED = {"mp4": _MP4, "ipod": _MP4, "mov": _MP4 - {"opus", "flac"}, "webm": frozenset({"opus", "vorbis"})}
_LEAD_IN = Fraction(1, 10)  # seconds of encoder priming kept in front of the very start
_AHEAD = Fraction(1, 2)  # seconds of sound written ahead of the picture
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
        webm = self._output.format.name == "webm"
        source_rate = stream.codec_context.sample_rate
        rate = 48000 if webm else min(_AAC_RATES, key=lambda allowed_rate: abs(allowed_rate - source_rate))
        target = self._output.add_stream("libopus" if webm else "aac", rate=rate)
        assert isinstance(target, AudioStream)
        target.layout = "mono" if stream.channels == 1 else "stereo"
        target.bit_rate = 96000 * (1 if stream.channels == 1 else 2)
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
        encoder = target.codec_context
        encoder.open(strict=False)
        resampler = AudioResampler(
            format=encoder.format, layout=target.layout, rate=target.rate, frame_size=encoder.frame_size or None
        )
        for packet in self._in_range(stream):
            with contextlib.suppress(InvalidDataError):  # a damaged packet is a gap, not the end of the film
                for frame in packet.decode():
                    for part in resampler.resample(frame):
                        yield from target.encode(part)
        for part in resampler.resample(None):
            yield from target.encode(part)
        yield from target.encode(None)
