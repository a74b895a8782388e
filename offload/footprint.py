"""Knows the sizes of a model that a plan is made from; no machine, no budget.

Standard library only.
"""

from dataclasses import dataclass

SLOT_ALIGNMENT = 4096  # a slice of an expert begins on a page, as a whole one does
_WIDE_UNITS = (256, 128)  # rows whose bytes make whole lines of memory, or half ones


@dataclass(frozen=True)
class ModelFootprint:
    """What a model needs, in bytes, for one context length."""

    dense_nbytes: int  # all weights but routed experts and the input embedding; read every token
    embedding_nbytes: int  # the input embedding: resident, but one row is read a token; 0 if tied
    kv_nbytes: int  # KV cache at this context
    workspace_nbytes: int  # activations and logits
    num_moe_layers: int
    num_experts: int  # a layer
    experts_per_token: int
    expert_nbytes: int
    slot_nbytes: int  # an expert rounded up to what a slot takes
    intermediate_size: int = 0  # rows of an expert; 0: it cannot be sliced
    group_size: int = 0  # rows come in groups of so many
    device_workspace_nbytes: int | None = None  # where a device computes; None: the same
    prefill_tokens: int = 0  # of a prompt that pass a layer at once; 0: unknown
    host_bias_nbytes: int = 0  # of experts, that the processor's lane wants beside the device's
    active_weights: int = 0  # that a token of a prompt is multiplied with; 0: unknown

    def __post_init__(self) -> None:
        assert 1 <= self.experts_per_token <= self.num_experts, "more experts a token than a layer"
        assert self.num_moe_layers >= 1, "a model without experts"
        assert 0 < self.expert_nbytes <= self.slot_nbytes, "an expert that does not fit its slot"
        if self.intermediate_size:
            assert self.group_size > 0, "rows without groups"
            assert self.intermediate_size % self.group_size == 0, "a broken group of rows"
            assert self.expert_nbytes % self.intermediate_size == 0, "rows of different sizes"

    @property
    def total_experts(self) -> int:
        return self.num_moe_layers * self.num_experts

    @property
    def experts_nbytes(self) -> int:
        """All routed experts, as they lie on disk."""
        return self.total_experts * self.expert_nbytes

    @property
    def active_expert_nbytes(self) -> int:
        """Bytes of routed experts that one token needs."""
        return self.num_moe_layers * self.experts_per_token * self.expert_nbytes

    @property
    def fixed_nbytes(self) -> int:
        """What must be in memory besides experts, where there is no device."""
        return self.dense_nbytes + self.embedding_nbytes + self.kv_nbytes + self.workspace_nbytes

    @property
    def on_device_nbytes(self) -> int:
        """What must be in VRAM besides experts, where there is a device; less CUDA itself."""
        return self.dense_nbytes + self.kv_nbytes + self.device_workspace

    @property
    def device_workspace(self) -> int:
        given = self.device_workspace_nbytes
        return self.workspace_nbytes if given is None else given

    @property
    def slice_units(self) -> tuple[int, ...]:
        """Row counts that a slice may be a multiple of, the one that vectorises best first.

        What lies beyond the slice is a multiple of the same.
        """
        if not self.intermediate_size:
            return ()
        fine = self.group_size
        wide = [u for u in _WIDE_UNITS if u % fine == 0 and self.intermediate_size % u == 0]
        return tuple(dict.fromkeys([*wide, fine]))

    def slice_nbytes(self, rows: int) -> int:
        """What the first `rows` rows of one expert take in VRAM, up to the next slice."""
        assert 0 < rows <= self.intermediate_size, f"{rows} of {self.intermediate_size} rows"
        nbytes = rows * (self.expert_nbytes // self.intermediate_size)
        return -(-nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
