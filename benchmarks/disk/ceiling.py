"""Measures how fast experts can be read from a disk at all; knows no manager and no model."""

import itertools
import os
import random
import threading
import time

from offload.disk import ExpertSpan
from offload.host import HostArena
from offload.keys import ExpertKey

DEPTHS = (1, 2, 3, 4, 8, 16)
PIECE_NBYTES = 4 << 20
CEILING_S = 0.4


class Ceiling:
    """Direct reads of experts, by threads that do nothing else.

    Into an arena, whose pages may be large ones: that alone made reads twice as fast on a virtual
    disk. What a manager believes to lie there is spoilt.
    """

    def __init__(self, spans: dict[ExpertKey, ExpertSpan], arena: HostArena) -> None:
        self._spans, self._arena = list(spans.values()), arena
        paths = {span.path for span in self._spans}
        self._files = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths}
        self._nbytes = max(span.nbytes for span in self._spans) // 4096 * 4096
        pieces = sorted({self._nbytes, min(self._nbytes, PIECE_NBYTES)})
        depths = [depth for depth in DEPTHS if depth <= arena.num_slots]
        self.ways = [(depth, piece) for piece in pieces for depth in depths]

    def measure(self, way: tuple[int, int], seed: int) -> float:
        """Bytes a second of so many threads that read so many bytes at once."""
        depth, piece = way
        counts = [0] * depth
        begin = time.perf_counter()

        def read(i: int) -> None:
            draw = random.Random(seed * 100 + i)
            slots = itertools.cycle(range(i, self._arena.num_slots, depth))
            while time.perf_counter() - begin < CEILING_S:
                span, buffer = draw.choice(self._spans), self._arena.buffer(next(slots))
                for done in range(0, self._nbytes, piece):
                    end = min(done + piece, self._nbytes)
                    with buffer[done:end] as target:
                        counts[i] += os.preadv(self._files[span.path], [target], span.offset + done)

        threads = [threading.Thread(target=read, args=(i,)) for i in range(depth)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts) / (time.perf_counter() - begin)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)


def named(found: dict[tuple[int, int], float]) -> dict[str, float]:
    """GB/s by what people read: threads and how much each reads at once."""
    return {
        f"{depth} x {piece / 2**20:.1f} MiB": value / 1e9 for (depth, piece), value in found.items()
    }
