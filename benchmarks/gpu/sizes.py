"""Knows how large everything is that is measured: for a graphics card, or tiny for a trial."""

from dataclasses import dataclass

from moecli.models.config import ModelSpec
from quant.layout import ExpertLayout
from quant.scheme import QuantScheme

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class ExpertShape:
    """Experts of one model, as kernels see them."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    weight_on_input: bool

    def layout(self, scheme: QuantScheme) -> ExpertLayout:
        return ExpertLayout(self.hidden_size, self.intermediate_size, scheme)


@dataclass(frozen=True)
class LinearShape:
    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class AttentionShape:
    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class ModelArm:
    """A model of random weights, and the VRAM that it is given."""

    name: str
    config: dict  # as config.json has it
    scheme: QuantScheme
    dense_scheme: QuantScheme
    ctx: int
    vram_nbytes: tuple[int, ...] = ()  # budgets, or
    residencies: tuple[float, ...] = ()  # shares of all experts that VRAM is to hold
    every_way: bool = False  # all placements and lanes, not only the most telling


@dataclass(frozen=True)
class Sizes:
    copy_nbytes: int  # of a block that is copied to measure memory
    experts: tuple[ExpertShape, ...]
    schemes: tuple[QuantScheme, ...]
    decode_tokens: tuple[int, ...]
    grouped_tokens: tuple[int, ...]
    linears: tuple[LinearShape, ...]
    attention: tuple[AttentionShape, ...]
    positions: tuple[int, ...]
    models: tuple[ModelArm, ...]
    steps: int  # of decoding that are timed
    prompts: tuple[int, ...]
    repeats: int
    rotation_nbytes: int  # experts that rotate; more than any cache holds
    read_programs: int


SCOUT = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "attention_chunk_size": 8192,
        "rope_theta": 500000.0,
        "max_position_embeddings": 10485760,
        "vocab_size": 202048,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    },
}
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
}
_INT4, _INT8 = QuantScheme(4, 32), QuantScheme(8, 128)

REAL = Sizes(
    copy_nbytes=GIB,
    experts=(
        ExpertShape("scout", 5120, 8192, 16, 1, True),
        ExpertShape("qwen3-30b", 2048, 768, 128, 8, False),
    ),
    schemes=(_INT4, _INT8),
    decode_tokens=(1, 2, 4, 8),
    grouped_tokens=(512, 4096),
    linears=(
        LinearShape("scout q_proj, o_proj", 5120, 5120),
        LinearShape("scout k_proj, v_proj", 1024, 5120),
        LinearShape("scout shared gate, up", 8192, 5120),
        LinearShape("scout shared down", 5120, 8192),
        LinearShape("scout head", 202048, 5120),
        LinearShape("qwen3-30b q_proj", 4096, 2048),
        LinearShape("qwen3-30b head", 151936, 2048),
    ),
    attention=(
        AttentionShape("scout", 40, 8, 128),
        AttentionShape("qwen3-30b", 32, 4, 128),
    ),
    positions=(8192, 32768),
    models=(
        ModelArm("scout", SCOUT, _INT4, _INT8, 8192, (24 * GIB,), every_way=True),
        ModelArm("qwen3-30b", QWEN3_30B, _INT4, _INT8, 8192, residencies=(0.25, 0.5, 1.0)),
    ),
    steps=64,
    prompts=(512, 4096),
    repeats=9,
    rotation_nbytes=512 * MIB,
    read_programs=4096,
)

_TINY_SCOUT = {
    **SCOUT,
    "text_config": {
        **SCOUT["text_config"],
        **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128},
        **{"intermediate_size_mlp": 64, "num_local_experts": 4, "vocab_size": 96},
        **{"attention_chunk_size": 16, "max_position_embeddings": 4096},
    },
}
_TINY_QWEN3 = {
    **QWEN3_30B,
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16},
    **{"num_key_value_heads": 2, "intermediate_size": 64, "moe_intermediate_size": 64},
    **{"num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 96},
}
_INT8_SMALL = QuantScheme(8, 32)

TINY = Sizes(
    copy_nbytes=MIB,
    experts=(
        ExpertShape("scout", 64, 64, 4, 1, True),
        ExpertShape("qwen3-30b", 64, 64, 4, 2, False),
    ),
    schemes=(_INT4, _INT8_SMALL),
    decode_tokens=(1, 2),
    grouped_tokens=(9,),
    linears=(LinearShape("tiny", 64, 64),),
    attention=(AttentionShape("tiny", 4, 2, 16),),
    positions=(40,),
    models=(
        ModelArm("scout", _TINY_SCOUT, _INT4, _INT8_SMALL, 64, residencies=(0.4,), every_way=True),
        ModelArm("qwen3-30b", _TINY_QWEN3, _INT4, _INT8_SMALL, 64, residencies=(0.5, 1.0)),
    ),
    steps=3,
    prompts=(12,),
    repeats=1,
    rotation_nbytes=1,
    read_programs=2,
)


def spec_of(arm: ModelArm) -> ModelSpec:
    return ModelSpec.from_hf(arm.config)
