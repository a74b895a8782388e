"""Drawing on the device: with the same random numbers, the same tokens as moecli.sampler."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.config import SamplingConfig
from moecli.device_sampler import BAD_LOGITS, SamplingParams, draw, mode_of
from moecli.sampler import new_generator, sample


def both(logits: torch.Tensor, config: SamplingConfig, num_draws: int) -> tuple[list, list]:
    """Tokens drawn by the host's sampler and by the device's."""
    host, params = new_generator(config.seed), SamplingParams("cpu")
    params.set(config)
    points = torch.rand(num_draws, generator=new_generator(config.seed), dtype=torch.float64)
    ours = [int(draw(logits, params, point[None], mode_of(config))) for point in points]
    return [sample(logits, config, host) for _ in range(num_draws)], ours


@settings(max_examples=120, deadline=None)
@given(
    size=st.integers(1, 700),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 7, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    levels=st.sampled_from([3, 10**6]),
    seed=st.integers(0, 2**31),
)
def test_same_tokens_as_the_sampler_of_the_processor(
    size: int, temperature: float, top_k: int, top_p: float, min_p: float, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator) * 3
    logits = (logits * levels).round() / levels  # few levels: many equal logits
    if levels == 3 and temperature:  # which of equal tokens stands first is nobody's promise
        logits += torch.arange(size) * 1e-5
    config = SamplingConfig(temperature, top_p, top_k, min_p, seed=seed)
    expected, found = both(logits, config, 8)
    assert found == expected


def test_equal_logits_at_the_edge_of_top_k_all_stay() -> None:
    logits = torch.tensor([1.0, 5.0, 1.0, 1.0])
    params = SamplingParams("cpu")
    params.set(SamplingConfig(temperature=1.0, top_k=2))
    points = torch.linspace(0, 0.999999, 2000, dtype=torch.float64)
    drawn = {int(draw(logits, params, point[None], "filtered")) for point in points}
    assert drawn == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_told(temperature: float, bad: float) -> None:
    logits = torch.tensor([0.0, bad, 1.0])
    for top_k in (0, 2):
        config = SamplingConfig(temperature=temperature, top_k=top_k)
        params = SamplingParams("cpu")
        params.set(config)
        point = torch.zeros(1, dtype=torch.float64)
        assert int(draw(logits, params, point, mode_of(config))) == BAD_LOGITS


def test_many_random_numbers_at_once_are_those_drawn_one_by_one() -> None:
    """What lets the device have its random numbers ahead of time."""
    one_by_one, at_once = new_generator(7), new_generator(7)
    singles = [torch.rand(1, generator=one_by_one, dtype=torch.float64) for _ in range(600)]
    blocks = [torch.rand(256, generator=at_once, dtype=torch.float64) for _ in range(3)]
    assert torch.equal(torch.cat(singles), torch.cat(blocks)[:600])
