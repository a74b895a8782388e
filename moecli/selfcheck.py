"""Knows whether the fast paths of this card give right results, and remembers it between runs.

A path is a way of computing that has a slower one behind it. What the cases do is in
`moecli.checks`; they run in a process of their own, since a kernel that goes wrong may
take its whole process with it. Nothing here imports torch before it must.
"""

import hashlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from moecli import __version__

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
_SOURCES = (  # whatever decides what a fast path computes
    *("quant/ops.py", "quant/layout.py", "quant/kernels"),
    *("offload/device_cache.py", "offload/device_ops.py", "offload/host_lane.py"),
    *("offload/lane_ops.py", "offload/mailbox.py", "offload/kernels"),
    *("offload/slots.py", "offload/transfer.py", "offload/copy2d.py", "offload/pieces.py"),
    *("moecli/graphs.py", "moecli/models/fused.py", "moecli/models/kernels"),
    *("moecli/selfcheck.py", "moecli/checks"),
)
_SILENCE_S = 180.0  # a child that says nothing for so long hangs; compiling takes a few seconds
_TEXT = 2000  # characters of an error that are kept
_POISONED = 3  # exit code of a child whose device answers nothing any more


@dataclass(frozen=True)
class FastPaths:
    """What the engine may use. What is off has a slower way, and the user is told."""

    kernels: bool = True  # Triton kernels; off: plain PyTorch
    graph: bool = True  # a decode step as one CUDA graph; off: launched kernel by kernel
    fetch: bool = True  # experts copied into slots by the device itself; off: not fetched at decode
    doorbell: bool = True  # experts handed to the host from inside a step; off: not by the host
    parts: bool = True  # the rows that slices lack, copied for a prompt; off: whole experts

    @classmethod
    def none(cls) -> "FastPaths":
        return cls(*(False for _ in fields(cls)))


PATHS = tuple(path.name for path in fields(FastPaths))


@dataclass(frozen=True)
class Result:
    """One case: `error` is None where it went well. `lasting`: trying again would not help."""

    path: str
    name: str
    error: str | None
    seconds: float
    lasting: bool = True

    @property
    def ok(self) -> bool:
        return self.error is None


@dataclass(frozen=True)
class SelfCheck:
    """Every case that was tried on one card, driver and version of all that is involved."""

    identity: dict[str, str]
    results: tuple[Result, ...]
    remembered: bool = field(default=False, compare=False)  # read from the cache, not run now

    @property
    def paths(self) -> FastPaths:
        """A path is on when it was tried and none of its cases failed."""
        return FastPaths(**{path: self.is_on(path) for path in PATHS})

    def is_on(self, path: str) -> bool:
        cases = self.of(path)
        return bool(cases) and all(result.ok for result in cases)

    def of(self, path: str) -> list[Result]:
        return [result for result in self.results if result.path == path]

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if not result.ok]

    @property
    def seconds(self) -> float:
        return sum(result.seconds for result in self.results)

    def notes(self) -> list[str]:
        """One sentence for each path that is off, for the user."""
        return [
            f"{path} of this graphics card: off, {why(self.of(path))}; `moecli doctor --refresh` "
            "tries again"
            for path in PATHS
            if not self.is_on(path)
        ]


def why(cases: Sequence[Result]) -> str:
    """What failed among the cases of a path, in one line."""
    failed = [result for result in cases if not result.ok]
    if not failed:
        return "it was not tried" if not cases else "nothing failed"
    first = (failed[0].error or "").strip().splitlines() or ["no reason given"]
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return f"`{failed[0].name}` failed: {first[0]}{more}"


# Running


@dataclass(frozen=True)
class Case:
    """One comparison; `run` raises where fast and plain disagree, or where anything breaks."""

    path: str
    name: str
    run: Callable[["torch.device"], None]


def run_cases(cases: Sequence[Case], device: "torch.device | str") -> Iterator[Result]:
    """Each case in this process. Whatever it raises is its result."""
    import torch

    for case in cases:
        begin = time.perf_counter()
        error, lasting = None, True
        try:
            case.run(torch.device(device))
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()  # a kernel's failure shows when it is waited for
        except torch.OutOfMemoryError as problem:
            error, lasting = _text(problem), False
        except Exception as problem:  # noqa: BLE001 - a failing compiler raises what it likes
            error = _text(problem)
        yield Result(case.path, case.name, error, time.perf_counter() - begin, lasting)


def _text(problem: BaseException) -> str:
    text = str(problem).strip()
    return f"{type(problem).__name__}: {text}"[:_TEXT] if text else type(problem).__name__


def run_isolated(
    names: Sequence[str], paths: dict[str, str], command: Sequence[str], silence_s: float
) -> list[Result]:
    """The cases of these names, each by a child `command NAME...` that prints a line a result.

    A child that dies or hangs fails the case it was at, and another goes on behind it. `paths`:
    to which path each case belongs.
    """
    left, found = list(names), []
    while left:
        child = _Child([*command, *left], silence_s)
        for result in child.results():
            found.append(result)
            left.remove(result.name)
        if left and child.ending is not None:
            name = left.pop(0)
            found.append(Result(paths[name], name, child.ending, 0.0))
    return found


class _Child:
    """One child process. After `results`, `ending` says how it died within a case; None: between
    two, having said so itself, or at its end.
    """

    def __init__(self, command: Sequence[str], silence_s: float) -> None:
        self._command, self._silence_s = list(command), silence_s
        self.ending: str | None = None

    def results(self) -> Iterator[Result]:
        with subprocess.Popen(
            self._command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            lines = _Lines(process.stdout, process.stderr)
            num_results = 0
            try:
                for line in lines.until_silent(self._silence_s):
                    num_results += 1
                    yield Result(**json.loads(line))
            except TimeoutError:
                self.ending = f"no answer within {self._silence_s:g} s"
                process.kill()
            except BaseException:  # nobody listens any more
                process.kill()
                raise
        if self.ending is None and (process.returncode != _POISONED or not num_results):
            self.ending = f"the process ended with {process.returncode}: {lines.last_error()}"


class _Lines:
    """Lines of a process' stdout as they come, its stderr kept aside."""

    def __init__(self, out: IO[bytes], err: IO[bytes]) -> None:
        self._out, self._err = out, err
        self._errors = b""

    def until_silent(self, seconds: float) -> Iterator[str]:
        """Raises TimeoutError where nothing comes for so long."""
        pending = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._out, selectors.EVENT_READ)
            selector.register(self._err, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(seconds)
                if not ready:
                    raise TimeoutError
                for key, _ in ready:
                    data = os.read(key.fd, 65536)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is self._err:
                        self._errors = (self._errors + data)[-_TEXT:]
                    else:
                        *whole, pending = (pending + data).split(b"\n")
                        yield from (line.decode() for line in whole)

    def last_error(self) -> str:
        lines = self._errors.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _child(device: str, names: Sequence[str]) -> None:
    """What a child does: the cases, until the device is past answering."""
    import torch

    from moecli.checks.cases import CASES

    wanted = [case for case in CASES if case.name in names]
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no result
    for result in run_cases(wanted, device):
        print(json.dumps(asdict(result)), file=out, flush=True)
        if not result.ok:
            try:
                synchronize()
            except RuntimeError:
                os._exit(_POISONED)


# Remembering


def identity() -> dict[str, str]:
    """What a result depends on. Needs a CUDA device."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "driver": driver_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "moecli": __version__,
        "sources": sources_hash(),
    }


def package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def driver_version() -> str:
    """The version of NVIDIA's driver; "unknown" where nothing tells it."""
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.split() or ["unknown"])[0]


def sources_hash(root: Path = ROOT) -> str:
    """A hash of all code that fast paths consist of, and of the cases themselves."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moecli" / "selfcheck.json"


def remembered(now: dict[str, str], path: Path) -> SelfCheck | None:
    """What an earlier run found on exactly this card and code; None where there is nothing."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        results = tuple(Result(**result) for result in data["results"])
    except (OSError, ValueError, TypeError, KeyError):
        return None  # none yet, or one that another version wrote
    return SelfCheck(now, results, remembered=True) if data["identity"] == now else None


def remember(check: SelfCheck, path: Path) -> None:
    """Keep a result, unless a case failed for want of memory: that may be over next time."""
    if any(not result.lasting for result in check.failures):
        return
    data = {"identity": check.identity, "results": [asdict(result) for result in check.results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def self_check(refresh: bool = False, begin: Callable[[], None] = lambda: None) -> SelfCheck:
    """The check of this machine's CUDA device, from the cache where it is there.

    `begin` is called before cases are run, which takes seconds to a minute: kernels are compiled.
    """
    from moecli.checks.cases import CASES

    now, path = identity(), cache_file()
    known = None if refresh else remembered(now, path)
    if known is not None:
        return known
    begin()
    paths = {case.name: case.path for case in CASES}
    command = (sys.executable, "-m", "moecli.selfcheck", "cuda")
    check = SelfCheck(now, tuple(run_isolated(list(paths), paths, command, _SILENCE_S)))
    with suppress(OSError):  # a home that cannot be written costs this check at every start
        remember(check, path)
    return check


def fast_paths(notify: Callable[[str], None]) -> FastPaths:
    """What the engine may use here; `notify` hears of everything that is off."""
    check = self_check(begin=lambda: notify("checking the kernels on this card, once"))
    for note in check.notes():
        notify(note)
    return check.paths


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2:])
