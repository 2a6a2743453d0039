"""Values that files hold: exact codes, colours, where chroma lies, the shape of pixels; and copies of copies."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vae_core.cli import app as commands
from vae_core.media.latents import open_latent
from vae_core.media.video import Codec, VideoWriter, probe

from .clips import moving_picture
from .media_reading import read_all, run

RATE = Fraction(25)


def test_a_shape_of_pixels_that_a_file_cannot_hold_is_said(tmp_path: Path) -> None:
    for name, kept in (("a.webm", False), ("a.mkv", True)):
        with VideoWriter(tmp_path / name, fps=RATE, size=(48, 64), aspect=Fraction(16, 11)) as writer:
            writer.write(moving_picture(3, 48, 64))
            assert writer.told == [] if kept else "pixels of 16:11 are written as square ones" in writer.told[0]
        assert probe(tmp_path / name).aspect == (Fraction(16, 11) if kept else 1)
    with VideoWriter(tmp_path / "b.mkv", fps=RATE, size=(48, 64), aspect=Fraction(2), codec="ffv1") as writer:
        writer.write(moving_picture(3, 48, 64))
        assert writer.told[0].endswith("since ffv1 in .mkv cannot be given their shape; choose .mp4 or .mov, or h264")


@pytest.mark.parametrize("suffix", [".mkv", ".mov", ".mp4"])
def test_the_shape_of_pixels_is_kept(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"source{suffix}"
    with VideoWriter(source, fps=RATE, size=(48, 64), aspect=Fraction(16, 11)) as writer:
        writer.write(moving_picture(3, 48, 64))
    assert probe(source).aspect == Fraction(16, 11)
    assert run("encode", source, "-o", tmp_path / "a.latent.safetensors").exit_code == 0
    assert open_latent(tmp_path / "a.latent.safetensors").meta.aspect == Fraction(16, 11)
    assert run("decode", tmp_path / "a.latent.safetensors", "-o", tmp_path / f"back{suffix}").exit_code == 0
    assert probe(tmp_path / f"back{suffix}").aspect == Fraction(16, 11)


@pytest.mark.parametrize(("bits", "codes"), [(8, (16, 126, 235)), (10, (64, 502, 940)), (12, (256, 2008, 3760))])
@pytest.mark.parametrize("layout", ["yuv420p", "yuv422p", "yuv444p"])
def test_code_values_are_exact(tmp_path: Path, bits: int, codes: tuple[int, ...], layout: str) -> None:
    form = layout if bits == 8 else f"{layout}{bits}le"
    path = tmp_path / "codes.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, form
        for code in codes:
            frame = av.VideoFrame(64, 48, form)
            for number, plane in enumerate(frame.planes):
                kind = np.uint8 if bits == 8 else np.uint16
                value = 2 ** (bits - 1) if number else code
                plane.update(np.full(plane.buffer_size // kind().itemsize, value, kind).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    levels = read_all(path)[0].mean((0, 2, 3))
    black, white = 16 * 2 ** (bits - 8), 235 * 2 ** (bits - 8)
    expected = [2 * (code - black) / (white - black) - 1 for code in codes]
    np.testing.assert_allclose(levels.numpy(), expected, atol=1e-6)


def test_chroma_is_written_where_it_is_said_to_be(tmp_path: Path) -> None:
    """A colour ramp keeps its place: half a chroma sample would shift it by half a pixel."""
    ramp = torch.linspace(-0.5, 0.5, 128).view(1, 1, 1, 1, 128).expand(1, 1, 1, 64, 128)
    video = torch.cat([ramp, torch.zeros_like(ramp), -ramp], dim=1)
    with VideoWriter(tmp_path / "ramp.mkv", fps=RATE, size=(64, 128), crf=0) as writer:
        writer.write(video)
    with av.open(str(tmp_path / "ramp.mkv")) as file:
        red = np.frombuffer(next(file.decode(video=0)).planes[2], np.uint8).reshape(32, -1)[16, :64].astype(float)
    y = 0.2126 * ramp[0, 0, 0, 0] - 0.0722 * ramp[0, 0, 0, 0]
    exact = 128 + 224 * (ramp[0, 0, 0, 0] - y) / 2 / 1.5748
    offset = (red - exact[::2].numpy())[8:-8].mean() / float(exact[20] - exact[19])  # in pixels
    assert abs(offset) < 0.1


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        *((".mp4", "h264"), (".mkv", "h264"), (".mov", "prores"), (".mkv", "prores")),
        *((".mkv", "ffv1"), (".webm", "vp9"), (".webm", "av1"), (".mp4", "av1")),
    ],
)
def test_colours_are_read_as_they_were_written(tmp_path: Path, suffix: str, codec: Codec) -> None:
    """Small pictures without tags are guessed to be BT.601; flat colours are what every encoder keeps."""
    colours = torch.tensor([[0.8, -0.6, -0.5], [-0.5, 0.6, -0.3], [-0.4, -0.3, 0.7]])
    video = colours.T[None, :, :, None, None].expand(1, 3, 3, 48, 64)
    with VideoWriter(tmp_path / f"a{suffix}", fps=RATE, size=(48, 64), codec=codec) as writer:
        writer.write(video)
    made = read_all(tmp_path / f"a{suffix}").mean((3, 4))[0].T
    assert float((made - colours).abs().max()) * 127.5 < 2.5
    with av.open(str(tmp_path / f"a{suffix}")) as file:
        assert next(file.decode(video=0)).colorspace in ((0, 2) if codec == "ffv1" else (1,))


def _blocks(height: int, width: int) -> torch.Tensor:
    """Edges between the most saturated colours there are, where 4:2:0 mixes what RGB cannot hold."""
    corners = (torch.rand(1, 3, height // 5 + 1, width // 5 + 1, generator=torch.manual_seed(0)) > 0.5).float() * 2 - 1
    return torch.nn.functional.interpolate(corners, scale_factor=5)[None, 0, :, None, :height, :width]


@pytest.mark.parametrize(
    ("suffix", "codec", "bits", "pix_fmt", "size"),
    [
        (".mp4", "h264", 8, None, (96, 128)),
        (".mkv", "h264", 10, None, (96, 128)),
        (".mkv", "h264", None, "yuv422p", (96, 128)),
        (".mp4", "h264", 8, None, (95, 127)),
        (".webm", "vp9", 8, None, (96, 128)),
        (".mp4", "av1", 8, None, (96, 128)),
        (".mkv", "av1", 10, None, (95, 127)),
        (".mkv", "ffv1", 8, None, (96, 128)),
        (".mkv", "ffv1", 16, None, (95, 127)),
    ],
)
def test_eight_generations_change_nothing(
    tmp_path: Path, suffix: str, codec: Codec, bits: int | None, pix_fmt: str | None, size: tuple[int, int]
) -> None:
    demo = read_all(Path(commands.__file__).parents[1] / "demo" / "demo_clip.mp4")[..., :1, : size[0], : size[1]]
    video = torch.cat([demo, (demo * 1.5).clamp(-1, 1), _blocks(*size)], dim=2)
    made: list[torch.Tensor] = []
    for _ in range(8):
        crf = None if codec == "ffv1" else 0
        path = tmp_path / f"a{suffix}"
        with VideoWriter(path, fps=RATE, size=size, codec=codec, bits=bits, pix_fmt=pix_fmt, crf=crf) as writer:
            writer.write(made[-1] if made else video)
        made.append(read_all(path))
    assert float((made[-1] - made[0]).abs().max()) * 127.5 < 0.01
    assert float((made[0] - video)[:, :, 0].abs().mean() * 127.5) < 1


def test_generations_of_an_encoder_with_losses_do_not_wander(tmp_path: Path) -> None:
    video = read_all(Path(commands.__file__).parents[1] / "demo" / "demo_clip.mp4")[:, :, :3]
    made = video
    for _ in range(8):
        with VideoWriter(tmp_path / "a.mp4", fps=RATE, size=(video.shape[3], video.shape[4])) as writer:
            writer.write(made)
        made = read_all(tmp_path / "a.mp4")
    assert (made - video).mean((0, 2, 3, 4)).abs().max() * 127.5 < 1  # colours
    shifted = [
        (made[..., 1:-1, 1 + x : made.shape[-1] - 1 + x] - video[..., 1:-1, 1:-1]).square().mean() for x in (-1, 0, 1)
    ]
    assert shifted[1] < 0.2 * min(shifted[0], shifted[2])
