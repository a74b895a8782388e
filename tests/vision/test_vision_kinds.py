"""Choices of experts by image tokens and by text tokens: counted where they are made."""

from pathlib import Path

import pytest
import torch

from moecli.config import EngineConfig, SamplingConfig
from moecli.engine import Engine
from moecli.vision.kinds import KindChoices
from moecli.vision.picture import PictureReader
from tests.vision import seeing


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_every_choice_of_a_prompt_is_counted_by_its_kind(
    seeing_model: Path, tmp_path: Path, device: str
) -> None:
    """Against what the routers say, token by token, chunk by chunk."""
    vram = None if device == "cpu" else 1 << 30
    config = EngineConfig(ctx=256, prefill_chunk=20, device=device, vram_nbytes=vram)
    picture = PictureReader.of(seeing_model).read(seeing.write_picture(tmp_path / "a.png", 90, 151))
    with Engine.open(seeing_model, config) as engine:
        asked: dict[int, list[torch.Tensor]] = {}
        for layer in engine.decoder.layers:
            counted = layer.mlp.experts
            begin = counted.begin

            def noted(index, hidden, topk_ids, topk_weights, begin=begin):
                asked.setdefault(index, []).append(topk_ids.clone())
                return begin(index, hidden, topk_ids, topk_weights)

            counted.begin = noted
        messages = [{"role": "user", "content": "what is this?", "images": [picture]}]
        ids = engine.encode_chat(messages)
        sampling = SamplingConfig(temperature=0, max_tokens=5, ignore_eos=True)
        session = engine.new_session()
        list(engine.generate(session, ids, sampling, pictures=[picture]))
        found = engine.eye.choices()
        list(engine.generate(session, ids, sampling, pictures=[picture]))
        again = engine.eye.choices()
    images = torch.tensor(ids) == seeing.IDS["<|patch|>"]
    for layer, chosen in asked.items():
        of_prompt = torch.cat(chosen)[: len(ids)].flatten()
        assert found.image[layer] == of_prompt[images].bincount(minlength=4).tolist()
        assert found.text[layer] == of_prompt[~images].bincount(minlength=4).tolist()
        assert sum(found.image[layer]) == picture.num_patches
        assert again.image[layer] == found.image[layer], "cached tokens are not counted again"
        assert sum(again.text[layer]) == sum(found.text[layer]) + 1
    assert set(asked) == set(found.image) == set(found.text) == {0, 1, 2, 3}


def test_what_is_told_of_choices() -> None:
    choices = KindChoices(
        image={0: [8, 2, 0, 0], 2: [1, 1, 1, 1], 4: [0, 0, 0, 0]},
        text={0: [0, 1, 0, 3], 2: [2, 2, 2, 2], 4: [1, 0, 0, 0]},
    )
    assert choices.alike() == {0: pytest.approx(0.2), 2: pytest.approx(1.0)}
    assert choices.busiest({0: [8, 2], 2: [1, 1]}) == pytest.approx(0.65)
    assert choices.hottest([0, 5, 9, 1, 5]) == [2, 1, 4]
