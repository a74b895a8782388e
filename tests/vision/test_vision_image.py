"""Files to upright RGB bytes; what is no picture is refused with a hint."""

import hashlib
import io
import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from moecli.errors import MoecliError
from moecli.vision.image import MAX_PIXELS, read_image
from tests.vision.pictures import pattern
from tests.vision.seeing import write_picture


def image_of(height: int, width: int) -> Image.Image:
    return Image.fromarray(pattern(height, width).permute(1, 2, 0).contiguous().numpy())


@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_a_lossless_file_gives_its_bytes(tmp_path: Path, suffix: str) -> None:
    path = write_picture(tmp_path / f"a.{suffix}", 31, 47)
    pixels, digest = read_image(path)
    assert torch.equal(pixels, pattern(31, 47))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_what_compresses_away_comes_near(tmp_path: Path, suffix: str) -> None:
    ramp = torch.arange(64).repeat(3, 48, 1).to(torch.uint8) * 3
    image = Image.fromarray(ramp.permute(1, 2, 0).contiguous().numpy())
    image.save(tmp_path / f"a.{suffix}", quality=95)
    pixels, _ = read_image(tmp_path / f"a.{suffix}")
    assert (pixels.int() - ramp.int()).abs().max() < 16


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(tmp_path: Path, orientation: int) -> None:
    turns = {
        **{1: lambda t: t, 2: lambda t: t.flip(2), 3: lambda t: t.flip(1, 2)},
        **{4: lambda t: t.flip(1), 5: lambda t: t.transpose(1, 2)},
        6: lambda t: t.transpose(1, 2).flip(2),
        7: lambda t: t.transpose(1, 2).flip(1, 2),
        8: lambda t: t.transpose(1, 2).flip(1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image_of(20, 30).save(tmp_path / "a.png", exif=exif)
    pixels, _ = read_image(tmp_path / "a.png")
    assert torch.equal(pixels, turns[orientation](pattern(20, 30)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_the_rgb_that_the_library_makes(tmp_path: Path, mode: str) -> None:
    from transformers.image_transforms import convert_to_rgb

    image = image_of(20, 30)
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(pattern(20, 30, seed=3)[0].numpy()))
    image = image.convert(mode)
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(path)
    with Image.open(path) as stored:
        expected = torch.from_numpy(convert_to_rgb(stored, return_numpy=True)).permute(2, 0, 1)
    assert torch.equal(read_image(path)[0], expected)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0].unique().tolist() == [255]
    palette = Image.new("P", (4, 4), 7)
    palette.putpalette([10, 20, 30] * 16)
    palette.save(tmp_path / "b.png", transparency=7)
    assert read_image(tmp_path / "b.png")[0].unique().tolist() == [255]


def test_16_bits_are_refused_rather_than_cut_off(tmp_path: Path) -> None:
    Image.new("I;16", (4, 4), 40_000).save(tmp_path / "a.png")
    with pytest.raises(MoecliError, match="more than 8 bits") as raised:
        read_image(tmp_path / "a.png")
    assert raised.value.hint == "save it with 8 bits"


def header_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and ends in its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    fields = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(20)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", fields) + pixels


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no picture that can be read"),
        (b"just text", "no picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture that can be read"),
        (header_of(10, 10), "is damaged"),
        (header_of(MAX_PIXELS // 1000 + 1, 1000), "too large: 64001 x 1000 pixels"),
        (header_of(60_000, 60_000), "too large"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(MoecliError, match=message) as raised:
        read_image(tmp_path / "a.png")
    assert "a.png" in raised.value.message
    assert raised.value.hint


def test_files_cut_short_anywhere_are_refused(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp", "gif"):
        whole = io.BytesIO()
        image_of(40, 40).save(whole, {"jpg": "jpeg"}.get(suffix, suffix))
        for share in (0.1, 0.5, 0.9):
            data = whole.getvalue()[: int(share * len(whole.getvalue()))]
            (tmp_path / "a").write_bytes(data)
            with pytest.raises(MoecliError, match=r"damaged|no picture"):
                read_image(tmp_path / "a")


def test_no_file_and_no_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MoecliError, match="there is no file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(MoecliError, match="cannot read"):
        read_image(tmp_path)
    path = write_picture(tmp_path / "a.png", 4, 4)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MoecliError, match="Pillow, which is not installed") as raised:
        read_image(path)
    assert raised.value.hint == "`pip install pillow`"
