"""Pictures gathered from packages."""

import io
import zipfile
from pathlib import Path

from PIL import Image

from vae_core.training.photographs import from_templates


def _webp(size: tuple[int, int], *colours: str) -> bytes:
    frames = [Image.new("RGB", size, colour) for colour in colours]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    return file.getvalue()


def test_templates_give_their_pictures_and_the_middle_of_their_animations(tmp_path: Path) -> None:
    wheel = tmp_path / "media.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("media/templates/still-1.webp", _webp((800, 600), "blue"))
        archive.writestr("media/templates/moving-1.webp", _webp((400, 300), "red", "lime", "blue"))
        archive.writestr("media/templates/tiny-1.webp", _webp((200, 300), "red"))
        archive.writestr("media/templates/sound.mp3", b"no picture")
        archive.writestr("media/logo.webp", _webp((400, 300), "red"))
    from_templates(wheel, tmp_path)
    found = {path.name: Image.open(path) for path in tmp_path.glob("*.png")}
    assert set(found) == {"template_still-1.png", "template_moving-1.png"}
    assert found["template_still-1.png"].size == (768, 576)  # twice the least short side
    assert found["template_moving-1.png"].size == (384, 288)
    assert found["template_moving-1.png"].getpixel((9, 9)) == (0, 255, 0)
