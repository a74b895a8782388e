"""What a prompt copies of experts whose first rows are in VRAM, at the sizes of real models."""

import pytest

from offload.pieces import Piece, worth_copying
from quant.layout import ExpertLayout
from quant.scheme import QuantScheme


@pytest.mark.parametrize("scheme", [QuantScheme(4, 32), QuantScheme(4, 128), QuantScheme(8, 128)])
@pytest.mark.parametrize(
    ("hidden", "inner", "most"), [(5120, 8192, 0.011), (4096, 14336, 0.007), (7168, 2048, 0.037)]
)
def test_few_copies_move_little_more_than_what_vram_lacks(
    hidden: int, inner: int, most: float, scheme: QuantScheme
) -> None:
    """For large experts, which slices are for, the plan's prediction holds to this share of one."""
    layout = ExpertLayout(hidden, inner, scheme)
    for size in range(scheme.group_size, inner, scheme.group_size):
        pieces = worth_copying(Piece(*runs) for runs in layout.runs(size, inner))
        copied = sum(piece.total_nbytes for piece in pieces)
        assert len(pieces) <= 6
        extra = copied - layout.nbytes * (inner - size) // inner
        assert 0 <= extra <= most * layout.nbytes, size
        assert copied <= layout.nbytes
