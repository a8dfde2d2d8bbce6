"""Algebraic equality of two LaTeX expressions, by math-verify in a worker process with a time limit.

sympy may never finish on a model's text, and Python runs signal handlers in the main thread only. So another
process does the work, which the system ends after `TIMEOUT` seconds of processor time; wall time would make
grades depend on load. math-verify is the `[math]` extra; without it no two expressions are equal by algebra.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import inspect
import json
import os
import re
import select
import subprocess
import sys
import threading

from thinkrl import UserError

TIMEOUT = 3.0  # seconds of processor time that one answer may take

# Texts that algebra misreads: "east" and "seat" are the same product of variables, 10:30am is 10:30pm, 52_8
# is 52_9, x' is x, and 1 2 is 2.
_NO_ALGEBRA = re.compile(r"(?<!_\{)(?<![\\A-Za-z])[A-Za-z]{3,}|:|'|\d_|\d \d")


@functools.cache
def has_algebra() -> bool:
    """Whether math-verify, the `[math]` extra, is installed. Accuracies depend on it: report which."""
    return importlib.util.find_spec("math_verify") is not None


class Judge:
    """Judge of LaTeX equality; all its calls together have `TIMEOUT` seconds of processor time."""

    def __init__(self) -> None:
        self.seconds_left = TIMEOUT

    def __call__(self, a: str, b: str) -> bool:
        if not (a and b and self.seconds_left > 0 and has_algebra()):
            return False
        if _NO_ALGEBRA.search(a) or _NO_ALGEBRA.search(b):
            return False
        equal, seconds = worker.equal(a, b, self.seconds_left)
        self.seconds_left -= seconds
        return equal


def _serve() -> None:
    """Program of the worker process. Reads lines [latex, latex, seconds], writes lines [equal, seconds used],
    in JSON.

    It first writes an empty line, when it is ready.
    """
    import contextlib
    import json
    import os
    import resource
    import signal
    import sys
    import time

    reply, sys.stdout = sys.stdout, open(os.devnull, "w")
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify import verify

    def parse(latex):
        # math-verify's own `parse` reads R as r, 5m as 5, and i as a variable
        parsed = latex2sympy(
            latex, normalization_config=None, conversion_config=ConversionConfig(lowercase_symbols=False)
        )
        return parsed.subs(sympy.Symbol("i"), sympy.I)

    def apart(a, b):
        """Whether two expressions differ at one point: a fast check that finds most wrong answers."""
        symbols = sorted(a.free_symbols | b.free_symbols, key=str)
        point = {symbol: sympy.Rational(137 + 11 * i, 100) for i, symbol in enumerate(symbols)}
        x, y = (complex(side.subs(point).evalf(15)) for side in (a, b))
        return abs(x - y) > 1e-9 * max(abs(x), abs(y), 1e-14)

    def equal(a, b):
        if isinstance(a, sympy.Eq) and isinstance(b, sympy.Eq):
            left, right = (sympy.simplify(side.lhs - side.rhs) for side in (a, b))
            ratio = sympy.simplify(left / right)
            return left.free_symbols and ratio.is_number and ratio.is_nonzero and ratio.is_finite
        if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
            with contextlib.suppress(TypeError, ValueError):  # not a number at that point
                if apart(a, b):
                    return False
            if not a.free_symbols | b.free_symbols and a.is_nonzero and b.is_nonzero:
                a, b = a / b, sympy.Integer(1)  # `verify` takes what is below 1e-15 for 0
        return verify(a, b, float_rounding=12, timeout_seconds=None)

    def answer(line):
        reply.write(f"{line}\n")  # one write, even to an unbuffered stream: the reader takes what is there
        reply.flush()

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    memory = 4 << 30
    resource.setrlimit(
        resource.RLIMIT_AS, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard)
    )
    answer("")
    for line in sys.stdin:
        a, b, seconds = json.loads(line)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends this process: nothing handles it
        try:
            verdict = bool(equal(parse(a), parse(b)))
        except Exception:  # an error of the parser is no proof of equality
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        answer(json.dumps([verdict, time.process_time() - start]))


class _Worker:
    """Handle of the worker process, which is started when needed and again after it ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()
        atexit.register(self.close)

    def equal(self, a: str, b: str, seconds: float) -> tuple[bool, float]:
        """Whether two texts are equal, decided within `seconds` of processor time, and the seconds used."""
        with self.lock:
            if self.process is None:
                self._start()
            try:
                self.process.stdin.write(json.dumps([a, b, seconds]).encode() + b"\n")
                # a last resort, should the worker hang without computing
                reply = self._read_line(20 * TIMEOUT)
            except BrokenPipeError:
                reply = b""
            if not reply:
                self.close()
                return False, seconds
            return tuple(json.loads(reply))

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _start(self) -> None:
        program = f"{inspect.getsource(_serve)}\n_serve()"
        pipe = subprocess.PIPE
        # from the root folder: the current one comes first on the worker's path, and may hold a types.py
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
        )
        if not self._read_line(60.0):
            raise UserError(
                "math-verify is installed but does not start: pip install --force-reinstall 'thinkrl[math]'"
            )

    def _read_line(self, seconds: float) -> bytes:
        """Read one short line from the pipe, or b"" if it does not come in time or the worker ended."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return os.read(self.process.stdout.fileno(), 4096) if ready else b""


worker = _Worker()
