"""Stop strings: cut where they begin, whatever the pieces in which text arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecli.stopping import StopFilter


def run(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, bool]:
    stop_filter = StopFilter(stops)
    text = "".join(stop_filter.feed(piece) for piece in pieces)
    return text + stop_filter.flush(), stop_filter.stopped


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", max_size=3), max_size=3))
def test_text_ends_where_the_first_complete_stop_string_begins(
    pieces: list[str], stops: list[str]
) -> None:
    text, stopped = run(pieces, tuple(stops))
    whole = "".join(pieces)
    assert whole.startswith(text)
    # No stop string is inside what was let through.
    assert not any(stop in text for stop in stops if stop)
    if not stopped:
        assert text == whole
    else:
        assert any(whole.startswith(stop, len(text)) for stop in stops if stop)


def test_nothing_is_held_back_without_need() -> None:
    stop_filter = StopFilter(("\n\n",))
    assert stop_filter.feed("abc") == "abc"
    assert stop_filter.feed("\n") == ""
    assert stop_filter.feed("d") == "\nd"


@pytest.mark.parametrize("pieces", [["one END two"], ["one E", "ND two"], ["one ", "E", "N", "D"]])
def test_a_stop_string_split_over_pieces_is_found(pieces: list[str]) -> None:
    assert run(pieces, ("END",)) == ("one ", True)
