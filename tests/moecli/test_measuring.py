"""The CPU lane's bandwidth is measured on experts of the very kind that a step computes."""

import pytest
import torch

from moecli import measuring
from moecli.measuring import expert_compute
from quant import ops
from quant.layout import ExpertLayout
from quant.scheme import QuantScheme

LAYOUT = ExpertLayout(64, 96, QuantScheme(4, 32))


@pytest.mark.parametrize(("spread", "top_k", "count"), [(0, 1, 1), (5.5, 2, 6), (99, 3, 63)])
def test_every_expert_is_computed_once_and_counted(
    monkeypatch: pytest.MonkeyPatch, spread: float, top_k: int, count: int
) -> None:
    monkeypatch.setattr(measuring, "_SPREAD_NBYTES", int(spread * LAYOUT.nbytes))
    monkeypatch.setattr(measuring, "_CALL_NBYTES", 1)
    asked: list[int] = []
    results: list[torch.Tensor] = []
    real = ops.routed_experts

    def spy(hidden: torch.Tensor, ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        assert (hidden.shape[0], ids.shape) == (1, (1, top_k))
        asked.extend(ids.flatten().tolist())
        results.append(real(hidden, ids, *rest))
        return results[-1]

    monkeypatch.setattr(ops, "routed_experts", spy)
    host = expert_compute(LAYOUT, top_k)
    assert host.compute() == count * LAYOUT.nbytes
    assert asked == list(range(count))
    assert all(bool(torch.isfinite(result).all()) and result.any() for result in results)


def test_a_call_has_so_much_work_that_its_own_cost_is_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a plan of tiny experts would promise less than a run reaches."""
    work: list[int] = []
    monkeypatch.setattr(ops, "routed_experts", lambda _, ids, *rest: work.append(ids.numel()))
    demo = ExpertLayout(256, 128, QuantScheme(4, 32))
    assert expert_compute(demo, 1).compute() == sum(work) * demo.nbytes
    assert len(set(work)) == 1
    assert work[0] * demo.nbytes >= 1 << 20
    work.clear()
    assert expert_compute(ExpertLayout(2048, 768, QuantScheme(4, 32)), 8).compute()
    assert set(work) == {8}, "as a step asks for them, where they are large enough"


def test_kinds_of_experts_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_CALL_NBYTES", 1)
    other = (
        expert_compute(ExpertLayout(64, 96, QuantScheme(8, 32)), 1),
        expert_compute(ExpertLayout(64, 128, QuantScheme(4, 32)), 1),
        expert_compute(LAYOUT, 2),
    )
    names = {expert_compute(LAYOUT, 1).name, *(host.name for host in other)}
    assert len(names) == 4
    assert expert_compute(LAYOUT, 1).name in names


@pytest.mark.parametrize(("top_k", "shared_by"), [(1, 5), (2, 3), (3, 8)])
def test_a_prompt_shares_each_expert_among_so_many_tokens(
    monkeypatch: pytest.MonkeyPatch, top_k: int, shared_by: int
) -> None:
    monkeypatch.setattr(measuring, "_SPREAD_NBYTES", 6 * LAYOUT.nbytes)
    monkeypatch.setattr(measuring, "_CALL_NBYTES", 1)
    asked: list[torch.Tensor] = []

    def spy(hidden: torch.Tensor, ids: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        assert hidden.shape == (ids.shape[0], LAYOUT.hidden_size)
        asked.append(ids)
        return hidden

    monkeypatch.setattr(ops, "routed_experts", spy)
    share = expert_compute(LAYOUT, top_k, shared_by).share
    assert share is not None
    operations = share()
    (ids,) = asked
    assert all(len(set(row)) == top_k for row in ids.tolist()), "a token's experts differ"
    assert ids.flatten().bincount().tolist() == [shared_by] * 6
    assert operations == 2 * ids.numel() * LAYOUT.num_weights
    assert expert_compute(LAYOUT, top_k).share is None
