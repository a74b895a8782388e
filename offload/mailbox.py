"""Knows where in one block of shared memory the device and the host leave each other messages.

Legend: T tokens, k choices a token, E experts of a layer, H hidden size.
"""

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LINE = 128  # what one side polls shares no cache line with what the other writes

# Which parts of a reply count; the others are zeros to whoever takes it.
HAS_PARTIAL, HAS_ADDRESSES = 1, 2


@dataclass(frozen=True)
class RequestAddresses:
    """What the device writes, as it sees it: `bell` last, when the rest is there."""

    bell: int  # int64: the number of the request
    header: int  # int64 [2]: layer, tokens
    hidden: int  # fp32 [T, H]
    topk_ids: int  # int64 [T, k]
    topk_weights: int  # fp32 [T, k]
    mask: int  # int32 [E]: not 0 where the host shall see to an expert


@dataclass(frozen=True)
class ReplyAddresses:
    """What the host writes, and `fault`, which the device writes when it no longer waits."""

    answered: int  # int64: the number of the request answered last, written last
    parts: int  # int64: HAS_PARTIAL | HAS_ADDRESSES
    partial: int  # fp32 [T, H]
    addresses: int  # int64 [E]
    fault: int  # int64: the number of the request that was not answered in time; 0: none


class Mailbox:
    """The areas for up to `max_tokens` tokens, at offsets from the beginning of one block."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, max_tokens: int) -> None:
        choices, values = max_tokens * top_k, max_tokens * hidden_size
        # bell, header, answered and parts, fault; then what is as long as it is
        sizes = [8, 16, 16, 8, 4 * values, 8 * choices, 4 * choices, 4 * num_experts]
        sizes += [4 * values, 8 * num_experts]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _LINE) * _LINE)
        self.nbytes = starts.pop()
        self._starts = starts

    def request(self, base: int) -> RequestAddresses:
        """The areas of a request where the block begins at `base`."""
        bell, header, _, _, hidden, ids, weights, mask, _, _ = [base + at for at in self._starts]
        return RequestAddresses(bell, header, hidden, ids, weights, mask)

    def reply(self, base: int) -> ReplyAddresses:
        """The areas of a reply where the block begins at `base`."""
        _, _, answered, fault, _, _, _, _, partial, table = [base + at for at in self._starts]
        return ReplyAddresses(answered, answered + 8, partial, table, fault)


def tensor_at(address: int, shape: tuple[int, ...], dtype: "torch.dtype") -> "torch.Tensor":
    """Memory of this process as a tensor, not copied."""
    import torch

    count = 1
    for size in shape:
        count *= size
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def word_at(address: int) -> ctypes.c_int64:
    """An int64 of shared memory; it is read and written in one piece, being aligned."""
    return ctypes.c_int64.from_address(address)
