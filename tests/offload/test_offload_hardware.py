"""Machines made of fake /proc and /sys files, and this one."""

from pathlib import Path

import pytest

import offload.bandwidth
from offload.bandwidth import measure_disk, measure_ram
from offload.errors import OffloadError
from offload.hardware import Machine, detect, peak_rss_nbytes

MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n"
GIB = 1 << 30


def make_root(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_memory_without_cgroups(tmp_path: Path) -> None:
    machine = detect(root=make_root(tmp_path, {"proc/meminfo": MEMINFO}))
    assert (machine.ram_total, machine.ram_available) == (16 * GIB, 8 * GIB)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_peak_memory_grows_by_what_was_touched() -> None:
    before = peak_rss_nbytes()
    held = bytearray(64 << 20)
    held[:: 1 << 12] = b"x" * (len(held) >> 12)
    assert peak_rss_nbytes() <= before + (96 << 20)
    del held
    spent = bytearray(before + (64 << 20))
    spent[:: 1 << 12] = b"x" * (len(spent) >> 12)
    assert peak_rss_nbytes() >= before + (32 << 20)


V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"
STAT_V2 = f"anon 5\ninactive_file {GIB}\n"
STAT_V1 = f"inactive_file 7\ntotal_inactive_file {GIB}\n"


@pytest.mark.parametrize(
    ("groups", "files", "total", "available"),
    [
        ("0::/a/b", {V2 + "a/memory.max": f"{4 * GIB}", V2 + "a/memory.current": f"{GIB}"}, 4, 3),
        (
            "0::/a/b",
            {
                V2 + "a/memory.max": f"{4 * GIB}",
                V2 + "a/memory.current": f"{3 * GIB}",
                V2 + "a/memory.stat": STAT_V2,
                V2 + "a/b/memory.max": "max",
            },
            4,
            2,
        ),
        ("0::/", {V2 + "memory.max": f"{2 * GIB}"}, 2, 2),  # the mount of a container is its own
        ("0::/host/path", {V2 + "memory.max": f"{2 * GIB}"}, 2, 2),
        (
            "4:memory:/x\n0::/",
            {
                V1 + "x/memory.limit_in_bytes": f"{6 * GIB}",
                V1 + "x/memory.usage_in_bytes": f"{5 * GIB}",
                V1 + "x/memory.stat": STAT_V1,
                V1 + "memory.limit_in_bytes": "9223372036854771712",
                V1 + "memory.usage_in_bytes": f"{15 * GIB}",
            },
            6,
            2,
        ),
        ("4:memory:/x", {V1 + "x/memory.limit_in_bytes": f"{64 * GIB}"}, 16, 8),
        ("0::/a", {V2 + "a/memory.max": "100", V2 + "a/memory.current": "200"}, 100 / GIB, 0),
        ("5:cpu:/x", {V2 + "cpu/x/memory.max": "100"}, 16, 8),
        ("garbage", {}, 16, 8),
    ],
)
def test_memory_limits_of_cgroups(
    tmp_path: Path, groups: str, files: dict[str, str], total: float, available: float
) -> None:
    root = make_root(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups, **files})
    machine = detect(root=root)
    assert (machine.ram_total, machine.ram_available) == (total * GIB, available * GIB)


def cpu_files(siblings: list[str], allowed: str) -> dict[str, str]:
    files = {"proc/self/status": f"Name: x\nCpus_allowed_list:\t{allowed}\n"}
    for cpu, text in enumerate(siblings):
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = text + "\n"
    return files


@pytest.mark.parametrize(
    ("siblings", "allowed", "extra", "cores"),
    [
        (["0,2", "1,3", "0,2", "1,3"], "0-3", {}, 2),  # hyper-threads
        (["0", "1", "2", "3"], "0-3", {}, 4),
        (["0", "1", "2", "3"], "0,2-3", {}, 3),
        (["0-1", "0-1"], "1", {}, 1),
        (["0", "1", "2", "3"], "0-3", {"sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
        (["0", "1", "2", "3"], "0-3", {"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        (["0", "1", "2", "3"], "0-3", {"sys/fs/cgroup/cpu.max": "max 100000"}, 4),
        (
            ["0", "1", "2"],
            "0-2",
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/y",
                "sys/fs/cgroup/cpu,cpuacct/y/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/y/cpu.cfs_period_us": "100000",
            },
            2,
        ),
    ],
)
def test_physical_cores(
    tmp_path: Path, siblings: list[str], allowed: str, extra: dict[str, str], cores: int
) -> None:
    files = {"proc/self/cgroup": "0::/", **cpu_files(siblings, allowed), **extra}
    assert detect(root=make_root(tmp_path, files)).physical_cores == cores


def test_cpu_name_and_instruction_sets(tmp_path: Path) -> None:
    info = (
        "processor\t: 0\nmodel name\t: Best CPU\nflags\t\t: fpu avx2 sse avx_vnni\n\n"
        "processor\t: 1\nmodel name\t: Other\nflags\t\t: avx2 avx512f\n"
    )
    machine = detect(root=make_root(tmp_path, {"proc/cpuinfo": info}))
    assert machine.cpu_name == "Best CPU"
    assert machine.isa == ("avx2", "avx_vnni")


@pytest.mark.parametrize(
    ("found", "available"),
    [({"cpu": 5 * GIB}, 5 * GIB), ({0: GIB, "cpu": GIB}, GIB), ({"mps": GIB}, GIB), ({}, None)],
)
def test_memory_of_a_system_without_proc_is_what_accelerate_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict, available: int | None
) -> None:
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: found)
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if "SIZE" in name else 4 * GIB)
    machine = detect(root=tmp_path)
    assert machine.ram_total == 4096 * 4 * GIB
    assert machine.ram_available == (available or machine.ram_total)


def test_memory_of_linux_asks_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {"cpu": 1})
    assert detect(root=make_root(tmp_path, {"proc/meminfo": MEMINFO})).ram_available == 8 * GIB


def test_a_system_without_proc_degrades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.get_max_memory", dict)
    monkeypatch.delattr("os.sysconf")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    machine = detect(path=tmp_path, root=tmp_path / "nothing")
    assert (machine.ram_total, machine.ram_available, machine.physical_cores) == (None,) * 3
    assert machine.isa == ()
    assert machine.disk_free is not None


def test_this_machine(tmp_path: Path) -> None:
    machine = detect(path=tmp_path / "not" / "yet" / "there")
    assert machine.ram_total is not None
    assert machine.ram_available is not None
    assert 0 < machine.ram_available <= machine.ram_total
    assert machine.physical_cores
    assert machine.disk_free
    assert machine.gpu_name is None


def test_bandwidths_are_measured(tmp_path: Path) -> None:
    ram = measure_ram(threads=2, nbytes=16 << 20)
    assert ram is not None
    assert ram > 1e8
    disk = measure_disk(tmp_path, nbytes=8 << 20)
    assert disk.nbytes == 8 << 20
    assert disk.bytes_per_s > 0
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "shard"
    path.write_bytes(bytes((5 << 20) + 123))
    assert 4 << 20 <= measure_disk(path).nbytes <= path.stat().st_size
    path.write_bytes(b"tiny")
    assert measure_disk(path).nbytes in (0, 4)


def test_a_file_system_without_direct_reads_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(offload.bandwidth.os, "O_DIRECT", raising=False)
    assert measure_disk(tmp_path, nbytes=4 << 20).direct is False


def test_a_disk_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match="cannot measure the disk"):
        measure_disk(tmp_path / "missing")


def test_machines_are_made_by_hand() -> None:
    assert Machine(ram_bw=6e10).ram_bw == 6e10
