"""Decoded frames on their way out: values, layout, order, and what is held meanwhile."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from vae_core.door.output import Frames, NotFiniteError, collect, host_frames, in_turn, make_frames
from vae_core.door.vae import VideoVAE
from vae_core.errors import VideoError
from vae_core.media.video import VideoWriter
from vae_core.plan.profile import Profile

Make = Callable[..., VideoVAE]
CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16], ids=["uint8", "fp32", "fp16"])


def expected(chunk: Tensor, dtype: torch.dtype) -> Tensor:
    """As plainly as it can be said: images in 0..1, and from these the frames of a file."""
    images = ((chunk.float().movedim(1, -1) + 1) / 2).clamp(0, 1)
    if dtype != torch.uint8:
        return images.to(dtype)
    return ((images * 2 - 1 + 1) * 127.5).round().to(torch.uint8)


def clip(t: int, *, seed: int = 0) -> Tensor:
    """(2, 3, t, 5, 4), some of it out of range."""
    return torch.randn(2, 3, t, 5, 4, generator=torch.Generator().manual_seed(seed))


class TwoPlaces:
    """A courier over two buffers that never grow old: each is written at once, or as late as can be."""

    def __init__(self, *, late: bool) -> None:
        self.late = late
        self.log: list[str] = []
        self.sent: dict[int, Frames] = {}
        self.buffers: dict[int, Tensor] = {}

    def _write(self, place: int, pixels: Tensor) -> None:
        self.buffers.setdefault(place, torch.empty(10_000, dtype=pixels.dtype))[: pixels.numel()] = pixels.flatten()

    def send(self, place: int, frames: Frames) -> None:
        self.log.append(f"send {place}")
        assert place not in self.sent
        self.sent[place] = frames
        if not self.late:
            self._write(place, frames.pixels)

    def receive(self, place: int) -> Frames:
        self.log.append(f"receive {place}")
        frames = self.sent.pop(place)
        if self.late:
            self._write(place, frames.pixels)
        shape = frames.pixels.shape
        return Frames(self.buffers[place][: frames.pixels.numel()].view(shape), None)


# ---------------------------------------------------------------------------------------------------- pixels


@DTYPES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["planes", "channels_last"])
def test_pixels_are_those_of_the_plain_formula(dtype: torch.dtype, layout: torch.memory_format) -> None:
    chunk = clip(3).to(memory_format=layout)
    made = make_frames(chunk, dtype)
    assert made.pixels.shape == (2, 3, 5, 4, 3)
    assert made.pixels.is_contiguous()
    assert made.finite is None
    assert torch.equal(made.pixels, expected(chunk, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_8_bits_are_rounded_the_same_from_every_value(dtype: torch.dtype) -> None:
    """Straight from [-1, 1], and by way of images in 0..1, as files were written before; halves included."""
    values = torch.cat((torch.linspace(-1.01, 1.01, 300_001), torch.arange(-3, 514) / 255 - 1)).to(dtype)
    chunk = torch.cat((values, torch.tensor([-torch.inf, torch.inf], dtype=dtype))).expand(1, 3, 1, 1, -1)
    assert torch.equal(make_frames(chunk, torch.uint8).pixels, expected(chunk, torch.uint8))


def test_decoded_frames_are_those_of_the_stream(family: str, small_vae: Make) -> None:
    vae = small_vae(family, torch.float32)
    latent = torch.randn(2, vae.info.latent_channels, 6, 1, 2, generator=torch.Generator().manual_seed(0))
    total = vae.info.compression.pixel_frames(6) - 1
    choice: dict[str, Any] = {"frames": total, "size": (7, 15)}
    chunks = list(vae.decode_stream(latent, **choice))
    for dtype in (torch.uint8, torch.float32):
        got = list(vae.decode_frames(latent, dtype=dtype, **choice))
        assert [chunk.shape[1] for chunk in got] == [chunk.shape[2] for chunk in chunks]
        for chunk, frames in zip(chunks, got, strict=True):
            assert torch.equal(frames, expected(chunk, dtype))
    again = collect(vae.decode_frames(latent, lent=True, **choice), total, dim=1)
    assert torch.equal(again, torch.cat(got, dim=1))


def test_frames_of_a_model_in_training_carry_no_graph(small_vae: Make) -> None:
    vae = small_vae("iv-vae", torch.float32)
    latent = torch.randn(1, 4, 2, 1, 1, requires_grad=True)
    assert not any(frames.requires_grad for frames in vae.decode_frames(latent))


def test_other_dtypes_are_refused(small_vae: Make) -> None:
    with pytest.raises(ValueError, match=r"Frames of torch.int16 were asked for; allowed are torch.uint8 \(0 to 255\)"):
        next(small_vae("iv-vae").decode_frames(torch.zeros(1, 4, 1, 1, 1), dtype=torch.int16))


def test_what_is_wrong_with_a_latent_is_said_here_too(small_vae: Make) -> None:
    vae = small_vae("cv-vae")
    with pytest.raises(ValueError, match="decode to 9 frames; give a smaller number"):
        list(vae.decode_frames(torch.zeros(1, 4, 3, 1, 1, dtype=torch.float64), frames=10))
    with pytest.raises(ValueError, match="latent with 16 channels is of another VAE"):
        list(vae.decode_frames(torch.zeros(1, 16, 3, 1, 1)))


@DTYPES
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_piece_that_is_not_finite_is_told_and_those_before_come_out(dtype: torch.dtype, value: float) -> None:
    chunks = [clip(2, seed=n) for n in range(4)]
    chunks[2][1, 2, 1, 4, 3] = value
    got: list[Tensor] = []
    with pytest.raises(NotFiniteError, match=r"Chunk 2 of the result holds NaN or infinity\. In float16, load") as told:
        got.extend(host_frames(iter(chunks), CPU, dtype, check=True))
    assert told.value.chunk == 2
    assert torch.equal(torch.cat(got, dim=1), expected(torch.cat(chunks[:2], dim=2), dtype))
    assert len(list(host_frames(iter(chunks), CPU, dtype))) == 4


# ---------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_two_places_in_turn_bring_everything_in_order(late: bool, count: int) -> None:
    """Lengths change from chunk to chunk; what is lent is right as long as the next was not asked for."""
    chunks = [clip(1 + n % 3, seed=n) for n in range(count)]
    made = (make_frames(chunk, torch.uint8) for chunk in chunks)
    got = [frames.pixels.clone() for frames in in_turn(made, TwoPlaces(late=late))]
    assert len(got) == count
    for frames, chunk in zip(got, chunks, strict=True):
        assert torch.equal(frames, expected(chunk, torch.uint8))


def test_a_piece_comes_when_the_next_is_on_its_way() -> None:
    courier = TwoPlaces(late=True)

    def made() -> Iterator[Frames]:
        for n in range(3):
            courier.log.append(f"make {n}")
            yield make_frames(clip(1), torch.uint8)

    for n, _ in enumerate(in_turn(made(), courier)):
        courier.log.append(f"use {n}")
    assert ", ".join(courier.log) == (
        "make 0, send 0, make 1, send 1, receive 0, use 0, make 2, send 0, receive 1, use 1, receive 0, use 2"
    )


@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_what_is_under_way_comes_out_before_an_error(fail_at: int) -> None:
    chunks = [clip(2, seed=n) for n in range(fail_at)]

    def made() -> Iterator[Frames]:
        for chunk in chunks:
            yield make_frames(chunk, torch.uint8)
        raise torch.cuda.OutOfMemoryError("injected")

    got: list[Tensor] = []
    with pytest.raises(torch.cuda.OutOfMemoryError, match="injected"):
        got.extend(frames.pixels.clone() for frames in in_turn(made(), TwoPlaces(late=False)))
    assert len(got) == fail_at
    for frames, chunk in zip(got, chunks, strict=True):
        assert torch.equal(frames, expected(chunk, torch.uint8))


# ---------------------------------------------------------------------------------------------------- what is held


@pytest.mark.parametrize("lent", [False, True])
def test_no_piece_is_held_while_the_next_is_computed(lent: bool) -> None:
    """Neither the decoded chunk nor its pixels, if the consumer lets them go."""
    pixels: list[weakref.ref[Tensor]] = []

    def chunks() -> Iterator[Tensor]:
        for n in range(5):
            assert [one for one in pixels if one() is not None] == []
            chunk = clip(2, seed=n)
            held = weakref.ref(chunk)
            yield chunk
            del chunk
            assert held() is None

    for frames in host_frames(chunks(), CPU, torch.uint8, lent=lent):
        pixels.append(weakref.ref(frames))
        del frames
    assert len(pixels) == 5


def test_frames_on_the_device_are_let_go_when_they_are_sent() -> None:
    class Forgetful(TwoPlaces):
        def send(self, place: int, frames: Frames) -> None:
            self._write(place, frames.pixels)
            self.sent[place] = Frames(torch.empty_like(frames.pixels), None)

    def made() -> Iterator[Frames]:
        for n in range(5):
            frames = make_frames(clip(2, seed=n), torch.uint8)
            held = weakref.ref(frames.pixels)
            yield frames
            del frames
            assert held() is None

    assert len(list(in_turn(made(), Forgetful(late=False)))) == 5


def test_kept_pieces_stay_as_they_were(small_vae: Make) -> None:
    vae = small_vae("iv-vae", torch.float32)
    latent = torch.randn(1, 4, 5, 2, 2, generator=torch.Generator().manual_seed(1))
    kept, copies = [], []
    for frames in vae.decode_frames(latent, dtype=torch.uint8):
        kept.append(frames)
        copies.append(frames.clone())
    assert torch.equal(torch.cat(kept, dim=1), torch.cat(copies, dim=1))


def test_a_collected_clip_takes_its_own_size_and_two_pieces() -> None:
    chunks = (torch.zeros(1, 3, 4, 64, 64) for _ in range(20))
    with Profile() as profile:
        result = collect(host_frames(chunks, CPU, torch.float32, lent=True), 80, dim=1)
    chunk = 3 * 4 * 64 * 64 * 4
    assert result.nbytes == 20 * chunk
    assert profile.device.peak <= result.nbytes + 3 * chunk  # the decoded one, its pixels, and a frame in the making


def test_collecting_tells_how_far_it_is() -> None:
    told: list[tuple[int, int]] = []
    chunks = [torch.full((2, n, 1), n) for n in (1, 4, 2)]
    out = collect(chunks, 7, dim=1, progress=lambda done, total: told.append((done, total)))
    assert torch.equal(out, torch.cat(chunks, dim=1))
    assert told == [(1, 7), (5, 7), (7, 7)]


# ---------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_a_file_is_the_same_from_pixels(size: tuple[int, int]) -> None:
    """Of frames whose values are those of pixels; what lies between two levels is written as near as the file can."""
    drawn = torch.randn(1, 3, 6, *size, generator=torch.Generator().manual_seed(0))
    video = make_frames(drawn, torch.uint8).pixels.movedim(-1, 1).float() * 2 / 255 - 1
    files: list[bytes] = []
    for pixels in (False, True):
        buffer = io.BytesIO()
        with VideoWriter(buffer, fps=Fraction(25), size=size, container="mp4") as writer:
            for chunk in video.split(4, dim=2):
                if pixels:
                    writer.write_pixels(make_frames(chunk, torch.uint8).pixels[0])
                else:
                    writer.write(chunk)
        assert writer.frames == 6
        files.append(buffer.getvalue())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "pixels", [torch.zeros(2, 32, 32, 3), torch.zeros(2, 32, 16, 3, dtype=torch.uint8), torch.zeros(2, 3, 32, 32)]
)
def test_pixels_of_another_kind_are_refused(pixels: Tensor) -> None:
    with VideoWriter(io.BytesIO(), fps=Fraction(25), size=(32, 32), container="mp4") as writer:
        with pytest.raises(VideoError, match=r"pixels of shape .*this file takes torch\.uint8, \(t, 32, 32, 3\)"):
            writer.write_pixels(pixels)
        writer.write_pixels(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
