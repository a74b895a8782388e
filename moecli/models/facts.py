"""Knows what is asked of a model's spec outside of its forward pass, whoever computes that."""

from collections.abc import Mapping
from typing import Any, Protocol

from moecli.models.config import DenseTensor, ModelSpec
from moecli.models.hf_config import is_known


class LibraryFacts(Protocol):
    """Sizes and counts of a Mixture-of-Experts text decoder that the library computes: HfSpec."""

    @property
    def architecture(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def moe_layers(self) -> tuple[int, ...]: ...

    @property
    def num_experts(self) -> int: ...

    @property
    def experts_per_token(self) -> int: ...

    @property
    def expert_intermediate_size(self) -> int: ...

    @property
    def shared_intermediate_size(self) -> int:
        """Of the expert that all tokens share; 0: there is none, or nobody says."""
        ...

    @property
    def weight_on_input(self) -> bool: ...

    @property
    def max_context(self) -> int: ...

    @property
    def tie_word_embeddings(self) -> bool: ...

    @property
    def dense_tensors(self) -> tuple[DenseTensor, ...]: ...

    @property
    def expert_numel(self) -> int: ...

    @property
    def num_params(self) -> int: ...

    @property
    def num_vision_params(self) -> int: ...

    @property
    def num_active_params(self) -> int: ...

    def chunk_size(self, ctx: int, prefill_chunk: int) -> int: ...

    def cache_nbytes(self, ctx: int, prefill_chunk: int) -> int: ...

    def workspace_nbytes(self, ctx: int, prefill_chunk: int) -> int: ...


ModelFacts = ModelSpec | LibraryFacts  # what they have in common is asked for outside


def read_facts(config: Mapping[str, Any]) -> ModelFacts:
    """Those of a parsed config.json: of our own decoder where it knows the family, else of the
    library's model, which takes the library's seconds.

    Raises MoecliError for what neither can run, with the reason.
    """
    if is_known(config):
        return ModelSpec.from_hf(dict(config))
    from moecli.models.hf.spec import HfSpec

    return HfSpec.of(config)
