"""What moecli writes loads in transformers (with compressed-tensors), value by value."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.checkpoint import Checkpoint, QuantizedCheckpoint
from quant.convert import convert
from quant.items import DenseItem, ExpertItem, TensorSlice
from quant.job import ConversionJob
from quant.pack_quantized import quantization_config
from quant.quantize import dequantize
from quant.safetensors_file import SafetensorsFile
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight

# Experts of 10 KiB and a bit: they need fillers.
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
INTERMEDIATE, NUM_EXPERTS = 96, 4


@dataclass(frozen=True)
class Written:
    """A tiny model of transformers, and what became of it."""

    family: str
    model: Any
    source: Checkpoint
    out: QuantizedCheckpoint
    loaded: Any
    info: dict[str, Any]


def new_model(family: str) -> Any:
    import transformers

    torch.manual_seed(0)
    if family == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **SIZES, intermediate_size=96, moe_intermediate_size=INTERMEDIATE,
            num_experts=NUM_EXPERTS, num_experts_per_tok=2,
        )  # fmt: skip
    else:
        config = transformers.Llama4TextConfig(
            **SIZES, intermediate_size=INTERMEDIATE, intermediate_size_mlp=128,
            num_local_experts=NUM_EXPERTS, num_experts_per_tok=1, interleave_moe_layer_step=1,
            attention_chunk_size=32,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def expert_items(family: str) -> tuple[ExpertItem, ...]:
    items = []
    for layer in range(SIZES["num_hidden_layers"]):
        block = "mlp" if family == "qwen3_moe" else "feed_forward"
        experts = f"model.layers.{layer}.{block}.experts"
        for expert in range(NUM_EXPERTS):
            if family == "qwen3_moe":
                names = (
                    f"{experts}.{expert}.{kind}_proj.weight" for kind in ("gate", "up", "down")
                )
                parts = [TensorSlice(name) for name in names]
            else:
                both, down = f"{experts}.gate_up_proj", f"{experts}.down_proj"
                parts = [
                    TensorSlice(both, expert, True, (0, INTERMEDIATE)),
                    TensorSlice(both, expert, True, (INTERMEDIATE, 2 * INTERMEDIATE)),
                    TensorSlice(down, expert, True),
                ]
            items.append(ExpertItem(layer, expert, f"{experts}.{expert}", *parts))
    return tuple(items)


def make_job(
    family: str, source: Checkpoint, out: Path, dense: QuantScheme | None
) -> ConversionJob:
    items = []
    for name in source.tensors:
        if ".experts." in name:
            continue
        linear = name.removesuffix(".weight")
        if dense is not None and linear.endswith(("_proj", "lm_head")):
            items.append(DenseItem(linear, TensorSlice(name), dense))
        else:
            items.append(DenseItem(name, TensorSlice(name), None))
    scheme = QuantScheme(4, 32)
    ignore = ["re:.*mlp.gate$", "re:.*router$"] + ([] if dense else ["lm_head"])
    config = source.config | {"quantization_config": quantization_config(scheme, dense, ignore)}
    return ConversionJob(source, out, scheme, dense, expert_items(family), tuple(items), config)


@pytest.fixture(
    scope="module",
    params=[
        ("qwen3_moe", QuantScheme(8, 64)),
        ("qwen3_moe", QuantScheme(4, 32)),
        ("llama4", QuantScheme(8, 32)),
        ("llama4", None),
    ],
    ids=["qwen3_moe-int8", "qwen3_moe-int4", "llama4-int8", "llama4-16bit"],
)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    import transformers

    family, dense = request.param
    path = tmp_path_factory.mktemp(family)
    model = new_model(family)
    model.save_pretrained(path / "source")
    source = Checkpoint.open(path / "source")
    out = convert(make_job(family, source, path / "out", dense)).out
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, output_loading_info=True
    )
    with torch.inference_mode():
        loaded(torch.tensor([[1]]))  # the library expands packed weights in the first forward
    return Written(family, model, source, QuantizedCheckpoint.open(out), loaded.eval(), info)


def our_experts(written: Written) -> Iterator[tuple[ExpertItem, dict[str, Tensor]]]:
    """gate, up [intermediate, hidden] and down [hidden, intermediate] of every expert's bytes."""
    for item in expert_items(written.family):
        path, offset, nbytes = written.out.expert_span(item.layer, item.expert)
        content = bytearray(path.read_bytes()[offset : offset + nbytes])
        views = written.out.layout.views(torch.frombuffer(content, dtype=torch.uint8))
        yield item, {kind: dequantize(w, torch.bfloat16) for kind, w in vars(views).items()}


def our_dense(written: Written, name: str) -> Tensor:
    weight = written.out.dense(name)
    return dequantize(weight, torch.bfloat16) if isinstance(weight, QuantizedWeight) else weight


def original_state(written: Written) -> dict[str, Tensor]:
    """The state of the original model, its weights replaced by what our files hold."""
    state = {name: tensor.clone() for name, tensor in written.model.state_dict().items()}
    for name in state:
        if ".experts." not in name:
            state[name] = our_dense(written, name)
    for item, weights in our_experts(written):
        both, down = torch.cat((weights["gate"], weights["up"])), weights["down"]
        if written.family == "llama4":
            both, down = both.t(), down.t()
        experts = item.prefix.rpartition(".")[0]
        state[f"{experts}.gate_up_proj"][item.expert] = both
        state[f"{experts}.down_proj"][item.expert] = down
    return state


def test_every_weight_is_ours(written: Written) -> None:
    loaded = written.loaded.state_dict()
    seen = {name for name in loaded if name.endswith(("weight_scale", "weight_shape"))}
    for name in written.model.state_dict():
        if ".experts." not in name:
            assert torch.equal(loaded[name], our_dense(written, name)), name
            seen.add(name)
    for item, weights in our_experts(written):
        experts = item.prefix.rpartition(".")[0]
        if written.family == "llama4":  # the library takes the experts apart to load them
            names = {kind: f"{item.prefix}.{kind}_proj.weight" for kind in weights}
            found = {kind: loaded[name] for kind, name in names.items()}
            seen |= set(names.values())
        else:
            gate_up = loaded[f"{experts}.gate_up_proj"][item.expert]
            gate, up = gate_up.chunk(2)
            found = {"gate": gate, "up": up, "down": loaded[f"{experts}.down_proj"][item.expert]}
            seen |= {f"{experts}.gate_up_proj", f"{experts}.down_proj"}
        for kind, weight in weights.items():
            assert torch.equal(found[kind], weight), f"{item.prefix} {kind}"
    assert set(loaded) == seen


def test_nothing_is_missing_or_unexpected(written: Written) -> None:
    """Fillers included: their name is one that readers skip."""
    fillers = [name for name in written.out.checkpoint.tensors if "moecli" in name]
    assert fillers
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not written.info[kind], kind


def test_logits_are_those_of_the_dequantized_model(written: Written) -> None:
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    reference = new_model(written.family)
    reference.load_state_dict(original_state(written))
    with torch.inference_mode():
        expected = reference.float()(ids).logits
        # The library forbids .float() here, though the weights are bf16 by now.
        loaded = torch.nn.Module.float(written.loaded)(ids).logits
        original = new_model(written.family).float()(ids).logits
    assert (loaded - expected).abs().max() < 1e-5 * expected.abs().max()
    assert 0.001 < (original - expected).norm() / original.norm() < 0.25


def test_quantized_linears_carry_their_shape(written: Written) -> None:
    file = SafetensorsFile.open(written.out.path / "model.safetensors")
    config = json.loads((written.out.path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    assert len(groups) == (1 if written.out.dense_scheme in (None, QuantScheme(4, 32)) else 2)
    shapes = [name for name in file.entries if name.endswith("weight_shape")]
    packed = [name for name in file.entries if name.endswith("weight_packed")]
    assert len(shapes) == len(packed) >= 2 * NUM_EXPERTS * 3
    for name in shapes:
        rows, columns = file.read(name).tolist()
        scale = file.entries[name.replace("shape", "scale")]
        assert rows == scale.shape[0]
        assert columns % scale.shape[1] == 0


@pytest.mark.parametrize("dense", [QuantScheme(8, 64), QuantScheme(4, 32)], ids=["two", "one"])
@pytest.mark.parametrize("head", ["lm_head", "language_model.lm_head"])
def test_a_head_is_targeted_by_its_name(dense: QuantScheme, head: str) -> None:
    """vLLM's head is of a class that no target names; without this it expects 16 bits."""
    groups = quantization_config(QuantScheme(4, 32), dense, [])["config_groups"].values()
    found = [
        group["weights"]["num_bits"]
        for group in groups
        for target in group["targets"]
        if target.startswith("re:") and re.match(target.removeprefix("re:"), head)
    ]
    assert found == [dense.bits]
