"""Knows how the device asks the host for the experts it leaves to it, and gets its answer.

A mailbox in main memory that both sides see, and a thread that looks into it while armed. The
device rings, does something else, and waits; the host copies nothing to it and launches nothing,
so a step that contains both can be one CUDA graph. What the host computes is the caller's `serve`.

Legend: T tokens, k choices a token, E experts of a layer, H hidden size.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from offload import lane_ops
from offload.errors import OffloadError
from offload.host import SLOT_ALIGNMENT, HostArena
from offload.mailbox import HAS_ADDRESSES, HAS_PARTIAL, Mailbox, tensor_at, word_at
from offload.pinning import CudaPinner, Pinner, SimulatedPinner

# (layer_index, hidden fp32 [T, H], topk_ids int64 [T, k], topk_weights fp32 [T, k],
#  mask int32 [E]) -> partial sum fp32 [T, H] or None, addresses the device shall read or None
Serve = Callable[[int, Tensor, Tensor, Tensor, Tensor], tuple[Tensor | None, dict[int, int] | None]]

MAX_SPINS = 1 << 22  # looks over the link, of about a microsecond each
_SPIN_S = 0.002  # longer than the time between two layers; then the thread naps between looks
_NAP_S = 50e-6
_STOP_S = 10.0  # how long a serve may take to come to its end


class HostLane:
    """`ring` and `wait` on the device; `serve` on a thread of the host, while `armed`.

    `serve` gets views of the mailbox that are valid until it returns. It returns the weighted sum
    over the masked choices, and where the device reads the experts that it shall compute itself.
    `taken` is called, in the same thread, when the device has read what the last reply pointed to:
    before the next `serve`, and when `armed` ends.

    The device never hangs: when `serve` raises, the reply is zeros, and so are all further ones
    until `check` has raised it; when nobody replies, the device gives up after `max_spins` looks,
    and asks nothing more until armed again. Raises OffloadError where the mailbox cannot be pinned.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        max_tokens: int,
        serve: Serve,
        device: torch.device | str,
        pinner: Pinner | None = None,
        taken: Callable[[], None] = lambda: None,
        max_spins: int = MAX_SPINS,
    ) -> None:
        self._device = torch.device(device)
        self._shape = (hidden_size, num_experts, top_k, max_tokens)
        self._max_spins = max_spins
        if pinner is None:
            on_cuda = self._device.type == "cuda"
            pinner = CudaPinner(self._device) if on_cuda else SimulatedPinner()
        mailbox = Mailbox(hidden_size, num_experts, top_k, max_tokens)
        arena = _pinned_block(mailbox.nbytes, pinner)
        base = arena.device_address(0)
        self._request, self._reply = mailbox.request(base), mailbox.reply(base)
        state = torch.zeros(lane_ops.NUM_STATE_WORDS, dtype=torch.int64, device=device)
        self._state = state  # [3]
        self._partial = torch.zeros(max_tokens, hidden_size, device=device)  # [T, H]
        self._addresses = torch.zeros(num_experts, dtype=torch.int64, device=device)  # [E]
        self._num_tokens = 0  # of the request that waits for `wait`
        self._server = _Server(arena, mailbox, self._shape, serve, taken)
        self._finalizer = weakref.finalize(self, _stop, self._server, self._device)

    def ring(
        self,
        layer_index: int,
        hidden: Tensor,  # [T, H], any float
        topk_ids: Tensor,  # int64 [T, k]
        topk_weights: Tensor,  # [T, k], any float
        host_mask: Tensor,  # int32 [E]
    ) -> None:
        """Hand the masked experts to the host; nothing where none is. `wait` must follow."""
        hidden_size, num_experts, top_k, max_tokens = self._shape
        num_tokens = hidden.shape[0]
        assert not self._server.closed, "the lane is closed"
        assert not self._num_tokens, "rung twice without a wait"
        assert 1 <= num_tokens <= max_tokens, f"{num_tokens} tokens, at most {max_tokens}"
        assert hidden.shape == (num_tokens, hidden_size), f"hidden is {tuple(hidden.shape)}"
        assert topk_ids.shape == topk_weights.shape == (num_tokens, top_k), "choices do not match"
        assert host_mask.shape == (num_experts,), f"the mask is {tuple(host_mask.shape)}"
        assert topk_ids.dtype == torch.int64, f"ids are {topk_ids.dtype}"
        assert host_mask.dtype == torch.int32, f"the mask is {host_mask.dtype}"
        lane_ops.ring(
            hidden.contiguous(),
            topk_ids.contiguous(),
            topk_weights.contiguous(),
            host_mask,
            self._state,
            self._request,
            layer_index,
        )
        self._num_tokens = num_tokens

    def wait(self) -> tuple[Tensor, Tensor]:
        """(partial sum fp32 [T, H], addresses int64 [E]) of the last `ring`: zeros where none.

        The same tensors each time: the next `wait` overwrites them.
        """
        assert self._num_tokens, "waited without a ring"
        partial = self._partial[: self._num_tokens]
        self._num_tokens = 0
        lane_ops.wait(self._state, partial, self._addresses, self._reply, self._max_spins)
        return partial, self._addresses

    @contextmanager
    def armed(self) -> Iterator[None]:
        """The host looks for requests meanwhile; a step that rings must run inside.

        The end waits until the device has done what it was given, and raises what `check` would.
        """
        assert not self._server.closed, "the lane is closed"
        assert not self._server.is_armed, "armed twice"
        self.check()
        _synchronize(self._device)
        self._num_tokens = 0  # what an interrupted step rang for nobody waits for any more
        self._state[lane_ops.OPEN :] = 0
        self._server.arm()
        try:
            yield
        finally:
            _synchronize(self._device)
            self._server.disarm()
        self.check()

    def check(self) -> None:
        """Raise what went wrong since the last check: an error of `serve`, or a missing reply.

        Looks at main memory only: it does not wait for the device.
        """
        server = self._server
        failure, server.failure = server.failure, None
        late = 0
        if not server.closed:
            late, server.fault.value = server.fault.value, 0
        if isinstance(failure, OffloadError):
            raise OffloadError(failure.message, failure.hint) from failure
        if failure is not None:
            raise failure
        if late:
            raise OffloadError(
                "the processor did not answer the graphics card in time",
                "leave the link alone with the experts: `--lane link`",
            )

    def close(self) -> None:
        """End the thread and give the mailbox back; nothing may ring any more."""
        self._finalizer()


def _pinned_block(nbytes: int, pinner: Pinner) -> HostArena:
    whole = -(-nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
    arena = HostArena(whole, whole, hugepages=False)
    if not arena.pin(pinner):
        arena.close()
        raise OffloadError(
            f"the system pins no {whole / 2**20:.1f} MiB for messages to the processor",
            "leave the link alone with the experts: `--lane link`",
        )
    return arena


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Server:
    """The host's side: a thread that refers to no HostLane, so that one can be collected."""

    def __init__(
        self,
        arena: HostArena,
        mailbox: Mailbox,
        shape: tuple[int, int, int, int],
        serve: Serve,
        taken: Callable[[], None],
    ) -> None:
        self.arena = arena
        self.failure: BaseException | None = None
        self.closed = False
        self.thread: threading.Thread | None = None
        self._serve, self._taken = serve, taken
        self._shape = shape
        base = arena.address(0)
        self._from, to = mailbox.request(base), mailbox.reply(base)
        self._bell, self._answered = word_at(self._from.bell), word_at(to.answered)
        self._parts, self.fault = word_at(to.parts), word_at(to.fault)
        hidden_size, num_experts, _, max_tokens = shape
        self._partial = tensor_at(to.partial, (max_tokens, hidden_size), torch.float32)
        self._table = tensor_at(to.addresses, (num_experts,), torch.int64)
        self._header = tensor_at(self._from.header, (2,), torch.int64)
        self._views: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}  # by tokens
        self.is_armed = self._polling = False
        self.changed = threading.Condition()
        # On the only core, looking all the time keeps away whoever shall ring.
        self._spins = len(os.sched_getaffinity(0)) > 1 if hasattr(os, "sched_getaffinity") else True

    def arm(self) -> None:
        with self.changed:
            self._wait_for_rest()
            self._answered.value = self._bell.value  # nothing that was rung before is waited for
            self.is_armed = True
            if self.thread is None:
                # daemon: ended by the finalizer, which runs later than Python's own join
                self.thread = threading.Thread(
                    target=self._work, name="moecli-host-lane", daemon=True
                )
                self.thread.start()
            self.changed.notify_all()

    def disarm(self) -> None:
        with self.changed:
            self.is_armed = False
            self._wait_for_rest()

    def _wait_for_rest(self) -> None:
        """Until nothing is being served; under the lock."""
        if not self.changed.wait_for(lambda: not self._polling, _STOP_S):
            raise OffloadError("the processor is still busy with an expert of the last step")

    def stop(self) -> bool:
        """Whether the thread has ended."""
        with self.changed:
            self.closed, self.is_armed = True, False
            self.changed.notify_all()
        thread = self.thread
        if thread is None or thread is threading.current_thread():
            return thread is None
        thread.join(_STOP_S)
        return not thread.is_alive()

    def _work(self) -> None:
        while True:
            with self.changed:
                while not (self.is_armed or self.closed):
                    self.changed.wait()
                if self.closed:
                    return
                self._polling = True
            self._poll()
            self._try(self._taken)
            with self.changed:
                self._polling = False
                self.changed.notify_all()

    def _poll(self) -> None:
        """Look for requests until disarmed."""
        last = self._answered.value
        since = time.monotonic()
        while self.is_armed:
            number = self._bell.value
            if number != last:
                self._answer(number)
                last, since = number, time.monotonic()
            elif self._spins and time.monotonic() - since < _SPIN_S:
                time.sleep(0)  # lets other Python threads have the interpreter
            else:
                time.sleep(_NAP_S)

    def _answer(self, number: int) -> None:
        """Whatever happens in between, the device gets its reply."""
        self._parts.value = 0
        if self.failure is None:
            self._try(self._reply)
        self._answered.value = number  # last: the device may read the rest from here on

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as failure:  # noqa: BLE001  # kept for check()
            if self.failure is None:
                self.failure = failure

    def _reply(self) -> None:
        self._taken()
        layer_index, num_tokens = self._header.tolist()
        partial, addresses = self._serve(layer_index, *self._views_of(num_tokens))
        parts = 0
        if partial is not None:
            to = self._partial[:num_tokens]
            assert partial.shape == to.shape, f"the partial sum is {tuple(partial.shape)}"
            to.copy_(partial)
            parts |= HAS_PARTIAL
        if addresses:
            self._table.zero_()
            for expert, address in addresses.items():
                self._table[expert] = address
            parts |= HAS_ADDRESSES
        self._parts.value = parts

    def _views_of(self, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        views = self._views.get(num_tokens)
        if views is None:
            hidden_size, num_experts, top_k, _ = self._shape
            views = self._views[num_tokens] = (
                tensor_at(self._from.hidden, (num_tokens, hidden_size), torch.float32),
                tensor_at(self._from.topk_ids, (num_tokens, top_k), torch.int64),
                tensor_at(self._from.topk_weights, (num_tokens, top_k), torch.float32),
                tensor_at(self._from.mask, (num_experts,), torch.int32),
            )
        return views


def _stop(server: _Server, device: torch.device) -> None:
    """A thread that does not end keeps its mailbox."""
    _synchronize(device)
    if server.stop():
        server.arena.close()
