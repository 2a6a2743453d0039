"""The date tokens that ComfyUI's page fills into file names, for those who come without the page: %date:yyyy-MM-dd%."""

from __future__ import annotations

import re
import time

_TOKEN = re.compile(r"%date:([^%]*)%")
_FIELDS = re.compile(r"yyyy|yy|MM?|dd?|hh?|mm?|ss?")
_OF_THE_CLOCK = ("h", "m", "s")


def fill_dates(text: str, now: time.struct_time) -> str:
    """`text` with every %date:...% as the page writes it: d, M, h, m and s once or twice, yy and yyyy."""
    values = {"d": now.tm_mday, "M": now.tm_mon, "h": now.tm_hour, "m": now.tm_min, "s": now.tm_sec}

    def field(match: re.Match[str]) -> str:
        name = match.group()
        if name[0] == "y":
            return str(now.tm_year)[-len(name) :]
        return str(values[name[0]]).zfill(len(name))

    return _TOKEN.sub(lambda match: _FIELDS.sub(field, match.group(1)), text)


def passing_dates(text: str) -> list[str]:
    """The date tokens in `text` that tell the time of day."""
    return [
        match.group()
        for match in _TOKEN.finditer(text)
        if any(name[0] in _OF_THE_CLOCK for name in _FIELDS.findall(match.group(1)))
    ]
