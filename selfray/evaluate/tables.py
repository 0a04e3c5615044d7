"""The main numbers of an evaluation as tables: for a terminal, a spreadsheet and a paper."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfray.data.dataset import write_atomically
from selfray.errors import InputError

Line = dict[str, Any]

_FIRST = (
    ("macro-AUROC", "macro", "auroc"),
    ("macro-AUPRC", "macro", "auprc"),
    ("mean Dice", "macro", "dice"),
    ("clinical F1", "macro", "clinical_f1"),
    *(("ROUGE-L", part, "rouge_l") for part in ("findings", "impression", "report")),
    *(("BLEU-4", part, "bleu_4") for part in ("findings", "impression", "report")),
    ("sex AUROC", "sex", "auroc"),
    ("age R²", "age_years", "r2"),
    ("weight R²", "weight_kg", "r2"),
    ("BMI R²", "bmi", "r2"),
)
_CSV = (
    "encoder", "task", "target", "metric", "probe", "trained_on", "grouped_by", "subgroup",
    "reference", "reference_probe", "of_metric", "value", "unit", "ci_low", "ci_high", "p_value",
    "p_holm", "test", "best", "like_best", "probability_best", "probe_seeds", "n", "n_patients",
    "n_positive", "prevalence", "split", "seed", "features", "reason",
)  # fmt: skip
_OF_A_PART = {"subgroup", "trained_on", "reference_probe"}
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"²": "$^2$", "×": r"$\times$"}
)


@dataclass(frozen=True)
class _Column:
    title: str
    target: str
    metric: str


class _Results:
    """Lines of `results.jsonl`, found by what they are of."""

    def __init__(self, lines: Sequence[Line]) -> None:
        whole = [line for line in lines if not (_OF_A_PART & line.keys())]
        self._by_key = {
            (x["encoder"], x.get("reference"), x["target"], x["metric"], x["probe"]): x
            for x in whole
        }
        self.columns = self._columns(whole)
        shown = {(column.target, column.metric) for column in self.columns}
        main = [x for x in whole if (x["target"], x["metric"]) in shown]
        self.rows = list(dict.fromkeys((x["encoder"], x["probe"]) for x in main))
        self.encoders = list(dict.fromkeys(encoder for encoder, _ in self.rows))

    def line(self, column: _Column, encoder: str, probe: str, reference: str | None) -> Line | None:
        metric = column.metric + ("_difference" if reference else "")
        return self._by_key.get((encoder, reference, column.target, metric, probe))

    def references(self, encoder: str) -> list[str]:
        """Encoders that this one was compared with."""
        found = (key[1] for key in self._by_key if key[0] == encoder)
        return list(dict.fromkeys(reference for reference in found if reference is not None))

    def _columns(self, lines: Sequence[Line]) -> list[_Column]:
        there = dict.fromkeys((x["target"], x["metric"]) for x in lines)
        columns = [_Column(*c) for c in _FIRST if c[1:] in there]
        named = {column.target for column in columns}
        for target, metric in there:
            own = metric in ("auroc", "r2") and "=" not in target
            records = {x["target"] for x in lines if x["task"] == "metadata"}
            if own and target in records - named:
                title = f"{target} {'AUROC' if metric == 'auroc' else 'R²'}"
                columns.append(_Column(title, target, metric))
        return columns


def results_table(out: Path) -> str:
    """The main numbers as text.

    Args:
        out: Evaluation directory.

    Returns:
        One line an encoder and probe, linear where none is named, 95 % intervals in brackets; then
        one line for each encoder that the first was compared with, the first minus the other,
        paired by patient.

    Raises:
        InputError: Not an evaluation directory.
    """
    results = _Results(read_lines(out))
    table = [["encoder", *(column.title for column in results.columns)]]
    for encoder, probe in results.rows:
        cells = [_cell(results.line(c, encoder, probe, None)) for c in results.columns]
        table.append([_row_name(encoder, probe), *cells])
    for reference in results.references(results.encoders[0]) if results.encoders else ():
        lines = [results.line(c, results.encoders[0], "linear", reference) for c in results.columns]
        if any(lines):
            name = f"{results.encoders[0]} minus {reference}"
            table.append([name, *(_cell(line, "+") for line in lines)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def write_tables(out: Path, lines: Sequence[Line]) -> None:
    """Write `results.csv`, with every line, and `results.tex`, with the main numbers.

    In the LaTeX table (package booktabs) the best of a column and protocol is bold, and what is
    not ruled out as the best at 95 % (`rank_encoders`) has a dagger.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    writer.writerows([line.get(name) for name in _CSV] for line in lines)
    write_atomically(out / "results.csv", text.getvalue().encode())
    write_atomically(out / "results.tex", _latex(_Results(lines)).encode())


def read_lines(out: Path) -> list[Line]:
    """Lines of `results.jsonl`.

    Raises:
        InputError: Not an evaluation directory.
    """
    try:
        return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as cause:
        raise InputError(
            f"{out} holds no results.jsonl. Make one with `selfray evaluate`."
        ) from cause


def _latex(results: _Results) -> str:
    columns = results.columns
    rows = [r"% needs \usepackage{booktabs}", rf"\begin{{tabular}}{{l{'c' * len(columns)}}}"]
    heads = ["Encoder", *(column.title.translate(_LATEX) for column in columns)]
    rows += [r"\toprule", " & ".join(heads) + r" \\", r"\midrule"]
    for encoder, probe in results.rows:
        cells = [_latex_cell(results.line(c, encoder, probe, None)) for c in columns]
        rows.append(" & ".join([_row_name(encoder, probe).translate(_LATEX), *cells]) + r" \\")
    rows += [r"\bottomrule", r"\end{tabular}"]
    rows.append(r"% bold: best; \dag: not ruled out as the best (95 \%)")
    return "\n".join(rows) + "\n"


def _latex_cell(line: Line | None) -> str:
    if line is None:
        return "--"
    text = _cell(line)
    value, _, spread = text.partition(" ")
    if line.get("best"):
        value = rf"\textbf{{{value}}}"
    elif line.get("like_best"):
        value += r"$^\dag$"
    return f"{value} {spread}".strip().replace("-", "$-$") if line["value"] is not None else "--"


def _row_name(encoder: str, probe: str) -> str:
    return encoder if probe == "linear" else f"{encoder}, {probe}"


def _cell(line: Line | None, sign: str = "") -> str:
    if line is None:
        return "-"
    if line["value"] is None:
        return "not defined"
    numbers = [line["value"], line["ci_low"], line["ci_high"]]
    value, *ends = [format(number, f"{sign}.3f") for number in numbers if number is not None]
    return f"{value} [{', '.join(ends)}]" if ends else value
