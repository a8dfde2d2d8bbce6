"""Stop on SIGTERM or SIGINT after finishing and saving the current step; a second signal ends at once.

    stop = StopRequest()
    ...
    if stop.agreed():        collective: all ranks stop at the same place, if one of them was asked to
        raise Stopped("…")   main prints it and exits with RESUMABLE

Python runs a signal handler in the main thread, which may wait for another rank for minutes. So signals are
also read in a thread of their own. torchrun forwards these two signals to its workers and kills workers that
are alive after 30 seconds (TORCH_ELASTIC_SHUTDOWN_TIMEOUT=SECONDS in newer versions).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import NoReturn

from thinkrl.distributed import global_max

RESUMABLE = 75  # exit status of a run that was asked to stop: EX_TEMPFAIL of sysexits.h, "try again later"
ASKING = (signal.SIGTERM, signal.SIGINT)
# A scheduler signals every process of a job, and torchrun forwards its signal: within this time they count as
# one request.
SAME_REQUEST_SECONDS = 2.0


class Stopped(Exception):
    """Raised when the program stops on request, with its state saved. The text says how to continue."""


def exit_when_stopped(program: str, reason: Stopped) -> NoReturn:
    """Print the reason on rank 0 and exit with RESUMABLE."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{program}: {reason}", file=sys.stderr, flush=True)
    sys.exit(RESUMABLE)


class StopRequest:
    """Listener for stop requests, until `close`. what: the work that is finished first ("this step")."""

    def __init__(self, what: str, main: bool):
        self.asked = False
        self._what, self._main = what, main
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # the C-level handler writes a signal's number here immediately, even if the main thread is blocked
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._ask) for number in ASKING}
        threading.Thread(target=self._listen, daemon=True).start()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return global_max(float(self.asked)) > 0

    def close(self) -> None:
        """Handle signals as before. May be called twice."""
        if self._before:
            signal.set_wakeup_fd(-1)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}
            os.close(self._writer)  # ends the thread

    def _ask(self, *_: object) -> None:
        self.asked = True  # before the main thread goes on: the thread below may come to it a step later

    def _listen(self) -> None:
        first = None  # when the first request came, in seconds
        while number := os.read(self._reader, 1):
            if number[0] not in ASKING:
                continue
            name = signal.Signals(number[0]).name
            if first is None:
                self.asked, first = True, time.monotonic()
                self._say(f"\n{name}: finishing {self._what}, then saving; a second signal ends at once")
            elif time.monotonic() - first > SAME_REQUEST_SECONDS:
                self._say(f"\n{name}: ended at once; what is saved stays usable")
                os._exit(128 + number[0])
        os.close(self._reader)

    def _say(self, sentence: str) -> None:
        if self._main:
            print(sentence, file=sys.stderr, flush=True)
