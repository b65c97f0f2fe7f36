"""Jobs in processes of their own, which may be limited."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any
from unittest.mock import patch

from perf.implementations import Missing, reason

ROOT = Path(__file__).parent.parent
Job = Callable[[], Iterable[Any]]  # can be pickled where it runs in another process


class TimeIsUp(Exception):
    """Of a part, or of a job."""


class Child:
    """A process that runs jobs. One that takes too long is killed, with all that it has started.

    Nothing is interrupted: an exception that a signal's handler raises can come up in anybody's
    code, such as a callback of the garbage collector, which swallows it.
    """

    def __init__(self, env: dict[str, str] | None = None) -> None:
        self.env = env or {}
        self.process: Any = None
        self.idle = True

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def __call__(self, job: Job, until: float | None = None) -> Iterator[Any]:
        """What a job finds. Raises Missing where it fails, TimeIsUp at `until`."""
        if self.process is None:
            self._start()
        try:
            self.idle = False
            self.pipe.send(job)
            while self.pipe.poll(None if until is None else max(0.0, until - monotonic())):
                kind, found = self.pipe.recv()
                if kind == "found":
                    yield found
                    continue
                self.idle = True
                if kind == "failed":
                    raise Missing(found)
                return
        except (EOFError, OSError):
            self.process.join()
            why = f"the process ended with exit code {self.process.exitcode}"
            self.end()
            raise Missing(why) from None
        self.end()
        raise TimeIsUp

    def _start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, parent_process() is None))
        path = [*sys.path, str(ROOT)]  # pytest finds `perf` without it
        with patch.dict(os.environ, self.env), patch.object(sys, "path", path):
            self.process.start()
        theirs.close()

    def end(self) -> None:
        if self.process is None:
            return
        self.pipe.close()
        self.process.join(10 if self.idle else 0)
        if self.process.exitcode is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (AttributeError, OSError):  # it has no group of its own
                self.process.kill()
            self.process.join()
        self.process = None


def _serve(pipe: Connection, leads: bool) -> None:
    if leads:
        with suppress(AttributeError):  # not on Windows
            os.setsid()
    while True:
        try:
            for found in pipe.recv()():
                pipe.send(("found", found))
            pipe.send(("done", None))
        except (EOFError, BrokenPipeError):  # nobody waits any more
            return
        except Exception as why:
            pipe.send(("failed", reason(why)))
        gc.collect()


def apart(job: Job, env: dict[str, str] | None = None, seconds: float | None = None) -> list[Any]:
    """What a job finds in a process that nothing has run in.

    A compiler leaves a heap in pieces: steps over 1000 tensors, whose objects are found far from
    each other, then take up to twice their time. So an earlier job would decide about a later one.
    """
    with Child(env) as child:
        return list(child(job, None if seconds is None else monotonic() + seconds))
