"""Tiny random models of transformers, and our decoder over their weights."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from moecli.kv_cache import KvCache
from moecli.models.config import ModelSpec
from moecli.models.decoder import Batch, Decoder
from moecli.models.moe import FloatExperts, expert_biases
from moecli.models.naming import dense_loader, plan_conversion
from moecli.models.provider import ExpertProvider
from tests.models.families import FAMILIES
from tests.models.stacked_experts import StackedExperts


def oracle(family: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A model of transformers with weights so large that logits and routing are far from flat."""
    import transformers

    known = FAMILIES[family]
    config = getattr(transformers, known.config)(**(known.sizes | changes))
    model = getattr(transformers, known.model)(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.data = 1 + 0.3 * noise
        elif name.endswith(("bias", "sinks")):
            parameter.data = 0.3 * noise
        else:
            fan_in = parameter.shape[1] if "experts" in name else parameter.shape[-1]
            scale = 0.5 if "embed" in name or "lm_head" in name else 1.0
            parameter.data = scale * noise * fan_in**-0.5
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):  # as large as what it corrects
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    model.tie_weights()
    return model


def stored_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """What counts as weights: parameters, and the one kind of buffer that checkpoints hold."""
    corrections = {n: b for n, b in model.named_buffers() if n.endswith("correction_bias")}
    return dict(model.named_parameters()) | corrections


def num_weights(model: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in stored_tensors(model).values())


def spec_of(model: torch.nn.Module) -> ModelSpec:
    import json

    architecture = {"architectures": [type(model).__name__]}
    return ModelSpec.from_hf(json.loads(model.config.to_json_string()) | architecture)


def decoder_of(
    model: torch.nn.Module,
    dtype: torch.dtype = torch.float32,
    tensors: dict[str, Tensor] | None = None,
    wrap: Callable[[ExpertProvider], ExpertProvider] = lambda experts: experts,
    guesses: int = 0,
    device: torch.device | str = "cpu",
) -> Decoder:
    """Our decoder over a model's weights, or over the same weights by other names.

    `device`: where it computes; `wrap` brings experts there.
    """
    spec, tensors = spec_of(model), dict(tensors or model.state_dict())
    if spec.tie_word_embeddings:
        del tensors["lm_head.weight"]
    plan = plan_conversion(spec, {name: tuple(t.shape) for name, t in tensors.items()})
    items = {(item.layer, item.expert): item for item in plan.experts}

    def slice_of(part: object) -> Tensor:
        tensor = tensors[part.name]
        tensor = tensor if part.index is None else tensor[part.index]
        tensor = tensor.T if part.transpose else tensor
        return tensor if part.rows is None else tensor[slice(*part.rows, part.step)]

    def load(layer: int, expert: int) -> tuple[Tensor, ...]:
        item = items[layer, expert]
        return slice_of(item.gate), slice_of(item.up), slice_of(item.down)

    weights = dense_loader(spec, tensors, tensors.__getitem__)
    experts_of_floats = FloatExperts(spec, load, expert_biases(spec, weights))
    experts = wrap(experts_of_floats)
    if isinstance(experts, StackedExperts):
        for layer in spec.moe_layers:
            experts.stack(layer)
    if device == "cpu":
        return Decoder(spec, weights, experts, dtype, guesses)
    return Decoder(
        spec, lambda name: weights(name).to(device), experts, dtype, guesses, device=device
    )


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def expected_logits(model: torch.nn.Module, token_ids: Tensor) -> Tensor:
    """Logits [T, V] of the library's forward over the whole sequence, without a cache."""
    return model(token_ids[None], use_cache=False).logits[0]


def logits_in_steps(
    decoder: Decoder, token_ids: Tensor, sizes: Iterable[int], cache: KvCache | None = None
) -> Tensor:
    """Logits [T, V] of tokens that arrive in pieces of these sizes."""
    cache = cache or KvCache(decoder.spec, len(token_ids), torch.float32)
    found, start = [], 0
    for size in sizes:
        batch = Batch.of(token_ids[start : start + size], cache, all_logits=True)
        found.append(decoder.forward(batch))
        start += size
    assert start == len(token_ids)
    return torch.cat(found)
