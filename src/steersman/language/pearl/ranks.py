"""PEARL over two ranks of ``torch.distributed``: rank 0 has the draft model, rank 1 the target.

What is sent in a round, w tokens having been drafted:

====  ==========================================================================  ===============
from  what                                                                        as
====  ==========================================================================  ===============
0     z, the bits of q(z) and of the seconds that a token took                    int64 (2 w + 1)
1     after a rejection at i, with sampling: the wish for the law q_i             int64 (6)
0     q_i                                                                         float32 (V)
1     the verdict: accepted, token, kept, stop, the next gamma                    int64 (6)
both  behind the last round: the text is done                                     int64 (1)
====  ==========================================================================  ===============

So one law travels after a rejection, not one a token; ids are never numbers of a law's type, which would round them;
and rank 0 follows what rank 1 says, so that nothing hangs on two random streams being equal.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from steersman.errors import InputError, TrialError
from steersman.language.pearl.rounds import Verdict
from steersman.language.pearl.sides import Draft, Target, Work
from steersman.language.pearl.threads import inherited
from steersman.language.vocabularies import only_padding

ROLES = ("draft model", "target")
WISH, VERDICT = 0, 1
SLACK_S = 0.5  # the transport's own timeout gets to speak first: it knows what was waited for

_GROUPS: WeakKeyDictionary[Any, dict[float, Any]] = WeakKeyDictionary()


def _groups() -> dict[float, Any]:
    """The groups that rounds have run in, by timeout: connecting takes longer than a round."""
    return _GROUPS.setdefault(dist.group.WORLD, {})


class Ranks:
    """One rank's part of the rounds.

    The loop runs in a thread, and the calling thread watches it: a rank whose own step hangs raises as well as the rank
    that waits for it.

    Args:
        timeout: seconds that one step of a rank may take.
        device: of this rank's model.

    Raises:
        InputError: no process group, or one of another size than two.
    """

    side: Draft | Target

    def __init__(self, timeout: float, device: torch.device) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError("engine", "distributed", "called in a process group (torchrun --nproc-per-node 2)")
        if dist.get_world_size() != 2:
            raise InputError("world size", dist.get_world_size(), "2 for PEARL: rank 0 draft model, rank 1 target")
        self.rank, self.timeout = dist.get_rank(), timeout
        self.verifies = self.rank == 1
        self.peer = 1 - self.rank
        self._device = device
        self._laws: list[Tensor] = []
        self._beat, self._waiting = time.monotonic(), False

    @property
    def target(self) -> Target:
        """The target's side (rank 1 only)."""
        assert isinstance(self.side, Target)
        return self.side

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        group = _groups().pop(self.timeout, None) if kind is not None else None
        if group is not None:
            # Closes the connections: the other rank learns of it now, not at its timeout.
            dist.destroy_process_group(group)

    # ---------------------------------------------------------------- the two threads

    def run(self, loop: Callable[[], Any]) -> Any:
        """Run the loop of rounds in a thread, and raise if it stands still.

        Raises:
            TrialError: a step of this rank, or of the other, took longer than the timeout, or the other is gone.
        """
        outcome: dict[str, Any] = {}
        done = threading.Event()
        modes = inherited(self._device)

        def work() -> None:
            try:
                with modes():
                    outcome["result"] = loop()
            except BaseException as error:
                outcome["error"] = error
            finally:
                done.set()

        self._beat = time.monotonic()
        # A daemon: a process whose model hangs can still end.
        threading.Thread(target=work, name=f"pearl-rank{self.rank}", daemon=True).start()
        while not done.wait(0.05):
            late = time.monotonic() - self._beat - self.timeout
            if self._waiting and late > SLACK_S:
                raise self._silent()
            if not self._waiting and late > 0:
                took = f"{self._name(self.rank)} took longer than {self.timeout:g} s for one step"
                raise TrialError(f"{took} (if it may: PEARL(timeout=...))")
        if "error" in outcome:
            raise outcome["error"]
        return outcome["result"]

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({ROLES[rank]})"

    def _silent(self) -> TrialError:
        return TrialError(f"{self._name(self.peer)} did not answer for {self.timeout:g} s")

    # ---------------------------------------------------------------- messages

    def _exchange(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """A call of the transport, whose errors become sentences."""
        self._beat, self._waiting = time.monotonic(), True
        try:
            call(*arguments, **options)
        except RuntimeError as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if "timed out" in line.lower() or "timeout" in line.lower():
                raise self._silent() from error
            # gloo writes [file:line] in front and advice behind.
            reason = re.sub(r"^(\[\S*\] )?(.*?)(\. This is .*)?$", r"\2", line)
            raise TrialError(f"{self._name(self.peer)} is gone ({reason[:120]})") from error
        finally:
            self._beat, self._waiting = time.monotonic(), False

    def _send(self, tensor: Tensor) -> None:
        self._exchange(dist.send, tensor.cpu(), group=self._group, group_dst=self.peer)

    def _receive(self, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        tensor = torch.empty(count, dtype=dtype)
        self._exchange(dist.recv, tensor, group=self._group, group_src=self.peer)
        return tensor

    def meet(self, facts: Mapping[str, int], extra: Sequence[int]) -> tuple[int, list[int]]:
        """Compare what both ranks were called with; gives the target's vocabulary size and rank 1's ``extra``.

        Args:
            facts: numbers by name, the same names on both; ``allowed`` is 0 if this rank refuses its input.

        Raises:
            InputError: the ranks were called with different things.
            TrialError: the other rank refuses its input.
        """
        if self.timeout not in _groups():
            self._exchange(self._connect)
        mine = torch.tensor([*facts.values(), *extra], dtype=torch.int64)
        if self.rank == 0:
            self._send(mine)
            theirs = self._receive(len(mine))
        else:
            theirs = self._receive(len(mine))
            self._send(mine)
        at0, at1 = (mine.tolist(), theirs.tolist())[:: 1 if self.rank == 0 else -1]
        numbers = dict(zip(facts, zip(at0, at1, strict=False), strict=False))
        allowed = numbers.pop("allowed")
        if not allowed[self.rank]:
            return 0, at1[len(facts) :]  # the caller knows why
        if not allowed[self.peer]:
            raise TrialError(f"{self._name(self.peer)} refused its input, and says why itself")
        draft, target = numbers.pop("vocabulary")
        if not only_padding(target, draft):
            raise InputError("draft_model", f"a model with {draft} tokens", f"one with the target's {target} tokens")
        for name, (here, there) in numbers.items():
            if here != there:
                shown = "" if name == "prompt" else f": {here} on rank 0, {there} on rank 1"
                raise InputError("inputs", f"different on the two ranks ({name}{shown})", "the same on both")
        return target, at1[len(facts) :]

    def _connect(self) -> None:
        _groups()[self.timeout] = dist.new_group([0, 1], timeout=timedelta(seconds=self.timeout), backend="gloo")

    @property
    def _group(self) -> Any:
        """A group of the rounds' own, which may end with an error while the caller's stays.

        It is gloo whatever the caller's is: a round's few numbers are on the host anyway, and gloo tells at once that
        the other rank is gone, where nccl would leave both waiting.
        """
        group = _groups().get(self.timeout)
        if group is None:
            raise TrialError("the run has ended")
        return group

    # ---------------------------------------------------------------- rounds

    def work(self, length: int, write: int, places: int) -> Work:
        """This rank's forwards of a round, and what the draft model wrote."""
        work = Work()
        if isinstance(self.side, Draft):
            if write:
                work.written, work.chances, laws, work.t_draft = self.side.write(length, write)
                self._laws += laws
                numbers = torch.tensor([*work.chances, work.t_draft], dtype=torch.float64)
                self._send(torch.cat([torch.tensor(work.written), numbers.view(torch.int64)]))
            return work
        if places:
            work.t_target = self.side.score(length, places)
        if write:
            message = self._receive(2 * write + 1)
            work.written = message[:write].tolist()
            *work.chances, work.t_draft = message[write:].view(torch.float64).tolist()
        return work

    def law(self, i: int) -> Tensor:
        """The law that token i of (rest + z) was drawn from; asked for on rank 1, answered on rank 0."""
        self._send(torch.tensor([WISH, i, 0, 0, 0, 0]))
        return self._receive(self.side.law.size, torch.float32).to(self.side.device)

    def agree(self, verdict: Verdict | None) -> Verdict:
        """The verdict of rank 1, on both; before it, rank 0 answers wishes."""
        if verdict is not None:
            token = -1 if verdict.token is None else verdict.token
            numbers = [VERDICT, verdict.accepted, token, verdict.kept, int(verdict.stop), verdict.gamma]
            self._send(torch.tensor(numbers))
            return verdict
        while True:
            kind, accepted, token, kept, stop, gamma = self._receive(6).tolist()
            if kind == VERDICT:
                return Verdict(accepted, None if token < 0 else token, kept, bool(stop), gamma)
            self._send(self._laws[accepted].float())

    def close(self) -> None:
        """Wait until the other rank has done all of a text: rank 0 may fail behind the last verdict.

        Raises:
            TrialError: it did.
        """
        if self.rank == 0:
            self._send(torch.zeros(1, dtype=torch.int64))
            self._receive(1)
        else:
            self._receive(1)
            self._send(torch.zeros(1, dtype=torch.int64))

    def commit(self, length: int, verified: list[int], rest: list[int]) -> None:
        """Put verified tokens behind the first ``length``, and rest behind them; cut the cache to what stays."""
        self._laws = self._laws[len(self._laws) - len(rest) :]
        self.side.commit(length, verified, rest)
