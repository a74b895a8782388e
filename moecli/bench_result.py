"""Knows the numbers that a benchmark of a model ends with; measures nothing."""

import statistics
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

from moecli.beside import Beside, Pair, by_memory, hits, planned_traffic
from moecli.roofline import Traffic
from offload.plan import MemoryPlan


@dataclass(frozen=True)
class Run:
    """One prompt that was read, or one answer that was written; rates in tokens a second."""

    tok_s: float
    hit_rate: float | None  # of experts; None where none was asked for
    moved_nbytes: float  # a token, from disk and over the link
    ttft_s: float | None = None  # of a prompt
    read_nbytes: float | None = None  # a token of an answer, from where it was computed
    allowed_tok_s: float | None = None  # of an answer, by the bandwidths at that time
    traffic: Traffic | None = None  # of an answer


@dataclass(frozen=True)
class BenchRow:
    """One test from cold or from warm experts, with all its repeats."""

    test: str  # pp512, tg128, tg128 x4 (all sequences' tokens together)
    slots: str  # cold, warm
    runs: tuple[Run, ...]

    @property
    def tok_s(self) -> float:
        return statistics.median(run.tok_s for run in self.runs)

    @property
    def spread(self) -> tuple[float, float]:
        """The slowest and the fastest run."""
        rates = [run.tok_s for run in self.runs]
        return min(rates), max(rates)

    @property
    def roofline_share(self) -> float | None:
        """Median of what each run reached of what its bandwidths allowed."""
        shares = [run.tok_s / run.allowed_tok_s for run in self.runs if run.allowed_tok_s]
        return statistics.median(shares) if shares else None

    @property
    def traffic(self) -> Traffic | None:
        """Median of each memory's bytes a token; None of a prompt."""
        runs = [run.traffic for run in self.runs if run.traffic is not None]
        if not runs:
            return None
        return Traffic(*(statistics.median(each) for each in zip(*map(astuple, runs), strict=True)))

    def median(self, name: str) -> float | None:
        """Of a field of the runs; None where it is unknown."""
        values = [value for run in self.runs if (value := getattr(run, name)) is not None]
        return statistics.median(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        least, most = self.spread
        names = ("hit_rate", "moved_nbytes", "ttft_s", "read_nbytes", "allowed_tok_s")
        return {
            **{"test": self.test, "slots": self.slots, "tok_s": self.tok_s},
            **{"tok_s_least": least, "tok_s_most": most, "roofline_share": self.roofline_share},
            **{name: self.median(name) for name in names},
            "runs": [asdict(run) for run in self.runs],
        }


@dataclass(frozen=True)
class BenchResult:
    """Rates in tokens or bytes a second, sizes in bytes."""

    model: str
    device: str
    threads: int
    kernels: str
    ram_bw: float | None  # median over the warm runs
    disk_bw: float | None
    link_bw: float | None
    vram_bw: float | None
    peak_rss_nbytes: int
    peak_vram_nbytes: int | None
    grown_rss_nbytes: int | None  # of the peak, since the model was opened first
    page_cache_dropped: bool  # before cold runs
    rows: tuple[BenchRow, ...]
    plan: MemoryPlan  # with what these bandwidths let it predict

    @property
    def warm(self) -> BenchRow:
        """The answers that predictions are about."""
        return next(r for r in self.rows if r.slots == "warm" and r.test.startswith("tg"))

    @property
    def beside(self) -> Beside:
        plan, warm = self.plan, self.warm
        vram = plan.vram_nbytes if plan.on_device else None
        return Beside(
            tok_s=Pair(plan.predicted_tok_s, warm.tok_s),
            hit_rate=hits(plan, warm.median("hit_rate")),
            a_token=by_memory(planned_traffic(plan), warm.traffic),
            ram_nbytes=Pair(plan.ram_nbytes, self.grown_rss_nbytes),
            vram_nbytes=Pair(vram, self.peak_vram_nbytes),
        )

    def to_dict(self) -> dict[str, Any]:
        """Every number, for `--json`."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        rows = [row.to_dict() for row in self.rows]
        return found | {"rows": rows, "plan": self.plan.to_dict(), "beside": asdict(self.beside)}
