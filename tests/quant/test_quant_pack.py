"""Packing against the compressed-tensors library, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.pack import pack, unpack
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (7, 160), (16, 2048)])
def test_words_equal_those_of_compressed_tensors(bits: int, shape: tuple[int, int]) -> None:
    from compressed_tensors.compressors.pack_quantized import helpers

    generator = torch.Generator().manual_seed(bits)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    q = torch.randint(low, high, shape, dtype=torch.int8, generator=generator)
    words = pack(q, bits)
    assert torch.equal(words, helpers.pack_to_int32(q, bits))
    assert torch.equal(unpack(words, bits, shape[1]), q)
    assert torch.equal(helpers.unpack_from_int32(words, bits, torch.Size(shape)), q)


def test_every_code_has_its_place_in_the_word() -> None:
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(1, 2)
    expected = [0x76543210, 0xFEDCBA98 - (1 << 32)] * 2
    assert pack(q, 4).tolist() == [expected]
    assert pack(torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8), 8).tolist() == [
        [0xFF807F00 - (1 << 32)]
    ]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_unpack_undoes_pack(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([4, 8]))
    rows, words = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    columns = words * 32 // bits
    limit = 1 << (bits - 1)
    values = data.draw(
        st.lists(st.integers(-limit, limit - 1), min_size=rows * columns, max_size=rows * columns)
    )
    q = torch.tensor(values, dtype=torch.int8).view(rows, columns)
    assert torch.equal(unpack(pack(q, bits), bits, columns), q)
    transposed = q.t().contiguous().t()  # other strides, same values
    assert torch.equal(pack(transposed, bits), pack(q, bits))


def test_what_does_not_fit_words_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="do not fill words"):
        pack(torch.zeros(2, 12, dtype=torch.int8), 4)
    with pytest.raises(AssertionError, match="cannot pack"):
        pack(torch.zeros(2, 32, dtype=torch.int32), 4)
    with pytest.raises(AssertionError, match="are not 40 values"):
        unpack(torch.zeros(2, 4, dtype=torch.int32), 4, 40)


def test_a_weight_moves_whole_and_stays_itself_where_it_is() -> None:
    scheme = QuantScheme(4, 32)
    weight = QuantizedWeight(
        torch.zeros(3, 8, dtype=torch.int32), torch.ones(3, 2, dtype=torch.bfloat16), scheme
    )
    assert weight.to("cpu") is weight
    moved = weight.to("meta")
    assert moved.device == moved.packed.device == moved.scale.device == torch.device("meta")
    assert (moved.scheme, moved.out_features, moved.nbytes) == (scheme, 3, weight.nbytes)
