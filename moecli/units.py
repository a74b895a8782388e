"""Knows how sizes, counts and times are written for people and read from them; knows no flags."""

import re
from dataclasses import dataclass

from moecli.errors import MoecliError

KIB, MIB, GIB, TIB = (1 << shift for shift in (10, 20, 30, 40))
_UNITS = {
    "b": 1,
    **{"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
    **{"k": KIB, "m": MIB, "g": GIB, "t": TIB},
    **{"kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB},
}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z%]*)")


@dataclass(frozen=True)
class Size:
    """A budget: so many bytes, or a share of something known only later."""

    nbytes: int | None = None
    share: float | None = None

    def of(self, whole_nbytes: int) -> int:
        """The budget in bytes, where a share is of `whole_nbytes`."""
        if self.nbytes is not None:
            return self.nbytes
        assert self.share is not None, "a size is bytes or a share"
        return int(self.share * whole_nbytes)


def parse_size_or_none(text: str, name: str) -> Size:
    """As parse_size, and 0, with any unit or none: there is nothing of it."""
    match = _NUMBER.fullmatch(text.strip())
    nothing = match and not float(match[1]) and match[2].lower() in {"", "%", *_UNITS}
    return Size(nbytes=0) if nothing else parse_size(text, name)


def parse_size(text: str, name: str) -> Size:
    """`24GiB`, `24g`, `500MB`, `80%`. Raises MoecliError (usage), naming the option `name`."""
    match = _NUMBER.fullmatch(text.strip())
    if match:
        number, unit = float(match[1]), match[2].lower()
        if unit == "%" and 0 < number <= 100:
            return Size(share=number / 100)
        if unit in _UNITS and int(number * _UNITS[unit]) > 0:
            return Size(nbytes=int(number * _UNITS[unit]))
    raise MoecliError(
        f"{name}: `{text}` is no size", "write it as `24GiB`, `500MB` or `80%`", exit_code=2
    )


def parse_bandwidth(text: str, name: str) -> float:
    """Bytes a second: `25GB/s`. Raises MoecliError (usage), naming the option `name`."""
    match = _NUMBER.fullmatch(text.strip().removesuffix("/s"))
    if match and match[2].lower() in _UNITS and float(match[1]) > 0:
        return float(match[1]) * _UNITS[match[2].lower()]
    raise MoecliError(f"{name}: `{text}` is no bandwidth", "write it as `25GB/s`", exit_code=2)


def parse_count(text: str, name: str) -> int:
    """`4096`, `32k` (32768), `1m`. Raises MoecliError (usage), naming the option `name`."""
    match = re.fullmatch(r"(\d+)([km]?)", text.strip().lower())
    if match:
        count = int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2]]
        if count > 0:
            return count
    raise MoecliError(
        f"{name}: `{text}` is no count of tokens", "write it as `4096` or `32k`", exit_code=2
    )


def format_nbytes(nbytes: int | float) -> str:
    """`3.2 GiB`, `512 KiB`, `17 B`."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(nbytes) >= 0.9995 * unit:
            value = nbytes / unit
            return f"{value:.0f} {name}" if value >= 99.95 else f"{value:.1f} {name}"
    return f"{nbytes:.0f} B"


def format_bandwidth(nbytes_s: float) -> str:
    """Decimal, as makers and planners write them: `3.2 GB/s`."""
    for unit, name in ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s")):
        if nbytes_s >= unit:
            return f"{nbytes_s / unit:.1f} {name}"
    return f"{nbytes_s:.0f} B/s"


def format_params(count: int) -> str:
    """`108.6B`, `22.7M`, `512`."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(count)


def format_seconds(seconds: float) -> str:
    """`0.42 s`, `12 s`, `3m 05s`, `2h 10m`."""
    return f"{seconds:.2f} s" if seconds < 10 else format_wait(seconds)


def format_wait(seconds: float) -> str:
    """The same in whole seconds, for what can only be guessed."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
