"""What transformers says of a directory that moecli wrote: tokens and logits to compare with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """A model as transformers loads it, and the same weights computing in fp32."""

    models: dict[str, Any]  # by the name of a dtype

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Raises AssertionError where the library finds a tensor too many or too few."""
        # The library forbids .float() here, though the weights are bf16 by now.
        return cls({"bfloat16": _load(path), "float32": torch.nn.Module.float(_load(path))})

    def greedy(self, prompt: list[int], count: int, dtype: str) -> list[int]:
        """The `count` likeliest tokens after a prompt, one after the other."""
        from transformers import GenerationConfig

        settings = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
        model = self.models[dtype]
        model.generation_config.eos_token_id = None  # else it is taken where `settings` has none
        with torch.no_grad():
            found = model.generate(torch.tensor([prompt]), generation_config=settings)
        tokens: list[int] = found[0, len(prompt) :].tolist()
        return tokens

    def logits(self, prompt: list[int], answer: list[int], dtype: str) -> Tensor:
        """Before each token of an answer, fp32 [T, V]."""
        tokens = torch.tensor([prompt + answer[:-1]])
        with torch.no_grad():
            found: Tensor = self.models[dtype](tokens).logits[0, len(prompt) - 1 :]
        return found.float()


def _load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{kind} of `{path}`: {info[kind]}"
    with torch.no_grad():
        model(torch.tensor([[1]]))  # packed weights are expanded in the first forward
    return model.eval()
