"""What an evaluation found, in plain words taken from the intervals and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from selfray.summary.inputs import Evaluation, Run


@dataclass(frozen=True)
class Measure:
    """A number that encoders are compared by.

    Attributes:
        what: What is predicted, for a sentence.
        metric_name: For a sentence.
        column: Head of a column, title of a chart.
        target: In `results.jsonl`.
        metric: In `results.jsonl`.
        ignorance: Value of an encoder that knows nothing.
    """

    what: str
    metric_name: str
    column: str
    target: str
    metric: str
    ignorance: float


MEASURES = (
    Measure("the findings", "macro-AUROC", "Findings, macro-AUROC", "macro", "auroc", 0.5),
    Measure("sex", "AUROC", "Sex, AUROC", "sex", "auroc", 0.5),
    Measure("age", "R²", "Age, R²", "age_years", "r2", 0.0),
    Measure("weight", "R²", "Weight, R²", "weight_kg", "r2", 0.0),
    Measure("BMI", "R²", "BMI, R²", "bmi", "r2", 0.0),
)


def is_baseline(encoder: str) -> bool:
    """Whether this is there to be compared with: random weights or pixels."""
    return encoder.startswith(("random:", "pixels:"))


def subjects(encoders: Sequence[str]) -> list[str]:
    """Those that are judged: all but the baselines, or the first where all are baselines."""
    return [e for e in encoders if not is_baseline(e)] or list(encoders[:1])


def readable_names(encoders: Sequence[str]) -> dict[str, str]:
    """A short name for each encoder, distinct.

    Directories are known by the end of their path, as much of it as tells them apart.
    """
    names = {}
    for encoder in encoders:
        spoken = _spoken(encoder)
        parts = PurePosixPath(encoder).parts
        length = 1
        others = [PurePosixPath(o).parts for o in encoders if o != encoder]
        while length < len(parts) and any(o[-length:] == parts[-length:] for o in others):
            length += 1
        published = len(parts) == 2 and not encoder.startswith(("/", "."))
        names[encoder] = spoken or (encoder if published else "/".join(parts[-length:])) or encoder
    return names


def _spoken(encoder: str) -> str:
    if encoder.startswith("random:"):
        return f"random weights ({encoder.removeprefix('random:')})"
    return {"pixels:pca": "PCA of the pixels", "pixels:16x16": "16 × 16 thumbnails"}.get(
        encoder, ""
    )


def evaluation_verdict(evaluation: Evaluation) -> tuple[str, list[tuple[str, str]]]:
    """The opening words, and for each comparison who with whom, and what came of it.

    Args:
        evaluation: With paired differences; where there are none, there is no comparison.
    """
    names = readable_names(evaluation.encoders)
    sentences = []
    for subject in subjects(evaluation.encoders):
        # Baselines first: whether anything was learned comes before who learned more.
        references = sorted(evaluation.encoders, key=lambda e: not is_baseline(e))
        for reference in references:
            sentence = _comparison(evaluation, subject, reference)
            if reference != subject and sentence:
                sentences.append((f"{names[subject]} against {names[reference]}", sentence))
    return _opening(evaluation), sentences


def _opening(evaluation: Evaluation) -> str:
    lines = [line for line in evaluation.results if line["n"] is not None]
    lines = [line for line in lines if line["target"] == "macro"] or lines
    if not lines:
        return "No result is recorded yet."
    most = max(lines, key=lambda line: line["n"])
    patients = f" of {most['n_patients']:,} patients" if most["n_patients"] is not None else ""
    split = "held-out images" if most.get("split") == "test" else "images"
    return f"On {most['n']:,} {split}{patients}:"


def _comparison(evaluation: Evaluation, subject: str, reference: str) -> str:
    """What the intervals of the paired differences say; empty where there are none."""
    outcomes: dict[str, list[str]] = {"better on": [], "worse on": [], "no clear difference on": []}
    for measure in MEASURES:
        line = evaluation.difference(subject, reference, measure.target, measure.metric)
        if line is None:
            continue
        outcome = "better on" if line["ci_low"] > 0 else "no clear difference on"
        outcome = "worse on" if line["ci_high"] < 0 else outcome
        outcomes[outcome].append(
            f"{measure.what} ({measure.metric_name}\u00a0{signed(line['value'])}, "
            f"95\u00a0% interval {signed(line['ci_low'])} to {signed(line['ci_high'])})"
        )
    return "; ".join(f"{how} {_listed(what)}" for how, what in outcomes.items() if what)


def run_verdict(run: Run) -> str:
    """What a run's own probe says so far."""
    total = run.config.get("steps")
    of = f" of {total:,}" if isinstance(total, int) else ""
    state = (
        f"Finished after {run.step:,} steps."
        if run.done
        else f"In progress: step {run.step:,}{of}."
    )
    best, start = run.best, run.start
    if best is None:
        return f"{state} No probe of the features is recorded, so nothing is known of their worth."
    words = f"macro-AUROC over the findings on the validation split: {best['macro_auroc']:.3f}"
    if start is None:
        return f"{state} Best probe: {words}, at step {best['step']:,}."
    if best["step"] == start["step"]:
        later = [p for p in run.probes if p["step"] > start["step"]]
        never = " No later probe was better." if later else " No later probe is recorded."
        return f"{state} Probe before the first step: {words}.{never}"
    gain = signed(best["macro_auroc"] - start["macro_auroc"])
    return f"{state} Best probe: {words}, at step {best['step']:,} ({gain} against the start)."


def signed(value: float) -> str:
    """With a true minus sign: +0.061, −0.004."""
    return f"{value:+.3f}".replace("-", "−")


def cell_text(line: dict[str, Any]) -> str:
    """Value and interval of a line, for a chart."""
    text = f"{line['value']:.3f}"
    if line["ci_low"] is not None and line["ci_high"] is not None:
        text += f" [{line['ci_low']:.3f}, {line['ci_high']:.3f}]"
    return text.replace("-", "−")


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
