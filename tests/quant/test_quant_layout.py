"""The bytes of an expert: order, alignment, shared memory."""

import pytest
import torch

from quant.errors import QuantError
from quant.layout import ExpertLayout
from quant.quantize import dequantize, quantize
from quant.scheme import QuantScheme

SCHEMES = [QuantScheme(bits, group) for bits in (4, 8) for group in (32, 64, 128)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(("hidden", "intermediate"), [(5120, 8192), (2048, 768)])
def test_experts_of_real_models_fill_whole_pages(
    scheme: QuantScheme, hidden: int, intermediate: int
) -> None:
    layout = ExpertLayout(hidden, intermediate, scheme)
    assert layout.slot_nbytes == layout.nbytes
    assert layout.num_weights == 3 * hidden * intermediate
    assert layout.nbytes * 8 == layout.num_weights * scheme.bpw


def test_an_int4_expert_of_scout_has_its_published_size() -> None:
    assert ExpertLayout(5120, 8192, QuantScheme(4, 32)).nbytes == 70_778_880


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_parts_follow_each_other_without_gaps(scheme: QuantScheme) -> None:
    layout = ExpertLayout(128, 384, scheme)
    end = 0
    for part in layout.parts:
        assert part.offset == end
        assert part.nbytes == part.dtype.itemsize * part.shape[0] * part.shape[1]
        end += part.nbytes
    assert end == layout.nbytes <= layout.slot_nbytes
    assert layout.slot_nbytes % 4096 == 0
    assert [part.name for part in layout.parts] == [
        f"{projection}_proj.weight_{kind}"
        for projection in ("gate", "up", "down")
        for kind in ("packed", "scale")
    ]


def test_views_share_the_memory_of_the_blob() -> None:
    layout = ExpertLayout(64, 96, QuantScheme(4, 32))
    blob = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
    views = layout.views(blob)
    assert (views.up.out_features, views.up.in_features) == (96, 64)
    assert (views.down.out_features, views.down.in_features) == (64, 96)
    views.down.scale.fill_(1.0)
    assert blob[layout.nbytes - 2 : layout.nbytes].tolist() == [0x80, 0x3F]
    blob[0] = 0xFF
    assert views.gate.packed[0, 0] == 0xFF


def test_a_written_expert_reads_back() -> None:
    layout = ExpertLayout(64, 96, QuantScheme(8, 32))
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (
        quantize(torch.randn(shape, generator=generator), layout.scheme)
        for shape in layout.projections.values()
    )
    blob = torch.zeros(layout.nbytes, dtype=torch.uint8)
    views = layout.views(blob)
    layout.write(type(views)(gate, up, down), blob)
    for written, original in ((views.gate, gate), (views.up, up), (views.down, down)):
        assert torch.equal(dequantize(written), dequantize(original))


def test_shapes_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(QuantError, match="down_proj"):
        ExpertLayout(128, 100, QuantScheme(4, 32))


def test_a_blob_that_is_too_short_is_our_bug() -> None:
    layout = ExpertLayout(64, 96, QuantScheme(4, 32))
    with pytest.raises(AssertionError, match="hold no expert"):
        layout.views(torch.zeros(layout.nbytes - 1, dtype=torch.uint8))
