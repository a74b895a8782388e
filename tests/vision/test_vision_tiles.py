"""Tiles against values that the library's processor gave, bit for bit: see make_fixtures.py."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moecli.vision.tiles import TileSettings, best_grid, cut, fitted_size, normalize, num_tiles
from tests.vision.pictures import pattern

FIXTURES = Path(__file__).parents[1] / "fixtures" / "vision"
KNOWN = json.loads((FIXTURES / "llama4_tiles.json").read_text())


def settings_of(theirs: dict) -> TileSettings:
    """From the library's names."""
    names = {
        "size": lambda value: ("size", value["height"]),
        "max_patches": lambda value: ("most", value),
        "resize_to_max_canvas": lambda value: ("largest_canvas", value),
        "resample": lambda value: ("resample", {2: "bilinear", 3: "bicubic"}[value]),
        "image_mean": lambda value: ("mean", tuple(value)),
        "image_std": lambda value: ("std", tuple(value)),
    }
    return TileSettings(**dict(names[name](value) for name, value in theirs.items()))


@pytest.mark.parametrize(
    ("known", "settings"),
    [
        ("grids", TileSettings()),
        ("grids_of_the_largest_canvas", TileSettings(largest_canvas=True)),
    ],
)
def test_every_size_gets_the_library_s_grid_and_size(known: str, settings: TileSettings) -> None:
    assert len(KNOWN[known]) >= 200
    for height, width, rows, columns, *fitted in KNOWN[known]:
        grid = best_grid(height, width, settings)
        assert grid == (rows, columns), (height, width)
        assert fitted_size(height, width, grid, settings) == tuple(fitted), (height, width)


@pytest.mark.parametrize("case", KNOWN["whole"], ids=str)
def test_small_tiles_have_every_value_of_the_library_s(case: dict) -> None:
    expected = load_file(FIXTURES / "llama4_tiles.safetensors")[str(KNOWN["whole"].index(case))]
    settings = settings_of(case["settings"])
    grid, tiles = cut(pattern(*case["size"]), settings)
    assert grid == tuple(case["grid"])
    assert len(tiles) == num_tiles(grid)
    assert torch.equal(normalize(tiles, settings), expected)


@pytest.mark.parametrize("case", KNOWN["hashed"], ids=str)
def test_tiles_of_released_models_are_the_library_s_to_the_bit(case: dict) -> None:
    settings = settings_of(case["settings"])
    grid, tiles = cut(pattern(*case["size"]), settings)
    assert (grid, len(tiles)) == (tuple(case["grid"]), case["tiles"])
    values = normalize(tiles, settings).contiguous().view(torch.uint8).numpy()
    assert hashlib.sha256(values.tobytes()).hexdigest() == case["sha256"]
