"""Names of protocols, and cells that say which encoder is best."""

from __future__ import annotations

import re
from collections.abc import Iterable

from selfray.evals.segmentation_decoders import is_fine_tuned, plain_name
from selfray.summary.markup import escaped
from selfray.summary.number_cells import Line, fixed, interval, number_cell

_PROBES = {
    "linear": "linear",
    "knn": "k-NN",
    "sgd": "linear, SGD",
    "sgd-crops": "linear, SGD on crops",
    "attentive": "attentive pooling",
    "fine-tune": "fine-tuned",
    "linear-four-blocks": "linear, four blocks",
    "vitdet": "ViTDet decoder",
    "upernet": "UPerNet decoder",
}


def probe_name(probe: str) -> str:
    """A protocol in words, not escaped."""
    last = re.fullmatch(r"fine-tune-last-(\d+)", probe)
    if is_fine_tuned(probe):
        return f"{_PROBES.get(plain_name(probe), plain_name(probe))}, encoder fine-tuned"
    return f"fine-tuned, last {last[1]} blocks" if last else _PROBES.get(probe, probe)


def judged_cell(line: Line | None, digits: int = 3) -> str:
    """A number with its interval; the best is bold, what is not told from it has a dagger.

    Args:
        line: Of `results.jsonl`, or None where there is none.
        digits: Decimal places shown; `data-value` has all of them.
    """
    if line is None or line["value"] is None:
        return number_cell(line)
    value = fixed(line["value"], digits)
    if line.get("best") is True:
        value = f"<b>{value}</b>"
    elif line.get("like_best") is True:
        value += "<sup>†</sup>"
    return f'<td data-value="{line["value"]!r}">{value}{interval(line, digits)}</td>'


def best_legend(lines: Iterable[Line | None], within: str) -> str:
    """What bold and dagger mean, HTML; empty where no line says which is best.

    Args:
        lines: Of a table.
        within: What the best is the best of.
    """
    if not any(line is not None and line.get("best") is True for line in lines):
        return ""
    return (
        f" <b>Bold</b>: best {escaped(within)}; <b>†</b>: may be the best too; at 95 % "
        "the paired differences of all encoders together do not rule it out."
    )
