"""Knows how config.json says that weights are in compressed-tensors' form `pack-quantized`."""

from collections.abc import Sequence
from typing import Any

from quant.scheme import QuantScheme

EXPERT_TARGETS = (r"re:.*\.experts\..*_proj$",)  # of experts whose linears have the usual names
# A head is a Linear in transformers; vLLM has a class of its own for it, so it goes by name too.
_DENSE_TARGETS = ("Linear", "re:.*lm_head$")


def quantization_config(
    scheme: QuantScheme,
    dense_scheme: QuantScheme | None,
    ignore: Sequence[str],
    expert_targets: Sequence[str] = EXPERT_TARGETS,
) -> dict[str, Any]:
    """The `quantization_config` of config.json: compressed-tensors, `pack-quantized`.

    Readers match a Linear's name before its class, so the experts' group goes by name and the
    dense group takes the other Linears. `ignore` names the Linears that stay in 16 bits.
    """
    targets: list[tuple[QuantScheme, Sequence[str]]]
    if dense_scheme == scheme:
        targets = [(scheme, _DENSE_TARGETS)]
    else:
        targets = [(scheme, expert_targets)]
        if dense_scheme is not None:
            targets.append((dense_scheme, _DENSE_TARGETS))
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {
            f"group_{number}": _config_group(group_scheme, group_targets)
            for number, (group_scheme, group_targets) in enumerate(targets)
        },
    }


def _config_group(scheme: QuantScheme, targets: Sequence[str]) -> dict[str, Any]:
    return {
        "targets": list(targets),
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": scheme.group_size,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
        },
    }
