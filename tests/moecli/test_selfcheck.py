"""The frame of the self-check: what a case's end means, children that die, what is remembered."""

import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moecli import selfcheck
from moecli.selfcheck import PATHS, Case, FastPaths, Result, SelfCheck

IDENTITY = {"gpu": "Test GPU", "sources": "1"}


def result(path: str = "kernels", name: str = "a", error: str | None = None) -> Result:
    return Result(path, name, error, 0.5)


def all_ok() -> tuple[Result, ...]:
    return tuple(result(path, path) for path in PATHS)


def test_paths_are_on_only_when_tried_and_right() -> None:
    assert SelfCheck(IDENTITY, all_ok()).paths == FastPaths()
    assert SelfCheck(IDENTITY, ()).paths == FastPaths.none()
    for path in PATHS:
        check = SelfCheck(IDENTITY, (*all_ok(), result(path, "b", "wrong")))
        assert check.paths == replace(FastPaths(), **{path: False})
        assert [failure.name for failure in check.failures] == ["b"]
        (note,) = check.notes()
        assert note.startswith(f"{path} ")
        assert "`b` failed: wrong" in note


def test_why_is_one_line() -> None:
    assert selfcheck.why([]) == "it was not tried"
    failed = [result(error="first\nsecond"), result(name="c", error="third")]
    assert selfcheck.why([result(), *failed]) == "`a` failed: first (and 1 more)"
    assert selfcheck.why([result(error="")]) == "`a` failed: no reason given"


def test_whatever_a_case_raises_is_its_result() -> None:
    def out_of_memory(device: torch.device) -> None:
        raise torch.OutOfMemoryError("no room")

    def broken(device: torch.device) -> None:
        assert device.type == "cpu"
        raise ZeroDivisionError

    cases = [
        Case("kernels", "good", lambda device: None),
        Case("fetch", "broken", broken),
        Case("graph", "full", out_of_memory),
        Case("doorbell", "long", lambda device: (_ for _ in ()).throw(ValueError("x" * 9000))),
    ]
    good, wrong, full, long = selfcheck.run_cases(cases, "cpu")
    assert (good.ok, good.error, good.path) == (True, None, "kernels")
    assert (wrong.error, wrong.lasting) == ("ZeroDivisionError", True)
    assert (full.error, full.lasting) == ("OutOfMemoryError: no room", False)
    assert len(long.error or "") < 3000


# Children


CHILD = """
import json, os, sys, time
for name in sys.argv[1:]:
    if name == "dies":
        print("RuntimeError: illegal memory access", file=sys.stderr)
        os._exit(9)
    if name == "hangs":
        time.sleep(60)
    error = "wrong" if name in ("wrong", "poisons") else None
    print(json.dumps(dict(path="kernels", name=name, error=error, seconds=0.0, lasting=True)),
          flush=True)
    if name == "poisons":
        os._exit(3)
"""


def isolated(tmp_path: Path, *names: str, silence_s: float = 20.0) -> list[Result]:
    child = tmp_path / "child.py"
    child.write_text(textwrap.dedent(CHILD))
    paths = dict.fromkeys(names, "kernels")
    return selfcheck.run_isolated(names, paths, (sys.executable, str(child)), silence_s)


def test_children_report(tmp_path: Path) -> None:
    found = isolated(tmp_path, "a", "wrong", "b")
    assert [(r.name, r.error) for r in found] == [("a", None), ("wrong", "wrong"), ("b", None)]


def test_a_child_that_dies_fails_one_case(tmp_path: Path) -> None:
    found = isolated(tmp_path, "a", "dies", "b")
    assert [r.name for r in found] == ["a", "dies", "b"]
    assert [r.ok for r in found] == [True, False, True]
    assert found[1].error == "the process ended with 9: RuntimeError: illegal memory access"


def test_a_child_whose_device_is_past_answering_fails_nothing_else(tmp_path: Path) -> None:
    found = isolated(tmp_path, "a", "poisons", "b", "c")
    assert [(r.name, r.ok) for r in found] == [
        ("a", True),
        ("poisons", False),
        ("b", True),
        ("c", True),
    ]


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    found = isolated(tmp_path, "hangs", "b", silence_s=1.0)
    assert [(r.name, r.ok) for r in found] == [("hangs", False), ("b", True)]
    assert found[0].error == "no answer within 1 s"


def test_a_child_that_cannot_start(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import no_such_module")
    found = selfcheck.run_isolated(["a", "b"], {"a": "fetch", "b": "graph"}, command, 20.0)
    assert [(r.path, r.ok) for r in found] == [("fetch", False), ("graph", False)]
    assert "no_such_module" in (found[0].error or "")


# Remembering


def test_remembered_for_one_card_and_code_only(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "selfcheck.json"
    assert selfcheck.remembered(IDENTITY, path) is None
    check = SelfCheck(IDENTITY, (*all_ok(), result("fetch", "b", "wrong")))
    selfcheck.remember(check, path)
    again = selfcheck.remembered(dict(IDENTITY), path)
    assert again == check
    assert again is not None
    assert again.remembered
    for key in IDENTITY:
        assert selfcheck.remembered(IDENTITY | {key: "other"}, path) is None
    assert [file.name for file in path.parent.iterdir()] == ["selfcheck.json"]


def test_damaged_cache_is_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "selfcheck.json"
    for text in ("", "{", "[]", '{"identity": {}}', '{"identity": {}, "results": [{"a": 1}]}'):
        path.write_text(text)
        assert selfcheck.remembered({}, path) is None


def test_want_of_memory_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "selfcheck.json"
    short = Result("graph", "full", "OutOfMemoryError", 0.1, lasting=False)
    selfcheck.remember(SelfCheck(IDENTITY, (*all_ok(), short)), path)
    assert not path.exists()


def test_sources_hash_sees_every_change(tmp_path: Path) -> None:
    kernel = tmp_path / "quant" / "kernels" / "deep" / "a.py"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("1")
    first = selfcheck.sources_hash(tmp_path)
    assert first == selfcheck.sources_hash(tmp_path)
    kernel.write_text("2")
    assert selfcheck.sources_hash(tmp_path) != first
    kernel.write_text("1")
    kernel.rename(kernel.with_name("b.py"))
    assert selfcheck.sources_hash(tmp_path) != first


def test_hashed_sources_exist() -> None:
    missing = [name for name in selfcheck._SOURCES if not (selfcheck.ROOT / name).exists()]
    assert missing == []


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A machine that seems to have a card; the cases' child is the one above. Counts runs."""
    runs: list[str] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selfcheck, "identity", lambda: dict(IDENTITY))

    def run(names, paths, command, silence_s):
        runs.append("run")
        return [
            result(paths[name], name, "off" if paths[name] == "graph" else None) for name in names
        ]

    monkeypatch.setattr(selfcheck, "run_isolated", run)
    return runs


def test_engine_hears_of_what_is_off_and_waits_once(on_a_card: list[str], tmp_path: Path) -> None:
    heard: list[str] = []
    assert selfcheck.fast_paths(heard.append) == FastPaths(graph=False)
    assert heard[0] == "checking the kernels on this card, once"
    assert heard[1].startswith("graph ")
    assert "off" in heard[1]
    again: list[str] = []
    assert selfcheck.fast_paths(again.append) == FastPaths(graph=False)
    assert again == heard[1:]
    assert on_a_card == ["run"]
    assert selfcheck.self_check(refresh=True).remembered is False
    assert on_a_card == ["run", "run"]


def test_cache_that_cannot_be_written(on_a_card, monkeypatch, tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert selfcheck.fast_paths(lambda note: None).kernels
