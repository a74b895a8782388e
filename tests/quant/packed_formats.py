"""Weights as quantization libraries save them, made here from random numbers, and what they mean.

Every format gives the tensors of a module and, computed another way, the values they stand for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Packing:
    """A `quantization_config`, and a function of (module, shape [O, I], seed) that gives tensors
    and the values that they stand for.
    """

    config: dict[str, Any]
    pack: Callable[[str, tuple[int, int], int], tuple[Tensors, Tensor]]


def _random(shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def _scales(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    random = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1))
    return (random * 0.01 + 0.002).to(dtype)


def _words(codes: Tensor, bits: int) -> Tensor:
    """int32 [r, columns * bits / 32] of unsigned codes [r, columns], lowest bits first."""
    per_word = 32 // bits
    words = torch.zeros(codes.shape[0], codes.shape[1] // per_word, dtype=torch.int64)
    for place in range(per_word):
        words |= codes[:, place::per_word].long() << (bits * place)
    return (words & 0xFFFFFFFF).where(words < 1 << 31, words - (1 << 32)).to(torch.int32)


def gptq(bits: int, act_order: bool, version: str = "gptq", group: int = 32) -> Packing:
    """Scales in fp16; zero points of version 1 are stored less one."""
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order,
        "sym": False, "checkpoint_format": version,
    }  # fmt: skip

    def pack(module: str, shape: tuple[int, int], seed: int) -> tuple[Tensors, Tensor]:
        out_features, in_features = shape
        groups, top = in_features // group, 1 << bits
        codes = _random((out_features, in_features), 0, top, seed)
        zeros = _random((groups, out_features), 1, top, seed + 1)
        scales = _scales((groups, out_features), torch.float16, seed)
        order = torch.arange(in_features) // group
        if act_order:
            order = order[torch.randperm(in_features, generator=torch.Generator().manual_seed(7))]
        stored = zeros - 1 if version == "gptq" else zeros
        tensors = {
            f"{module}.qweight": _words(codes, bits).t().contiguous(),
            f"{module}.qzeros": _words(stored, bits),
            f"{module}.scales": scales,
            f"{module}.g_idx": order.to(torch.int32),
        }
        values = torch.empty(shape, dtype=torch.float64)
        for column in range(in_features):
            row = order[column]
            exact = (codes[:, column] - zeros[row]).double() * scales[row].double()
            values[:, column] = exact
        return tensors, values.to(torch.float16)

    return Packing(config, pack)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _awq_words(codes: Tensor) -> Tensor:
    """As AutoAWQ packs: nibble i of a word holds the output AWQ_ORDER[i] of eight."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32)
    for word in range(words.shape[1]):
        for place, output in enumerate(AWQ_ORDER):
            words[:, word] |= codes[:, 8 * word + output].to(torch.int32) << (4 * place)
    return words


def awq(group: int = 32) -> Packing:
    config = {
        "quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm",
        "zero_point": True,
    }  # fmt: skip

    def pack(module: str, shape: tuple[int, int], seed: int) -> tuple[Tensors, Tensor]:
        out_features, in_features = shape
        groups = in_features // group
        codes = _random((in_features, out_features), 0, 16, seed)
        zeros = _random((groups, out_features), 0, 16, seed + 1)
        scales = _scales((groups, out_features), torch.float16, seed)
        tensors = {
            f"{module}.qweight": _awq_words(codes),
            f"{module}.qzeros": _awq_words(zeros),
            f"{module}.scales": scales,
        }
        spread = [tensor.double().repeat_interleave(group, 0) for tensor in (zeros, scales)]
        exact = (codes.double() - spread[0]) * spread[1]
        return tensors, exact.t().to(torch.float16).contiguous()

    return Packing(config, pack)


def fp8(block: tuple[int, int] | None) -> Packing:
    """As DeepSeek-V3 and Qwen3 are released; blocks at the edges are not whole."""
    config = {"quant_method": "fp8", "weight_block_size": None if block is None else list(block)}

    def pack(module: str, shape: tuple[int, int], seed: int) -> tuple[Tensors, Tensor]:
        rows, columns = block or shape
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100
        codes = weight.to(torch.float8_e4m3fn)
        grid = (-(-shape[0] // rows), -(-shape[1] // columns))
        scale = _scales(grid, torch.float32, seed) / 10
        if block is None:
            scale = scale.view(())
        tensors = {f"{module}.weight": codes, f"{module}.weight_scale_inv": scale}
        values = codes.double()
        for row in range(grid[0]):
            for column in range(grid[1]):
                here = (
                    slice(row * rows, (row + 1) * rows),
                    slice(column * columns, (column + 1) * columns),
                )
                values[here] *= float(scale if block is None else scale[row, column])
        return tensors, values.float().to(torch.bfloat16)

    return Packing(config, pack)


def compressed(
    form: str,
    num_bits: int = 4,
    kind: str = "int",
    strategy: str = "group",
    symmetric: bool = True,
    **more: Any,
) -> Packing:
    """Packed, and unpacked again, by the compressed-tensors library."""
    weights = {
        "num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": symmetric, **more
    }  # fmt: skip
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }

    def pack(module: str, shape: tuple[int, int], seed: int) -> tuple[Tensors, Tensor]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        out_features, in_features = shape
        grid = {
            "group": (out_features, in_features // more.get("group_size", 1)),
            "channel": (out_features, 1),
            "tensor": (1,),
            "block": tuple(
                -(-size // block)
                for size, block in zip(shape, more.get("block_structure", shape), strict=True)
            ),
        }[strategy]
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 30
        low = -(1 << (num_bits - 1))
        state = {"weight": weight.bfloat16(), "weight_scale": _scales(grid, torch.bfloat16, seed)}
        if not symmetric:
            zeros = _random(grid, low, -low, seed + 1)
            state["weight_zero_point"] = zeros.to(torch.int8)
        library = BaseCompressor.get_value_from_registry(form)
        packed = library.compress(state, scheme)
        values = library.decompress(dict(packed), scheme)["weight"]
        return {f"{module}.{name}": tensor.contiguous() for name, tensor in packed.items()}, values

    return Packing(config, pack)


PACKINGS = {
    "gptq": gptq(4, False),
    "gptq-act-order": gptq(4, True),
    "gptq-8": gptq(8, False),
    "gptq-v2": gptq(4, True, "gptq_v2"),
    "awq": awq(),
    "fp8-block": fp8((128, 128)),
    "fp8-small-block": fp8((48, 40)),
    "fp8-tensor": fp8(None),
    "int4": compressed("pack-quantized", group_size=32),
    "int4-asymmetric": compressed("pack-quantized", group_size=32, symmetric=False),
    "int4-channel": compressed("pack-quantized", strategy="channel"),
    "int8": compressed("pack-quantized", num_bits=8, group_size=16),
    "int8-asymmetric": compressed("pack-quantized", num_bits=8, group_size=32, symmetric=False),
    "fp8-channel": compressed("float-quantized", 8, "float", "channel"),
    "fp8-one-scale": compressed("float-quantized", 8, "float", "tensor"),
    "fp8-blocks": compressed("float-quantized", 8, "float", "block", block_structure=[32, 32]),
    "int8-channel": compressed("int-quantized", 8, "int", "channel"),
    "int8-naive": compressed("naive-quantized", 8, "int", "channel", symmetric=False),
}
