"""The model of transformers with the weights that moecli has quantized, expanded again."""

from pathlib import Path

import torch


def dequantized(path: Path) -> torch.nn.Module:
    """What the library itself makes of a directory that moecli wrote, in fp32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for parameter in model.parameters():  # fused experts stay bf16 whatever is asked for
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model
