"""Knows in which schemes a model's weights are stored: those that are asked for by name, in groups
as narrow as the model's rows want them where no group is named; knows no bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from moecli.models.outline import Counted
from quant.scheme import GROUP_SIZES, QuantScheme

Schemes = tuple[QuantScheme, QuantScheme | None]  # of the experts, and of the rest: None is 16 bits


@dataclass(frozen=True)
class AskedScheme:
    """What somebody has asked for; `named`: with its group, which is kept then or refused."""

    scheme: QuantScheme
    named: bool = False

    @classmethod
    def parse(cls, name: str, group_size: int | None = None) -> "AskedScheme":
        """`int4`, `int8-g64`, ...; raises QuantError for what is no scheme."""
        scheme = QuantScheme.parse(name, group_size)
        return cls(scheme, group_size is not None or scheme.name == name.lower())

    def of(
        self, spec: Counted, *, experts: bool, notify: Callable[[str], None] | None = None
    ) -> QuantScheme:
        """What the model's routed experts are stored in, or else its other linears.

        `notify` hears where groups are narrower than they usually are.
        """
        fits = self.scheme if self.named else fitting(spec, self.scheme, experts)
        if notify is not None and fits != self.scheme:
            usual = self.scheme.group_size
            odd = min(width for width in _widths(spec, experts) if width % usual)
            notify(
                f"{'experts' if experts else 'other linears'} take {fits.name}: rows "
                f"of {odd} weights do not divide into groups of {usual}"
            )
        return fits


def fitting(spec: Counted, scheme: QuantScheme, experts: bool) -> QuantScheme:
    """`scheme` with the widest groups, up to its own, that divide the rows it is for.

    One group for all of them, since readers join linears (q, k and v in vLLM) and look for the
    scheme of what they have joined. Where none divides the rows the scheme stays as it is, and
    whoever lays out such rows says so. `experts`: those of routed experts; else of all other
    linears.
    """
    groups = (g for g in sorted(GROUP_SIZES, reverse=True) if g <= scheme.group_size)
    widths = _widths(spec, experts)
    whole = (g for g in groups if not any(width % g for width in widths))
    return QuantScheme(scheme.bits, next(whole, scheme.group_size))


def _widths(spec: Counted, experts: bool) -> set[int]:
    """Weights of a row."""
    if experts:
        return {spec.hidden_size, spec.expert_intermediate_size}
    return {tensor.shape[1] for tensor in spec.dense_tensors if tensor.linear}
