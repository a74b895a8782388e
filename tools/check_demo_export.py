"""Checks that an exported repository gives transformers the logits that training computes."""

import sys
from pathlib import Path

import torch
from demo_model import Batch, DemoConfig, DemoModel
from transformers import AutoTokenizer, Llama4ForCausalLM


def training_logits(checkpoint: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = DemoModel(DemoConfig(**state["config"]))
    for name, param in model.named_parameters():
        weight = state["optimiser"]["master"][name].to(torch.bfloat16)
        param.data = weight.float() if param.dim() == 1 or name == "embedding" else weight.to(dtype)
    model.embedding.data = model.embedding.data.to(dtype)
    length = len(ids)
    chunks = [min(256, length - s) for s in range(0, length, 256)]
    empty = torch.zeros(length)
    batch = Batch(ids, ids, empty, torch.arange(length), [length], chunks)
    with torch.inference_mode():
        hidden, _, _ = model.hidden(batch)
        return (hidden.to(dtype) @ model.embedding.to(dtype).t()).float()


def main() -> None:
    repository, checkpoint = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(repository)
    text = "Once there was a small fox named Nils who lived near the forest. " * 30
    ids = tokenizer(text, return_tensors="pt").input_ids
    for dtype in (torch.float32, torch.bfloat16):
        model, info = Llama4ForCausalLM.from_pretrained(
            repository, dtype=dtype, output_loading_info=True
        )
        assert not info["missing_keys"], info
        assert not info["unexpected_keys"], info
        with torch.inference_mode():
            theirs = model(ids).logits[0].float()
        ours = training_logits(checkpoint, ids[0], dtype)
        gap = (ours - theirs).abs().max().item()
        same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
        print(f"{dtype}: {ids.shape[1]} tokens, largest gap {gap:.5f}, same top token {same:.1%}")


if __name__ == "__main__":
    main()
