"""The device tier behind the same provider: a simulated device changes nothing that is computed."""

from pathlib import Path

import pytest
import torch

from moecli.config import EngineConfig
from moecli.engine import Engine
from moecli.experts import OffloadedExperts
from moecli.kv_cache import KvCache
from moecli.models.batch import Batch
from moecli.models.decoder import Decoder
from moecli.models.naming import dense_loader
from offload.disk import DiskTier, ExpertSpan
from offload.host import HostArena
from offload.manager import ExpertManager
from offload.slots import SlotPool
from offload.usage import ExpertUsage
from quant.checkpoint import QuantizedCheckpoint


def logits(decoder: Decoder) -> torch.Tensor:
    """Of fifty tokens at once, then of ten one by one."""
    tokens = torch.arange(60)
    cache = KvCache(decoder.spec, 128)
    first = decoder.forward(Batch.of(tokens[:50], cache, all_logits=True))
    rest = [decoder.forward(Batch.of(token[None], cache)) for token in tokens[50:]]
    return torch.cat([first, *rest])


@pytest.mark.parametrize(("host_slots", "device_slots"), [(2, 2), (6, 3), (3, 8), (16, 16)])
def test_logits_are_bitwise_the_same_with_a_device_tier(
    quantized_qwen3: Path, host_slots: int, device_slots: int
) -> None:
    with Engine.open(quantized_qwen3, EngineConfig(ctx=128)) as engine:
        spec = engine.spec
        expected = logits(engine.decoder)
    checkpoint = QuantizedCheckpoint.open(quantized_qwen3)
    spans = {
        (layer, expert): ExpertSpan(*checkpoint.expert_span(layer, expert))
        for layer in spec.moe_layers
        for expert in range(spec.num_experts)
    }
    slot_nbytes = checkpoint.layout.slot_nbytes
    manager = ExpertManager(
        DiskTier(spans),
        HostArena(host_slots * slot_nbytes, slot_nbytes),
        SlotPool(device_slots, slot_nbytes, "cpu"),
    )
    weights = dense_loader(spec, checkpoint.checkpoint.tensors, checkpoint.dense)
    experts = OffloadedExperts(
        manager, checkpoint.layout, spec, ExpertUsage(spec.moe_layers, spec.num_experts)
    )
    decoder = Decoder(spec, weights, experts, guesses=spec.experts_per_token)
    try:
        found = logits(decoder)
        manager.check_integrity(deep=True)
        assert manager.stats.device_nbytes > 0
    finally:
        manager.close()
    assert torch.equal(found, expected)
