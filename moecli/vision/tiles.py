"""Knows how Llama 4 divides a picture into square tiles: its image processor in plain torch.

The values are those of the library's processor, bit for bit, which itself needs torchvision.
Knows no files. Legend of the shapes: n tiles, S pixels of a tile's side.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # rows and columns of tiles


@dataclass(frozen=True)
class TileSettings:
    """What preprocessor_config.json says; the built-in values are those of released models."""

    size: int = 336  # pixels of a tile's side
    most: int = 16  # tiles of a picture, the one of the whole picture not counted
    largest_canvas: bool = False  # enlarge as far as so many tiles allow
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


def num_tiles(grid: Grid) -> int:
    """Tiles of a picture: where it takes several, one more shows the whole picture."""
    count = grid[0] * grid[1]
    return count if count == 1 else count + 1


def best_grid(height: int, width: int, settings: TileSettings) -> Grid:
    """The grid that a picture of this size is shrunk least for, or enlarged least, or most."""
    grids = torch.tensor(_grids(settings.most))  # [N, 2]
    canvases = grids * settings.size
    scales = torch.minimum(canvases[:, 0] / height, canvases[:, 1] / width)  # [N] fp32
    enlarging = scales[scales >= 1]
    if not len(enlarging):
        chosen = scales.max()
    else:
        chosen = enlarging.max() if settings.largest_canvas else enlarging.min()
    fitting = grids[scales == chosen]  # the smallest of these pads least
    rows, columns = fitting[fitting.prod(dim=1).argmin()].tolist()
    return rows, columns


def _grids(most: int) -> list[Grid]:
    """All grids of at most so many tiles, in the library's order: it breaks ties."""
    by_ratio: dict[float, list[Grid]] = {}
    for count in range(most, 0, -1):
        for rows in range(1, count + 1):
            if count % rows == 0:
                by_ratio.setdefault(rows / (count // rows), []).append((rows, count // rows))
    return [grid for grids in by_ratio.values() for grid in grids]


def fitted_size(height: int, width: int, grid: Grid, settings: TileSettings) -> tuple[int, int]:
    """Height and width that the picture is brought to on its canvas, its shape kept."""
    high, wide = (
        _limit(pixels, torch.tensor(count * settings.size), settings)
        for pixels, count in zip((height, width), grid, strict=True)
    )
    scale_high, scale_wide = high / height, wide / width
    if scale_wide < scale_high:
        fitted = min(math.floor(height * scale_wide), int(high)), int(wide)
    else:
        fitted = int(high), min(math.floor(width * scale_high), int(wide))
    return max(fitted[0], 1), max(fitted[1], 1)


def _limit(pixels: int, canvas: Tensor, settings: TileSettings) -> Tensor | int:
    """How long a side may become: only a picture smaller than a tile is enlarged.

    A tensor where the canvas is the limit, as in the library: then quotients have single precision,
    which decides how some are rounded.
    """
    wanted = max(pixels, settings.size)
    return canvas if settings.largest_canvas or int(canvas) < wanted else wanted


def cut(picture: Tensor, settings: TileSettings) -> tuple[Grid, Tensor]:
    """uint8 [3, height, width] -> its grid and tiles, uint8 [n, 3, S, S].

    The tiles come row by row, black where the picture does not reach; where there are several, the
    whole picture squeezed into one is the last.
    """
    height, width = picture.shape[1:]
    grid = best_grid(height, width, settings)
    (rows, columns), size = grid, settings.size
    fitted = _resize(picture, fitted_size(height, width, grid, settings), settings)
    below, beside = rows * size - fitted.shape[1], columns * size - fitted.shape[2]
    canvas = F.pad(fitted, (0, beside, 0, below))  # [3, rows * S, columns * S]
    tiles = canvas.view(3, rows, size, columns, size).permute(1, 3, 0, 2, 4)
    tiles = tiles.reshape(rows * columns, 3, size, size)
    if rows * columns > 1:
        whole = _resize(picture, (size, size), settings)
        tiles = torch.cat((tiles, whole[None]))
    return grid, tiles


def _resize(picture: Tensor, size: tuple[int, int], settings: TileSettings) -> Tensor:
    """uint8 [3, height, width] -> [3, *size], in the integers that torch has for bytes."""
    if tuple(picture.shape[1:]) == size:
        return picture
    batch = picture[None]
    return F.interpolate(batch, size, mode=settings.resample, antialias=True)[0]


def normalize(tiles: Tensor, settings: TileSettings) -> Tensor:
    """uint8 [n, 3, S, S] -> what the tower takes, in bf16, as the model was trained with."""
    pixels = tiles.to(torch.bfloat16) * settings.rescale
    mean, std = (
        torch.tensor(values, dtype=torch.bfloat16).view(-1, 1, 1)
        for values in (settings.mean, settings.std)
    )
    return pixels.sub(mean).div(std)
