"""Knows which value of a setting counts, and what it means.

One rule of precedence: flag, environment, config file, the model's generation_config.json, built
in. Flags and environment arrive together, as typed: Typer has joined them. Knows no commands.
"""

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moecli.config import (
    DEVICES,
    KERNELS,
    KV_DTYPES,
    LANES,
    PLACEMENTS,
    RUN_SCHEMES,
    EngineConfig,
    SamplingConfig,
)
from moecli.errors import MoecliError
from moecli.units import Size, parse_count, parse_size, parse_size_or_none


def parse_int(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise MoecliError(f"{name}: `{text}` is no whole number", exit_code=2) from None


def parse_float(text: str, name: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise MoecliError(f"{name}: `{text}` is no number", exit_code=2) from None
    if number != number or abs(number) == float("inf"):
        raise MoecliError(f"{name}: `{text}` is no number", exit_code=2)
    return number


def _one_of(what: str, known: tuple[str, ...]) -> Callable[[str, str], str]:
    """Reads one of a few names."""

    def parse(text: str, name: str) -> str:
        if text not in known:
            names = ", ".join(f"`{one}`" for one in known)
            raise MoecliError(f"{name}: no {what} `{text}`", f"there are {names}", exit_code=2)
        return text

    return parse


def _text(text: str, name: str) -> str:
    return text


# Every setting that a config file may hold, by the name of its flag.
_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "ctx": parse_count,
    "ram": parse_size,
    "vram": parse_size_or_none,
    "threads": parse_int,
    "kernels": _one_of("kernels", KERNELS),
    "device": _one_of("device", DEVICES),
    "placement": _one_of("placement", PLACEMENTS),
    "lane": _one_of("lane", LANES),
    "dense-scheme": _one_of("scheme of running dense weights", RUN_SCHEMES),
    "kv-dtype": _one_of("dtype of a KV cache", KV_DTYPES),
    "temp": parse_float,
    "top-p": parse_float,
    "top-k": parse_int,
    "min-p": parse_float,
    "seed": parse_int,
    "max-tokens": parse_count,
    "system": _text,
}
_MODEL_NAMES = {"temp": "temperature", "top-p": "top_p", "top-k": "top_k", "min-p": "min_p"}


class Settings:
    """What was asked for on the command line, in the environment and in the config file."""

    def __init__(self, given: Mapping[str, Any], file: Mapping[str, Any]) -> None:
        """`given` by flag name with `_` for `-`, None where not given; `file` as read."""
        self._values: dict[str, Any] = dict(file)
        for key, value in given.items():
            name = key.replace("_", "-")
            if name == "stop":
                if value:
                    self._values[name] = tuple(value)
            elif value is not None:
                assert name in _PARSERS, f"no setting is called {name}"
                self._values[name] = _PARSERS[name](str(value), f"`--{name}`")

    @classmethod
    def read(cls, **given: Any) -> "Settings":
        """Of the flags and environment `given`, and the config file where there is one."""
        return cls(given, read_config_file(config_file()))

    @property
    def system(self) -> str | None:
        return self._values.get("system")

    def engine_config(self) -> EngineConfig:
        values = self._values
        builtin = EngineConfig()
        device = values.get("device", builtin.device)
        if values.get("vram") == Size(nbytes=0):  # no card, or none of it
            if device == "cuda":
                raise MoecliError(
                    "`--device cuda` with no VRAM: the two contradict each other",
                    "leave out one of them",
                    exit_code=2,
                )
            device = "cpu"
        return EngineConfig(
            ctx=values.get("ctx"),
            ram_nbytes=_budget(values.get("ram"), "RAM"),
            # The processor has no use for VRAM that a config file grants to the card.
            vram_nbytes=None if device == "cpu" else _budget(values.get("vram"), "VRAM"),
            device=device,
            placement=values.get("placement", builtin.placement),
            lane=values.get("lane", builtin.lane),
            dense_scheme=values.get("dense-scheme", builtin.dense_scheme),
            kv_dtype=values.get("kv-dtype", builtin.kv_dtype),
            threads=values.get("threads"),
            kernels=values.get("kernels", builtin.kernels),
        )

    def sampling_config(self, generation_config: Mapping[str, Any]) -> SamplingConfig:
        """`generation_config` is what the model's own file says."""
        values = _model_defaults(generation_config) | self._values
        builtin = SamplingConfig()
        return SamplingConfig(
            temperature=values.get("temp", builtin.temperature),
            top_p=values.get("top-p", builtin.top_p),
            top_k=values.get("top-k", builtin.top_k),
            min_p=values.get("min-p", builtin.min_p),
            seed=values.get("seed"),
            max_tokens=values.get("max-tokens"),
            stop=values.get("stop", ()),
        )


def config_file() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "moecli" / "config.toml"


def read_config_file(path: Path) -> dict[str, Any]:
    """Settings by flag name; empty without a file. Raises MoecliError on whatever is not one."""
    try:
        content = tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MoecliError(f"`{path}` is not TOML: {error}", "mend it, or remove it") from error
    return {name: _file_value(path, name, value) for name, value in content.items()}


def _file_value(path: Path, name: str, value: Any) -> Any:
    where = f"`{name}` in `{path}`"
    if name == "stop":
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise MoecliError(f"{where} must be a list of strings")
    if name not in _PARSERS:
        close = difflib.get_close_matches(name, [*_PARSERS, "stop"], 1)
        hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(_PARSERS)}, stop"
        raise MoecliError(f"{where} is no setting", hint)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise MoecliError(f"{where} must be a number or a string")
    try:
        return _PARSERS[name](str(value), where)
    except MoecliError as error:
        raise MoecliError(error.message, error.hint) from error  # not a usage error


def _model_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's file says of sampling; `do_sample: false` is temperature 0."""
    found = {
        name: generation_config[theirs]
        for name, theirs in _MODEL_NAMES.items()
        if isinstance(generation_config.get(theirs), (int, float))
    }
    if generation_config.get("do_sample") is False:
        found["temp"] = 0.0
    return found


def _budget(size: Size | None, memory: str) -> int | None:
    """Bytes of a budget; a share of RAM is of what is available now, one of VRAM of all."""
    if size is None or size.nbytes is not None:
        return None if size is None else size.nbytes
    from offload.hardware import detect

    machine = detect(gpu=memory == "VRAM")
    whole = machine.vram_total if memory == "VRAM" else machine.ram_available
    if whole is None:
        raise MoecliError(
            f"cannot tell how much {memory} this machine has",
            f"give `--{memory.lower()}` as a size, such as `8GiB`",
        )
    return size.of(whole)
