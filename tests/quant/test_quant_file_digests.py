"""Hashes of files that are filled in any order, and checksums of their parts."""

import hashlib
import random
import zlib
from itertools import accumulate
from pathlib import Path

import pytest

import quant.file_digests
from quant.file_digests import FileDigests
from quant.shard_writer import ShardWriter
from quant.shards import PlacedUnit, Unit


def placed_units(shard: int, sizes: list[int]) -> list[PlacedUnit]:
    content = random.Random(shard)
    units = [Unit((), constant=content.randbytes(size)) for size in sizes]
    starts = accumulate(sizes, initial=0)
    return [PlacedUnit(shard, n, start, u) for n, (start, u) in enumerate(zip(starts, units))]  # noqa: B905


def fill(writer: ShardWriter, placed: PlacedUnit) -> None:
    writer.begin(placed.offset)
    writer.write(placed.unit.constant)


@pytest.mark.parametrize("seed", range(4))
def test_order_does_not_matter(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant.file_digests, "_LOT_NBYTES", 100_000)
    choose = random.Random(seed)
    sizes = [[choose.choice([1, 700, 90_000, 600_000]) for _ in range(12)] for _ in range(3)]
    units = [unit for shard in range(3) for unit in placed_units(shard, sizes[shard])]
    choose.shuffle(units)
    writers = [ShardWriter(tmp_path / str(n), sum(sizes[n])) for n in range(3)]
    with FileDigests() as digests:
        for placed in units:
            fill(writers[placed.shard], placed)
            digests.add(writers[placed.shard], placed)
        found = [digests.take(number) for number in range(3)]
    for number, writer in enumerate(writers):
        writer.close()
        content = (tmp_path / str(number)).read_bytes()
        assert len(content) == sum(sizes[number])
        assert found[number] == hashlib.sha256(content).hexdigest()


def test_little_is_left_for_the_end(tmp_path: Path) -> None:
    """What is complete is hashed meanwhile, but not what is behind a unit that is missing."""
    units = placed_units(0, [20 << 20, 20 << 20, 20 << 20])
    writer = ShardWriter(tmp_path / "file", 60 << 20)
    with FileDigests() as digests:
        for number, expected in ((1, 0), (0, 40 << 20)):
            fill(writer, units[number])
            digests.add(writer, units[number])
            digests._wait()
            assert digests._files[0]._hashed == expected
    writer.close()


def test_who_stops_does_not_wait_for_hashes(tmp_path: Path) -> None:
    (unit,) = placed_units(0, [20 << 20])
    writer = ShardWriter(tmp_path / "file", 20 << 20)
    fill(writer, unit)
    with FileDigests() as digests:
        digests._given_up.set()
        digests.add(writer, unit)
    assert digests._files[0]._hashed == 0
    writer.close()


def test_checksums_of_what_is_there(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(700_000)
    writer = ShardWriter(tmp_path / "file", len(content))
    writer.begin(0)
    for start in range(0, len(content), 99_999):
        writer.write(content[start : start + 99_999])
    assert writer.checksum == zlib.crc32(content) == writer.checksum_of(0, len(content))
    assert writer.checksum_of(5, 600_001) == zlib.crc32(content[5:600_001])
    assert writer.checksum_of(600_000, 10**9) == zlib.crc32(content[600_000:])
    (tmp_path / "file").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert writer.checksum_of(0, len(content)) != writer.checksum
    writer.close()
