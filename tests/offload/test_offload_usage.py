"""Which experts were asked for, kept from run to run."""

import json
from pathlib import Path

import pytest

from offload.errors import OffloadError
from offload.usage import ExpertUsage


def usage(**counts: list[int]) -> ExpertUsage:
    made = ExpertUsage([1, 3], 4)
    made.add_counts({int(name[1:]): row for name, row in counts.items()})
    return made


def test_favourites_are_the_most_wanted_and_nobody_else() -> None:
    made = usage(l3=[0, 5, 2, 0])
    made.add(1, [2, 0])
    made.add(1, [2])
    assert made.favourites() == [(3, 1), (1, 2), (3, 2), (1, 0)]
    assert made.num_requests == 10


def test_runs_add_up_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "usage.json"
    for _ in range(2):
        run = ExpertUsage([1, 3], 4)
        run.add_file(path)
        run.add(3, [0, 2])
        run.save(path)
    kept = ExpertUsage([1, 3], 4)
    kept.add_file(path)
    assert kept.counts == {1: [0, 0, 0, 0], 3: [2, 0, 2, 0]}
    assert [file.name for file in path.parent.iterdir()] == ["usage.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"counts": {"1": [0, 0, 0, 0]}},
        {"counts": {"1": [0, 0, 0, 0], "3": [1, 2, 3]}},
        {"counts": {"1": [0, 0, 0, 0], "3": [1, 2, 3, -1]}},
        {"counts": {"1": [0, 0, 0, 0], "3": [1, 2, 3, True]}},
        {"counts": {"1": [0, 0, 0, 0], "3": "none"}},
        {"counts": []},
    ],
)
def test_file_of_something_else_is_refused_by_name(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "usage.json"
    usage(l1=[1, 0, 0, 0]).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    fresh = ExpertUsage([1, 3], 4)
    with pytest.raises(OffloadError, match=r"usage\.json"):
        fresh.add_file(path)
    assert fresh.num_requests == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_file_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "usage.json"
    path.write_text(text)
    with pytest.raises(OffloadError):
        ExpertUsage([1], 4).add_file(path)


def test_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadError, match="file/usage"):
        usage().save(tmp_path / "file" / "usage.json")
