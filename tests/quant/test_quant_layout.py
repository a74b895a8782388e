"""The bytes of an expert: order, alignment, shared memory."""

import pytest
import torch

from quant.errors import QuantError
from quant.layout import ExpertLayout
from quant.quantize import dequantize, quantize
from quant.scheme import QuantScheme
from tests.quant.quant_experts import Experts

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


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("span", [(0, 128), (128, 384), (256, 512), (0, 512)])
def test_cut_experts_are_the_expert_in_parts(scheme: QuantScheme, span: tuple[int, int]) -> None:
    experts = Experts(ExpertLayout(128, 512, scheme), num_experts=1)
    layout = experts.layout.restricted(*span)
    assert (layout.hidden_size, layout.intermediate_size) == (128, span[1] - span[0])
    assert layout.nbytes * 512 == experts.layout.nbytes * (span[1] - span[0])
    blob = torch.full((layout.nbytes + 1,), 0xAB, dtype=torch.uint8)
    experts.layout.cut(experts.blob(0), *span, blob)
    assert blob[-1] == 0xAB
    whole, part = experts.layout.views(experts.blob(0)), layout.views(blob)
    rows = slice(*span)
    assert torch.equal(dequantize(part.gate), dequantize(whole.gate)[rows])
    assert torch.equal(dequantize(part.up), dequantize(whole.up)[rows])
    assert torch.equal(dequantize(part.down), dequantize(whole.down)[:, rows])


def test_parts_that_cut_groups_are_our_bug() -> None:
    layout = ExpertLayout(64, 256, QuantScheme(4, 64))
    for begin, end in ((32, 128), (0, 96), (64, 64), (128, 64), (-64, 64), (192, 320)):
        with pytest.raises(AssertionError, match=r"is no part of|cuts groups"):
            layout.restricted(begin, end)


def test_shapes_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(QuantError, match="down_proj"):
        ExpertLayout(128, 100, QuantScheme(4, 32))


def test_a_blob_that_is_too_short_is_our_bug() -> None:
    layout = ExpertLayout(64, 96, QuantScheme(4, 32))
    with pytest.raises(AssertionError, match="hold no expert"):
        layout.views(torch.zeros(layout.nbytes - 1, dtype=torch.uint8))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("begin", "end"), [(0, 32), (32, 96), (64, 96), (0, 96)])
def test_runs_are_the_bytes_of_these_rows(bits: int, begin: int, end: int) -> None:
    layout = ExpertLayout(64, 96, QuantScheme(bits, 32))
    blob = torch.arange(layout.nbytes).remainder(251).to(torch.uint8)
    cut = torch.zeros(layout.restricted(begin, end).nbytes, dtype=torch.uint8)
    layout.cut(blob, begin, end, cut)
    runs = layout.runs(begin, end)
    parts = [
        blob[at : at + run.nbytes]
        for run in runs
        for at in range(run.offset, run.offset + run.num_runs * run.pitch, run.pitch)
    ]
    assert torch.equal(torch.cat(parts), cut)
    assert list(runs) == sorted(runs)
