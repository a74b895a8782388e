"""Threads that work ahead: order, how far ahead, failures, and torch's own threads."""

import threading
from collections.abc import Iterator

import pytest
import torch

from quant.workers import Workers


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def test_results_come_in_order_and_not_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    with Workers() as workers:
        for place, result in enumerate(workers.map(lambda n: n * n, items())):
            assert result == place * place
            assert len(taken) <= place + 4
    assert place == 49


def test_all_threads_work_at_once() -> None:
    together = threading.Barrier(3, timeout=20)
    with Workers() as workers:
        assert len(list(workers.map(lambda _: together.wait(), range(3)))) == 3


def test_torch_has_one_thread_meanwhile() -> None:
    with Workers() as workers:
        counts = list(workers.map(lambda _: torch.get_num_threads(), range(6)))
        assert counts == [1] * 6
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_a_failure_comes_at_its_turn() -> None:
    def fail_at_two(number: int) -> int:
        if number == 2:
            raise ValueError(number)
        return number

    seen = []
    with Workers() as workers:
        with pytest.raises(ValueError, match="2"):
            seen.extend(workers.map(fail_at_two, range(9)))
        assert list(workers.map(str, range(3))) == ["0", "1", "2"]
    assert torch.get_num_threads() == 3
