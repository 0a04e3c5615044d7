"""Progress of long work on stderr: a bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import io
import sys
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
