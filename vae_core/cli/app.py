"""The commands."""

import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..door.downloads import OFFICIAL_FILES, changed_since, download
from ..door.loading import load
from ..door.vae import VideoVAE
from ..media.latents import SOUND_ENDING, LatentFile, open_latent, sound_name
from ..media.pictures import is_picture
from . import report
from .blocks import kind_of_file, latent_block, name_of, video_block
from .decoding import check_latent, chosen, decode, decoded_paths, sound_of, store_for, unfinished_folder
from .demo import demo_command
from .encode_dataset import encode_dataset_command
from .evaluate import build_set_command, evaluate_command
from .guard import Commands, UserError, guarded, note, out, say, say_written, set_debug, show
from .inflate import inflate_command
from .options import (
    Bits,
    Budget,
    CodecChoice,
    Crf,
    Device,
    DType,
    DTypeOption,
    Frames,
    HdrChoice,
    HdrOption,
    Overwrite,
    PixFmt,
    Ram,
    Resume,
    Seed,
    SkipDamage,
    Start,
    Tile,
    Tiling,
    TilingOption,
    Video,
    Weights,
    bounded,
    form_of,
    load_weights,
)
from .outputs import check_outputs, fitting, lost_in_pictures
from .plan import plan_command
from .progress import bar_of, progress
from .svd_adapter import train_svd_adapter_command
from .train import train_command
from .work import (
    encode,
    opened,
    reconstruct,
)

app = typer.Typer(
    cls=Commands,
    help="CV-VAE and IV-VAE: video into latents and back, exactly and in bounded memory.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("demo")(demo_command)
app.command("plan")(plan_command)
app.command("evaluate")(evaluate_command)
app.command("build-set")(build_set_command)
app.command("encode-dataset")(encode_dataset_command)
app.command("inflate")(inflate_command)
app.command("train")(train_command)
app.command("train-svd-adapter")(train_svd_adapter_command)


def run() -> None:
    """Run the command line; ends in SystemExit."""
    os.environ.setdefault("SVT_LOG", "1")  # else the AV1 encoder tells its settings on 20 lines
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console's code page lacks most of the world's letters
    app(prog_name="cviv-vae")


def _version(value: bool) -> None:
    if value:
        out.print(f"cviv-vae {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and end.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """CV-VAE and IV-VAE: video into latents and back, exactly and in bounded memory."""
    set_debug(debug)


@app.command()
@guarded
def info(
    file: Annotated[Path, typer.Argument(help="Weights (file or folder), a latent file, a video or a picture.")],
) -> None:
    """Say what a weights file, a latent file or a video holds."""
    kind = kind_of_file(file)
    if kind == "latent":
        say(latent_block(open_latent(file)))
    elif kind == "video":
        say(video_block(file))
    else:
        vae = load(str(file), dtype=None)
        origin = changed_since(file) if file.is_file() else ""
        sha = f"\nSHA-256          {origin}" if origin else ""
        say(f"{file}\n{vae.info}\nstored as        {name_of(vae.dtype)}{sha}")


@app.command("encode")
@guarded
def encode_command(
    video: Video,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The latent file; NAME.latent.safetensors here if left out.")
    ] = None,
    weights: Weights = "demo-cv-vae",
    seed: Seed = None,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
    start: Start = 0,
    frames: Frames = None,
    skip_damage: SkipDamage = False,
    hdr: HdrChoice = HdrOption.tone_map,
    budget: Budget = None,
    ram: Ram = None,
    tiling: Tiling = TilingOption.exact,
    tile: Tile = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a video into a latent file, with its sound beside it."""
    path = output or Path(fitting(video.stem, ".latent.safetensors", spare=len(SOUND_ENDING)))
    check_outputs((path,), overwrite=overwrite, inputs=(video,))
    clip = opened(video, start, frames, skip_damage=skip_damage, hdr=hdr.value)
    if clip.info.has_audio:
        check_outputs((path.with_name(sound_name(path)),), overwrite=overwrite, inputs=(video,))
    vae = bounded(load_weights(weights, dtype, device), budget, ram, tiling, tile)
    with progress("encoding", clip.frames) as advance:
        encode(vae, clip, path, seed=seed, advance=advance)
    say(latent_block(open_latent(path)))


@app.command("decode")
@guarded
def decode_command(
    latents: Annotated[Path, typer.Argument(help="A latent file that encode wrote.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The video, a picture, or pictures such as out_%05d.png; NAME_decoded.mp4 if left out.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", "-w", help="The weights that encoded it; the demo weights of its family if left out."
        ),
    ] = None,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
    start: Start = 0,
    frames: Frames = None,
    crf: Crf = None,
    codec: CodecChoice = None,
    bits: Bits = None,
    pix_fmt: PixFmt = None,
    budget: Budget = None,
    ram: Ram = None,
    tiling: Tiling = TilingOption.exact,
    tile: Tile = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Turn a latent file back into a video with its sound, or into pictures."""
    file = open_latent(latents)
    form = form_of(crf, codec, bits, pix_fmt)
    job = chosen(file, form, start, frames)
    path = output or Path(fitting(_bare_name(latents), f"_decoded{_usual_suffix(job.frames)}"))
    form.check(path, job.size)
    sound, missing = sound_of(file)
    paths = decoded_paths(file, path)
    inputs = [latents] + ([] if sound is None else [sound])
    if resume and tiling is TilingOption.blended:
        raise UserError("--resume goes with --tiling exact: which blended tiles are taken depends on memory.")
    begun = resume and is_picture(path) and unfinished_folder(paths[0]).is_dir()  # some of the pictures are there
    check_outputs(paths, overwrite=overwrite or begun, inputs=inputs, frames=job.frames)
    check_latent(file)
    vae = bounded(_load_for(file, weights, dtype, device), budget, ram, tiling, tile)
    if missing is not None:
        note(missing)
    meta = file.meta
    for text in lost_in_pictures(path, sound=sound is not None, times=meta.times is not None, aspect=meta.aspect):
        note(text)
    store = store_for(vae, job, paths) if resume else None
    if store is not None and store.found:
        note(f"{_frames(store.found)} of {job.frames} are there from an earlier run; goes on after them.")
    elif store is None and unfinished_folder(paths[0]).is_dir():
        note(f"{unfinished_folder(paths[0])} holds frames of a run that was not finished: with --resume they are used.")
    try:
        with progress("decoding", job.frames) as advance:
            told = decode(vae, job, paths, sound=None if is_picture(path) else sound, store=store, advance=advance)
    except BaseException:
        if store is not None and store.frames:
            note(f"{_frames(store.frames)} are kept in {store.folder}: the same command goes on after them.")
        raise
    _say_told(told)
    say_written((_kind_of(path), made) for made in paths)


@app.command("reconstruct")
@guarded
def reconstruct_command(
    video: Video,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The reconstruction, a video or pictures; NAME_reconstruction.mp4 here if left out."
        ),
    ] = None,
    weights: Weights = "demo-cv-vae",
    seed: Seed = None,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
    start: Start = 0,
    frames: Frames = None,
    skip_damage: SkipDamage = False,
    hdr: HdrChoice = HdrOption.tone_map,
    crf: Crf = None,
    codec: CodecChoice = None,
    bits: Bits = None,
    pix_fmt: PixFmt = None,
    budget: Budget = None,
    ram: Ram = None,
    tiling: Tiling = TilingOption.exact,
    tile: Tile = None,
    overwrite: Overwrite = False,
) -> None:
    """Send a video through a VAE and back; write it, a side-by-side, and say how close it is."""
    clip = opened(video, start, frames, skip_damage=skip_damage, hdr=hdr.value)
    suffix = _usual_suffix(1 if clip.info.still else 2)
    plain = output or Path(fitting(video.stem, f"_reconstruction{suffix}"))
    beside = plain.with_name(fitting(plain.stem if output else video.stem, f"_side_by_side{plain.suffix}"))
    form = form_of(crf, codec, bits, pix_fmt)
    form.check(plain, clip.info.size)
    for text in lost_in_pictures(
        plain, sound=clip.info.has_audio, times=clip.times is not None and clip.frames > 1, aspect=clip.info.aspect
    ):
        note(text)
    check_outputs((plain, beside), overwrite=overwrite, inputs=(video,), frames=clip.frames)
    vae = bounded(load_weights(weights, dtype, device), budget, ram, tiling, tile)
    with progress("reconstructing", clip.frames) as advance:
        quality, told = reconstruct(vae, clip, plain=plain, beside=beside, form=form, seed=seed, advance=advance)
    _say_told(told)
    show(report.quality_table(quality, out.width))
    psnr, ssim = quality.mean
    count = len(quality.psnr)
    say(f"mean of {count} frame{'s' * (count != 1)}: PSNR {report.figure(psnr, 2)} dB, SSIM {report.figure(ssim, 4)}")
    say_written((("reconstruction", plain), ("side by side", beside)))


@app.command("download")
@guarded
def download_command(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(OFFICIAL_FILES)}.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder it goes into.")] = Path("models"),
) -> None:
    """Fetch official weights from their authors, and check them."""
    official = OFFICIAL_FILES.get(name)
    if official is None:
        raise UserError(f"{name!r} is not a published file; choose one of {', '.join(OFFICIAL_FILES)}.")
    with bar_of("downloading", None, unit="MB") as (bar, task):

        def report_bytes(here: int, total: int | None) -> None:
            bar.update(task, completed=here // 10**6, total=None if total is None else total // 10**6)

        path = download(name, output, report=report_bytes)
    say(f"{path}\nlicence: {official.licence}; from {official.page}")


# ------------------------------------------------------------------------------------------------------ helpers


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"


def _bare_name(latents: Path) -> str:
    """The name of a latent file without what all of them end in."""
    return latents.name.removesuffix(".safetensors").removesuffix(".latent")


def _usual_suffix(frames: int) -> str:
    return ".png" if frames == 1 else ".mp4"


def _kind_of(path: Path) -> str:
    return "video" if not is_picture(path) else "pictures" if "%" in path.name else "picture"


def _load_for(file: LatentFile, weights: str | None, dtype: DType, device: str) -> VideoVAE:
    """The VAE for a latent file: of the same family and channels."""
    channels = file.shape[1]
    if weights is None:
        demos = {("cv-vae", 4): "demo-cv-vae", ("iv-vae", 16): "demo-iv-vae", ("image-vae", 4): "demo-image-vae"}
        weights = demos.get((file.meta.family, channels))
        if weights is None:
            raise UserError(
                f"{file.path} was made by {file.meta.family} with {channels} latent channels, of which there are no "
                "demo weights; name the weights that made it with --weights."
            )
        note(f"decoding with {weights}; if other weights made this file, name them with --weights.")
    vae = load_weights(weights, dtype, device)
    if (vae.family, vae.info.latent_channels) != (file.meta.family, channels):
        raise UserError(
            f"{file.path} was made by {file.meta.family} with {channels} latent channels, and {weights} is "
            f"{vae.family} with {vae.info.latent_channels}; name the weights that made it with --weights."
        )
    return vae


def _say_told(told: Iterable[str]) -> None:
    for sentence in dict.fromkeys(told):
        note(f"{sentence[0].upper()}{sentence[1:]}.")
