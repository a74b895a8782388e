"""The sampler against transformers' logits processors."""

import pytest
import torch

from moecli.config import SamplingConfig
from moecli.errors import MoecliError
from moecli.sampler import candidates, new_generator, sample

CONFIGS = [
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.3),
    SamplingConfig(temperature=1.7, top_k=1),
    SamplingConfig(temperature=1.0, top_k=7),
    SamplingConfig(temperature=1.0, top_k=100_000),
    SamplingConfig(temperature=1.0, top_p=0.5),
    SamplingConfig(temperature=1.0, top_p=0.95),
    SamplingConfig(temperature=1.0, top_p=0.999),
    SamplingConfig(temperature=1.0, top_p=1e-6),
    SamplingConfig(temperature=1.0, min_p=0.1),
    SamplingConfig(temperature=1.0, min_p=1.0),
    SamplingConfig(temperature=0.8, top_k=40, top_p=0.9, min_p=0.05),
    SamplingConfig(temperature=2.0, top_p=0.9, min_p=0.01),
]


def expected_probabilities(logits, config):
    from transformers.generation import logits_process as hf

    scores = hf.TemperatureLogitsWarper(float(config.temperature))(None, logits[None])
    if config.top_k:
        scores = hf.TopKLogitsWarper(config.top_k)(None, scores)
    if config.top_p < 1:
        scores = hf.TopPLogitsWarper(config.top_p)(None, scores)
    if config.min_p:
        scores = hf.MinPLogitsWarper(config.min_p)(None, scores)
    return scores[0].softmax(0)


@pytest.mark.parametrize("spread", [0.5, 4.0])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("size", [5, 300, 5000])
def test_probabilities_equal_transformers(size, config, spread):
    logits = spread * torch.randn(size, generator=torch.Generator().manual_seed(size))
    ids, probabilities = map(torch.from_numpy, candidates(logits, config))
    found = torch.zeros(size).scatter(0, ids, probabilities)
    expected = expected_probabilities(logits, config)
    # Sums of thousands of fp32 numbers in another order may move the border of top-p by a hair.
    border = expected[expected > 0].min()
    assert ((found > 0) != (expected > 0)).sum() <= (size == 5000 and config.top_p < 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1.01 * border.item())
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)


def test_equals_at_the_border_of_top_k_all_stay():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0])
    ids, _ = candidates(logits, SamplingConfig(temperature=1.0, top_k=2))
    assert sorted(ids.tolist()) == [1, 2, 3, 5]


def test_equals_at_the_border_stay_in_a_large_vocabulary():
    """Where borders of parts are looked at first; many tokens are as likely as the last one."""
    logits = torch.randint(0, 40, (20_011,), generator=torch.Generator().manual_seed(2)) / 7
    for top_k in (1, 20, 600):
        ids, _ = candidates(logits, SamplingConfig(temperature=0.6, top_k=top_k))
        least = logits.sort(descending=True).values[top_k - 1]
        assert sorted(ids.tolist()) == torch.where(logits >= least)[0].tolist()


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    config, generator = SamplingConfig(temperature=1.0), new_generator(0)
    counts = torch.zeros(4)
    for _ in range(3000):
        counts[sample(logits, config, generator)] += 1
    assert counts[3] == 0
    torch.testing.assert_close(counts / 3000, logits.softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("config", [SamplingConfig(temperature=1.0), SamplingConfig(top_k=3000)])
def test_draws_from_a_whole_vocabulary(config):
    """Each point falls where the sum of the probabilities says; zeros are not drawn."""
    logits = 2 * torch.randn(5000, generator=torch.Generator().manual_seed(1))
    logits[::3] = -torch.inf
    ids, probabilities = candidates(logits, config)
    ends = probabilities.cumsum(dtype="float64")
    points = torch.rand(1000, generator=new_generator(5), dtype=torch.float64)
    generator = new_generator(5)
    drawn = [sample(logits, config, generator) for _ in range(1000)]
    expected = ids[ends.searchsorted(points.numpy() * ends[-1], side="right")].tolist()
    assert sum(a != b for a, b in zip(drawn, expected, strict=True)) <= 2, "but for rounding"
    assert not any(logits[token] == -torch.inf for token in drawn)


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    config = SamplingConfig(temperature=0, top_k=5, top_p=0.1)
    assert sample(logits, config, new_generator(None)) == int(logits.argmax())


def test_a_seed_repeats_the_draws_and_another_does_not():
    logits, config = torch.zeros(1000), SamplingConfig(temperature=1.0)

    def draws(seed):
        generator = new_generator(seed)
        return [sample(logits, config, generator) for _ in range(8)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_an_error(value, temperature):
    logits = torch.zeros(50)
    logits[20] = value
    with pytest.raises(MoecliError, match="no numbers") as caught:
        sample(logits, SamplingConfig(temperature=temperature), new_generator(0))
    assert "quantize" in caught.value.hint


def test_all_tokens_impossible_is_an_error():
    with pytest.raises(MoecliError):
        sample(torch.full((5,), -torch.inf), SamplingConfig(temperature=0), new_generator(0))
