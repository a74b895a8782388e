"""Knows which special tokens stand for a picture in a text; knows no pixels, and no ids."""

from collections.abc import Sequence

from moecli.errors import MoecliError
from moecli.vision.tiles import Grid

IMAGE = "<|image|>"  # where a picture is to be; then, before the tile that shows it whole
PATCH = "<|patch|>"
_BEGIN, _END = "<|image_start|>", "<|image_end|>"
_NEXT_TILE, _NEXT_ROW = "<|tile_x_separator|>", "<|tile_y_separator|>"


def expansion(grid: Grid, tile_tokens: int) -> str:
    """The text of a picture: one patch for every embedding, tile by tile as `cut` orders them."""
    rows, columns = grid
    tile = PATCH * tile_tokens
    row = _NEXT_TILE.join([tile] * columns) + _NEXT_ROW
    several = row * rows if rows * columns > 1 else ""
    return f"{_BEGIN}{several}{IMAGE}{tile}{_END}"


def spread(text: str, expansions: Sequence[str]) -> str:
    """`text` with each IMAGE replaced; raises MoecliError unless there are as many as pictures."""
    pieces = text.split(IMAGE)
    if len(pieces) != len(expansions) + 1:
        raise MoecliError(
            f"the prompt names `{IMAGE}` {len(pieces) - 1} times for {len(expansions)} pictures",
            f"leave `{IMAGE}` out of what is said, or name it once a picture with `--raw`",
        )
    rest = [expanded + piece for expanded, piece in zip(expansions, pieces[1:], strict=True)]
    return "".join([pieces[0], *rest])
