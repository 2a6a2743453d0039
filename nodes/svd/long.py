"""SVD Long Video: the model of SVD, patched to sample more latents than it was trained on."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...vae_core.families import VIDEO
from ..bridge.running import report_ui
from ..bridge.schema import check_choice, describe
from ..bridge.wire import Facts, read_facts, samples_of
from .anchor import CHANNELS, Reader, check_readers
from .hooks import LongSampling
from .job import LongSettings
from .long_inputs import ANCHORS, MODES, NOISES, SCHEDULES, long_inputs
from .model import check_svd
from .picture import draw_plan
from .schedule import FUSES
from .windows import TRAINED, check_overlap, count_spans, describe_runs, most_latents

DEFAULT_FPS = 24.0


class SVDLongVideo(io.ComfyNode):
    """Windows or continuation for SVD, in any sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_SVDLongVideo",
            display_name="SVD Long Video",
            description="Lets SVD sample more latents than the 25 it was trained on: chunk after chunk, by overlapping "
            "windows in every step, or as a loop. Works in KSampler and SamplerCustomAdvanced with every sampler.",
            search_aliases=["svd context windows", "svd long", "freenoise", "continue video", "svd extend", "loop"],
            inputs=long_inputs(),
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler. Clips of one window sample as before."),
                io.Image.Output(display_name="picture", tooltip="The windows or chunks over time."),
                io.String.Output(display_name="report", tooltip="Which windows, how much work, what to expect."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        samples: Any,
        mode: str,
        window_length: int,
        overlap: int,
        fuse: str,
        carry: int,
        crossfade: int,
        anchor: str,
        noise: str,
        drift_control: float,
        time_offset: bool,
        min_cfg: float,
        window_schedule: str = "moving",
        wide_steps: float = 0.0,
        resamples: int = 1,
        steady_motion: bool = False,
        image_vae: Any = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        for what, got, allowed in (
            ("mode", mode, MODES),
            ("fuse", fuse, FUSES),
            ("anchor", anchor, ANCHORS),
            ("noise", noise, NOISES),
            ("window_schedule", window_schedule, SCHEDULES),
        ):
            check_choice(what, got, allowed)
        chunks = mode == "continuation"
        check_overlap("carry" if chunks else "overlap", window_length, carry if chunks else overlap, least=int(chunks))
        check_svd(model)
        facts = _check_latent(samples)
        settings = LongSettings(
            mode=mode,
            length=window_length,
            overlap=carry if chunks else overlap,
            fuse=fuse,
            moving=window_schedule == "moving",
            wide=wide_steps,
            fade=min(crossfade, carry) if chunks else 0,
            anchor=anchor,
            freenoise=noise == "FreeNoise",
            drift=drift_control,
            time_offset=time_offset,
            min_cfg=min_cfg,
            resamples=resamples,
            steady=steady_motion,
        )
        reader = _reader(anchor, clip_vision, image_vae) if chunks else None
        latents = samples["samples"].shape[0]
        fps = float(facts.fps or DEFAULT_FPS)
        report = "\n".join(_report(latents, settings, facts, fps))
        patched, picture = LongSampling(settings, reader).patch(model), draw_plan(latents, settings, fps)
        return io.NodeOutput(patched, picture, report, ui=report_ui(report))


def _reader(anchor: str, clip_vision: Any, image_vae: Any) -> Reader | None:
    """What makes pictures of latents, where the anchor asks for it. Raises ValueError where a model is missing."""
    if anchor != "re-encoded":
        return None
    if image_vae is None or clip_vision is None:
        given = {"image_vae": image_vae, "clip_vision": clip_vision}
        missing = " and ".join(name for name, one in given.items() if one is None)
        raise ValueError(
            f"anchor is re-encoded and nothing is connected to {missing}: connect VAE and CLIP vision of Image Only "
            "Checkpoint Loader, or choose anchor moving."
        )
    check_readers(clip_vision, image_vae)
    return Reader(image_vae=image_vae, clip_vision=clip_vision)


def _check_latent(latent: Any) -> Facts:
    """The facts of a latent that SVD can sample. Raises ValueError for any other."""
    samples, facts = samples_of(latent), read_facts(latent)
    if facts.own_space or (facts.family is not None and samples.shape[1] != CHANNELS):
        raise ValueError(
            f"This latent was made by {facts.family}, whose latent space is not SVD's; sampling it would give noise. "
            "Use the latent of SVD Image to Long Video, or encode the video with CV-VAE (4 channels)."
        )
    if samples.ndim != 4 or samples.shape[1] != CHANNELS:
        raise ValueError(
            f"The latent has shape {tuple(samples.shape)}; SVD samples (frames, 4, height, width). Use the latent of "
            "SVD Image to Long Video; a 5-D latent of CV-VAE becomes 4-D in Latent Layout (clip as frame batch)."
        )
    return facts


def _report(latents: int, settings: LongSettings, facts: Facts, fps: float) -> list[str]:
    frames = facts.frames or VIDEO.pixel_frames(latents)
    lines = [f"{latents} latents, {frames} frames, {frames / fps:.1f} s at {fps:g} frames per second"]
    if settings.mode == "loop":
        lines[0] = f"a loop of {latents} latents: Decode Loop makes {4 * latents} frames, {4 * latents / fps:.1f} s"
    elif latents <= settings.length:
        lines.append(f"one window of up to {settings.length} latents is enough: the model samples as without this node")
        return lines
    if settings.mode == "continuation":
        lines += _about_chunks(latents, settings)
    else:
        lines += _about_windows(latents, settings)
    if settings.length > TRAINED:
        lines.append(f"windows of {settings.length} latents are longer than the {TRAINED} that SVD-XT was trained on")
    lines.append("no quality of SVD beyond its training length was measured for this node: compare settings by eye")
    return lines


def _about_chunks(latents: int, settings: LongSettings) -> list[str]:
    spans = settings.spans(latents)
    runs = describe_runs([(span.start, span.stop - 1) for span in spans])
    lines = [
        f"{len(spans)} chunks, one after another, {settings.length} latents each: {runs}",
        *_cost(latents, len(spans), settings),
    ]
    if settings.drift:
        lines.append(f"drift control {settings.drift:g}: grows over each chunk, before its last latents are carried on")
    if settings.resamples > 1:
        lines.append(f"every step of a later chunk is made {settings.resamples} times; the sampler must be euler")
    return lines


def _about_windows(latents: int, settings: LongSettings) -> list[str]:
    schedule = settings.schedule
    windows = schedule.windows(latents, 0, 0)
    runs = describe_runs([(window.latents[0], window.latents[-1]) for window in windows])
    count = schedule.most_windows(latents)
    lines = [f"up to {count} windows in every step, {len(windows[0].latents)} latents each; in the first: {runs}"]
    if not settings.moving:
        lines = [f"{count} windows in every step, {len(windows[0].latents)} latents each: {runs}"]
    if settings.wide:
        lines.append(f"in the first {settings.wide:.0%} of the steps they take every other latent")
    if settings.mode == "loop":
        work = count * len(windows[0].latents)
        return [*lines, f"work of {work} latents ({work / latents:.2f} times the loop), memory of one window"]
    return [*lines, *_cost(latents, count, settings)]


def _cost(latents: int, count: int, settings: LongSettings) -> list[str]:
    """Work and memory, and the lengths at which a window more or fewer is needed."""
    length, overlap = settings.length, settings.overlap
    work = count * length
    needed = count_spans(latents, length, overlap)
    most, fewer = (most_latents(spans, length, overlap) for spans in (needed, needed - 1))
    lines = [f"work of {work} latents ({work / latents:.2f} times the clip), memory of {length}"]
    if most > latents:
        lines.append(
            f"the same work gives up to {most} latents ({VIDEO.pixel_frames(most)} frames); {fewer} latents "
            f"({VIDEO.pixel_frames(fewer)} frames) need one less"
        )
    return lines


NODES = [SVDLongVideo]
