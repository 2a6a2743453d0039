"""Load Video VAE, Video VAE Info and Demo Clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import InputImpl, io

from ...vae_core import DEMO_FOLDER, load
from ..bridge.native import NativeVideoVAE, require
from ..bridge.running import report_ui, show_text
from ..bridge.schema import before_run, check_choice, describe, dtype_words, field, stamp, vae_input
from ..bridge.wire import Layout
from .official import choices, chosen_download, fetch_official, path_of

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEVICES = ("auto", "gpu", "cpu")
LAYOUTS: dict[str, Layout | None] = {
    "auto": None,
    "clip as frame batch": "frames",
    "video 5-D": "video",
    "separate images": "images",
}


class LoadVideoVAE(io.ComfyNode):
    """Weights of models/vae, or the bundled demo weights, as a VAE that stock nodes can use."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_LoadVideoVAE",
            display_name="Load Video VAE",
            description="Loads a CV-VAE, an IV-VAE or the image VAE of Stable Diffusion (1.x, 2.x, XL, 3) or Flux, and "
            "gives a VAE that ComfyUI's own nodes can use, too. ComfyUI's Load VAE cannot read CV-VAE and IV-VAE.",
            search_aliases=["cv-vae", "iv-vae", "image vae", "video vae loader", "vae3d", "ivvae"],
            inputs=[
                field(
                    io.Combo,
                    "vae_name",
                    options=choices(),
                    tooltip="A file of models/vae; bundled demo weights, which are small and blur; or download: gets "
                    "that official file into models/vae when the workflow runs, once. The family is read from the "
                    "weights, whatever the name.",
                ),
                field(
                    io.Combo,
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    tooltip="Number format of the network. auto: bf16 where the device has it, else fp32; ComfyUI's "
                    "--bf16-vae and its like are obeyed. fp16 can overflow and then stops with a message.",
                ),
                field(
                    io.Combo,
                    "device",
                    options=list(DEVICES),
                    default="auto",
                    tooltip="Where the network runs. auto: ComfyUI's choice for VAEs; gpu and cpu overrule it.",
                ),
                field(
                    io.Combo,
                    "latent_layout",
                    options=list(LAYOUTS),
                    default="auto",
                    tooltip="How a clip's latents lie on the wire. clip as frame batch: 4-D, as SD, AnimateDiff and "
                    "SVD samplers take them; a batch is then ONE clip. video 5-D: as newer video models. separate "
                    "images: each latent of a batch is a picture of its own. auto: frame batch for CV-VAE with 4 "
                    "channels and for image VAEs, which take every latent by itself; 5-D for the others.",
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="For the nodes of this pack and for stock VAE nodes.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, vae_name: str | None = None) -> bool | str:
        return before_run((path_of, vae_name))

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        return stamp(path_of, inputs.get("vae_name"))

    @classmethod
    def execute(cls, vae_name: str, dtype: str, device: str, latent_layout: str) -> io.NodeOutput:
        check_choice("dtype", dtype, tuple(DTYPES))
        check_choice("device", device, DEVICES)
        check_choice("latent_layout", latent_layout, tuple(LAYOUTS))
        path, told = path_of(vae_name), list[str]()
        if path is None:
            path, sentence = _download(vae_name, cls.hidden.unique_id)
            told.append(sentence)
        target, remarks = _device(device)
        working = DTYPES[dtype] or mm.vae_dtype(target, [torch.bfloat16, torch.float32])
        codec = load(path, device=mm.vae_offload_device(), dtype=working)
        info, chosen = codec.info, LAYOUTS[latent_layout]
        sampled = info.scaled_by == "sampler"
        on_batch_axis = sampled and (info.time_compression == 1 or info.latent_channels == 4)
        layout = chosen or ("frames" if on_batch_axis else "video")
        if layout == "frames" and not sampled:
            raise ValueError(
                f"{vae_name} is of the family {info.family}, whose latent space is its own, and clip as frame batch is "
                "the layout of SD and SVD samplers, which would make noise of its latents. Choose auto or video 5-D, "
                "or load a CV-VAE."
            )
        vae = NativeVideoVAE(codec, layout=layout, device=target, dtype=working, chosen=chosen, remarks=remarks)
        head = f"{codec.family}, {codec.info.latent_channels} channels, {dtype_words(working)} on {target}"
        return io.NodeOutput(vae, ui=report_ui("\n".join((head, *remarks, *told))))


def _device(choice: str) -> tuple[torch.device, list[str]]:
    """The device of a choice, and a sentence where it is another than the user must expect."""
    if choice == "cpu":
        return torch.device("cpu"), []
    if choice == "auto":
        return mm.vae_device(), []
    device = mm.get_torch_device()
    if device.type != "cpu":
        return device, []
    return device, ["device is gpu, but ComfyUI has none here or runs with --cpu: this runs on the CPU"]


def _download(vae_name: str, node_id: str) -> tuple[Path, str]:
    """Fetch the official file of a choice, with progress and cancel: its path, and a sentence about it."""
    official = chosen_download(vae_name)
    assert official is not None
    bar = comfy.utils.ProgressBar(official.bytes, node_id=node_id)

    def report(here: int, total: int | None) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(here, total or official.bytes)
        show_text(f"{here / 1e6:.0f} of {(total or official.bytes) / 1e6:.0f} MB", node_id)

    path, digest = fetch_official(official, report)
    return path, f"downloaded from {official.page} as {path.name}, licence: {official.licence}\nSHA-256 {digest}"


class VideoVAEInfo(io.ComfyNode):
    """What a loaded VAE is, as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_VideoVAEInfo",
            display_name="Video VAE Info",
            description="Family, channels, compression, scaling, parameters, number format and layout of a video VAE.",
            inputs=[vae_input()],
            outputs=[io.String.Output(display_name="info", tooltip="One fact a line.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, vae: Any) -> io.NodeOutput:
        vae = require(vae)
        layout = next(words for words, layout in LAYOUTS.items() if layout == vae.layout)
        text = "\n".join(
            (
                str(vae.codec.info),
                f"running as       {dtype_words(vae.vae_dtype)} on {vae.device}",
                f"latent layout    {layout}",
            )
        )
        return io.NodeOutput(text, ui=report_ui(text, unfolded=True))


class DemoClip(io.ComfyNode):
    """The clip that comes with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_DemoClip",
            display_name="Demo Clip",
            description="The clip that comes with the pack: 49 frames of 320x192 at 24 frames per second, camera "
            "moves over two photographs that are free to use. For trying a workflow without a file of your own.",
            inputs=[],
            outputs=[io.Video.Output(display_name="video", tooltip="A VIDEO, as Load Video gives it.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(InputImpl.VideoFromFile(str(DEMO_FOLDER / "demo_clip.mp4")))


NODES = [LoadVideoVAE, VideoVAEInfo, DemoClip]
