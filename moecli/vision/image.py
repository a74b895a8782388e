"""Knows how a picture file becomes upright RGB bytes, and which files are refused; no model."""

import hashlib
import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecli.errors import MoecliError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # none that runs another program
MAX_PIXELS = 64_000_000  # decoding takes some ten bytes a pixel
MAX_NBYTES = 256 << 20
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def read_image(path: Path) -> tuple[Tensor, str]:
    """uint8 [3, height, width] of a file, and the SHA-256 of its bytes.

    It is turned as its EXIF data says; what is transparent becomes white, as in the library. Of an
    animation it is the first picture. Raises MoecliError for whatever is none, or is too large.
    """
    data = _read(path)
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise MoecliError(
            "pictures are read with Pillow, which is not installed", "`pip install pillow`"
        ) from error
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # Pillow can be built without some
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_size is stricter
        try:
            with Image.open(io.BytesIO(data), formats=formats) as image:
                _check_size(path, image.size)
                upright = ImageOps.exif_transpose(image)
                rgb = _to_rgb(path, upright)
        except Image.UnidentifiedImageError as error:
            raise MoecliError(
                f"`{path}` is no picture that can be read", "PNG, JPEG, WebP, GIF and BMP can"
            ) from error
        except Image.DecompressionBombError as error:
            raise _too_large(path, "far too many pixels") from error
        except _DAMAGED as error:
            raise MoecliError(
                f"`{path}` is damaged: {error}", "open it in another program and save it anew"
            ) from error
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    planes = pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1).contiguous()
    return planes, hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_NBYTES:
            raise _too_large(path, f"more than {MAX_NBYTES >> 20} MiB")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise MoecliError(f"there is no file `{path}`") from error
    except OSError as error:
        raise MoecliError(f"cannot read `{path}`: {error.strerror}") from error


def _check_size(path: Path, size: tuple[int, int]) -> None:
    """Of the header, before memory is taken for pixels."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width} x {height} pixels")


def _too_large(path: Path, why: str) -> MoecliError:
    return MoecliError(
        f"`{path}` is too large: {why}",
        f"make it smaller, {MAX_PIXELS // 1_000_000} million pixels at most: a model sees fewer",
    )


def _to_rgb(path: Path, image: Any) -> Any:
    """A PIL image, and one in RGB."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":  # Pillow would cut these off at 255
        raise MoecliError(
            f"`{path}` has more than 8 bits a pixel and channel", "save it with 8 bits"
        )
    if "A" in image.getbands() or "transparency" in image.info:
        seen = image.convert("RGBA")
        paper = Image.new("RGBA", seen.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, seen).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
