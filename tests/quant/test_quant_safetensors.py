"""The strict reader of safetensors files: what it reads, and everything it must refuse."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from quant.errors import QuantError
from quant.safetensors_file import DTYPES, SafetensorsFile, build_header, memory_of

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "I8", "shape": [4], "data_offsets": [16, 20]},
}


def write(path: Path, header: Any, data: bytes = bytes(20), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def changed(name: str, **fields: Any) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(json.dumps(GOOD))
    header[name] |= fields
    return header


def test_it_reads_what_the_library_writes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "bf16": torch.randn(3, 5, 2, generator=generator).bfloat16(),
        "f32": torch.randn(7, generator=generator),
        "i64": torch.arange(6).view(2, 3),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "fp8": torch.randn(8, generator=generator).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile.open(tmp_path / "x.safetensors")
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        read = file.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert bytes(memory_of(read)) == bytes(memory_of(tensor))
        assert file.entries[name].nbytes == tensor.nbytes
    for index in range(3):
        assert torch.equal(file.read_slice("bf16", index), tensors["bf16"][index])
    assert torch.equal(file.read_rows("bf16", 1, 3), tensors["bf16"][1:3])
    assert file.read_rows("bf16", 2, 2).shape == (0, 5, 2)
    with pytest.raises(AssertionError, match="has no rows"):
        file.read_rows("bf16", 2, 4)


def test_a_slice_reads_its_bytes_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"x": torch.zeros(64, 1000)}, tmp_path / "x.safetensors")
    file = SafetensorsFile.open(tmp_path / "x.safetensors")
    seen = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        seen.append(preadv(descriptor, buffers, offset))
        return seen[-1]

    monkeypatch.setattr(os, "preadv", counted)
    file.read_slice("x", 63)
    assert sum(seen) == 4000


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.arange(1000)
    save_file({"x": expected}, tmp_path / "x.safetensors")
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:77]], offset)
    )
    assert torch.equal(SafetensorsFile.open(tmp_path / "x.safetensors").read("x"), expected)


def test_the_library_reads_a_header_of_ours(tmp_path: Path) -> None:
    tensors = [("z", torch.float32, (2, 3)), ("ü", torch.int8, (5,)), ("a", torch.int64, (1,))]
    header, entries = build_header(tensors)
    assert len(header) % 4096 == 0
    assert entries["z"].offset == len(header)
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(range(24 + 5 + 8)))
    ours = SafetensorsFile.open(path)
    assert dict(ours.entries) == entries
    with safe_open(path, framework="pt") as file:
        for name in ("z", "ü"):
            assert torch.equal(file.get_tensor(name), ours.read(name))


def test_every_dtype_has_a_name_that_the_library_knows(tmp_path: Path) -> None:
    for dtype in DTYPES.values():
        save_file({"x": torch.zeros(2).to(dtype)}, tmp_path / "x.safetensors")
        assert SafetensorsFile.open(tmp_path / "x.safetensors").entries["x"].dtype == dtype


BAD = {
    "a hole": (changed("b", data_offsets=[17, 21]), bytes(21), "belong to no tensor"),
    "a hole in front": (
        {"b": {"dtype": "I8", "shape": [4], "data_offsets": [16, 20]}},
        bytes(20),
        "belong to no tensor",
    ),
    "bytes at the end": (GOOD, bytes(24), "4 bytes at the end"),
    "overlap": (changed("b", data_offsets=[15, 19]), bytes(20), "overlaps"),
    "the same place": (changed("b", shape=[16], data_offsets=[0, 16]), bytes(16), "overlaps"),
    "truncated data": (GOOD, bytes(19), "ends 1 bytes after the end"),
    "no data at all": (GOOD, b"", "after the end of the file"),
    "offset far away": (changed("b", data_offsets=[2**62, 2**62 + 4]), bytes(20), "after the end"),
    "offset beyond 64 bits": (
        changed("b", data_offsets=[2**80, 2**80 + 4]),
        bytes(20),
        "after the end",
    ),
    "negative offset": (changed("a", data_offsets=[-16, 0]), bytes(20), "impossible offsets"),
    "reversed offsets": (changed("a", data_offsets=[16, 0]), bytes(20), "impossible offsets"),
    "three offsets": (changed("a", data_offsets=[0, 8, 16]), bytes(20), "impossible offsets"),
    "offsets of text": (changed("a", data_offsets=["0", "16"]), bytes(20), "impossible offsets"),
    "offsets of floats": (changed("a", data_offsets=[0.0, 16.0]), bytes(20), "impossible offsets"),
    "offsets of booleans": (changed("b", data_offsets=[False, True]), bytes(20), "impossible"),
    "shape too large": (changed("a", shape=[2, 3]), bytes(20), "which is not F32"),
    "shape too small": (changed("a", shape=[2]), bytes(20), "which is not F32"),
    "negative shape": (changed("a", shape=[-2, -2]), bytes(20), "impossible shape"),
    "shape of text": (changed("a", shape="4"), bytes(20), "impossible shape"),
    "shape with null": (changed("a", shape=[None]), bytes(20), "impossible shape"),
    "shape that wraps to 16 bytes": (changed("a", shape=[2**62 + 4]), bytes(20), "shape"),
    "empty shape that overflows": (
        changed("b", shape=[0, 2**40, 2**40], data_offsets=[16, 16]),
        bytes(16),
        "impossible shape",
    ),
    "too many dimensions": (changed("b", shape=[1] * 100 + [4]), bytes(20), "impossible shape"),
    "other dtype": (changed("a", dtype="F16"), bytes(20), "which is not F16"),
    "unknown dtype": (changed("a", dtype="F5"), bytes(20), "unknown dtype 'F5'"),
    "dtype that is a list": (changed("a", dtype=["F32"]), bytes(20), "unknown dtype"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 4]}}, bytes(4), "lacks dtype"),
    "entry that is no object": ({"a": [1, 2]}, bytes(4), "lacks dtype"),
    "header that is no object": ([GOOD], bytes(20), "no JSON object"),
    "not JSON": (b"{broken", bytes(20), "header of"),
    "not UTF-8": (b'{"\xff": 1}', bytes(20), "header of"),
    "deep nesting": (b"[" * 200_000, bytes(20), "header of"),
    "a number of 10000 digits": (
        b'{"a": {"dtype": "I8", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 4]}}',
        bytes(4),
        "header of",
    ),
    "duplicate tensors": (
        b'{"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},'
        b'"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
        bytes(4),
        "`a` occurs twice",
    ),
    "duplicate fields": (
        b'{"a":{"dtype":"I8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        bytes(4),
        "`dtype` occurs twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_headers(tmp_path: Path, case: str) -> None:
    header, data, message = BAD[case]
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(QuantError, match=message) as caught:
        SafetensorsFile.open(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_the_good_header_of_these_tests_is_good(tmp_path: Path) -> None:
    assert len(SafetensorsFile.open(write(tmp_path / "x.safetensors", GOOD)).entries) == 2


@pytest.mark.parametrize("length", [10**8 + 1, 2**63, 2**64 - 1, 10_000])
def test_absurd_header_lengths(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x.safetensors", GOOD, length=length)
    with pytest.raises(QuantError, match=f"claims a header of {length} bytes"):
        SafetensorsFile.open(path)


def test_a_header_over_the_limit_is_refused_even_if_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((10**8 + 1).to_bytes(8, "little"))
        file.truncate(2 * 10**8)  # sparse
    with pytest.raises(QuantError, match="claims a header"):
        SafetensorsFile.open(path)


@pytest.mark.parametrize("nbytes", [0, 1, 7])
def test_files_that_are_too_short(tmp_path: Path, nbytes: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(nbytes))
    with pytest.raises(QuantError, match="too short"):
        SafetensorsFile.open(path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", GOOD)
    file = SafetensorsFile.open(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert file.read("a").shape == (2, 2)
    with pytest.raises(QuantError, match="ends inside `b`"):
        file.read("b")


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", GOOD)
    file = SafetensorsFile.open(path)
    path.unlink()
    with pytest.raises(QuantError, match="cannot read `a`"):
        file.read("a")
    with pytest.raises(QuantError, match="No such file"):
        SafetensorsFile.open(path)
    with pytest.raises(QuantError, match="cannot read"):
        SafetensorsFile.open(tmp_path)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_damage_to_a_header_gets_past_the_checks(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever is flipped, cut or put in: an error of ours, or tensors that lie in the file."""
    text = json.dumps(GOOD).encode()
    content = bytearray(len(text).to_bytes(8, "little") + text + bytes(range(20)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "digit", "cut", "insert"]))
        if kind == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "digit":
            content[place] = data.draw(st.sampled_from(b'0123456789-[]{}",:eE.'))
        elif kind == "cut":
            del content[max(1, place) :]
        else:
            content[place:place] = data.draw(st.binary(max_size=3))
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        file = SafetensorsFile.open(path)
        for name, entry in file.entries.items():
            assert 8 <= entry.offset <= entry.offset + entry.nbytes <= len(content)
            read = file.read(name)
            start = entry.offset
            assert bytes(memory_of(read)) == bytes(content[start : start + entry.nbytes])
    except QuantError as error:
        assert str(path) in error.message  # noqa: PT017 success is fine too
