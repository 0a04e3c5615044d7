"""How the numbers of an evaluation were made, and where they lie as files."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from selfray.summary.differences_section import names_of_tests
from selfray.summary.inputs import Evaluation, number

_FILES = {
    "results.csv": "every number",
    "results.tex": "the main table for LaTeX",
    "results.jsonl": "every number with all that is known of it",
    "predictions.parquet": "the prediction for every test image, to be kept like the images",
}

_BCA_SINCE = 2
"""Version of evaluations whose intervals are bias-corrected and accelerated."""


def method_section(evaluation: Evaluation, directory: Path) -> str:
    """Statistics in a few sentences, and links to the files that are there.

    Args:
        evaluation: Read by `read_evaluation`.
        directory: Where the page will lie; links are relative to it. Holds the
            evaluation.
    """
    return _files(evaluation, directory) + (
        f"<p>{_statistics(evaluation)}</p>" if evaluation.results else ""
    )


def _files(evaluation: Evaluation, directory: Path) -> str:
    items = []
    for name, what in _FILES.items():
        file = evaluation.path / name
        if file.is_file():
            link = quote(file.relative_to(directory).as_posix())
            items.append(f'<li><a href="./{link}">{name}</a>: {what}</li>')
    beside = "<p>Beside this page, as long as it stays where it was written:</p>"
    return f"{beside}<ul>{''.join(items)}</ul>" if items else ""


def _statistics(evaluation: Evaluation) -> str:
    resamples = number(evaluation.info.get("resamples"))
    many = f"{resamples:,.0f} " if resamples else ""
    version = number(evaluation.info.get("version"))
    kind = "BCa" if version and version >= _BCA_SINCE else "percentile"
    told = (
        "Every number is of the test split, which no probe was fitted on and nothing was chosen "
        f"on. Intervals are of 95 %, by the bootstrap ({kind}): {many}resamples of the patients, "
        "drawn with replacement, each with all of its images; every encoder meets the same "
        "resamples, so that differences are paired."
    )
    if any(line["metric"] == "rank" for line in evaluation.results):
        told += (
            " Ranks are counted anew in each resample, and the probability of being best is the "
            "share of resamples in which an encoder comes first."
        )
    tests = names_of_tests(evaluation.differences)
    if tests:
        told += f" p-values are two-sided ({tests}), corrected over the findings by Holm's method."
    return told + " selfray's docs/statistics.md has the formulas and their sources."
