"""Knows whether kernels are right on this device: their own tests, and the self-check."""

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.machine import device_of
from benchmarks.gpu.report import Section

ROOT = Path(__file__).resolve().parents[2]
_USERS = "tests.devices"  # a test that imports this runs on the device
_WORKERS = 6  # compiling takes the time, and that is the processor's
_TINY_FILES = ("tests/moecli/test_stopping.py",)
_TINY_CASES = ("experts of a few tokens, int4-g32", "requests to the host")
_SHOWN = 10  # failures of a file
_DONE = (0, 1)  # exit codes of pytest: all is well, or some tests failed
_LEAVE_S = 8.0  # for a file that comes too late to say how far it came


@dataclass(frozen=True)
class FileCounts:
    """How the tests of one file ended; `error`: why there are no counts, or not all."""

    file: str
    seconds: float
    tests: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    error: str | None = None


def measure(section: Section, tiny: bool) -> None:
    with ThreadPoolExecutor(1) as pool:  # beside each other: both wait for compilers
        checked = pool.submit(self_check, tiny)
        section.part("tests", lambda: kernel_tests(tiny, section.left_s))
        section.part("self_check", checked.result)


def self_check(tiny: bool) -> dict[str, Any]:
    """The cases of the self-check, tried now. On a card each as in a first start."""
    from moecli import selfcheck
    from moecli.checks.cases import CASES

    begin = time.monotonic()
    if tiny:
        cases = [case for case in CASES if case.name in _TINY_CASES]
        results = tuple(selfcheck.run_cases(cases, device_of(tiny)))
        check = selfcheck.SelfCheck({}, results)
    else:
        check = selfcheck.self_check(refresh=True)
    return {
        "paths": check.paths,
        "wall_s": time.monotonic() - begin,
        "right": sum(result.ok for result in check.results),
        "cases": len(check.results),
        "failures": check.failures,
        "identity": check.identity,
        "seconds_by_case": {result.name: result.seconds for result in check.results},
    }


def files_on_device() -> list[str]:
    """The test files that take their device from tests/devices.py."""
    found = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if _USERS in path.read_text(encoding="utf-8")
    ]
    assert found, f"no test imports {_USERS}"
    return found


def kernel_tests(tiny: bool, left_s: float) -> dict[str, Any]:
    """Each file in a process of its own, several at once; all end in time."""
    files = list(_TINY_FILES) if tiny else files_on_device()
    end = time.monotonic() + left_s
    with TemporaryDirectory() as folder, ThreadPoolExecutor(_WORKERS) as pool:
        counts = list(
            pool.map(
                lambda item: run_file(item[1], Path(folder) / f"{item[0]}.xml", end),
                enumerate(files),
            )
        )
    return {
        "tests": sum(c.tests for c in counts),
        "failed": sum(c.failed for c in counts),
        "skipped": sum(c.skipped for c in counts),
        "incomplete": [c.file for c in counts if c.error is not None],
        "files": counts,
    }


def run_file(file: str, report: Path, end: float) -> FileCounts:
    """pytest on one file until `end` at the latest."""
    begin = time.monotonic()
    if end <= begin:
        return FileCounts(file, 0.0, error="no time left")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    with subprocess.Popen(
        [*command, f"--junitxml={report}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        said, error = _talk(process, max(1.0, end - begin - _LEAVE_S))
    seconds = time.monotonic() - begin
    if process.returncode not in _DONE:
        error = error or f"ended with {process.returncode}: {said}"
    if not report.is_file():
        return FileCounts(file, seconds, error=error or "it wrote no report")
    return _counts(file, seconds, report, error)


def _talk(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[str, str | None]:
    """Its last words, and what is wrong with them. Who is late is interrupted before it is killed:
    pytest then writes down what it has.
    """
    error = None
    for seconds, number in ((timeout_s, signal.SIGINT), (_LEAVE_S, signal.SIGKILL), (None, 0)):
        try:
            said, _ = process.communicate(timeout=seconds)
            break
        except subprocess.TimeoutExpired:
            error = "took longer than was left"
            process.send_signal(number)
    return said.decode(errors="replace")[-1000:], error


def _counts(file: str, seconds: float, report: Path, error: str | None) -> FileCounts:
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, "pytest wrote no suite"
    failures = [
        f"{case.get('name')}: {(problem.get('message') or '')[:300]}"
        for case in suite.iter("testcase")
        for problem in (*case.findall("failure"), *case.findall("error"))
    ]
    return FileCounts(
        file,
        seconds,
        tests=int(suite.get("tests", 0)),
        failed=int(suite.get("failures", 0)) + int(suite.get("errors", 0)),
        skipped=int(suite.get("skipped", 0)),
        failures=failures[:_SHOWN],
        error=error,
    )
