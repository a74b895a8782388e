"""Knows what alternations add up to: medians of ratios, shares of bandwidth, and the marks."""

import itertools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TESTS = ("decode", "prefill")
# What is wanted of moecli: ratios to llama.cpp's best, and the share of memory's bandwidth.
WANTED = {
    "int4": {"decode": 1.1, "prefill": 1.2},
    "int4-g128": {"decode": 1.1, "prefill": 1.2},
    "int8": {"decode": 1.2, "prefill": 1.2},
}
WANTED_SHARE = 0.9  # decoding, 4 bits


@dataclass(frozen=True)
class Spread:
    """A median and what it lies between."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} - {self.most:.2f})"


def summarize_peer(peer: dict[str, Any], our_read_nbytes: float) -> dict[str, Any]:
    """Medians and spreads of one peer's alternations; ratios are taken within each."""
    rounds = peer["alternations"]
    found: dict[str, Any] = {"ram_bw": Spread.of(r["ram_bw"] for r in rounds)}
    for test in TESTS:
        ours, theirs = f"ours_{test}", f"theirs_{test}"
        found[test] = {
            "ours": Spread.of(r[ours] for r in rounds),
            "theirs": Spread.of(r[theirs] for r in rounds),
            "ratio": Spread.of(r[ours] / r[theirs] for r in rounds),
            "foreign_cores": max(
                r[f"{side}_foreign_cores"] for r in rounds for side in (ours, theirs)
            ),
        }
    for side, read in (("ours", our_read_nbytes), ("theirs", peer["sizes"]["read_nbytes"])):
        found[f"{side}_share_of_ram_bw"] = Spread.of(
            r[f"{side}_decode"] * read / r["ram_bw"] for r in rounds
        )
    return found


def summarize(comparison: dict[str, Any]) -> dict[str, Any]:
    """Of one of ours: every peer, and how the marks stand against the best of them."""
    read = comparison["sizes"]["read_nbytes"]
    peers = {p["peer"]: summarize_peer(p, read) for p in comparison["peers"]}
    marks = []
    for test, wanted in WANTED.get(comparison["ours"], {}).items():
        best = min(peers, key=lambda name: peers[name][test]["ratio"].median)
        ratio = peers[best][test]["ratio"]
        marks.append(_mark(f"{test} against {best}", wanted, ratio.median))
    turns = comparison.get("beside_memory")  # reports of earlier versions have none
    share = None if turns is None else share_of_memory(turns, read)
    if share is not None and comparison["ours"].startswith("int4"):
        marks.append(_mark("share of memory bandwidth", WANTED_SHARE, share.median))
    together = {count: Spread.of(rates) for count, rates in comparison["together"].items() if rates}
    if "1" in together:
        alone = together["1"].median
        least = min(together.values(), key=lambda spread: spread.median).median
        marks.append(_mark("slowest count of sequences against one", 1.0, least / alone))
    return {"peers": peers, "together": together, "share": share, "marks": marks}


def share_of_memory(turns: dict[str, list[float]], read_nbytes: float) -> Spread:
    """Of what memory gave, on an average, before and after each few tokens."""
    speeds = [(a + b) / 2 for a, b in itertools.pairwise(turns["ram_bw"])]
    rates = turns["decode"]
    return Spread.of(r * read_nbytes / s for r, s in zip(rates, speeds, strict=True))


def _mark(what: str, wanted: float, reached: float) -> dict[str, Any]:
    return {"what": what, "wanted": wanted, "reached": reached, "ok": reached >= wanted}


def tables(shapes: Iterable[dict[str, Any]]) -> str:
    """Markdown: both sides of each shape, sequences together, and marks."""
    head = (
        "| shape | moecli | llama.cpp | decode, tok/s | ratio | of RAM bandwidth "
        "| prefill, tok/s | ratio |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    together = ["| shape | moecli | sequences: tok/s of all |", "|---|---|---|"]
    shares = ["| shape | moecli | of RAM bandwidth, in short turns |", "|---|---|---|"]
    marks = ["| shape | moecli | what | wanted | reached |", "|---|---|---|---|---|"]
    for shape in shapes:
        for comparison in shape["comparisons"]:
            summary, who = summarize(comparison), f"| {shape['name']} | {_sized(comparison)} "
            lines += [who + _row(summary["peers"][p["peer"]], p) for p in comparison["peers"]]
            counts = summary["together"].items()
            rates = ", ".join(f"{count}: {spread.median:.1f}" for count, spread in counts)
            together += [f"{who}| {rates} |"] if rates else []
            shares += [f"{who}| {summary['share']} |"] if summary["share"] else []
            marks += [
                f"{who}| {m['what']} | {m['wanted']:.2f} | {m['reached']:.2f}"
                f"{'' if m['ok'] else ', missed'} |"
                for m in summary["marks"]
            ]
    return "\n".join([*lines, "", *together, "", *shares, "", *marks])


def _sized(comparison: dict[str, Any]) -> str:
    sizes = comparison["sizes"]
    read = sizes["read_nbytes"] / 1e6
    return f"{comparison['ours']}, {sizes['bits_a_weight']:.2f} bits, {read:.0f} MB a token"


def _row(summary: dict[str, Any], peer: dict[str, Any]) -> str:
    sizes, cells = peer["sizes"], []
    read = sizes["read_nbytes"] / 1e6
    cells.append(f"{peer['peer']}, {sizes['bits_a_weight']:.2f} bits, {read:.0f} MB a token")
    for test in TESTS:
        rates = summary[test]
        cells.append(f"{rates['ours'].median:.1f} : {rates['theirs'].median:.1f}")
        cells.append(str(rates["ratio"]))
        if test == "decode":
            shares = [summary[f"{s}_share_of_ram_bw"].median for s in ("ours", "theirs")]
            cells.append(" : ".join(f"{share:.0%}" for share in shares))
    return "| " + " | ".join(cells) + " |"
