"""Settings of the image processor from the files beside a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from moecli.errors import MoecliError
from moecli.models.config import ModelSpec
from moecli.vision.picture import PictureReader
from moecli.vision.preprocessor import read_settings
from moecli.vision.tiles import TileSettings
from tests.vision.seeing import CONFIG, TILE, write_picture

SPEC = ModelSpec.from_hf({"architectures": ["Llama4ForConditionalGeneration"], **CONFIG})
VISION = SPEC.vision
GIVEN = {
    **{"size": {"height": TILE, "width": TILE}, "max_patches": 5, "resize_to_max_canvas": True},
    **{"resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    **{"rescale_factor": 0.01, "do_resize": True, "image_processor_type": "Llama4ImageProcessor"},
}
READ = TileSettings(TILE, 5, True, "bicubic", 0.01, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def write(directory: Path, name: str, content: Any) -> Path:
    (directory / name).write_text(json.dumps(content))
    return directory


def test_settings_of_older_and_newer_checkpoints(tmp_path: Path) -> None:
    newer = write(tmp_path, "processor_config.json", {"image_processor": GIVEN, "patch_size": 14})
    assert read_settings(newer, VISION) == READ
    older = write(tmp_path, "preprocessor_config.json", GIVEN | {"max_patches": 4})
    assert read_settings(older, VISION).most == 4


def test_what_is_not_said_is_as_in_released_models(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {"size": GIVEN["size"]})
    assert read_settings(tmp_path, VISION) == TileSettings(size=TILE)


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"height": TILE, "width": TILE - 1}},
        {"size": {"height": 336, "width": 336}},  # the tower takes others
        {"size": 3},
        {"resample": 1},
        {"max_patches": 17},
        {"max_patches": 0},
        {"do_normalize": False},
        {"image_std": [0.1, 0.1, 0.0]},
        {"image_mean": [0.1]},
        {"image_mean": "white"},
    ],
    ids=str,
)
def test_other_tiles_are_refused(tmp_path: Path, change: dict) -> None:
    write(tmp_path, "preprocessor_config.json", GIVEN | change)
    with pytest.raises(MoecliError, match=r"preprocessor_config.json` asks for tiles"):
        read_settings(tmp_path, VISION)


def test_a_model_without_vision_sees_no_pictures(tmp_path: Path) -> None:
    text = {"architectures": ["Llama4ForCausalLM"], **CONFIG["text_config"]}
    with pytest.raises(MoecliError, match="knows no vision tower of it"):
        PictureReader.of(write(tmp_path, "config.json", text))


def test_a_picture_says_what_it_takes(tmp_path: Path, seeing_model: Path) -> None:
    reader = PictureReader.of(seeing_model)
    one = reader.read(write_picture(tmp_path / "one.png", 56, 56))
    assert (one.size, one.grid, one.num_patches, one.num_tokens) == ((56, 56), (1, 1), 4, 7)
    six = reader.read(write_picture(tmp_path / "six.png", 100, 151))
    assert (six.size, six.grid, six.num_patches, six.num_tokens) == ((151, 100), (2, 3), 28, 37)
    for picture in (one, six):
        assert picture.text.count("<|") == picture.num_tokens
        assert picture.text.count("<|patch|>") == picture.num_patches


def test_tokens_of_a_tile_of_released_models() -> None:
    from tests.models.test_models_config import MAVERICK, SCOUT

    for config in (SCOUT, MAVERICK):
        vision = ModelSpec.from_hf(config).vision
        assert (vision.tile_tokens, vision.tile_size, vision.patch_token_id) == (144, 336, 200092)
