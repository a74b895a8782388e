"""The cases of the self-check: right with whole kernels, wrong at once with broken ones."""

import pkgutil
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moecli import selfcheck
from moecli.checks import graph
from moecli.checks.cases import CASES
from moecli.checks.compare import Mismatch, agree, equal
from moecli.selfcheck import PATHS, Case, FastPaths, SelfCheck
from tests.devices import DEVICE

NAMES = [case.name for case in CASES]
# The interpreter is slow, and the kernels' own tests try every group size.
TRIED = [c for c in CASES if "-g" not in c.name or "int4-g32" in c.name or "int8-g128" in c.name]
FEW, DENSE = "experts of a few tokens, int4-g32", "dense weights, int8-g128"
BIASED = "experts of many tokens, with biases and limits"


def test_cases_are_named_apart_and_cover_every_path() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert {case.path for case in CASES} == set(PATHS)


@pytest.mark.parametrize("case", CASES if DEVICE == "cuda" else TRIED, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    (result,) = selfcheck.run_cases([case], DEVICE)
    assert result.error is None


def test_cases_in_a_child() -> None:
    names = ["rows of an embedding", "requests to the host"]
    paths = {case.name: case.path for case in CASES}
    command = (sys.executable, "-m", "moecli.selfcheck", DEVICE)
    found = selfcheck.run_isolated(names, paths, command, 120.0)
    assert [(r.name, r.path, r.error) for r in found] == [(n, paths[n], None) for n in names]


def test_numbers_that_are_none_do_not_agree() -> None:
    good = torch.ones(3)
    agree("x", good, good, 0.0)
    for bad in (good * torch.nan, good[:2], good + 1e-3):
        with pytest.raises(Mismatch):
            agree("x", bad, good, 1e-4)
    for bad in (good[:2], good + 1e-6):
        with pytest.raises(Mismatch):
            equal("x", bad, good)


# What is broken, how, and the one path that must go off


def _off_by_little(original: Callable[..., Any]) -> Callable[..., Any]:
    def broken(self: object, out: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        original(self, out, *args, **kwargs)
        out[:, -1] += 0.01

    return broken


def _does_nothing(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: None


def _fails(original: Callable[..., Any]) -> Callable[..., Any]:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("cannot compile")

    return broken


def _scaled(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: original(*args, **kwargs) * 1.05


def _forgets_the_length(original: Callable[..., Any]) -> Callable[..., Any]:
    def broken(q: Any, kept: torch.Tensor, length: torch.Tensor, *rest: Any) -> torch.Tensor:
        return original(q, kept, torch.full_like(length, kept.shape[-2]), *rest)

    return broken


def _forgets_biases(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: original(*args, **{**kwargs, "biases": None})


def _half_of_it(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda src, dst, count, nbytes, slots: original(src, dst, count, nbytes // 2, slots)


_BACKEND = "quant.kernels.triton.TritonBackend"
BROKEN = [
    ("kernels", FEW, f"{_BACKEND}.add_routed_experts", _off_by_little),
    ("kernels", FEW, f"{_BACKEND}.add_routed_experts", _fails),
    ("kernels", DENSE, f"{_BACKEND}.linear_quantized", _scaled),
    ("kernels", "norms and activations", "moecli.models.kernels.rows.rms_norm", _scaled),
    ("kernels", "norms and activations", "moecli.models.kernels.rows.silu_mul", _scaled),
    ("kernels", "rows of an embedding", "moecli.models.kernels.rows.gather_rows", _scaled),
    (
        "kernels",
        "attention of one token",
        "moecli.models.kernels.heads.decode_attention",
        _forgets_the_length,
    ),
    (
        "kernels",
        "heads and the KV cache",
        "moecli.models.kernels.heads.rotate_and_store",
        _scaled,
    ),
    (
        "kernels",
        "attention of many tokens to windows",
        "moecli.models.kernels.prompt.windowed_attention",
        _scaled,
    ),
    (
        "kernels",
        "attention of one token to latents",
        "moecli.models.kernels.latents.decode_latents",
        _forgets_the_length,
    ),
    ("kernels", BIASED, f"{_BACKEND}.add_routed_experts", _forgets_biases),
    ("kernels", "the cache's bookkeeping", "offload.kernels.resolve.resolve", _does_nothing),
    ("fetch", "experts copied into slots", "offload.kernels.fetch.fetch", _does_nothing),
    ("fetch", "experts copied into slots", "offload.kernels.fetch.fetch", _half_of_it),
    ("doorbell", "requests to the host", "offload.kernels.doorbell.wait", _does_nothing),
    ("doorbell", "requests to the host", "offload.kernels.doorbell.ring", _fails),
    (
        "parts",
        "parts of experts copied into slots",
        "offload.slots.SlotPool.copy_in",
        _does_nothing,
    ),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("path", "name", "target", "how"), BROKEN)
def test_a_broken_kernel_turns_its_path_off(
    path: str, name: str, target: str, how: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pkgutil.resolve_name(target)
    monkeypatch.setattr(target, how(original))
    (result,) = selfcheck.run_cases([case for case in CASES if case.name == name], DEVICE)
    assert not result.ok
    assert result.path == path


STEPS = [case for case in CASES if "captured" in case.name]


def paths_of(cases: list[Case]) -> FastPaths:
    """Every path has a case that is sound besides."""
    sound = tuple(selfcheck.Result(path, path, None, 0.0) for path in PATHS)
    return SelfCheck({}, (*sound, *selfcheck.run_cases(cases, DEVICE))).paths


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what lies in slots is anything
def test_a_fetch_that_copies_nothing_leaves_the_other_paths_on(monkeypatch) -> None:
    from offload.kernels import fetch

    monkeypatch.setattr(fetch, "fetch", _does_nothing(fetch.fetch))
    copied = [case for case in CASES if case.name == "experts copied into slots"]
    assert paths_of([*copied, *STEPS]) == replace(FastPaths(), fetch=False)


@pytest.mark.skipif(DEVICE == "cuda", reason="a card has real graphs")
@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_steps_are_captured_by_a_simulated_graph(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = pytest.importorskip("tests.graphs")

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        recorded = graphs.SimulatedGraph()
        with recorded.capture():
            step()
        replay: Callable[[], None] = recorded.replay
        return replay

    monkeypatch.setattr(graph, "capture_on", lambda device: capture)
    (result,) = selfcheck.run_cases([case], DEVICE)
    assert result.error is None


def _replays_nothing(step: Callable[[], None]) -> Callable[[], None]:
    return lambda: None


def _replays_twice(step: Callable[[], None]) -> Callable[[], None]:
    def replay() -> None:
        step()
        step()

    return replay


def _cannot_capture(step: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("capture", [_replays_nothing, _replays_twice, _cannot_capture])
def test_a_broken_graph_turns_off_the_graph(
    capture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "capture_on", lambda device: capture)
    assert paths_of(STEPS) == replace(FastPaths(), graph=False)
