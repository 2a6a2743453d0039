"""The command inflate."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..door.loading import save
from ..training.inflation import InflationError, inflate
from .guard import UserError, guarded, note, say
from .options import Overwrite
from .outputs import check_outputs


class FamilyOption(str, Enum):
    """Families that an image VAE can become."""

    cv = "cv-vae"
    sd3 = "cv-vae-sd3"
    iv = "iv-vae"


@guarded
def inflate_command(
    image_vae: Annotated[
        list[Path],
        typer.Argument(
            help="The image VAE: a file or a diffusers folder. For IV-VAE one or two IVImageVAEs of half its channels.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The video VAE; ends in .safetensors or .pth.")],
    family: Annotated[
        FamilyOption | None,
        typer.Option("--family", help="cv-vae, cv-vae-sd3 or iv-vae; without: what the image VAE fits best."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a video VAE of a 2-D image VAE; before any training it does the same on still frames."""
    check_outputs((output,), overwrite=overwrite, inputs=image_vae)
    try:
        made = inflate(image_vae, None if family is None else family.value)
    except InflationError as error:
        raise UserError(str(error)) from error
    save(made.vae, output)
    for text in made.notes:
        note(text)
    say(f"{output}\n{made.vae.info}")
