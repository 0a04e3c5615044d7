"""Whether test images were in training: said above every number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selfray.summary.inputs import Evaluation
from selfray.summary.markup import escaped

_NOTED = "pre-training"
"""Kind of what is worth a line and no alarm: a run of the judged dataset saw no test image."""


def leak_notes(evaluations: Sequence[Evaluation]) -> str:
    """A loud box for each evaluation with leaks, a quiet line for each that was found clean.

    Nothing is said of an evaluation that nobody looked for leaks in; what holds of an encoder in
    several evaluations is said once.
    """
    several = len(evaluations) > 1
    found = [_found(e, f" in {e.path.name}" if several else "") for e in evaluations]
    noted = dict.fromkeys(
        _sentence(leak) for e in evaluations for leak in e.leaks or () if leak.get("kind") == _NOTED
    )
    return "".join(found) + "".join(f'<p class="note">{escaped(said)}</p>' for said in noted)


def _found(evaluation: Evaluation, where: str) -> str:
    if evaluation.leaks is None:
        return ""
    leaks = _alarms(evaluation)
    items = "".join(f"<li>{escaped(_sentence(leak))}</li>" for leak in leaks)
    return (
        f'<div class="banner leak" role="alert"><strong>Leak{escaped(where)}: numbers below are '
        f"too good.</strong><ul>{items}</ul></div>"
        if leaks
        else f'<p class="note">No leak found{escaped(where)}: patients, studies, images and what '
        "is known of the encoders' training were checked.</p>"
    )


def _alarms(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [leak for leak in evaluation.leaks or () if leak.get("kind") != _NOTED]


def _sentence(leak: dict[str, Any]) -> str:
    sentence = leak.get("sentence")
    if isinstance(sentence, str) and sentence:
        return sentence
    return f"A leak of kind {leak.get('kind', 'unknown')} was found."


def leaking(evaluation: Evaluation) -> set[str]:
    """Encoders that a leak is said of; a leak of the dataset itself names none."""
    named = [leak.get("encoder") for leak in _alarms(evaluation)]
    return {encoder for encoder in named if isinstance(encoder, str)}
