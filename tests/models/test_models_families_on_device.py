"""Families whole, on a card if there is one: a prompt, then a step that is captured once, against
the processor.

Where there is no card, main memory stands for it and tests/graphs.py for the graph.
"""

import pytest
import torch
from torch import Tensor

from moecli.graphs import captured
from moecli.kv_cache import KvCache
from moecli.models import fused
from moecli.models.batch import Batch
from moecli.models.decoder import Decoder
from tests.devices import DEVICE
from tests.graphs import SimulatedGraph
from tests.models.families import FAMILIES
from tests.models.stacked_experts import StackedExperts
from tests.models.tiny_models import decoder_of, logits_in_steps, oracle, spec_of, tokens

LENGTH, PROMPT = 40, 29  # several windows and chunks of 8
TOLERANCE = 1e-5 if DEVICE == "cpu" else 1e-3  # other libraries add up in other orders


def decoder_on(device: str, family: str) -> Decoder:
    model = oracle(family)
    count = spec_of(model).num_experts
    return decoder_of(
        model, wrap=lambda experts: StackedExperts(experts, count, device), device=device
    )


def replays(decoder: Decoder, ids: Tensor, cache: KvCache) -> Tensor:
    """Logits [n, V] of tokens after what the cache holds, by one step captured at the first."""
    token, position = ids[:1].clone(), torch.tensor([cache.length], device=DEVICE)
    kept: list[Tensor] = []

    def step() -> None:
        kept[:] = [decoder.decode(token, position, cache)]

    if DEVICE == "cuda":
        replay = captured(step)
    else:
        graph = SimulatedGraph()
        with graph.capture():
            step()
        replay = graph.replay
    found = []
    for row in ids:
        token.copy_(row[None])
        position.fill_(cache.length)
        cache.begin(cache.length, 1)
        replay()
        cache.commit()
        found.append(kept[0].clone())
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_and_a_captured_step(family: str) -> None:
    ids = tokens(LENGTH)
    expected = logits_in_steps(decoder_on("cpu", family), ids, [LENGTH])
    decoder, ids = decoder_on(DEVICE, family), ids.to(DEVICE)
    cache = KvCache(decoder.spec, LENGTH, torch.float32, DEVICE)
    pieces = [ids[:20], ids[20:PROMPT]]
    prompt = [decoder.forward(Batch.of(piece, cache, all_logits=True)) for piece in pieces]
    with torch.inference_mode():
        found = torch.cat((*prompt, replays(decoder, ids[PROMPT:], cache))).cpu()
    assert (found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_a_prompt_through_the_kernel_for_windows(family: str) -> None:
    """In Triton's interpreter where there is no card; in pieces, across windows."""
    changes = {"sliding_window": 5, "num_hidden_layers": 2}
    decoder, ids = decoder_of(oracle(family, **changes)), tokens(19)
    expected = logits_in_steps(decoder, ids, [19])
    fused.set_backend("triton")
    found = logits_in_steps(decoder, ids, [7, 1, 11])
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
