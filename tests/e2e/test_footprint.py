"""The sizes that a plan is made from are those of the files, and of the memory that is taken."""

from pathlib import Path

import pytest

from moecli.config import EngineConfig
from moecli.engine import KV_DTYPE, Engine
from moecli.footprint import model_footprint
from moecli.kv_cache import KvCache
from quant.checkpoint import QuantizedCheckpoint

SUFFIXES_UNREAD = ("weight_shape", "inv_freq")


@pytest.mark.parametrize("name", ["quantized", "quantized_qwen3", "quantized_demo"])
def test_footprint_equals_files_and_caches(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    assert isinstance(path, Path)
    checkpoint = QuantizedCheckpoint.open(path)
    with Engine.open(path, EngineConfig(ctx=300)) as engine:
        spec, plan = engine.spec, engine.plan
    footprint = model_footprint(spec, checkpoint.scheme, checkpoint.dense_scheme, 300, 512)
    stored = {
        tensor: info.nbytes
        for tensor, info in checkpoint.checkpoint.tensors.items()
        if not tensor.endswith(SUFFIXES_UNREAD)
    }
    experts = sum(nbytes for tensor, nbytes in stored.items() if ".experts." in tensor)
    assert footprint.experts_nbytes == experts
    dense = footprint.dense_nbytes + footprint.embedding_nbytes
    assert dense == sum(stored.values()) - experts
    assert footprint.kv_nbytes == KvCache(spec, 300, KV_DTYPE).nbytes
    with Engine.open(path, EngineConfig(ctx=300, kv_dtype="int8")) as engine:
        assert engine.plan.kv_nbytes == engine.new_session().cache.nbytes < footprint.kv_nbytes
    assert plan.dense_nbytes + plan.embedding_nbytes == dense
