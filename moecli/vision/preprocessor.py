"""Knows what the files of an image processor call its settings; knows no pixels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from moecli.errors import MoecliError
from moecli.models.config import MOST_TILES, VisionSpec
from moecli.vision.tiles import TileSettings
from quant.checkpoint import read_json

_RESAMPLE: dict[Any, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}


def read_settings(directory: Path, vision: VisionSpec) -> TileSettings:
    """The settings beside a checkpoint; those of released models where it says nothing.

    Raises MoecliError for what tiles cannot be made with.
    """
    name, found = _find(directory)
    size = found.get("size", {})
    try:
        settings = TileSettings(
            size=int(size.get("height", TileSettings.size)),
            most=int(found.get("max_patches", TileSettings.most)),
            largest_canvas=bool(found.get("resize_to_max_canvas", False)),
            resample=_RESAMPLE[found.get("resample", 2)],
            rescale=float(found.get("rescale_factor", TileSettings.rescale)),
            mean=tuple(float(value) for value in found.get("image_mean", TileSettings.mean)),
            std=tuple(float(value) for value in found.get("image_std", TileSettings.std)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _odd(directory, name) from error
    square = size.get("width", settings.size) == settings.size == vision.tile_size
    scaled = all(found.get(f"do_{what}", True) for what in ("resize", "rescale", "normalize"))
    channels = len(settings.mean) == len(settings.std) == 3 and all(settings.std)
    if not (square and scaled and channels and 1 <= settings.most <= MOST_TILES):
        raise _odd(directory, name)
    return settings


def _find(directory: Path) -> tuple[str, Mapping[str, Any]]:
    """The name of the file and its settings: newer libraries keep them in the processor's own."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).is_file():
            content = read_json(directory / name)
            found = content if name.startswith("pre") else content.get("image_processor")
            if isinstance(found, dict):
                return name, found
    return "", {}


def _odd(directory: Path, name: str) -> MoecliError:
    return MoecliError(
        f"`{directory / (name or 'config.json')}` asks for tiles that moecli does not make",
        "download it again, or compare it with the one the model was released with",
    )
