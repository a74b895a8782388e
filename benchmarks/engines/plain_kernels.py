"""Lends vLLM kernels in plain PyTorch for weights that its CPU build has none for.

It runs in vLLM's own environment, as a plugin of vLLM. What it replaces is arithmetic only: a
packed weight is expanded as compressed-tensors says and multiplied. All else stays vLLM's: which
layer has which scheme, where a tensor of the file goes, how it is cut for several ranks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

CHOSEN = "moecli-interop: plain kernels for"  # what the log shows


def register() -> None:
    """Offer the kernels: linears before those vLLM has, experts after; called in each process."""
    from vllm.model_executor.kernels import linear as kernels
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors_moe as experts,
    )
    from vllm.platforms import PlatformEnum

    offered = kernels._POSSIBLE_KERNELS[PlatformEnum.CPU]
    if any(kernel.__name__ == "PlainLinearKernel" for kernel in offered):
        return
    offered.insert(0, _linear_kernel())
    _offer_experts(experts.CompressedTensorsMoEMethod)


def expand(packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """[..., O, I * bits / 32] int32 and [..., O, I / group] to [..., O, I], rounded to bf16."""
    shifts = torch.arange(0, 32, bits)
    codes = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    codes = codes.flatten(-2) - 2 ** (bits - 1)
    groups = codes.unflatten(-1, (scale.shape[-1], -1)) * scale.float().unsqueeze(-1)
    return groups.flatten(-2).bfloat16().to(scale.dtype)


def _linear_kernel() -> type:
    from vllm.logger import init_logger
    from vllm.model_executor.kernels.linear import MPLinearKernel

    class PlainLinearKernel(MPLinearKernel):
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            if config.zero_points:
                return False, "weights are symmetric"
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            init_logger("vllm.moecli").info_once(f"{CHOSEN} linears")
            packed, scale = (getattr(layer, n).data for n in (self.w_q_name, self.w_s_name))
            layer.plain = expand(packed, scale, self.config.weight_type.size_bits)

        def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return linear(x, layer.plain, bias)

    return PlainLinearKernel


def _offer_experts(method: type) -> None:
    """Where vLLM finds no backend for quantized experts, ours computes them."""
    # vLLM is in another environment: a checker here knows neither the class nor its methods.
    choose = method.get_moe_method  # type: ignore[attr-defined]

    def chosen(config: Any, layer: Any, layer_name: str) -> Any:
        try:
            return choose(config, layer, layer_name)
        except NotImplementedError:  # which is how vLLM says that it has no backend
            name = f"{layer_name}.0.{layer.ckpt_gate_proj_name}"
            scheme = config.get_scheme_dict(layer, name)
            return _experts_class()(scheme["weights"], layer.moe_config)

    method.get_moe_method = staticmethod(chosen)  # type: ignore[attr-defined]


def _experts_class() -> type:
    from vllm.logger import init_logger
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
        CompressedTensorsWNA16MoEMethod,
    )

    class PlainExperts(CompressedTensorsWNA16MoEMethod):
        """Its parameters and how they are loaded are those of vLLM's class."""

        def __init__(self, weights: Any, moe: Any) -> None:
            FusedMoEMethodBase.__init__(self, moe)
            self.num_bits, self.group_size = weights.num_bits, weights.group_size
            self.symmetric, self.strategy = weights.symmetric, weights.strategy
            self.packed_factor = 32 // weights.num_bits

        @property
        def is_monolithic(self) -> bool:
            return False

        def process_weights_after_loading(self, layer: Any) -> None:
            init_logger("vllm.moecli").info_once(f"{CHOSEN} experts")
            layer.plain = [
                expand(packed.data, scale.data, self.num_bits)
                for packed, scale in (
                    (layer.w13_weight_packed, layer.w13_weight_scale),
                    (layer.w2_weight_packed, layer.w2_weight_scale),
                )
            ]

        def get_fused_moe_quant_config(self, layer: Any) -> None:
            return None

        def apply(
            self,
            layer: Any,
            x: Tensor,
            topk_weights: Tensor,
            topk_ids: Tensor,
            shared_experts: Any,
            shared_experts_input: Tensor | None,
        ) -> Tensor:
            ids = topk_ids.long()
            if layer.expert_map is not None:
                ids = layer.expert_map.long()[ids]  # -1: another rank's
            result = torch.zeros_like(x, dtype=torch.float32)
            gate_up, down = layer.plain
            for expert in range(gate_up.shape[0]):
                rows, choices = torch.nonzero(ids == expert, as_tuple=True)
                if not len(rows):
                    continue
                score = topk_weights[rows, choices].float().unsqueeze(-1)
                inner = x[rows]
                if layer.apply_router_weight_on_input:
                    inner = (inner * score).to(x.dtype)
                gate, up = linear(inner, gate_up[expert]).chunk(2, dim=-1)
                out = linear(silu(gate) * up, down[expert]).float()
                result.index_add_(
                    0, rows, out if layer.apply_router_weight_on_input else out * score
                )
            return result.to(x.dtype)

    return PlainExperts
