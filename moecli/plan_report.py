"""Knows all that `moecli plan` tells: the plan, what it was made for, and what lies beyond it."""

from dataclasses import asdict, dataclass
from typing import Any

from moecli import cluster, whatif
from moecli.cluster import CARD_GIB, Cluster
from moecli.footprint import stored_nbytes
from moecli.models.outline import Counted, Outline, Own
from moecli.planning import Question, refusal
from moecli.schemes import fitting
from moecli.whatif import Step
from offload.plan import MemoryPlan
from quant.scheme import QuantScheme


@dataclass(frozen=True)
class Subject:
    """Which model a plan is of."""

    name: str
    title: str  # for people
    spec: Counted  # as our own decoder would run it, where that can be counted
    source: str | None  # a repository or a directory; None: no weights were released
    quantized: str | None = None  # the directory that `quantize` writes, or has written
    guessed: str | None = None  # what nobody has published of it


@dataclass(frozen=True)
class Holding:
    """A whole model in one scheme: bytes of its files, and the cards of each size that hold it."""

    scheme: str  # of the experts; "bf16": nothing is quantized
    nbytes: int
    clusters: tuple[Cluster | None, ...]  # for CARD_GIB

    @property
    def fewest(self) -> Cluster | None:
        """Of all sizes of cards."""
        found = [cluster for cluster in self.clusters if cluster is not None]
        return min(found, key=lambda c: (c.num_cards, c.card_gib), default=None)


@dataclass(frozen=True)
class PlanReport:
    """Sizes in bytes, rates in tokens a second."""

    subject: Subject
    asked: Question
    plan: MemoryPlan
    steps: tuple[Step, ...]
    holdings: tuple[Holding, ...]

    @property
    def remark(self) -> str | None:
        """What cannot be done with the model, or with this plan of it."""
        subject, spec = self.subject, self.asked.spec
        if isinstance(spec, Outline):
            return "a dense model, for comparison: planned as if its MLPs were experts"
        if subject.source is None and subject.quantized is None:
            return "planned only: no weights were released"
        if self.plan.on_device and not isinstance(spec, Own):
            return "planned only: transformers computes this architecture, on the processor alone"
        refused = refusal(self.asked.spec, self.asked.config, self.plan)
        return None if refused is None else f"planned only: {refused.message}"

    @property
    def served(self) -> tuple[str, tuple[str, ...]] | None:
        """Where vLLM would serve the model, and what starts it there; None without weights.

        In the scheme that is asked for, where moecli writes it; else as it was released.
        """
        subject = self.subject
        model = subject.quantized or subject.source
        wanted = self.asked.schemes[0].name if subject.quantized else "bf16"
        found = next(h.fewest for h in self.holdings if h.scheme == wanted)
        if model is None or found is None:
            return None
        lines = cluster.commands(found, model, self.asked.ctx)
        if subject.quantized and subject.source:
            lines.insert(0, f"moecli quantize {subject.source} -q {wanted} --dense none")
        return f"{found.num_cards} x {found.card_gib} GB, {wanted}", tuple(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        subject, spec, schemes = self.subject, self.subject.spec, self.asked.schemes
        served = self.served
        return {
            "model": subject.name,
            "title": subject.title,
            "architecture": spec.architecture,
            "remark": self.remark,
            "guessed": subject.guessed,
            "ctx": self.asked.ctx,
            "scheme": schemes[0].name,
            "dense_scheme": None if schemes[1] is None else schemes[1].name,
            "num_params": spec.num_params,
            "num_active_params": spec.num_active_params,
            **self.plan.to_dict(),
            "steps": [asdict(step) for step in self.steps],
            "holdings": [_holding(holding) for holding in self.holdings],
            "cards_counted": cluster.assumed(self.asked.ctx),
            "vllm": None if served is None else {"cards": served[0], "commands": served[1]},
        }


def _holding(holding: Holding) -> dict[str, Any]:
    cards = zip(CARD_GIB, holding.clusters, strict=True)
    return {
        "scheme": holding.scheme,
        "nbytes": holding.nbytes,
        "cards": {
            f"{size} GB": found and {**asdict(found), "num_cards": found.num_cards}
            for size, found in cards
        },
    }


def runs(spec: Counted) -> bool:
    """Whether moecli runs such models; what it only counts are dense ones, for comparison."""
    return not isinstance(spec, Outline)


def make_report(subject: Subject, asked: Question) -> PlanReport:
    """Raises OffloadError or MoecliError where the model does not fit: see `plan_model`."""
    plan = asked.answer()
    return PlanReport(subject, asked, plan, whatif.steps(asked, plan), _holdings(subject, asked))


def _holdings(subject: Subject, asked: Question) -> tuple[Holding, ...]:
    """bf16, int8 and int4, or the scheme that is asked for in place of its namesake."""
    spec, (scheme, dense) = subject.spec, asked.schemes
    dense = dense or fitting(spec, QuantScheme.parse("int8"), experts=False)
    found = []
    for name in ("bf16", "int8", "int4"):
        of_experts, rest = None, None
        if name != "bf16":
            of_experts, rest = fitting(spec, QuantScheme.parse(name), experts=True), dense
            if of_experts.bits == scheme.bits:
                of_experts, rest = asked.schemes
        clusters = tuple(
            cluster.smallest(spec, of_experts, asked.ctx, size) if isinstance(spec, Own) else None
            for size in CARD_GIB
        )
        shown = "bf16" if of_experts is None else of_experts.name
        found.append(Holding(shown, stored_nbytes(spec, of_experts, rest), clusters))
    return tuple(found)
