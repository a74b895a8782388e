"""Knows all cases of the self-check, in the order in which they are tried."""

from moecli.checks.graph import graph_cases
from moecli.checks.lanes import lane_cases
from moecli.checks.quantized import quantized_cases
from moecli.checks.small import small_cases
from moecli.selfcheck import Case

CASES: tuple[Case, ...] = (
    *(*quantized_cases(), *small_cases()),
    *(*lane_cases(), *graph_cases()),
)
