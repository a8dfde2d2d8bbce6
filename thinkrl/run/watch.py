"""End the job if a rank stalls or is lost, with an error that names the rank, its step and its place.

    begin("train.py", minutes, world)    start watching; collective
    at("rollout", step)                  the main thread reaches this place
    alive()                              it is active: called with every forward of a model
    with waiting_for(thread):            it waits for this thread, which is watched in its place
    end()                                with watching(…): begins and ends

A rank is stalled if its main thread has neither reached a place nor been active for so long, unless it waits
for other ranks, which may take hours because rollouts differ in length. A thread in each process checks that.
Every BEAT_SECONDS it also writes to the process group's store that the process lives; rank 0 reads the
messages of all ranks, and they read rank 0's. So a frozen process, or one whose machine has left the network,
is found too. The process that finds an error prints it and exits with status 1, and torchrun ends the others.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch.distributed as dist

from thinkrl.distributed import World, global_max

BEAT_SECONDS = 2.0
ASK_SECONDS = 10.0  # for the store's word on whether another rank has printed the reason
LOST_BEATS = 5  # of a rank that a collective has lost: its process has ended
COLLECTIVES = str(Path(dist.__file__).parent)
ROOT = str(Path(__file__).resolve().parents[2])

_watch: Watch | None = None
_place, _step, _last = "the start", 0, 0.0
_instead: int | None = None  # identifier of the thread that the main thread waits for


def begin(program: str, minutes: float, world: World) -> None:
    """Watch this process and its peers until `end`, or until the next `begin`. Collective."""
    global _watch
    end()
    at("the start", 0)
    _watch = Watch(program, 60 * minutes, world)


def at(place: str, step: int | None = None) -> None:
    """Record that the main thread reached a place of a step, from 1; None: of the same step."""
    global _place, _step
    _place, _step = place, _step if step is None else step
    alive()
    if _watch and _watch.store is not None:
        _watch.say()  # now, and not at the next beat, which may not come


def alive() -> None:
    """Record that the main thread is active."""
    global _last
    _last = time.monotonic()


@contextmanager
def waiting_for(thread: int) -> Iterator[None]:
    """While the main thread waits for another thread of this process, that one is watched in its place."""
    global _instead
    alive()
    _instead = thread
    try:
        yield
    finally:
        _instead = None
        alive()


def end() -> None:
    """Stop watching. May be called twice."""
    global _watch
    if _watch:
        _watch.ended.set()
        _watch.talker.join()
        _watch.judge.join()  # no thread is left that the end of the interpreter would cut off
        _watch = None


@contextmanager
def watching(program: str, minutes: float, world: World) -> Iterator[None]:
    """Watch during the block; a collective that fails because a peer ended ends the process."""
    begin(program, minutes, world)
    try:
        yield
    except RuntimeError as error:
        exit_if_lost(error)
        raise
    finally:
        end()


def exit_if_lost(error: RuntimeError) -> None:
    """Print which rank's process has ended and exit with status 1, if that caused the error."""
    if _watch and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        _watch.exit_if_lost()


def waits(frame: FrameType | None) -> bool:
    """Whether a thread with this innermost frame waits for other ranks: it is in torch.distributed."""
    file = frame.f_code.co_filename if frame else ""
    # torch.distributed.checkpoint writes files; its collectives are elsewhere
    return file.startswith(COLLECTIVES) and not file.startswith(os.path.join(COLLECTIVES, "checkpoint"))


def line(frame: FrameType | None) -> str:
    """Innermost line of this project in a stack: "thinkrl/sampler.py:120"."""
    while frame and not frame.f_code.co_filename.startswith(ROOT):
        frame = frame.f_back
    return f"{os.path.relpath(frame.f_code.co_filename, ROOT)}:{frame.f_lineno}" if frame else "unknown line"


class Watch:
    """Two threads: one talks to the store, which may never answer if the network is gone; the other judges.

    A rank's message is "N step host place", N counted up.
    """

    def __init__(self, program: str, seconds: float, world: World):
        self.program, self.seconds, self.world = program, seconds, world
        self.beat, self.ended = 0, threading.Event()
        self.pause = min(BEAT_SECONDS, seconds / 10)
        self.patience = max(30.0, seconds)  # with the store, which a busy machine may keep from answering
        self.store: Any = None  # of a job of several ranks
        self.heard: dict[int, tuple[float, str]] = {}  # rank -> when it last said something new, and what
        if world.size > 1:
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            tries = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.TCPStore(*place, timeout=timedelta(seconds=self.patience), wait_for_workers=False)
            self.store = dist.PrefixStore(f"watch/{tries}", store)
            self.say()
            global_max(0.0)  # all have said something
        self.answered = time.monotonic()
        self.talker = threading.Thread(target=self._talk, daemon=True)
        self.talker.start()
        self.judge = threading.Thread(target=self._judge, args=(threading.get_ident(),), daemon=True)
        self.judge.start()

    def _talk(self) -> None:
        """Tell the store that this process lives, and read from it who else does, until `end`."""
        while not self.ended.wait(self.pause):
            if self.store is not None:
                try:
                    self.say()
                    self._listen(range(1, self.world.size) if self.world.main else [0])
                except RuntimeError as error:
                    reason = str(error).partition("\n")[0]
                    self._exit(f"rank {self.world.rank} does not reach torchrun's store ({reason})")
                self.answered = time.monotonic()

    def _judge(self, main_thread: int) -> None:
        """End the process if its main thread stalls, or if the store does not answer."""
        while self.talker.is_alive():
            self.talker.join(self.pause)
            frame, now = sys._current_frames().get(_instead or main_thread), time.monotonic()
            if waits(frame):
                alive()  # so that a rank is not called stalled when others let it go on
            elif now - _last > self.seconds and not self.ended.is_set():
                here = f"step {_step}, {_place}, {line(frame)}"
                self._exit(
                    f"rank {self.world.rank} on {socket.gethostname()} ({here}) has done nothing for "
                    f"{now - _last:.0f} s (--timeout)"
                )
            if self.store is not None and now - self.answered > self.patience:
                self._exit(
                    f"rank {self.world.rank} on {socket.gethostname()} has had no answer from torchrun's "
                    f"store for {now - self.answered:.0f} s"
                )

    def say(self) -> None:
        self.beat += 1
        self.store.set(str(self.world.rank), f"{self.beat} {_step} {socket.gethostname()} {_place}")

    def _listen(self, ranks: range | list[int]) -> None:
        now = time.monotonic()
        for rank, said in zip(ranks, self._read(ranks)):
            if self.heard.get(rank, (now, ""))[1] != said:
                self.heard[rank] = now, said
            since = now - self.heard[rank][0]
            if since > self.seconds:
                self._exit(f"{named(rank, said)} has not been heard of for {since:.0f} s (--timeout)")

    def _read(self, ranks: range | list[int]) -> list[str]:
        return [value.decode() for value in self.store.multi_get([str(rank) for rank in ranks])]

    def exit_if_lost(self) -> None:
        others = [rank for rank in range(self.world.size) if rank != self.world.rank]
        before = self._read(others)
        time.sleep(LOST_BEATS * BEAT_SECONDS)
        lost = [(rank, said) for rank, said, old in zip(others, self._read(others), before) if said == old]
        if lost:
            sentence = (
                f"{'; '.join(named(*one) for one in lost)}: the process has ended; what is saved stays usable"
            )
            # of those that are left, the first says it
            self._exit("" if any(rank < self.world.rank for rank in {*others} - {*dict(lost)}) else sentence)

    def _exit(self, sentence: str) -> NoReturn:
        """Print the reason, unless another rank has printed one, and end the process."""
        if sentence and self._first():
            print(f"\n{self.program}: {sentence}", file=sys.stderr, flush=True)
        os._exit(1)

    def _first(self) -> bool:
        """Whether no other rank has printed a reason, as far as the store can say."""
        said: list[int] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):  # the store is gone: nobody can know
                said.append(self.store.add("said", 1))

        if self.store is not None:
            asking = threading.Thread(target=ask, daemon=True)
            asking.start()
            asking.join(ASK_SECONDS)
        return said in ([], [1])


def named(rank: int, said: str) -> str:
    """Describe a rank by its last message."""
    _, step, host, place = said.split(" ", 3)
    return f"rank {rank} on {host} (step {step}, {place})"
