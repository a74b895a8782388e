"""Wires plan, experts, model and tokenizer into one thing that answers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import torch

from moecli.config import EngineConfig, SamplingConfig
from moecli.errors import MoecliError
from moecli.events import Event
from moecli.experts import OffloadedExperts
from moecli.footprint import model_footprint
from moecli.generation import Runtime, generate
from moecli.kv_cache import KvCache
from moecli.models.config import ModelSpec
from moecli.models.decoder import Decoder
from moecli.models.naming import DenseWeights
from moecli.session import Session
from moecli.tokenizer import Tokenizer
from offload.disk import DiskTier, ExpertSpan
from offload.hardware import Machine
from offload.host import HostArena
from offload.manager import ExpertManager
from offload.plan import MemoryPlan, make_plan
from quant import ops
from quant.checkpoint import QuantizedCheckpoint

DEFAULT_CTX = 8192
KV_DTYPE = torch.bfloat16
COMPUTE_DTYPE = torch.float32


def _say_nothing(message: str) -> None:
    pass


class Engine:
    """A quantized model ready to generate. Use it as a context manager, or close() it."""

    def __init__(self, checkpoint: QuantizedCheckpoint, config: EngineConfig) -> None:
        self.path: Path = checkpoint.path
        self.spec = ModelSpec.from_hf(checkpoint.config)
        self.tokenizer = Tokenizer.open(self.path)
        self.ctx = _context(config.ctx, self.spec)
        self.plan = _plan(checkpoint, self.spec, self.ctx, config)
        self.generation_config = _generation_config(self.path)
        self._manager = _manager(checkpoint, self.spec, self.plan)
        experts = OffloadedExperts(
            self._manager,
            checkpoint.layout,
            self.spec.num_experts,
            self.spec.activation,
            self.spec.weight_on_input,
        )
        decoder = Decoder(
            self.spec, DenseWeights(self.spec, checkpoint), experts, dtype=COMPUTE_DTYPE
        )
        self._runtime = Runtime(
            decoder, self.tokenizer, self._manager, self.ctx, config.prefill_chunk
        )

    @classmethod
    def open(
        cls, path: Path, config: EngineConfig, notify: Callable[[str], None] = _say_nothing
    ) -> "Engine":
        """Open what `moecli quantize` wrote.

        `notify` gets each message about a mode that is less than what was asked for. Raises
        MoecliError, QuantError or OffloadError: not a quantized model, a budget too small.
        """
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        backend = "torch" if config.kernels == "auto" else config.kernels
        ops.set_backend(backend)
        return cls(QuantizedCheckpoint.open(path), config)
