"""What an evaluation found, in plain words taken from the intervals and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from selfray.summary.inputs import Evaluation, Run
from selfray.summary.markup import enumerated, listed


@dataclass(frozen=True)
class Measure:
    """A number that encoders are compared by.

    Attributes:
        of: What is predicted, for a sentence.
        metric_name: For a sentence.
        column: Head of a column, title of a chart.
        target: In `results.jsonl`.
        metric: In `results.jsonl`.
        ignorance: Value of an encoder that knows nothing; None where it depends on the data.
    """

    of: str
    metric_name: str
    column: str
    target: str
    metric: str
    ignorance: float | None

    @property
    def title(self) -> str:
        """Of a chart whose axis is `unit`."""
        return self.column.rpartition(", ")[0]

    @property
    def unit(self) -> str:
        """Name of the axis."""
        return self.column.rpartition(", ")[2]


MEASURES = (
    Measure("over the findings", "macro-AUROC", "Findings, macro-AUROC", "macro", "auroc", 0.5),
    Measure("of sex", "AUROC", "Sex, AUROC", "sex", "auroc", 0.5),
    Measure("of age", "R²", "Age, R²", "age_years", "r2", 0.0),
    Measure("of weight", "R²", "Weight, R²", "weight_kg", "r2", 0.0),
    Measure("of BMI", "R²", "BMI, R²", "bmi", "r2", 0.0),
)

_PRECISION = Measure(
    "over the findings", "macro-AUPRC", "Findings, macro-AUPRC", "macro", "auprc", None
)
_OVERLAP = Measure("over the labels", "mean Dice", "Anatomy, mean Dice", "macro", "dice", 0.0)


def measures(evaluation: Evaluation) -> list[Measure]:
    """What the encoders of an evaluation are compared by: findings, label maps, records.

    Records beyond sex, age, weight and BMI come last, in the order of the results; a category,
    such as the view, is the mean over its values.
    """
    known = {(line["target"], line["metric"]) for line in evaluation.whole}
    order = (MEASURES[0], _PRECISION, _OVERLAP, *MEASURES[1:])
    found = [m for m in order if (m.target, m.metric) in known]
    named = {m.target for m in order}
    for line in evaluation.whole:
        target, metric = line["target"], line["metric"]
        one_of_many = "=" in target or target in named
        if line.get("task") == "metadata" and metric in ("auroc", "r2") and not one_of_many:
            named.add(target)
            spoken, unit = listed([target]), "AUROC" if metric == "auroc" else "R²"
            column = f"{spoken[:1].upper()}{spoken[1:]}, {unit}"
            chance = 0.5 if metric == "auroc" else 0.0
            found.append(Measure(f"of {spoken}", unit, column, target, metric, chance))
    return found


def is_baseline(encoder: str) -> bool:
    """Whether this is there to be compared with: random weights or pixels."""
    return encoder.startswith(("random:", "pixels:"))


def subjects(encoders: Sequence[str]) -> list[str]:
    """Those that are judged: all but the baselines, or the first where all are baselines."""
    return [e for e in encoders if not is_baseline(e)] or list(encoders[:1])


def readable_names(encoders: Sequence[str]) -> dict[str, str]:
    """A short name for each encoder, distinct.

    Directories are known by the end of their path, as much of it as tells them apart; what is
    still alike, such as one directory written in two ways, gets a number.
    """
    names: dict[str, str] = {}
    for encoder in encoders:
        name = _spoken(encoder) or _path_end(encoder, [o for o in encoders if o != encoder])
        taken = sum(name == other.partition(" #")[0] for other in names.values())
        names[encoder] = f"{name} #{taken + 1}" if taken else name
    return names


def _path_end(encoder: str, others: Sequence[str]) -> str:
    parts = PurePosixPath(encoder).parts
    published = len(parts) == 2 and not encoder.startswith(("/", "."))
    length = 1
    while length < len(parts) and any(
        PurePosixPath(o).parts[-length:] == parts[-length:] for o in others
    ):
        length += 1
    return encoder if published or not parts else str(PurePosixPath(*parts[-length:]))


def _spoken(encoder: str) -> str:
    if encoder.startswith("random:"):
        return f"random weights ({encoder.removeprefix('random:')})"
    return {"pixels:pca": "PCA of the pixels", "pixels:16x16": "16 × 16 thumbnails"}.get(
        encoder, ""
    )


def evaluation_verdict(evaluation: Evaluation) -> tuple[str, list[tuple[str, str]]]:
    """The opening words, and for each encoder that is judged its name and what was found.

    The claim is about one measure, the first of `measures`; `comparisons` has all.

    Args:
        evaluation: With paired differences; where there are none, there is no comparison.
    """
    encoders, names = evaluation.encoders, readable_names(evaluation.encoders)
    for measure in measures(evaluation):
        lines = {e: evaluation.result(e, measure.target, measure.metric) for e in encoders}
        known = [line for line in lines.values() if line is not None and line["value"] is not None]
        if known:
            claims = [
                (names[subject], _claim(evaluation, subject, line, measure, names))
                for subject in subjects(encoders)
                if (line := lines[subject]) is not None and line["value"] is not None
            ]
            told = f"{measure.metric_name} {measure.of}"
            return opening(known, told, "images"), claims
    return "No result is recorded yet.", []


def opening(lines: list[dict[str, Any]], told: str, judged: str) -> str:
    """`On 590 held-out images of 333 patients, macro-AUROC over the findings:`.

    Args:
        lines: Of one number, by encoder; the one of most images or studies is spoken of.
        told: What the number is.
        judged: `images` or `studies`.
    """
    lines = [line for line in lines if line["n"] is not None]
    if not lines:
        return f"{told[0].upper()}{told[1:]}:"
    most = max(lines, key=lambda line: line["n"])
    patients = f" of {most['n_patients']:,} patients" if most["n_patients"] is not None else ""
    split = f"held-out {judged}" if most.get("split") == "test" else judged
    return f"On {most['n']:,} {split}{patients}, {told}:"


def _claim(
    evaluation: Evaluation,
    subject: str,
    line: dict[str, Any],
    measure: Measure,
    names: dict[str, str],
) -> str:
    outcomes: list[tuple[str, str]] = []
    # Baselines first: whether anything was learned comes before who learned more.
    for reference in sorted(names, key=lambda e: not is_baseline(e)):
        difference = evaluation.difference(subject, reference, measure.target, measure.metric)
        if difference is not None and reference != subject:
            outcomes.append((outcome(difference), names[reference]))
    return claim(line, outcomes)


def claim(line: dict[str, Any], outcomes: Sequence[tuple[str, str]]) -> str:
    """`0.663 [0.645, 0.682], better than random weights; worse than ...`.

    Args:
        line: The number, with its interval.
        outcomes: What `outcome` says of each difference, and what it is the difference from.
    """
    by_outcome = {how: [who for found, who in outcomes if found == how] for how in _WORDS}
    told = "; ".join(f"{_WORDS[how]} {enumerated(who)}" for how, who in by_outcome.items() if who)
    return cell_text(line) + (f", {told}" if told else "")


_WORDS = {
    "better": "better than",
    "worse": "worse than",
    "undecided": "no clear difference from",
}


def outcome(difference: dict[str, Any]) -> str:
    """What the 95 % interval of a paired difference says: better, worse or undecided."""
    if difference["ci_low"] > 0:
        return "better"
    return "worse" if difference["ci_high"] < 0 else "undecided"


def comparisons(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Each judged encoder with each baseline and with each encoder after it, where compared."""
    judged = subjects(evaluation.encoders)
    baselines = [e for e in evaluation.encoders if e not in judged]
    pairs = [
        (subject, reference)
        for k, subject in enumerate(judged)
        for reference in [*baselines, *judged[k + 1 :]]
    ]
    compared = {(line["encoder"], line["reference"]) for line in evaluation.differences}
    # With one encoder as the only reference, the pair is there the other way round.
    pairs = [(a, b) if (a, b) in compared else (b, a) for a, b in pairs]
    return [pair for pair in pairs if pair in compared]


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


def probability(value: float) -> str:
    """A p-value: p = 0.012, p < 0.001."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def cell_text(line: dict[str, Any]) -> str:
    """Value and interval of a line, for a chart."""
    text = f"{line['value']:.3f}"
    if line["ci_low"] is not None and line["ci_high"] is not None:
        text += f" [{line['ci_low']:.3f}, {line['ci_high']:.3f}]"
    return text.replace("-", "−")
