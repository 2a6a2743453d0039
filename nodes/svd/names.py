"""Names that users give to files and folders."""

from __future__ import annotations

import re

from ..latents.paths import DEVICE_NAME

_NAME = re.compile(r"\w[\w .-]{0,79}")


def check_name(what: str, name: str, example: str, hint: str) -> None:
    """Raise ValueError unless `name` is a plain file name on every system."""
    if not _NAME.fullmatch(name) or name[-1] in " ." or DEVICE_NAME.fullmatch(name) or len(name.encode()) > 200:
        raise ValueError(
            f"The {what} is {name[:100]!r}: give a plain name of up to 80 letters, digits, blanks, dots, - and _, such "
            f"as {example}; {hint}."
        )
