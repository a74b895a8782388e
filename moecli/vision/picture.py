"""Knows a picture that a model is to see: cut into tiles, and what it takes of a prompt."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moecli.errors import MoecliError
from moecli.models.config import ModelSpec, VisionSpec
from moecli.models.facts import read_facts
from moecli.vision.image import read_image
from moecli.vision.preprocessor import read_settings
from moecli.vision.tiles import Grid, TileSettings, cut, normalize
from moecli.vision.tokens import expansion
from quant.checkpoint import CONFIG_FILE, read_json


@dataclass(frozen=True, eq=False)
class Picture:
    """A file as it was when it was read; nothing of it is read again."""

    path: Path
    digest: str  # SHA-256 of the file
    size: tuple[int, int]  # pixels: width and height
    grid: Grid
    tiles: Tensor  # uint8 [n, 3, S, S]
    settings: TileSettings
    tile_tokens: int

    @property
    def num_patches(self) -> int:
        """Tokens of a prompt that its embeddings take the places of."""
        return len(self.tiles) * self.tile_tokens

    @property
    def num_tokens(self) -> int:
        """Its patches and what stands around them."""
        tiles = len(self.tiles)
        return self.num_patches + 3 + (tiles - 1 if tiles > 1 else 0)

    @property
    def text(self) -> str:
        """What stands for it in a prompt."""
        return expansion(self.grid, self.tile_tokens)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        width, height = self.size
        return {
            **{"path": str(self.path), "sha256": self.digest, "width": width, "height": height},
            **{"grid": list(self.grid), "tiles": len(self.tiles), "tokens": self.num_tokens},
        }

    def pixels(self) -> Tensor:
        """What the tower takes, bf16 [n, 3, S, S]."""
        return normalize(self.tiles, self.settings)


class PictureReader:
    """Reads pictures for one model."""

    def __init__(self, vision: VisionSpec, settings: TileSettings) -> None:
        self._vision, self._settings = vision, settings

    @classmethod
    def of(cls, directory: Path) -> "PictureReader":
        """For the model in `directory`, of whose weights nothing is read.

        Raises MoecliError where it sees no pictures.
        """
        spec = read_facts(read_json(directory / CONFIG_FILE))
        vision = spec.vision if isinstance(spec, ModelSpec) else None
        if vision is None:
            raise MoecliError(
                f"`{directory.name}` sees no pictures here: moecli knows no vision tower of it",
                "Llama 4 Scout and Maverick see them",
            )
        return cls(vision, read_settings(directory, vision))

    def read(self, path: Path) -> Picture:
        """Raises MoecliError for a file that is no picture, or too large a one."""
        pixels, digest = read_image(path)
        height, width = pixels.shape[1:]
        grid, tiles = cut(pixels, self._settings)
        return Picture(
            *(path.absolute(), digest, (width, height), grid, tiles),
            *(self._settings, self._vision.tile_tokens),
        )
