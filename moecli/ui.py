"""Knows how results look to people; the only file that imports Rich, and only when it must.

Every function takes typed results and decides nothing. Data goes to stdout, the rest to stderr.
Model text does not pass through here.
"""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from moecli.progress import ConversionLines, PullLines, time_left
from moecli.terminal import bold, dim, for_terminal, has_colors, is_terminal, say, styled
from moecli.units import format_bandwidth, format_nbytes, format_seconds, format_wait

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from moecli.hub.client import RemoteFile
    from moecli.hub.pulling import Pull, PullProgress
    from offload.plan import MemoryPlan
    from quant.job import ConversionProgress, ConversionResult

_RED, _YELLOW, _GREEN = "31;1", "33", "32"


def show_error(message: str, hint: str | None) -> None:
    say(f"{styled('error:', _RED, sys.stderr)} {message}")
    if hint:
        say(f"\n{bold('hint:', sys.stderr)} {hint}")


def show_note(message: str) -> None:
    say(f"{styled('note:', _YELLOW, sys.stderr)} {message}")


def show_table(headers: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]]) -> None:
    """Cells are (for people, in full). On a terminal a table; piped, tabs and full values."""
    if not is_terminal(sys.stdout):
        for row in rows:
            print("\t".join(full for _, full in row))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown) for shown, _ in row))
    _console(sys.stdout).print(table)


def print_markdown(headers: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]]) -> None:
    """The cells for people, as a Markdown table."""
    lines = [headers, ["---"] * len(headers), *([shown for shown, _ in row] for row in rows)]
    for line in lines:
        print(f"| {' | '.join(line)} |")


def show_pairs(pairs: Sequence[tuple[str, str, str]]) -> None:
    """(label, value for people, value in full), one a line; piped, label, tab, value in full."""
    width = max((len(label) for label, _, _ in pairs), default=0)
    for label, shown, full in pairs:
        if is_terminal(sys.stdout):
            print(f"{dim(label.ljust(width), sys.stdout)}  {shown}")
        else:
            print(f"{label}\t{full}")


def show_command(line: str) -> None:
    """A command by itself on its line, to be copied."""
    print(line if is_terminal(sys.stdout) else f"command\t{line}")


def show_checks(checks: Sequence[tuple[str, str, str, str | None]]) -> None:
    """(status, what, found, fix), one line a check and one more for a fix."""
    codes = {"ok": _GREEN, "warn": _YELLOW, "error": _RED}
    width = max((len(what) for _, what, _, _ in checks), default=0)
    for status, what, found, fix in checks:
        mark = styled(status.ljust(5), codes[status], sys.stdout)
        print(f"{mark} {what.ljust(width)}  {found}")
        if fix:
            print(f"{' ' * (width + 8)}{dim('fix: ', sys.stdout)}{fix}")


# Generation


class CountingLine:
    """`doing: [##------] 2 of 8 things`, on a terminal, while it is done; gone when all are."""

    _CELLS = 20

    def __init__(self, doing: str, things: str) -> None:
        self._doing, self._things = doing, things
        self._shown = 0
        self._first: tuple[float, int] | None = None  # when the first update came, and its count

    def update(self, done: int, total: int) -> None:
        if done >= total:
            self.stop()
        elif is_terminal(sys.stderr):
            full = self._CELLS * done // total
            bar = "#" * full + "-" * (self._CELLS - full)
            left = self._left(done, total)
            self._replace(f"{self._doing}: [{bar}] {done} of {total} {self._things}{left}")

    def stop(self) -> None:
        if self._shown:
            self._replace("")

    def _left(self, done: int, total: int) -> str:
        now = time.monotonic()
        began, before = self._first = self._first or (now, done)
        if done == before:
            return ""
        return f", {format_wait((total - done) * (now - began) / (done - before))} left"

    def _replace(self, line: str) -> None:
        line = line[: max(1, shutil.get_terminal_size().columns - 1)]  # a wrapped one would stay
        sys.stderr.write(f"\r{' ' * self._shown}\r{line}")
        sys.stderr.flush()
        self._shown = len(line)


@contextmanager
def counting_line(doing: str, things: str) -> Iterator[CountingLine]:
    line = CountingLine(doing, things)
    try:
        yield line
    finally:
        line.stop()


class Thoughts:
    """A model's reasoning, on stderr where that is a terminal: dim, between two lines of ours."""

    def __init__(self) -> None:
        self._open = False

    def write(self, text: str) -> None:
        if not is_terminal(sys.stderr):
            return
        if not self._open:
            self._say("Thinking...\n")
            self._open = True
        self._say(for_terminal(text))

    def end(self) -> None:
        if self._open:
            self._say("\n...done thinking.\n\n")
            self._open = False

    def _say(self, text: str) -> None:
        sys.stderr.write(dim(text, sys.stderr))
        sys.stderr.flush()


# Tokens a second, beyond which bandwidth alone says nothing of a step: launching its kernels,
# drawing a token and writing its text count for more then.
BEYOND_BANDWIDTH = 1000
_LIMITS = {
    "ram": "RAM bandwidth",
    "cpu": "the processor",
    "disk": "disk bandwidth",
    "link": "link bandwidth",
    "link and cpu": "link and processor",
    "vram": "VRAM bandwidth",
}


def at_most(rate: float, bottleneck: str | None) -> str:
    """A plan knows bandwidths, not what a step costs besides: it must not read like a promise."""
    if rate > BEYOND_BANDWIDTH:
        return f"{tok_s(rate)}: bandwidth does not limit so small a model"
    return f"at most {tok_s(rate)}, limited by {limit(bottleneck)}"


def tok_s(rate: float) -> str:
    """A speed that bandwidth predicts."""
    if rate > BEYOND_BANDWIDTH:
        return f"over {BEYOND_BANDWIDTH}"
    return f"{rate:.1f}" if rate >= 2 else f"{rate:.2f}"


def limit(bottleneck: str | None) -> str:
    """What a plan calls a bottleneck, for people."""
    assert bottleneck is not None, "a speed without a bottleneck"
    return _LIMITS[bottleneck]


def show_chat_header(version: str, lines: Sequence[str]) -> None:
    first, *rest = lines
    say(f"{bold('moecli', sys.stderr)} {version} · {first}")
    for line in rest:
        say(dim(line, sys.stderr))


# Downloads


@contextmanager
def pull_progress(quiet: bool) -> Iterator["PullProgress"]:
    """A bar a file and one for all; lines where stderr is no terminal; nothing with `quiet`."""
    if quiet or not is_terminal(sys.stderr):
        yield PullLines(_silent if quiet else say)
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(sys.stderr), transient=True) as bars:
        yield _PullBars(bars)


def _silent(message: str) -> None:
    """What a command was told to keep to itself."""


class _PullBars:
    """Bars of the files that are on their way; what is whole is only in the sum."""

    def __init__(self, bars: "Progress") -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}

    def begin(self, wanted: "Pull") -> None:
        here = wanted.nbytes - wanted.missing_nbytes
        self._total = self._bars.add_task("total", total=wanted.nbytes, completed=here)

    def update(self, file: "RemoteFile", nbytes: int) -> None:
        name = file.name
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=file.nbytes, completed=nbytes)
        else:
            self._bars.update(self._tasks[name], completed=nbytes, visible=nbytes < file.nbytes)
            self._bars.advance(self._total, nbytes - self._done[name])
        self._done[name] = nbytes


# Conversion


class ConversionShown(Protocol):
    """Where a conversion is told of; `arrived` comes from another thread."""

    def update(self, now: "ConversionProgress") -> None: ...
    def arrived(self, nbytes: int) -> None: ...


@contextmanager
def conversion_progress() -> Iterator[ConversionShown]:
    """A bar with time left and running error; lines where stderr is no terminal."""
    if not is_terminal(sys.stderr):
        yield ConversionLines(say)
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("quantizing"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%  {task.fields[sizes]}  {task.fields[left]}"),
        TextColumn("{task.fields[error]}{task.fields[came]}", markup=False),
    )
    with Progress(*columns, console=_console(sys.stderr), transient=True) as bar:
        yield _ConversionBar(bar)


class _ConversionBar:
    def __init__(self, bar: "Progress") -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, sizes="", left="", error="", came="")

    def update(self, now: "ConversionProgress") -> None:
        self._bar.update(
            self._task,
            total=now.total_nbytes,
            completed=now.done_nbytes,
            sizes=f"{format_nbytes(now.done_nbytes)} of {format_nbytes(now.total_nbytes)}",
            left=time_left(now),
            error=f"error {now.error:.2%}",
        )

    def arrived(self, nbytes: int) -> None:
        self._bar.update(self._task, came=f"  {format_nbytes(nbytes)} downloaded")


def show_conversion(result: "ConversionResult", model: str) -> None:
    """What `quantize` has made, and the next command."""
    resumed = f", {result.units_resumed} parts were there already" if result.units_resumed else ""
    pairs = [
        ("written", str(result.out)),
        (
            "size",
            f"{format_nbytes(result.out_nbytes)}, from {format_nbytes(result.source_nbytes)}",
        ),
        ("bits a weight", f"{result.bpw:.2f} ({result.bpw_experts:.2f} in experts)"),
        ("error", f"{result.error_experts:.2%} in experts, {result.error_dense:.2%} elsewhere"),
        ("time", f"{format_seconds(result.seconds)}{resumed}"),
    ]
    width = max(len(label) for label, _ in pairs)
    for label, value in pairs:
        say(f"{dim(label.ljust(width), sys.stderr)}  {value}")
    if result.source_form:
        show_packed_source(result.source_form)
    say(f"\nnext: {bold(f'moecli chat {model}', sys.stderr)}")


def show_packed_source(form: str) -> None:
    """What to expect of quantizing once more."""
    show_note(f"the source is {form}: its errors and the new ones add up")


# Plans


def places(plan: "MemoryPlan") -> str:
    """Where experts are, in a few words."""
    total = plan.total_experts
    if not plan.on_device:
        return f"{plan.host_slots} of {total} experts have a place in RAM"
    if plan.placement == "slice":
        rows = f"{plan.slice_size} of {plan.intermediate_size} rows of each expert"
        return f"{rows} are in VRAM, {plan.host_slots} of {total} experts in RAM"
    if plan.device_slots == total:
        return f"all {total} experts are in VRAM"
    return f"{plan.device_slots} of {total} experts have a place in VRAM, {plan.host_slots} in RAM"


def memory(plan: "MemoryPlan") -> str:
    """What the plan takes of its budgets."""
    ram = f"{format_nbytes(plan.ram_nbytes)} of {format_nbytes(plan.ram_budget)}"
    if not plan.on_device:
        return ram
    vram = f"{format_nbytes(plan.vram_nbytes)} of {format_nbytes(plan.vram_budget)}"
    return f"{vram} VRAM and {ram} RAM"


def bandwidth(value: float | None) -> str:
    return "not measured" if value is None else format_bandwidth(value)


def ask(question: str) -> bool:
    """A yes or no from the terminal; Enter is no."""
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _console(stream: TextIO) -> "Console":
    from rich.console import Console

    colors: dict[str, Any] = {} if has_colors(stream) else {"color_system": None}
    return Console(file=stream, highlight=False, markup=False, emoji=False, **colors)
