"""Trained protocols: which gave which number, and what was chosen for each."""

from __future__ import annotations

import json

from selfray.evals.segmentation_decoders import DECODERS, FINE_TUNED
from selfray.summary.inputs import Evaluation
from selfray.summary.judged_cells import best_legend, judged_cell, probe_name
from selfray.summary.markup import escaped, facts, figure
from selfray.summary.number_cells import encoder_head, head, table
from selfray.summary.verdict import Measure, measures, readable_names

_FROZEN = {"linear", "knn"}
_DECODERS = {name + ending for name in DECODERS for ending in ("", FINE_TUNED)}
_BEST = "encoder of the column"


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
    tables = [_table(evaluation, measure) for measure in judged]
    caption = (
        f"{note}<b>Which protocol gave which number.</b> Linear and k-NN leave the encoder as it "
        "is; the others train a head step by step, or the encoder too, and then say more of what "
        "it can become than of what it is." + best_legend(evaluation.whole, _BEST)
    )
    folded = "".join(tables[1:])
    further = f"<details><summary>Further numbers</summary>{folded}</details>" if folded else ""
    return f"<h3>Protocols</h3>{figure(tables[0] + further, caption)}{_settings(evaluation)}"


def _table(evaluation: Evaluation, measure: Measure) -> str:
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
    told = f"Protocols: {measure.column}"
    return f"<h4>{escaped(measure.column)}</h4>{table(heads, rows, told=told)}"


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
