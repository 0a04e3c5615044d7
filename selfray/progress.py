"""Long work: its progress on stderr, and signals that wait for the end of a piece of it."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_LOG_SECONDS = 30.0


class _Lines(io.TextIOBase):
    """What a bar writes to go back to the start of its line begins a new line instead."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text.strip("\r\n") + "\n") if text.strip() else 0

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(**options: Any) -> tqdm:
    """A bar with rate and remaining time, to be updated by the caller and closed by `with`.

    Where stderr is no terminal (a batch system's log), a line is written every half minute, and
    none of work that takes less.

    Args:
        **options: Of `tqdm.tqdm`, e.g. `total`, `unit`, `desc`.
    """
    if sys.stderr.isatty():
        return tqdm(smoothing=0.05, dynamic_ncols=True, **options)
    return tqdm(
        file=_Lines(),
        smoothing=0.05,
        mininterval=_LOG_SECONDS,
        maxinterval=_LOG_SECONDS,
        delay=_LOG_SECONDS,
        ascii=True,
        ncols=100,
        **options,
    )


@contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step or between two files.

    Outside the main thread they are the caller's, and none is collected.
    """
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        caught.append(number)

    former: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        former = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in former.items():
            # In a generator this may run late, when somebody else has the signals.
            if signal.getsignal(number) is note:
                signal.signal(number, handler)
