"""The simulated graph itself: a test that relies on it must fail where a real graph would."""

import pytest
import torch

from moecli.models import fused
from tests.graphs import CaptureError, SimulatedGraph


def test_replay_reads_and_writes_the_tensors_of_the_capture():
    x, total = torch.tensor([1.0, 2.0]), torch.zeros(2)
    graph = SimulatedGraph()
    with graph.capture():
        view = (x * 2).view(2, 1)
        total.add_(view[:, 0])
        fused.add_rms_norm(total, x, None, 0.0)
        result = torch.nn.functional.linear(total, torch.eye(2)) + view.flatten()
    assert total.tolist() == [0, 0], "capturing runs nothing"
    assert result.isnan().all()
    graph.replay()
    assert total.tolist() == [3, 6]
    assert result.tolist() == [5, 10]
    x.copy_(torch.tensor([10.0, 0.0]))
    graph.replay()
    assert total.tolist() == [33, 6]
    assert result.tolist() == [53, 6]


def test_python_values_are_baked_in():
    count, seen = 1, torch.zeros(1)
    graph = SimulatedGraph()
    with graph.capture():
        seen.fill_(count)
    count = 2
    graph.replay()
    assert seen.item() == 1


def test_memory_keeps_what_the_replay_before_left_there():
    x = torch.ones(3)
    graph = SimulatedGraph()
    with graph.capture():
        buffer = torch.empty(3)
        buffer.add_(x)
    graph.replay()
    assert buffer.isnan().all(), "nobody has filled it"


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: bool(x[0] > 0),
        lambda x: x[0] > 0 and x,
        lambda x: int(x[0]),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
        lambda x: torch.equal(x, x),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_what_waits_for_the_device_is_refused(step):
    x = torch.tensor([1.0, -2.0, 3.0])
    with pytest.raises(CaptureError), SimulatedGraph().capture():
        step(x)
    assert x.tolist() == [1, -2, 3]


def test_what_does_not_wait_is_let_through():
    x = torch.tensor([3.0, 1.0, 2.0])
    graph = SimulatedGraph()
    with graph.capture():
        values, ids = x.topk(2)
        rows = torch.arange(3)[ids]
        y = torch.where(x > 1, x, 0).softmax(-1)[rows] * values
        y = y.to(torch.bfloat16).float().reshape(1, -1)
    graph.replay()
    expected = (torch.where(x > 1, x, 0).softmax(-1)[[0, 2]] * torch.tensor([3.0, 2.0])).bfloat16()
    assert torch.equal(y, expected.float()[None])
