r"""Pictures to train demo weights on, gathered from packages into one folder.

    pip download --no-deps comfyui-workflow-templates-media-image==0.3.160 \
        comfyui-workflow-templates-media-assets-01==0.1.48 comfyui-workflow-templates-media-assets-02==0.1.24
    pip download --no-deps --only-binary=:all: --python-version 3.10 --platform manylinux2014_x86_64 scipy==1.9.3
    npm pack @pmndrs/assets@1.7.0
    apt-get download lomiri-wallpapers-16.04 && dpkg -x lomiri-wallpapers-16.04_*.deb wallpapers
    pip install openexr
    python -m vae_core.training.photographs FOLDER --scipy scipy-1.9.3-*.whl --assets pmndrs-assets-1.7.0.tgz
        --wallpapers wallpapers --templates comfyui_workflow_templates_media_image-*.whl --templates ...

The photographs are CC0 or in the public domain, the pictures of the templates under the MIT license, as their
packages say. Of the demo weights only the IV-VAE's were trained on those of the templates too;
`vae_core/demo/README.md` lists what they were trained on.
"""

from __future__ import annotations

import base64
import bz2
import io
import pickletools
import re
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageSequence

SCIKIT_IMAGE = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "clock_motion.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "text.png",
)
WALLPAPER = "seeding_by_Clements_Engelhardt.jpg"
GREY = 0.2  # linear light that the geometric mean of a panorama is brought to
EXPOSURE_LIMIT = 50.0
TEMPLATE_SIDE = 288  # least short side that pictures of templates are shrunk to, so that compressed ones are sharp


def from_scikit_image(out: Path) -> None:
    """Photographs that the installed scikit-image holds; the retina's dark rim is cut off."""
    from skimage import data

    for name in SCIKIT_IMAGE:
        with Image.open(Path(data.__file__ or "").parent / name) as image:
            picture = image.convert("RGB")
        if name == "retina.jpg":
            picture = picture.crop((250, 250, 1160, 1160)).resize((455, 455), Image.Resampling.BOX)
        picture.save(out / f"skimage_{Path(name).stem}.png")


def from_scipy(wheel: Path, out: Path) -> None:
    """`face` (a raccoon) and `ascent`, which scipy held until 1.9."""
    with zipfile.ZipFile(wheel) as archive:
        face = bz2.decompress(archive.read("scipy/misc/face.dat"))
        ascent = archive.read("scipy/misc/ascent.dat")
    Image.fromarray(np.frombuffer(face, np.uint8).reshape(768, 1024, 3)).save(out / "scipy_face.png")
    # a pickled list of 512 lists of 512 integers: read as a list of opcodes, nothing is executed
    numbers = [value for code, value, _ in pickletools.genops(ascent) if code.name in ("BININT1", "BININT2", "BININT")]
    grey = np.array(numbers, np.uint8).reshape(512, 512)
    Image.fromarray(grey).convert("RGB").save(out / "scipy_ascent.png")


def _photograph(light: NDArray[np.floating[Any]]) -> Image.Image:
    """A picture of a panorama of linear light: exposed for its geometric mean, highlights rolled off, sRGB."""
    light = np.nan_to_num(light, nan=20.0, posinf=EXPOSURE_LIMIT).clip(0, EXPOSURE_LIMIT)
    light = light * (GREY / np.exp(np.log(light.mean(2) + 1e-4).mean()))
    light = 1.3 * light / (1 + 0.6 * light)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light.clip(1e-6) ** (1 / 2.4) - 0.055)
    return Image.fromarray((encoded.clip(0, 1) * 255).round().astype(np.uint8))


def from_assets(package: Path, out: Path) -> None:
    """The panoramas of @pmndrs/assets, 512 x 256 OpenEXR in base64."""
    import OpenEXR  # pyright: ignore[reportMissingImports]

    with tarfile.open(package) as archive, tempfile.TemporaryDirectory() as folder:
        for member in archive.getmembers():
            found = re.fullmatch(r"package/hdri/(\w+)\.exr\.js", member.name)
            content = archive.extractfile(member) if found else None
            if found is None or content is None:
                continue
            encoded = re.search(rb"base64,([A-Za-z0-9+/=]+)", content.read())
            assert encoded is not None, member.name
            path = Path(folder) / "panorama.exr"
            path.write_bytes(base64.b64decode(encoded[1]))
            file: Any = OpenEXR.File(str(path))  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            _photograph(file.channels()["RGB"].pixels.astype(np.float32)).save(out / f"hdri_{found[1]}.png")


def from_wallpapers(folder: Path, out: Path) -> None:
    """One wallpaper, shrunk to a width of 960 pixels."""
    with Image.open(next(folder.rglob(WALLPAPER))) as image:
        picture = image.convert("RGB")
    height = round(picture.height / (picture.width / 960))
    picture.resize((960, height), Image.Resampling.BOX).save(out / "lomiri_seeding.png")


def from_templates(wheel: Path, out: Path) -> None:
    """Pictures of a wheel of ComfyUI's workflow templates; the middle frame of each animation."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if Path(name).suffix not in (".webp", ".png", ".jpg") or "/templates/" not in name:
                continue
            with Image.open(io.BytesIO(archive.read(name))) as image:
                frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
            if min(frames[0].size) < TEMPLATE_SIDE:
                continue
            _shrunk(frames[len(frames) // 2]).save(out / f"template_{Path(name).stem}.png")


def _shrunk(picture: Image.Image) -> Image.Image:
    """To a short side of TEMPLATE_SIDE, or of twice that where there is as much."""
    side = min(picture.size)
    short = TEMPLATE_SIDE * (2 if side >= 2 * TEMPLATE_SIDE else 1)
    size = (round(picture.width * short / side), round(picture.height * short / side))
    return picture.resize(size, Image.Resampling.LANCZOS)


def main(
    out: Annotated[Path, typer.Argument(help="Folder to fill.")],
    scipy: Annotated[Path | None, typer.Option(help="The scipy 1.9.3 wheel.")] = None,
    assets: Annotated[Path | None, typer.Option(help="The @pmndrs/assets 1.7.0 package.")] = None,
    wallpapers: Annotated[Path | None, typer.Option(help="The unpacked lomiri-wallpapers-16.04.")] = None,
    templates: Annotated[list[Path] | None, typer.Option(help="A wheel of ComfyUI's template media.")] = None,
) -> None:
    """Gather the photographs; what is not given is left out."""
    out.mkdir(parents=True, exist_ok=True)
    from_scikit_image(out)
    if scipy is not None:
        from_scipy(scipy, out)
    if assets is not None:
        from_assets(assets, out)
    if wallpapers is not None:
        from_wallpapers(wallpapers, out)
    for wheel in templates or ():
        from_templates(wheel, out)
    typer.echo(f"{len(list(out.glob('*.png')))} photographs in {out}")


if __name__ == "__main__":
    typer.run(main)
