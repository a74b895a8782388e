"""Knows in which order a source is best read, and when each of its files comes and may go."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from quant.checkpoint import Checkpoint
from quant.shards import PlacedUnit
from quant.supply import FileTurn


@dataclass(frozen=True)
class Turn:
    """A file comes (None: what needs no file), units can be made of it and of those held, and
    files are not needed any more.
    """

    file: FileTurn | None
    units: tuple[PlacedUnit, ...]
    released: tuple[str, ...]


def turns_of(source: Checkpoint, units: Iterable[PlacedUnit]) -> list[Turn]:
    """Every file once, in the order of their names; each unit when its last file is there, in the
    order of the result, so that its files grow from the front. A file is held where a weight and
    its scales, say, lie in different ones.
    """
    placed_units = sorted(units, key=lambda placed: (placed.shard, placed.number))
    needs = [_files_of(source, placed) for placed in placed_units]
    names = sorted(frozenset[str]().union(*needs))
    made: dict[str, list[PlacedUnit]] = {name: [] for name in ("", *names)}
    last_use = {name: name for name in names}
    for placed, files in zip(placed_units, needs, strict=True):
        comes_last = max(files, default="")
        made[comes_last].append(placed)
        for name in files:
            last_use[name] = max(last_use[name], comes_last)
    ends = list(accumulate(sum(placed.unit.nbytes for placed in made[name]) for name in names))
    turns = [Turn(None, tuple(made[""]), ())]
    for name, end in zip(names, ends, strict=True):
        held = tuple(other for other in names if other < name <= last_use[other])
        released = tuple(other for other in names if last_use[other] == name)
        turns.append(Turn(FileTurn(name, ends[-1] - end, held), tuple(made[name]), released))
    return turns


def files_of(turns: Iterable[Turn]) -> list[FileTurn]:
    return [turn.file for turn in turns if turn.file is not None]


def _files_of(source: Checkpoint, placed: PlacedUnit) -> frozenset[str]:
    part = placed.unit.source
    return frozenset() if part is None else source.files_of(part.name)
