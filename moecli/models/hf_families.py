"""Knows Hugging Face's field names of the families beside Llama 4 and Qwen3-MoE; no tensors."""

from collections.abc import Callable

from moecli.errors import MoecliError
from moecli.models.config import LayerSpec, ModelSpec
from moecli.models.hf_fields import Fields, common_of, rope_of


def _mixtral(architecture: str, fields: Fields) -> ModelSpec:
    if fields.get("sliding_window", int, 0):
        raise MoecliError(
            "moecli does not know the `sliding_window` of this Mixtral",
            "no released Mixtral has one",
        )
    count, shared = fields.size("num_hidden_layers"), common_of(fields)
    return ModelSpec(
        **shared,
        architecture=architecture,
        family="mixtral",
        head_dim=fields.size("head_dim", shared["hidden_size"] // shared["num_heads"]),
        layers=(LayerSpec("full", rope=True, moe=True),) * count,
        num_experts=fields.size("num_local_experts"),
        expert_intermediate_size=fields.size("intermediate_size"),
        shared_intermediate_size=0,
        dense_intermediate_size=0,
        router="softmax",
        normalize_topk=True,
        weight_on_input=False,
        rope=rope_of(fields, "half"),
        qk_norm="none",
        chunk_size=None,
        temperature=None,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
    )


FAMILY_READERS: dict[str, Callable[[str, Fields], ModelSpec]] = {
    "MixtralForCausalLM": _mixtral,
}
