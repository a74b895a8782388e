"""Knows how fast others do the same in this run: transformers as its users start it, at 16 bits and
quantized by bitsandbytes, in VRAM and offloaded by accelerate; and bitsandbytes' products alone.

Each model is a checkpoint of random weights with few layers and a small vocabulary, written to a
temporary folder and opened with `from_pretrained`. Times are per layer.
"""

import functools
import gc
import statistics
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.machine import device_of, sizes_of
from benchmarks.gpu.report import Section
from benchmarks.gpu.sizes import LinearShape, ModelArm, Sizes, spec_of
from benchmarks.gpu.timing import seconds_each, wall_seconds

_MAX_LAYERS = 2
_MAX_NBYTES = 6 << 30  # of a checkpoint; one layer of Scout has 4.4 GB
_VOCAB = 1024
_CONTEXT = 64  # tokens in the KV cache when a token is timed
_ARM_S = 8.0
_REPEATS = 5
_MAX_COPIES = 8


@dataclass(frozen=True)
class Way:
    """How a user would start it. Offloaded: layers wait in main memory (in a trial, on disk)."""

    bits: int
    offloaded: bool

    @property
    def name(self) -> str:
        kind = "16 bits" if self.bits == 16 else f"bitsandbytes {self.bits} bits"
        return f"transformers, {kind}, " + ("offloaded" if self.offloaded else "in VRAM")

    @property
    def packages(self) -> list[str]:
        needed = ["accelerate"] if self.offloaded or self.bits < 16 else []
        return [*needed, "bitsandbytes"] if self.bits < 16 else needed


# The most telling first: what comes late may find no time left.
WAYS = (Way(16, True), Way(4, False), Way(4, True), Way(16, False), Way(8, False))


def measure(section: Section, tiny: bool, found: dict[str, Any]) -> None:
    device, sizes = device_of(tiny), sizes_of(tiny)
    needs = 0.0 if tiny else _ARM_S
    bind = functools.partial
    for arm in sizes.models:
        section.part(f"ours, {arm.name}", bind(ours, found, arm))
        with TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint"
            name = f"checkpoint, {arm.name}"
            if section.part(name, bind(write_checkpoint, arm, path, device), needs) is None:
                continue
            for way in WAYS:
                name = f"{way.name}, {arm.name}"
                absent = [package for package in way.packages if find_spec(package) is None]
                if absent:
                    section.skip(name, f"not installed: {', '.join(absent)}")
                elif tiny and way.offloaded and way.bits < 16:
                    section.skip(name, "on disk, quantized layers cannot be opened")
                else:
                    section.part(name, bind(measure_way, arm, way, path, device, sizes), needs)
                _free(device)
    for shape in sizes.linears:
        name = f"bitsandbytes NF4, {shape.name}"
        if find_spec("bitsandbytes") is None:
            section.skip(name, "not installed: bitsandbytes")
            continue
        section.part(name, bind(nf4_linear, shape, device, sizes))


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def ours(found: dict[str, Any], arm: ModelArm) -> dict[str, float]:
    """Seconds a layer and token in this run's decode section: everything divided by the layers."""
    layers = spec_of(arm).num_layers
    parts = found.get("decode", {}).get("parts", {})
    rows = {}
    for name, part in parts.items():
        if name.startswith(f"{arm.name}: ") and part["status"] == "ok":
            for skew, row in part["result"].get("decode", {}).items():
                rows[f"{name.removeprefix(f'{arm.name}: ')}, {skew}"] = row["step_s"] / layers
    return rows


# The model


def layer_nbytes(arm: ModelArm, itemsize: int) -> int:
    """A layer of the model as transformers holds it, about: experts and the shared one."""
    spec = spec_of(arm)
    rows = spec.num_experts * spec.expert_intermediate_size + (spec.shared_intermediate_size or 0)
    return 3 * spec.hidden_size * rows * itemsize


def num_layers(arm: ModelArm) -> int:
    return max(1, min(_MAX_LAYERS, _MAX_NBYTES // layer_nbytes(arm, 2)))


def _classes(model_type: str) -> tuple[Any, Any]:
    import transformers

    return {
        "llama4_text": (transformers.Llama4TextConfig, transformers.Llama4ForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    }[model_type]


def _fields(arm: ModelArm) -> dict[str, Any]:
    fields = dict(arm.config.get("text_config", arm.config))
    fields |= {"num_hidden_layers": num_layers(arm), "vocab_size": _VOCAB}
    fields |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    fields.pop("architectures", None)
    return fields


def write_checkpoint(arm: ModelArm, path: Path, device: torch.device) -> dict[str, Any]:
    """The family's own model with random weights, made on the device."""
    fields = _fields(arm)
    config_class, model_class = _classes(fields.pop("model_type"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(_dtype(device))
    try:
        with torch.device(device):
            model = model_class(config_class(**fields))
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(path)
    nbytes = sum(file.stat().st_size for file in path.iterdir())
    del model
    _free(device)
    return {"layers": num_layers(arm), "nbytes": nbytes}


def open_model(arm: ModelArm, way: Way, path: Path, device: torch.device) -> Any:
    """`from_pretrained` with what its documentation says to give."""
    _, model_class = _classes(_fields(arm)["model_type"])
    options: dict[str, Any] = {"dtype": _dtype(device)}
    if way.bits < 16:
        options["quantization_config"] = _bnb_config(way, device)
    if way.offloaded:
        options |= {"device_map": _layers_elsewhere(arm, device), "max_memory": _memory(device)}
        options |= {"offload_folder": path.with_name("offloaded")}
    elif way.packages:
        options["device_map"] = {"": device.type}
    model = model_class.from_pretrained(path, **options).eval()
    return model if "device_map" in options else model.to(device)


def _bnb_config(way: Way, device: torch.device) -> Any:
    from transformers import BitsAndBytesConfig

    if way.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=_dtype(device),
        # Without it offloading is refused; with it, what is offloaded stays at 16 bits.
        llm_int8_enable_fp32_cpu_offload=way.offloaded,
    )


def _layers_elsewhere(arm: ModelArm, device: torch.device) -> dict[str, int | str]:
    """All layers in main memory, so that the time of one is known; "auto" would divide them."""
    here, there = (0, "cpu") if device.type == "cuda" else ("cpu", "disk")
    places = {f"model.layers.{layer}": there for layer in range(num_layers(arm))}
    outside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return dict.fromkeys(outside, here) | places


def _memory(device: torch.device) -> dict[int | str, int]:
    """As much as there is; where layers go is said."""
    if device.type == "cpu":
        return {"cpu": 1 << 40}
    return {0: torch.cuda.mem_get_info(device)[0], "cpu": 1 << 40}


# What it takes


def measure_way(
    arm: ModelArm, way: Way, path: Path, device: torch.device, sizes: Sizes
) -> dict[str, Any]:
    """Seconds a layer for one token behind a short context, and for prompts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model, layers = open_model(arm, way, path, device), num_layers(arm)
    vocab = torch.arange(max(sizes.prompts)) % _VOCAB
    prompts = {}
    with torch.inference_mode():
        for count in sizes.prompts:
            ids = vocab[None, :count].to(device)
            call = functools.partial(model, ids, use_cache=False, logits_to_keep=1)
            seconds = statistics.median(wall_seconds(call, device, repeats=2))
            prompts[str(count)] = {"layer_s": seconds / layers, "tokens": count}
        token_s = _token_seconds(model, vocab[None, :_CONTEXT].to(device), device)
    return {
        "layer_s": token_s / layers,
        "prefill": prompts,
        "layers": layers,
        **_held(model),
        "peak_vram_nbytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def _held(model: Any) -> dict[str, Any]:
    """Bytes of weights by dtype, the experts' apart: what quantization left as it was."""
    everything, experts = Counter[str](), Counter[str]()
    for name, parameter in model.named_parameters():
        kind = str(parameter.dtype).removeprefix("torch.")
        everything[kind] += parameter.nbytes
        if ".experts." in name:
            experts[kind] += parameter.nbytes
    places = Counter(str(place) for place in getattr(model, "hf_device_map", {}).values())
    return {
        "nbytes_by_dtype": dict(everything),
        "routed_experts_by_dtype": dict(experts),
        "routed_experts_quantized": set(experts) <= {"uint8", "int8"},
        "modules_by_place": dict(places),
    }


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

    values = torch.randn(shape.out_features, shape.in_features, device=device, dtype=_dtype(device))
    weights = [BnbWeight.of(values, "nf4", device)]
    count = min(_MAX_COPIES, sizes.rotation_nbytes // weights[0].nbytes)
    weights += [BnbWeight.of(values, "nf4", device) for _ in range(count - 1)]
    x = torch.randn(1, shape.in_features, device=device, dtype=_dtype(device))
    launches = [functools.partial(weight.linear, x) for weight in weights]
    seconds = seconds_each(launches, device, sizes.repeats)
    nbytes = weights[0].nbytes
    return {"seconds": seconds, "nbytes": nbytes, "bytes_per_s": nbytes / seconds}
