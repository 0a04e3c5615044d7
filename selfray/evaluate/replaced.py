"""An evaluation that is written over another: what differs is said, and no stale page stays."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

PAGE_MARK = '<p class="kicker">selfray summary</p>'
"""By which a page that `selfray summary` wrote is known."""

_PAGE = "summary.html"
_ENCODERS = "encoders"
_OF_PLACE = ("--data", "--out")  # a dataset is known by its fingerprint, wherever it lies


def say_what_differs(out: Path, command: str, fingerprint: str) -> None:
    """Say on stderr, before hours are spent, that the results in `out` are of other options.

    Args:
        out: Evaluation directory, or none yet.
        command: What was asked for now.
        fingerprint: Of the dataset.
    """
    file = out / "evaluation.json"
    if not file.is_file():
        return
    try:
        kept = json.loads(file.read_text())
        before, dataset = _options(kept["command"]), kept["dataset"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        which = "options that cannot be read"
    else:
        now = _options(command)
        names = [name for name in {**now, **before} if now.get(name) != before.get(name)]
        names += ["--data"] if dataset != fingerprint else []
        if not names:
            return
        which = f"other options ({', '.join(names)})"
    print(
        f"evaluate: {out} held an evaluation with {which}: its results will be replaced; parts "
        "that still hold are taken over",
        file=sys.stderr,
    )


def remove_stale_page(out: Path, written: Mapping[str, bytes]) -> None:
    """Remove the summary of `out` where it shows other results than are written now.

    It is removed and not marked, because whoever opens it, or is sent it, looks at its numbers and
    at nothing beside it; `selfray summary` writes it again from what is kept. A page that `selfray
    summary` did not write is left alone.

    Args:
        out: Evaluation directory.
        written: By file of `out` that a page shows, what it will hold.
    """
    page = out / _PAGE
    same = all((out / name).is_file() for name in written) and all(
        (out / name).read_bytes() == content for name, content in written.items()
    )
    if same or not page.is_file() or PAGE_MARK.encode() not in page.read_bytes():
        return
    page.unlink()
    print(
        f"evaluate: removed {page}, which showed what is replaced; `selfray summary {out}` makes "
        "it again",
        file=sys.stderr,
    )


def _options(command: str) -> dict[str, list[str]]:
    """The words behind each option of a command, but where its directories lie."""
    options: dict[str, list[str]] = {}
    name = _ENCODERS
    for word in shlex.split(command)[2:]:  # selfray evaluate
        if word.startswith("--"):
            name = word
            options.setdefault(name, [])
        else:
            options.setdefault(name, []).append(word)
    return {name: words for name, words in options.items() if name not in _OF_PLACE}
