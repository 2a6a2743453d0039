"""SVD End Image: a clip that ends at a picture."""

from __future__ import annotations

from typing import Any

import comfy.utils
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ...vae_core.families import VIDEO
from ..bridge.schema import check_choice, describe, field
from ..bridge.wire import pixels_of
from .anchor import check_readers, encode_pictures, see_pictures
from .hooks import KEY, LongSampling
from .job import LongSettings
from .model import check_svd
from .rounds import END, EndImage
from .windows import TRAINED

FIRST = ("start image", "end image")


class SVDEndImage(io.ComfyNode):
    """Model and last picture in, model out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_SVDEndImage",
            display_name="SVD End Image",
            description="Lets a clip of SVD end at a picture, without training: every step is made towards the start "
            "image and, with time turned round, towards the end image. Twice the work; sampler euler. With one "
            "picture as both the clip comes back to where it began.",
            search_aliases=["last frame", "end frame", "inbetween", "keyframe interpolation", "vibid", "svd loop"],
            inputs=[
                field(io.Model, "model", tooltip="SVD, before or after SVD Long Video."),
                field(io.Conditioning, "positive", tooltip="Of the start image; gives the size."),
                field(io.ClipVision, "clip_vision", tooltip="From Image Only Checkpoint Loader."),
                field(io.Image, "image", tooltip="The picture that the clip ends at. Alpha is dropped."),
                field(
                    io.Vae,
                    "image_vae",
                    tooltip="Encodes the picture: SVD's own VAE from Image Only Checkpoint Loader, or a CV-VAE.",
                ),
                field(
                    io.Combo,
                    "first_pass",
                    options=list(FIRST),
                    default=FIRST[0],
                    optional=True,
                    tooltip="Which image the first of the two passes of a run follows. They take turns in every step, "
                    "so it matters little.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For the sampler, with euler, or SVD Long Video.")],
            is_experimental=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        clip_vision: Any,
        image: Any,
        image_vae: Any,
        first_pass: str = FIRST[0],
    ) -> io.NodeOutput:
        check_choice("first_pass", first_pass, FIRST)
        check_svd(model)
        check_readers(clip_vision, image_vae)
        shown = pixels_of(image)[-1:]
        height, width = (side * VIDEO.space for side in _start_image(positive).shape[-2:])
        scaled = comfy.utils.common_upscale(shown.movedim(-1, 1), width, height, "bilinear", "center").movedim(1, -1)
        end = EndImage(
            image=encode_pictures(image_vae, scaled).cpu(),
            seen=see_pictures(clip_vision, shown).cpu(),
            end_first=first_pass == FIRST[1],
        )
        patched = model.clone() if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY) else _sampled_at_once(model)
        patched.model_options.setdefault("transformer_options", {})[END] = end
        return io.NodeOutput(patched)


def _start_image(positive: Any) -> Tensor:
    """The image latent of a conditioning. Raises ValueError where there is none."""
    for _, told in positive:
        if isinstance(told.get("concat_latent_image"), Tensor):
            return told["concat_latent_image"]
    raise ValueError(
        "The conditioning has no image: connect positive of SVD Image to Long Video or SVD_img2vid_Conditioning."
    )


def _sampled_at_once(model: Any) -> Any:
    """A model with the hooks of SVD Long Video and nothing of what they do to longer clips."""
    settings = LongSettings(
        mode="continuation",
        length=TRAINED,
        overlap=4,
        fuse="pyramid",
        moving=False,
        wide=0.0,
        fade=2,
        anchor="moving",
        freenoise=False,
        drift=0.5,
        time_offset=False,
        min_cfg=0.0,
        resamples=1,
        steady=False,
    )
    return LongSampling(settings).patch(model)


NODES = [SVDEndImage]
