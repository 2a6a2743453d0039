"""Sizes of the pictures that docs/make_pictures.py takes, and the icon."""

from __future__ import annotations

from PIL import Image, ImageDraw

BACKGROUND = "#141414"  # of the graph, in dark


def shrunk(picture: Image.Image, width: int) -> Image.Image:
    """A picture that is no wider than `width`."""
    if picture.width <= width:
        return picture
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)


def on_square(picture: Image.Image, side: int) -> Image.Image:
    """A picture as wide as the square that it is put on, from the top; what is longer is cut off."""
    height = round(picture.height * side / picture.width)
    square = Image.new("RGB", (side, side), BACKGROUND)
    square.paste(picture.resize((side, height), Image.Resampling.LANCZOS), (0, max(0, (side - height) // 2)))
    return square


def cover(picture: Image.Image, side: int) -> Image.Image:
    """A square out of the upper middle of a picture."""
    edge = min(picture.size)
    left = (picture.width - edge) // 2
    return picture.crop((left, 0, left + edge, edge)).resize((side, side), Image.Resampling.LANCZOS)


def icon(side: int) -> Image.Image:
    """The pack's icon: frames one after another, the last of them whole."""
    picture = Image.new("RGB", (400, 400), "#1f2430")
    pen = ImageDraw.Draw(picture)
    for number, colour in enumerate(("#2f4a6b", "#3b6ea5", "#57a0d3", "#f2b134")):
        left, top = 60 + 40 * number, 70 + 35 * number
        pen.rounded_rectangle((left, top, left + 170, top + 150), radius=18, fill=colour, outline="#1f2430", width=8)
    pen.polygon(((245, 215), (245, 285), (305, 250)), fill="#1f2430")
    return picture.resize((side, side), Image.Resampling.LANCZOS)
