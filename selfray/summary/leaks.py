"""Whether test images were in training: said above every number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selfray.summary.inputs import Evaluation
from selfray.summary.markup import escaped


def leak_notes(evaluations: Sequence[Evaluation]) -> str:
    """A loud box for each evaluation with leaks, a quiet line for each that was found clean.

    Nothing is said of an evaluation that nobody looked for leaks in.
    """
    several = len(evaluations) > 1
    return "".join(_note(e, f" in {e.path.name}" if several else "") for e in evaluations)


def _note(evaluation: Evaluation, where: str) -> str:
    leaks = evaluation.leaks
    if leaks is None:
        return ""
    if not leaks:
        return (
            f'<p class="note">No leak found{escaped(where)}: patients, studies, images and known '
            "training lists were checked.</p>"
        )
    items = "".join(f"<li>{escaped(_sentence(leak))}</li>" for leak in leaks)
    return (
        f'<div class="banner leak" role="alert"><strong>Leak{escaped(where)}: test images were '
        "seen in training. Numbers of this page that it touches are too good.</strong>"
        f"<ul>{items}</ul></div>"
    )


def _sentence(leak: dict[str, Any]) -> str:
    sentence = leak.get("sentence")
    if isinstance(sentence, str) and sentence:
        return sentence
    return f"A leak of kind {leak.get('kind', 'unknown')} was found."


def leaking(evaluation: Evaluation) -> set[str]:
    """Encoders that a leak is said of; a leak of the dataset itself names none."""
    return {
        leak["encoder"] for leak in evaluation.leaks or () if isinstance(leak.get("encoder"), str)
    }
