"""Trained protocols: which gave which number, and what was chosen for each."""

from __future__ import annotations

import json

from selfray.summary.inputs import Evaluation
from selfray.summary.judged_cells import judged_cell, probe_name
from selfray.summary.markup import escaped, facts, figure
from selfray.summary.number_cells import encoder_head, head, table
from selfray.summary.verdict import Measure, measures, readable_names

_FROZEN = {"linear", "knn"}
_DECODERS = {"vitdet", "upernet"}


def protocols_section(evaluation: Evaluation, note: str) -> str:
    """A table of encoders by protocol for each measure that a trained protocol was judged by.

    Args:
        evaluation: Read by `read_evaluation`.
        note: What each caption begins with.

    Returns:
        HTML, empty when only frozen features were probed.
    """
    trained = set(evaluation.probes) - _FROZEN - _DECODERS
    judged = [
        m
        for m in measures(evaluation)
        if any(
            evaluation.result(e, m.target, m.metric, probe)
            for e in evaluation.encoders
            for probe in trained
        )
    ]
    if not judged:
        return ""
    return (
        "<h3>Protocols</h3>"
        + "".join(_table(evaluation, measure, note) for measure in judged)
        + _settings(evaluation)
    )


def _table(evaluation: Evaluation, measure: Measure, note: str) -> str:
    names = readable_names(evaluation.encoders)
    probes = [
        probe
        for probe in evaluation.probes
        if any(evaluation.result(e, measure.target, measure.metric, probe) for e in names)
    ]
    heads = head("Encoder") + "".join(head(escaped(probe_name(probe))) for probe in probes)
    rows = []
    for k, (encoder, name) in enumerate(names.items()):
        lines = [evaluation.result(encoder, measure.target, measure.metric, p) for p in probes]
        rows.append(f"<tr>{encoder_head(k, name)}{''.join(map(judged_cell, lines))}</tr>")
    caption = (
        f"{note}<b>{escaped(measure.column)}: which protocol gave which number.</b> Linear and "
        "k-NN leave the encoder as it is and train no network; further protocols train a head, or "
        "the encoder too, and say more of what it can become than of what it is."
    )
    return figure(table(heads, rows, told=f"Protocols: {measure.column}"), caption)


def _settings(evaluation: Evaluation) -> str:
    """What was chosen on the validate split, as it was recorded."""
    listed = evaluation.info.get("encoders")
    rows = [
        (
            one.get("name"),
            f"<code>{escaped(json.dumps(one['settings'], ensure_ascii=False))}</code>",
        )
        for one in (listed if isinstance(listed, list) else [])
        if isinstance(one, dict) and one.get("settings")
    ]
    told = facts(rows)
    return f"<details><summary>What was chosen for each</summary>{told}</details>" if told else ""
