"""Writes tests/fixtures/vision: what the library's own image processor makes of made-up pictures.

It needs torchvision beside the torch that it was built for, and no moecli. In a venv of its own:

    pip install torch==2.14.1 torchvision==0.29.1 transformers==5.23.0 pillow safetensors
    PYTHONPATH=. python tests/vision/make_fixtures.py
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
import torchvision
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

from tests.vision.pictures import pattern

OUT = Path(__file__).parents[1] / "fixtures" / "vision"
SMALL = {"size": {"height": 28, "width": 28}}
# Whole values are kept of pictures with small tiles.
WHOLE = [
    (28, 28, SMALL),
    (10, 7, SMALL),
    (61, 90, SMALL),
    (200, 33, SMALL),
    (150, 301, SMALL | {"max_patches": 6}),
    (61, 90, SMALL | {"resize_to_max_canvas": True, "max_patches": 5}),
    (61, 90, SMALL | {"resample": 3}),
    (90, 61, SMALL | {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.25]}),
]
# Of those with tiles of released models only a hash.
HASHED = [
    *[(336, 336, {}), (1, 1, {}), (335, 337, {}), (100, 5000, {}), (1200, 1601, {})],
    *[(768, 1024, {}), (2003, 1501, {}), (37, 911, {}), (700, 650, {"resample": 3})],
]


class Watched(Llama4ImageProcessor):
    """Notes the sizes that pictures are brought to, and spares the work."""

    sizes: list[tuple[int, int]]

    def resize(self, image: Tensor, size: Any, **_: Any) -> Tensor:
        self.sizes.append((int(size.height), int(size.width)))
        return image.new_zeros(*image.shape[:-2], int(size.height), int(size.width))


def grid(height: int, width: int, settings: dict[str, Any]) -> list[int]:
    """[height, width, rows and columns of tiles, height and width before padding]."""
    processor = Watched(**settings)
    processor.sizes = []
    picture = torch.zeros(3, height, width, dtype=torch.uint8)
    made = processor(picture, return_tensors="pt", input_data_format="channels_first")
    rows, columns = made["aspect_ratios"][0].tolist()
    return [height, width, rows, columns, *processor.sizes[0]]


def sizes() -> list[tuple[int, int]]:
    draw = random.Random(0)
    found = [(n, n) for n in (1, 2, 335, 336, 337, 671, 672, 673, 1343, 1344, 1345, 4000)]
    found += [(336 * a + d, 336 * b) for a in (1, 2, 5) for b in (1, 3, 4) for d in (-1, 0, 1)]
    # Where a quotient times a side is a whole number, its precision decides how it is rounded.
    found += [(n, n) for n in range(3, 336, 9)]
    found += [(n, m * n) for m in (2, 3, 7) for n in range(5, 700, 97)]
    found += [(m * n, n) for m in (2, 3, 7) for n in range(11, 700, 97)]
    while len(found) < 500:
        height, width = (int(2 ** draw.uniform(0, 12)) for _ in range(2))
        if height * width < 4_000_000:
            found.append((height, width))
    return found


def processed(height: int, width: int, settings: dict[str, Any]) -> tuple[Tensor, list[int]]:
    picture = pattern(height, width)
    made = Llama4ImageProcessor(**settings)(
        picture, return_tensors="pt", input_data_format="channels_first"
    )
    return made["pixel_values"], made["aspect_ratios"][0].tolist()


def main() -> None:
    whole, tensors, hashed = [], {}, []
    for index, (height, width, settings) in enumerate(WHOLE):
        pixels, ratio = processed(height, width, settings)
        tensors[str(index)] = pixels.contiguous()
        whole.append({"size": [height, width], "settings": settings, "grid": ratio})
    for height, width, settings in HASHED:
        pixels, ratio = processed(height, width, settings)
        digest = hashlib.sha256(pixels.contiguous().view(torch.uint8).numpy().tobytes())
        record = {"size": [height, width], "settings": settings, "grid": ratio}
        hashed.append({**record, "tiles": pixels.shape[0], "sha256": digest.hexdigest()})
    largest = {"resize_to_max_canvas": True}
    content = {
        "made_by": "tests/vision/make_fixtures.py: transformers' Llama4ImageProcessor",
        "versions": {
            **{"torch": torch.__version__, "torchvision": torchvision.__version__},
            "transformers": transformers.__version__,
        },
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "grids": [grid(*size, {}) for size in sizes()],
        "grids_of_the_largest_canvas": [grid(*size, largest) for size in sizes()[:200]],
        "whole": whole,
        "hashed": hashed,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, separators=(",", ":")).replace("],[", "],\n[")
    (OUT / "llama4_tiles.json").write_text(text.replace('},{"size"', '},\n{"size"') + "\n")
    save_file(tensors, OUT / "llama4_tiles.safetensors")


if __name__ == "__main__":
    main()
