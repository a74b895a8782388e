"""Knows what kernels must know of a card to divide their work among its multiprocessors."""

import functools
from dataclasses import dataclass

import torch
import triton

# A product and a sum are to be one instruction; from version 3.10 on, Triton must be told.
OPTIONS = {"enable_fp_fusion": True}
MAX_WARPS = 8  # of a program whose warps share rows
_RESIDENT_WARPS = 16  # of small programs, that a multiprocessor of any card holds at once


@dataclass(frozen=True)
class Card:
    capability: int  # 86 for 8.6
    multiprocessors: int

    @property
    def warps(self) -> int:
        """As many as keep all of its memory's bandwidth busy; more would only take turns."""
        return _RESIDENT_WARPS * self.multiprocessors

    @property
    def has_wide_tiles(self) -> bool:
        """Whether matrix units take 64 tokens by 64 rows at once, for gate and for up.

        Before 8.0 Triton uses no matrix units, and such tiles do not fit the registers. For 10.x
        it keeps sums in a memory of their own, and version 3.6 compiles two of these to a trap.
        """
        return self.capability >= 80 and self.capability // 10 != 10

    def warps_a_row(self, num_programs: int, num_tiles: int) -> int:
        """Warps of each of so many programs, whose rows have so many tiles: a power of two.

        One each where there are programs enough. Where not, warps share a program's rows and add
        up what they have in its shared memory: another launch would cost more.
        """
        wanted = min(num_tiles, triton.cdiv(self.warps, num_programs))
        return min(MAX_WARPS, triton.next_power_of_2(max(1, wanted)))


_INTERPRETED = Card(capability=80, multiprocessors=128)


def card_of(device: torch.device) -> Card:
    """The card that `device` is; where kernels are interpreted, one like many."""
    return _ask(device) if device.type == "cuda" else _INTERPRETED


@functools.cache
def _ask(device: torch.device) -> Card:
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.major * 10 + properties.minor, properties.multi_processor_count)
