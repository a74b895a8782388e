"""Built-in specs: every count against transformers' own model of full size on the meta device."""

import math
from typing import Any

import pytest
import torch

from moecli import known
from moecli.models import hf_config, hf_outline
from moecli.models.config import ModelSpec
from moecli.models.hf_outline import read_counted
from moecli.models.outline import Counted, Outline
from tests.models.tiny_models import num_weights, stored_tensors

MIB = 1 << 20
NAMES = [spec.name for spec in known.SPECS]
# As the makers publish them, in billions: all, and those of a token.
PUBLISHED = {
    "llama4-scout": (109, 17),
    "llama4-maverick": (402, 17),
    "llama4-behemoth": (1992, 289),  # as announced: "nearly two trillion", 288
    "mixtral-8x7b": (46.7, 12.9),
    "qwen3-30b-a3b": (30.5, 3.35),
    "qwen3-235b-a22b": (235, 22),
    "deepseek-v3": (671, 37.6),
    "gpt-oss-20b": (20.9, 4.19),  # their 3.61 leaves out the input embedding
    "gpt-oss-120b": (116.8, 5.71),
    "glm-4.5-air": (107, 13.4),
    "llama3.1-8b": (8.03, 8.03),
    "llama3.1-70b": (70.6, 70.6),
    "llama3.1-405b": (406, 406),
}


def meta_model(config: dict[str, Any]) -> torch.nn.Module:
    """The library's model of a config, without memory."""
    import accelerate
    import transformers

    kind = getattr(transformers, config["architectures"][0])
    with accelerate.init_empty_weights(include_buffers=True):
        model = kind(kind.config_class(**config))
    model.tie_weights()
    return model


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[str, Counted, torch.nn.Module]:
    """A built-in spec by name, what we count, and the library's model."""
    spec = known.find(request.param)
    assert spec is not None
    config = spec.config()
    return spec.name, read_counted(config), meta_model(config)


def test_parameters_are_those_of_the_library(
    pair: tuple[str, Counted, torch.nn.Module],
) -> None:
    name, counted, model = pair
    total = num_weights(model)
    assert counted.num_params == total
    assert math.isclose(total / 1e9, PUBLISHED[name][0], rel_tol=0.006)


def test_active_are_all_text_parameters_but_the_experts_that_a_token_passes_by(
    pair: tuple[str, Counted, torch.nn.Module],
) -> None:
    name, counted, model = pair
    active = 0
    for path, parameter in stored_tensors(model).items():
        if "vision" in path or "multi_modal" in path:
            continue
        numel = parameter.numel()
        if ".experts." in path:
            assert numel % counted.num_experts == 0
            numel = numel // counted.num_experts * counted.experts_per_token
        active += numel
    assert counted.num_active_params == active
    assert math.isclose(active / 1e9, PUBLISHED[name][1], rel_tol=0.02)


def test_every_tensor_outside_the_experts_is_counted_in_its_shape(
    pair: tuple[str, Counted, torch.nn.Module],
) -> None:
    """Bytes follow from shapes, not from the sum of parameters."""
    _, counted, model = pair
    experts = ".experts." if counted.num_experts > 1 else ".mlp."
    shapes = sorted(
        tuple(parameter.shape)
        for path, parameter in stored_tensors(model).items()
        if (experts not in path or path.endswith("proj_bias"))
        and "vision" not in path
        and "multi_modal" not in path
    )
    assert sorted(tensor.shape for tensor in counted.dense_tensors) == shapes


@pytest.mark.parametrize(
    ("name", "ctx", "nbytes"),
    [
        # A token leaves 2 x heads x size x 2 bytes in a layer.
        ("mixtral-8x7b", 32768, 32768 * 32 * 2 * 8 * 128 * 2),
        ("qwen3-30b-a3b", 8192, 8192 * 48 * 2 * 4 * 128 * 2),
        ("glm-4.5-air", 8192, 8192 * 46 * 2 * 8 * 128 * 2),
        ("llama3.1-70b", 8192, 8192 * 80 * 2 * 8 * 128 * 2),
        # 36 chunked layers hold one chunk of 8192 tokens, 12 all.
        ("llama4-scout", 8192, 1536 * MIB),
        ("llama4-scout", 131072, (6 * 1024 + 1152) * MIB),
        ("llama4-maverick", 1048576, (48 * 1024 + 1152) * MIB),
        # Every second layer holds a window of 128 tokens, twice where it moves on.
        ("gpt-oss-120b", 100, 36 * 100 * 2048),
        ("gpt-oss-120b", 8192, 18 * 2 * 128 * 2048 + 18 * 8192 * 2048),
        ("gpt-oss-20b", 131072, 12 * 2 * 128 * 2048 + 12 * 131072 * 2048),
        # A latent of 512 numbers and a key of 64 for all heads together.
        ("deepseek-v3", 8192, 61 * 8192 * (512 + 64) * 2),
    ],
)
def test_cache_of_each_kind_of_layer(name: str, ctx: int, nbytes: int) -> None:
    spec = known.find(name)
    assert spec is not None
    assert read_counted(spec.config()).kv_nbytes(ctx, 2) == nbytes


def test_a_scale_for_each_cached_vector() -> None:
    for name, vectors in (("llama3.1-8b", 32 * 16), ("glm-4.5-air", 46 * 16)):
        spec = known.find(name)
        assert spec is not None
        counted = read_counted(spec.config())
        assert counted.kv_nbytes(100, 1, 2) == counted.kv_nbytes(100, 1) + 100 * 2 * vectors


def test_a_family_that_moecli_runs_is_counted_by_its_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = known.find("llama3.1-8b")
    scout = known.find("scout")
    assert spec is not None
    assert scout is not None
    assert isinstance(read_counted(spec.config()), Outline)
    made = ModelSpec.from_hf(scout.config())
    assert read_counted(scout.config()) == made
    monkeypatch.setitem(hf_config._READERS, "LlamaForCausalLM", lambda *_: made)
    assert read_counted(spec.config()) is made
    assert hf_config.is_known(scout.config())


def test_no_family_is_read_in_two_ways() -> None:
    """Whoever teaches hf_config a family removes its reader, and what only that needs, here."""
    assert not set(hf_outline._READERS) & set(hf_config._READERS)


def test_names_as_people_type_them() -> None:
    for name in ("llama4-scout", "Llama-4-Scout", "scout", "SCOUT", "llama4_scout"):
        assert known.find(name) is known.SPECS[0], name
    assert known.find("meta-llama/Llama-4-Scout-17B-16E-Instruct") is known.SPECS[0]
    assert known.find("Mixtral-8x7B") is not None
    assert known.find("llama") is None
    assert known.find("-") is None
    assert known.close_to("lama4-scot")[0] == "llama4-scout"
    assert set(known.close_to("gpt-oss")) == {"gpt-oss-20b", "gpt-oss-120b"}
    assert known.close_to("something else") == []


def test_only_what_was_not_released_is_marked_as_announced() -> None:
    assert [spec.name for spec in known.SPECS if spec.guessed] == ["llama4-behemoth"]
    assert [spec.name for spec in known.SPECS if spec.repo_id is None] == ["llama4-behemoth"]
    behemoth = known.find("behemoth")
    assert behemoth is not None
    assert behemoth.label == "Llama 4 Behemoth (announced figures)"
