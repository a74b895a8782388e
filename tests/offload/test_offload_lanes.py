"""How what VRAM lacks is divided, against trying every division."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.lanes import LaneSpeeds, expected_misses, link_count, link_rows

whole = st.integers(0, 50)
speeds = st.builds(LaneSpeeds, whole, whole.filter(bool)) | st.builds(
    LaneSpeeds, whole.filter(bool), whole
)


@given(st.integers(0, 12), speeds)
def test_no_other_division_ends_sooner(missing: int, lanes: LaneSpeeds) -> None:
    count = link_count(missing, lanes)
    ends = [lanes.seconds(n, missing - n) for n in range(missing + 1)]
    assert 0 <= count <= missing
    assert ends[count] == pytest.approx(min(ends))
    assert all(end > ends[count] * (1 - 1e-9) for end in ends[count + 1 :]), "ties go to the link"


@pytest.mark.parametrize(
    ("link", "host", "counts"),
    [
        (25.0, 0.0, [0, 1, 2, 3]),
        (0.0, 25.0, [0, 0, 0, 0]),
        (25.0, 25.0, [0, 1, 1, 2]),
        (10.0, 20.0, [0, 0, 1, 1]),
        (10.0, 25.0, [0, 0, 0, 1]),
    ],
)
def test_divisions_by_hand(link: float, host: float, counts: list[int]) -> None:
    assert [link_count(m, LaneSpeeds(link, host)) for m in range(4)] == counts


def test_rows_are_divided_in_units() -> None:
    assert link_rows(1024, 128, LaneSpeeds(1, 3)) == 256
    assert link_rows(1024, 512, LaneSpeeds(1, 3)) == 0
    assert link_rows(1024, 256, LaneSpeeds(3, 1)) == 768


def test_lanes_end_together_and_share_main_memory() -> None:
    assert LaneSpeeds(2, 4).seconds(10, 10) == 5
    assert LaneSpeeds(2, 4, ram=2).seconds(10, 10) == 10
    assert LaneSpeeds(2, 0).seconds(10, 10) == inf
    assert LaneSpeeds(0, 4).seconds(0, 8) == 2


@given(st.integers(1, 8), st.floats(0, 1), speeds)
def test_expected_misses_add_up(choices: int, rate: float, lanes: LaneSpeeds) -> None:
    found = expected_misses(choices, rate, lanes)
    assert found.link + found.host == pytest.approx(choices * rate)
    lower = choices * rate / (lanes.link + lanes.host)
    slower = choices * rate / max(lanes.link, lanes.host)
    assert lower * (1 - 1e-9) <= found.seconds_per_byte <= slower * (1 + 1e-9)
