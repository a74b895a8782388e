"""Sizes and counts, read and written."""

import pytest

from moecli.errors import MoecliError
from moecli.units import (
    format_nbytes,
    format_params,
    format_seconds,
    parse_bandwidth,
    parse_count,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 << 30),
        ("24g", 24 << 30),
        ("1.5 GiB", 3 << 29),
        ("500MB", 500_000_000),
        ("512k", 512 << 10),
        ("1TiB", 1 << 40),
        ("4096B", 4096),
    ],
)
def test_size(text: str, nbytes: int) -> None:
    assert parse_size(text, "`--ram`").of(whole_nbytes=1) == nbytes


@pytest.mark.parametrize(("text", "share"), [("80%", 80), ("100%", 100), ("12.5%", 12.5)])
def test_share(text: str, share: float) -> None:
    assert parse_size(text, "`--ram`").of(whole_nbytes=1000) == 10 * share


@pytest.mark.parametrize("text", ["24", "", "0GiB", "-1GiB", "120%", "0%", "24 GiBs", "1e3GiB"])
def test_no_size(text: str) -> None:
    with pytest.raises(MoecliError, match="`--ram`") as error:
        parse_size(text, "`--ram`")
    assert error.value.exit_code == 2
    assert error.value.hint is not None


@pytest.mark.parametrize(
    ("text", "count"), [("4096", 4096), ("32k", 32768), ("1M", 1 << 20), (" 8K ", 8192)]
)
def test_count(text: str, count: int) -> None:
    assert parse_count(text, "`--ctx`") == count


@pytest.mark.parametrize("text", ["0", "-1", "1.5k", "k", "", "12x"])
def test_no_count(text: str) -> None:
    with pytest.raises(MoecliError, match="`--ctx`"):
        parse_count(text, "`--ctx`")


def test_bandwidth() -> None:
    assert parse_bandwidth("25GB/s", "") == 25e9
    with pytest.raises(MoecliError, match="`--disk`"):
        parse_bandwidth("fast", "`--disk`")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (200 << 20, "200 MiB"),
        ((1 << 30) - 1, "1.0 GiB"),
        (5 << 40, "5.0 TiB"),
    ],
)
def test_size_for_people(nbytes: int, text: str) -> None:
    assert format_nbytes(nbytes) == text


def test_other_numbers_for_people() -> None:
    assert [format_params(n) for n in (512, 22_700_000, 108_641_793_536)] == [
        *("512", "22.7M", "108.6B"),
    ]
    assert [format_seconds(s) for s in (0.421, 12.4, 59.7, 185, 7800)] == [
        *("0.42 s", "12 s", "1m 00s", "3m 05s", "2h 10m"),
    ]
