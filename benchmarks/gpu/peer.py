"""Knows how fast others do the same in this run: transformers, with layers in VRAM or offloaded by
accelerate, and bitsandbytes' NF4 products. Fewer layers, a small vocabulary: times are per layer.
"""

import functools
import statistics
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu.machine import device_of, sizes_of
from benchmarks.gpu.report import Section
from benchmarks.gpu.sizes import LinearShape, ModelArm, Sizes
from benchmarks.gpu.timing import seconds_each, wall_seconds

NUM_LAYERS = 2
_VOCAB = 1024
_CONTEXT = 64  # tokens in the KV cache when a token is timed
_ARM_S = 12.0
_REPEATS = 5
_MAX_COPIES = 8


def measure(section: Section, tiny: bool, found: dict[str, Any]) -> None:
    device, sizes = device_of(tiny), sizes_of(tiny)
    needs = 0.0 if tiny else _ARM_S
    for arm in sizes.models:
        section.part(f"ours, {arm.name}", functools.partial(ours, found, arm))
        resident = functools.partial(transformers_layers, arm, device, sizes, False)
        section.part(f"transformers in VRAM, {arm.name}", resident, needs)
        _free(device)
        name = f"transformers offloaded by accelerate, {arm.name}"
        if find_spec("accelerate") is None:
            section.skip(name, "accelerate is not installed")
            continue
        offloaded = functools.partial(transformers_layers, arm, device, sizes, True)
        section.part(name, offloaded, needs)
        _free(device)
    for shape in sizes.linears:
        name = f"bitsandbytes NF4, {shape.name}"
        if find_spec("bitsandbytes") is None:
            section.skip(name, "bitsandbytes is not installed")
            continue
        section.part(name, functools.partial(nf4_linear, shape, device, sizes))


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ours(found: dict[str, Any], arm: ModelArm) -> dict[str, float]:
    """Seconds a layer and token in this run's decode section: everything divided by the layers."""
    from moecli.models.config import ModelSpec

    layers = ModelSpec.from_hf(arm.config).num_layers
    parts = found.get("decode", {}).get("parts", {})
    rows = {}
    for name, part in parts.items():
        if name.startswith(f"{arm.name}: ") and part["status"] == "ok":
            for skew, row in part["result"].get("decode", {}).items():
                rows[f"{name.removeprefix(f'{arm.name}: ')}, {skew}"] = row["step_s"] / layers
    return rows


def peer_model(arm: ModelArm, device: torch.device) -> torch.nn.Module:
    """The family's own model of NUM_LAYERS layers, random weights made in place."""
    import transformers

    config = dict(arm.config.get("text_config", arm.config))
    config |= {"num_hidden_layers": NUM_LAYERS, "vocab_size": _VOCAB}
    kinds = {
        "llama4_text": (transformers.Llama4TextConfig, transformers.Llama4ForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    }
    config_class, model_class = kinds[config.pop("model_type")]
    fields = {name: value for name, value in config.items() if name != "architectures"}
    fields |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model_class(config_class(**fields)).eval()
    finally:
        torch.set_default_dtype(before)


def transformers_layers(
    arm: ModelArm, device: torch.device, sizes: Sizes, offloaded: bool
) -> dict[str, Any]:
    """Seconds a layer for one token behind a short context, and for prompts."""
    model = peer_model(arm, device)
    if offloaded:
        model = _offload(model, device)
    vocab = torch.arange(max(sizes.prompts)) % _VOCAB
    prompts = {}
    with torch.inference_mode():
        for count in sizes.prompts:
            ids = vocab[None, :count].to(device)
            call = functools.partial(model, ids, use_cache=False, logits_to_keep=1)
            seconds = statistics.median(wall_seconds(call, device, repeats=2))
            prompts[str(count)] = {"layer_s": seconds / NUM_LAYERS, "tokens": count}
        token_s = _token_seconds(model, vocab[None, :_CONTEXT].to(device), device)
    numel = sum(parameter.numel() for parameter in model.parameters())
    return {
        "layer_s": token_s / NUM_LAYERS,
        "prefill": prompts,
        "layers": NUM_LAYERS,
        "parameters": numel,
    }


def _offload(model: Any, device: torch.device) -> torch.nn.Module:
    """As `device_map` does it: whole layers in main memory, brought when it is their turn."""
    from accelerate import dispatch_model

    main = torch.cuda.current_device() if device.type == "cuda" else "cpu"
    places: dict[str, Any] = {name: main for name, _ in model.model.named_children()}
    del places["layers"]
    places = {f"model.{name}": place for name, place in places.items()} | {"lm_head": main}
    places |= {f"model.layers.{i}": "cpu" for i in range(NUM_LAYERS)}
    result: torch.nn.Module = dispatch_model(
        model, places, main_device=main, force_hooks=True, offload_buffers=True
    )
    return result


def _token_seconds(model: Any, context: torch.Tensor, device: torch.device) -> float:
    """Median seconds of a single token; the cache grows by one each time."""
    cache = model(context[:, :-1], use_cache=True).past_key_values
    token = context[:, -1:]

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True)

    return statistics.median(wall_seconds(step, device, repeats=_REPEATS))


def nf4_linear(shape: LinearShape, device: torch.device, sizes: Sizes) -> dict[str, float]:
    """One token through bitsandbytes' NF4 product, over weights that rotate."""
    from quant.bnb import BnbWeight

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    values = torch.randn(shape.out_features, shape.in_features, device=device, dtype=dtype)
    weights = [BnbWeight.of(values, "nf4", device)]
    count = min(_MAX_COPIES, sizes.rotation_nbytes // weights[0].nbytes)
    weights += [BnbWeight.of(values, "nf4", device) for _ in range(count - 1)]
    x = torch.randn(1, shape.in_features, device=device, dtype=dtype)
    launches = [functools.partial(weight.linear, x) for weight in weights]
    seconds = seconds_each(launches, device, sizes.repeats)
    nbytes = weights[0].nbytes
    return {"seconds": seconds, "nbytes": nbytes, "bytes_per_s": nbytes / seconds}
