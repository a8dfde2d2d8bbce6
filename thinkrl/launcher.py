"""End a worker with its torchrun, so that no old worker runs beside a run that is started again.

end_with_launcher()    first, before torch is imported
require_launcher()     before the process group waits for a store that torchrun keeps
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

from thinkrl import UserError

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of sys/prctl.h


def end_with_launcher() -> None:
    """Make the kernel kill this process when torchrun ends for any reason. Linux only."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it ended in between, and no signal will come
            os._exit(1)


def require_launcher() -> None:
    """Raise UserError if torchrun ended before `end_with_launcher`, so that its store cannot be reached.

    torch would wait for the store for many minutes.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection(place, timeout=60).close()
    except ConnectionRefusedError:
        raise UserError(
            f"torchrun is gone: nobody listens on {place[0]}:{place[1]}, where its store was; start the "
            "job again"
        ) from None
    except OSError:
        pass  # a slow or unusual network: torch has its own way of trying
