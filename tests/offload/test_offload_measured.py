"""Bandwidths are measured once a machine, and a broken cache costs a measurement only."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from offload import bandwidth, measured
from offload.hardware import Machine
from offload.measured import HostCompute, cache_file, disturbed, with_bandwidths

BARE = Machine(ram_total=64 << 30, cpu_name="CPU", physical_cores=8)
CARD = replace(BARE, gpu_name="RTX", gpu_driver="600.1")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured, in order; the n-th measurement finds n bytes a second."""
    done: list[str] = []

    def fake(name: str) -> None:
        def measure(*_: object) -> float:
            done.append(name)
            return float(len(done))

        monkeypatch.setattr(bandwidth, f"measure_{name}", measure)

    for name in ("ram", "link", "zero_copy", "vram", "compute"):
        fake(name)
    others_keep_busy(monkeypatch, 0.0)
    return done


def others_keep_busy(monkeypatch: pytest.MonkeyPatch, cores: float) -> None:
    monkeypatch.setattr(measured, "beside_others", lambda find: (find(), cores))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "bandwidths.json"


def host(name: str) -> HostCompute:
    return HostCompute(name, lambda: 1)


def put_into(file: Path, name: str, value: object) -> None:
    """Into the one entry that the file has."""
    content = json.loads(file.read_text())
    (entry,) = content["machines"].values()
    entry[name] = value
    file.write_text(json.dumps(content))


def test_each_is_measured_once(calls: list[str], file: Path) -> None:
    first = with_bandwidths(CARD, host("int4"), file=file)
    assert calls == ["ram", "link", "zero_copy", "vram", "compute"]
    assert (first.ram_bw, first.link_bw, first.zero_copy_bw) == (1, 2, 3)
    assert (first.vram_bw, first.host_bw) == (4, 5)
    assert with_bandwidths(CARD, host("int4"), file=file) == first
    assert len(calls) == 5
    assert list(file.parent.iterdir()) == [file]


def test_what_was_measured_before_costs_no_measurement(calls: list[str], file: Path) -> None:
    kinds = host("int4"), host("int8")
    assert with_bandwidths(BARE, kinds[0], file=file, measure=False) == BARE
    known = with_bandwidths(BARE, kinds[0], file=file)
    assert with_bandwidths(BARE, kinds[0], file=file, measure=False) == known
    other = with_bandwidths(BARE, kinds[1], file=file, measure=False)
    assert other == replace(known, host_bw=None)
    assert calls == ["ram", "compute"]


def test_without_a_card_only_main_memory(calls: list[str], file: Path) -> None:
    assert with_bandwidths(BARE, file=file) == replace(BARE, ram_bw=1.0)
    assert calls == ["ram"]


def test_what_is_stated_is_not_measured(calls: list[str], file: Path) -> None:
    stated = replace(CARD, ram_bw=7.0, link_bw=8.0, vram_bw=9.0)
    found = with_bandwidths(stated, file=file)
    assert (found.ram_bw, found.link_bw, found.vram_bw) == (7, 8, 9)
    assert calls == ["zero_copy"]
    assert with_bandwidths(CARD, file=file).ram_bw == 2, "and is not kept as measured"


@pytest.mark.parametrize(
    "other",
    [
        replace(CARD, cpu_name="other"),
        replace(CARD, gpu_name="other"),
        replace(CARD, gpu_driver=None),
        replace(CARD, ram_total=32 << 30),
        replace(CARD, physical_cores=4),
    ],
)
def test_another_machine_is_measured_anew(calls: list[str], file: Path, other: Machine) -> None:
    first = with_bandwidths(CARD, file=file)
    second = with_bandwidths(other, file=file)
    assert first.ram_bw != second.ram_bw
    assert len(calls) == 8
    assert with_bandwidths(CARD, file=file) == first
    assert with_bandwidths(other, file=file) == second
    assert len(calls) == 8


def test_memory_that_the_kernel_keeps_makes_no_other_machine(calls: list[str], file: Path) -> None:
    with_bandwidths(BARE, file=file)
    with_bandwidths(replace(BARE, ram_total=(64 << 30) - (100 << 20)), file=file)
    assert calls == ["ram"]


def test_each_kind_of_expert_is_measured(calls: list[str], file: Path) -> None:
    assert with_bandwidths(BARE, host("int4"), file=file).host_bw == 2
    assert with_bandwidths(BARE, host("int8"), file=file).host_bw == 3
    assert with_bandwidths(BARE, host("int4"), file=file).host_bw == 2
    assert with_bandwidths(BARE, file=file).host_bw is None


def test_refresh_measures_again_and_keeps_that(calls: list[str], file: Path) -> None:
    with_bandwidths(BARE, file=file)
    assert with_bandwidths(BARE, file=file, refresh=True).ram_bw == 2
    assert with_bandwidths(BARE, file=file).ram_bw == 2


def test_refresh_forgets_what_is_not_asked_for_now(calls: list[str], file: Path) -> None:
    with_bandwidths(BARE, host("int4"), file=file)
    with_bandwidths(BARE, file=file, refresh=True)
    assert with_bandwidths(BARE, host("int4"), file=file).host_bw == 4


def test_what_cannot_be_measured_stays_unknown(
    calls: list[str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bandwidth, "measure_zero_copy", lambda: None)
    found = with_bandwidths(CARD, file=file)
    assert (found.zero_copy_bw, found.link_bw) == (None, 2)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"format": 2, "machines": {}}', '{"format": 1}'),
        '{"format": 1, "machines": []}',
    ],
)
def test_a_broken_file_is_replaced(calls: list[str], file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    assert with_bandwidths(BARE, file=file).ram_bw == 1
    assert json.loads(file.read_text())["format"] == 1
    assert with_bandwidths(BARE, file=file).ram_bw == 1
    assert calls == ["ram"]


@pytest.mark.parametrize("value", [None, "fast", -1, 0, True, [], float("inf"), float("nan")])
def test_a_broken_number_is_measured_again(calls: list[str], file: Path, value: object) -> None:
    with_bandwidths(BARE, file=file)
    put_into(file, "ram_bw", value)
    assert with_bandwidths(BARE, file=file).ram_bw == 2


def test_a_place_that_cannot_be_written_costs_nothing_else(calls: list[str], file: Path) -> None:
    file.parent.write_text("not a directory")
    assert with_bandwidths(BARE, file=file).ram_bw == 1
    assert with_bandwidths(BARE, file=file).ram_bw == 2


def test_a_failed_write_leaves_the_old_file(
    calls: list[str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_bandwidths(BARE, file=file)
    before = file.read_text()

    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(measured.os, "replace", refuse)
    with_bandwidths(BARE, file=file, refresh=True)
    assert file.read_text() == before
    assert list(file.parent.iterdir()) == [file], "nothing half-written stays"


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_file() == Path("/somewhere/moecli/bandwidths.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_file() == Path("/home/me/.cache/moecli/bandwidths.json")


def test_compute_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: the first run, which warms up, does not count; the best one does."""
    now = [0.0]
    durations = iter([9.0, 0.2, 0.1, 0.3])
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: now[0])

    def compute() -> int:
        now[0] += next(durations)
        return 1000

    assert bandwidth.measure_compute(compute) == pytest.approx(10_000)


def test_nothing_of_a_device_is_measured_without_one() -> None:
    assert bandwidth.measure_link() is None
    assert bandwidth.measure_zero_copy() is None
    assert bandwidth.measure_vram() is None


def test_what_tokens_share_is_measured_where_it_is_asked_for(calls: list[str], file: Path) -> None:
    alone = host("int4")
    shared = replace(alone, share=lambda: 1, shared_by=32)
    assert with_bandwidths(BARE, alone, file=file).host_flops is None
    found = with_bandwidths(BARE, shared, file=file)
    assert calls == ["ram", "compute", "compute"], "what is kept of the other holds"
    assert (found.host_bw, found.host_flops) == (2, 3)
    assert with_bandwidths(BARE, shared, file=file) == found
    other = with_bandwidths(BARE, replace(shared, shared_by=8), file=file)
    assert (other.host_bw, other.host_flops) == (2, 4)


@pytest.mark.parametrize("direct", [True, False])
def test_each_disk_is_measured_once_and_never_by_what_memory_answers(
    calls: list[str], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    def measure(path: Path) -> bandwidth.DiskBandwidth:
        calls.append(path.name)
        return bandwidth.DiskBandwidth(7.0, direct, 1)

    monkeypatch.setattr(bandwidth, "measure_disk", measure)
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.mkdir()
    expected = 7.0 if direct else None
    assert with_bandwidths(BARE, file=file, measure=False, disk=first).disk_bw is None
    assert with_bandwidths(BARE, file=file, disk=first).disk_bw == expected
    assert with_bandwidths(BARE, file=file, disk=second).disk_bw == expected
    assert with_bandwidths(BARE, file=file).disk_bw is None, "nobody asked about a disk"
    same_disk = ["ram", "first"] if direct else ["ram", "first", "second"]
    assert calls == same_disk
    monkeypatch.setattr(measured, "_disk_of", lambda path: path.name)
    with_bandwidths(BARE, file=file, disk=second)
    assert calls == [*same_disk, "second"], "another disk"
    assert with_bandwidths(replace(BARE, disk_bw=1.0), file=file, disk=first).disk_bw == 1.0


def test_a_disk_has_the_name_of_what_is_mounted_there(tmp_path: Path) -> None:
    name = measured._disk_of(tmp_path)
    assert name == measured._disk_of(tmp_path.parent)
    if Path("/proc/self/mountinfo").exists():
        assert name != measured._disk_of(Path("/proc"))


def test_what_was_measured_beside_others_is_measured_again_until_they_are_gone(
    calls: list[str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others_keep_busy(monkeypatch, 0.9)  # of eight cores
    assert with_bandwidths(BARE, file=file).ram_bw == 1
    assert disturbed(BARE, file) == {"ram_bw"}
    assert with_bandwidths(BARE, file=file, measure=False).ram_bw == 1
    assert with_bandwidths(BARE, file=file).ram_bw == 2
    others_keep_busy(monkeypatch, 0.7)
    assert with_bandwidths(BARE, file=file).ram_bw == 3
    assert disturbed(BARE, file) == frozenset()
    assert with_bandwidths(BARE, file=file).ram_bw == 3
    assert calls == ["ram"] * 3


def test_who_is_never_alone_is_asked_a_few_times_and_the_most_is_kept(
    calls: list[str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([5.0, 7.0, 6.0, 2.0])
    monkeypatch.setattr(bandwidth, "measure_ram", lambda threads: next(found))
    others_keep_busy(monkeypatch, 8.0)
    assert [with_bandwidths(BARE, file=file).ram_bw for _ in range(6)] == [5, 7, 7, 7, 7, 7]
    assert disturbed(BARE, file) == {"ram_bw"}
    others_keep_busy(monkeypatch, 0.0)
    monkeypatch.setattr(bandwidth, "measure_ram", lambda threads: 3.0)
    assert with_bandwidths(BARE, file=file, refresh=True).ram_bw == 3
    assert disturbed(BARE, file) == frozenset()


@pytest.mark.parametrize("broken", [7, [], {"ram_bw": "often"}, {"ram_bw": -1}, {"ram_bw": True}])
def test_a_broken_count_counts_as_none(calls: list[str], file: Path, broken: object) -> None:
    with_bandwidths(BARE, file=file)
    put_into(file, "disturbed", broken)
    assert with_bandwidths(BARE, file=file).ram_bw == 1
    assert disturbed(BARE, file) == frozenset()
