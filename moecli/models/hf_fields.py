"""Knows how fields of config.json are read; knows none by name."""

from collections.abc import Mapping
from typing import Any

from moecli.errors import MoecliError

CONFIG_HINT = "download config.json again, or compare it with the one the model was released with"
_MISSING: Any = object()


class Fields:
    """Typed reads of one JSON object; every complaint names the key."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def get(self, key: str, kind: type, default: Any = _MISSING) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise MoecliError(f"`{key}` is missing from {self.where}", CONFIG_HINT)
            return default
        fits = isinstance(value, (int, float)) if kind in (int, float) else isinstance(value, kind)
        if not fits or (kind is int and (isinstance(value, bool) or value != int(value))):
            raise MoecliError(
                f"`{key}` in {self.where} should be of type {kind.__name__}, not {value!r}",
                CONFIG_HINT,
            )
        return kind(value)

    def size(self, key: str, default: Any = _MISSING) -> int:
        value = self.get(key, int, default)
        if value < 1:
            raise MoecliError(
                f"`{key}` in {self.where} must be at least 1, not {value}", CONFIG_HINT
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Some releases store a flag as a number."""
        value = self.values.get(key)
        return default if value is None else bool(value)

    def section(self, key: str) -> "Fields":
        return Fields(self.get(key, dict), f"`{key}` of {self.where}")
