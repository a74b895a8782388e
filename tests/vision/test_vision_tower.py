"""The tower whose weights pass through memory: against the library, and in its bounds."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moecli.errors import MoecliError
from moecli.vision.tower import Tower
from quant.checkpoint import Checkpoint
from tests.vision.seeing import TILE, TILE_TOKENS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(seeing_model: Path) -> Checkpoint:
    return Checkpoint.open(seeing_model)


def tower_of(checkpoint: Checkpoint, **changes) -> Tower:
    given = {
        **{"config": checkpoint.config["vision_config"], "text_hidden": 64},
        **{"names": checkpoint.tensors, "read": checkpoint.read},
        **{"device": torch.device("cpu"), "dtype": torch.float32, "before_part": lambda: None},
    }
    return Tower(**(given | changes))


def tiles(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, TILE, TILE, generator=generator) * 2 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_library_s(checkpoint, seeing_model: Path, dtype) -> None:
    from transformers import Llama4Config
    from transformers.models.llama4 import modeling_llama4

    config = Llama4Config.from_pretrained(seeing_model)
    body = modeling_llama4.Llama4VisionModel(config.vision_config).eval()
    projector = modeling_llama4.Llama4MultiModalProjector(config)
    for model, prefix in ((body, "vision_model."), (projector, "multi_modal_projector.")):
        state = {
            name.removeprefix(prefix): checkpoint.read(name).float()
            for name in checkpoint.tensors
            if name.startswith(prefix)
        }
        model.load_state_dict(state)
    with torch.no_grad():
        expected = projector(body(tiles(5)).last_hidden_state).flatten(0, 1)
    found = tower_of(checkpoint, dtype=dtype)(tiles(5))
    assert found.shape == (5 * TILE_TOKENS, 64)
    assert found.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else 0.1
    assert (found.float() - expected).abs().max() < tolerance * expected.std()


def test_a_tile_does_not_depend_on_its_neighbours(checkpoint) -> None:
    tower, some = tower_of(checkpoint), tiles(3)
    together = tower(some).split(TILE_TOKENS)
    for tile, expected in zip(some.split(1), together, strict=True):
        assert torch.equal(tower(tile), expected)


def test_each_tensor_is_read_once_for_all_tiles_and_none_is_kept(checkpoint) -> None:
    read: list[str] = []

    def noted(name: str) -> torch.Tensor:
        read.append(name)
        return checkpoint.read(name)

    tower = tower_of(checkpoint, read=noted)
    assert not read, "something was read before the first picture"
    tower(tiles(4))
    theirs = [name for name in checkpoint.tensors if name.startswith(("vision", "multi"))]
    assert sorted(read) == sorted(theirs)
    tower(tiles(1))
    assert len(read) == 2 * len(theirs)


def test_it_asks_before_each_part(checkpoint) -> None:
    class Enough(Exception):
        pass

    asked = []

    def before_part() -> None:
        asked.append(None)
        if len(asked) == 4:
            raise Enough

    tower = tower_of(checkpoint, before_part=before_part)
    with pytest.raises(Enough):
        tower(tiles(1))
    expected = tower_of(checkpoint)(tiles(1))
    assert torch.equal(tower(tiles(1)), expected), "what was left behind counts"
    assert len(asked) == 4 + 3 + 5  # layers; and the parts around them, the projector too


def test_a_checkpoint_without_or_with_another_tower(checkpoint) -> None:
    with pytest.raises(MoecliError, match="has no vision tower"):
        tower_of(checkpoint, names=["language_model.model.norm.weight"])
    names = set(checkpoint.tensors) - {"vision_model.layernorm_post.bias"}
    with pytest.raises(MoecliError, match=r"lacks `vision_model.layernorm_post.bias`"):
        tower_of(checkpoint, names=names)(tiles(1))
    config = checkpoint.config["vision_config"] | {"hidden_size": 16}
    with pytest.raises(MoecliError, match=r"has shape \[.*\]; config.json makes it") as raised:
        tower_of(checkpoint, config=config)(tiles(1))
    assert "quantize the whole model again" in raised.value.hint


PEAK = """
import sys, torch
from moecli.footprint import tower_nbytes
from moecli.models.config import ModelSpec
from moecli.vision.tiles import TileSettings, normalize
from moecli.vision.tower import Tower, _build
from tests.vision.seeing import CONFIG

torch.set_num_threads(1)
text = CONFIG["text_config"] | {"hidden_size": 1024}
vision = CONFIG["vision_config"] | {
    "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 3, "image_size": 168,
    "num_attention_heads": 8, "projector_input_dim": 1024, "projector_output_dim": 1024,
    "vision_output_dim": 1024,
}
config = CONFIG | {"text_config": text, "vision_config": vision}
spec = ModelSpec.from_hf({"architectures": ["Llama4ForConditionalGeneration"], **config})
body, projector = _build(vision, 1024)
shapes = {f"vision_model.{name}": p.shape for name, p in body.named_parameters()}
shapes |= {f"multi_modal_projector.{name}": p.shape for name, p in projector.named_parameters()}

def read(name):
    return torch.full(shapes[name], 0.01, dtype=torch.bfloat16)

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

tower = Tower(vision, 1024, shapes, read, torch.device("cpu"), torch.float32, lambda: None)
settings = TileSettings(size=168)
tower(normalize(torch.zeros(1, 3, 168, 168, dtype=torch.uint8), settings))
tiles = torch.zeros(17, 3, 168, 168, dtype=torch.uint8)
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
out = tower(normalize(tiles, settings))
print(status("VmHWM") - before, tower_nbytes(spec.vision, 1024))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_its_peak_is_what_the_plan_counts() -> None:
    """Of 17 tiles; weights of all layers together would not fit."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    peak, planned = map(int, run.stdout.split())
    assert 0.4 * planned < peak < planned + (4 << 20)


def test_a_plan_counts_what_a_picture_takes() -> None:
    from dataclasses import replace

    from moecli.footprint import tower_nbytes, workspace_nbytes
    from moecli.models.config import ModelSpec
    from tests.models.test_models_config import SCOUT

    spec = ModelSpec.from_hf(SCOUT)
    text = workspace_nbytes(replace(spec, vision=None), 8192, 512)
    tower = tower_nbytes(spec.vision, spec.hidden_size)
    embeddings = 4 * 2 * 17 * 144 * 5120
    assert text < tower < spec.num_vision_params, "the tower itself is not kept"
    assert workspace_nbytes(spec, 8192, 512) == tower + embeddings
    assert workspace_nbytes(spec, 8192, 8192) > tower + embeddings  # many tokens take more
