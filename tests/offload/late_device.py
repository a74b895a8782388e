"""Knows how to simulate a device whose kernels run later than they are launched."""

import threading
from collections import deque
from collections.abc import Sequence

import torch

from offload.errors import OffloadError
from offload.pieces import Piece, copy_pieces
from offload.transfer import Mark
from tests.offload.offload_files import bytes_at


class LateTransfer:
    """Kernels that read slots are launched by `launch` and run when somebody waits for them.

    They are given what they must find: a copy that came too early is found out by its bytes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._launched = 0
        self._waiting: deque[tuple[int, int, bytes]] = deque()  # number, address, what lies there
        self.num_waits = 0  # kernels that a copy had to wait for
        self.overwritten = 0  # kernels that found other bytes; a worker's guess may fail in silence
        self.fail_next = False

    def launch(self, address: int, expected: bytes) -> None:
        with self._lock:
            self._launched += 1
            self._waiting.append((self._launched, address, expected))

    def mark(self) -> Mark:
        with self._lock:
            return self._launched

    def copy(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        after: Mark | None,
        pieces: Sequence[Piece],
    ) -> None:
        if self.fail_next:
            self.fail_next = False
            raise OffloadError("the device is gone")
        if after is not None:
            assert isinstance(after, int)
            self.run(until=after)
        copy_pieces(target, source, pieces)

    def run(self, until: int | None = None) -> None:
        """Let the kernels launched so far come to their end, or the first `until` of them."""
        with self._lock:
            while self._waiting and (until is None or self._waiting[0][0] <= until):
                _, address, expected = self._waiting.popleft()
                assert bytes_at(address, len(expected)) == expected, (
                    "overwritten before it was read"
                )
                self.num_waits += until is not None

    def close(self) -> None:
        self.run()
