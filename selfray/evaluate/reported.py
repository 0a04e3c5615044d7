"""From reports, written beside their references, to result lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa

from selfray.data.phantom.findings import FINDINGS
from selfray.data.phantom.read_report import findings_of
from selfray.evals.bootstrap import Estimate, PatientResamples, PatientsLeftOut, seed_mean
from selfray.evals.clinical_metrics import (
    CHEXBERT_FINDINGS,
    CHEXBERT_FIVE,
    CLINICAL_VARIANTS,
    MACRO,
    MICRO,
    chexbert_labels,
    clinical_estimates,
    clinical_tests,
    radgraph_f1,
    require_chexbert,
    require_radgraph,
    score_estimate,
    score_test,
)
from selfray.evals.paired_tests import PatientSwaps, PermutationTest
from selfray.evals.text_metrics import (
    VARIANTS,
    TextStatistics,
    text_estimates,
    text_statistics,
    text_tests,
)
from selfray.evaluate.measure import in_favour, interval_of, mark_best
from selfray.evaluate.report_writing import (
    LANGUAGE_MODEL,
    MOST_FREQUENT,
    NEAREST,
    OTHER_NEIGHBOUR,
    WRITERS,
)
from selfray.evaluate.score import Line, add_holm

TASK = "reports"
RADGRAPH = "radgraph_rg_er"
PHANTOM_GRAMMAR, CHEXBERT = "phantom grammar", "CheXbert"
_F1 = "clinical_f1"
_WITHOUT_READER = (
    "findings are not read: give --chexbert a folder with chexbert.pth (StanfordAIMI/RRG_scorers) "
    "and bert-base-uncased's config.json and vocab.txt"
)
_NO_INTERVAL = (
    "no interval: every resample gives the same, or one patient at most is the evidence, which is "
    "no certainty"
)
_UNDEFINED = {"rouge_l": "no reference has words of the letters a to z, which alone it sees"}
_WITHOUT_RADGRAPH = (
    "not computed: give --radgraph a folder with the unpacked radgraph.tar.gz "
    "(StanfordAIMI/RRG_scorers) and its BERT"
)
_WRITERS_COMPARED = (
    *((LANGUAGE_MODEL, writer) for writer in WRITERS if writer != LANGUAGE_MODEL),
    (NEAREST, OTHER_NEIGHBOUR),  # whether features retrieve better than chance
)
_SUBSETS = {CHEXBERT: {"5": CHEXBERT_FIVE}}
"""By reader, further groups of findings that means are taken over."""

REPORT_VARIANTS = (
    VARIANTS
    | dict.fromkeys(("clinical_precision", "clinical_recall", _F1), CLINICAL_VARIANTS["labels"])
    | {RADGRAPH: CLINICAL_VARIANTS["radgraph"]}
)
"""By metric of reports, all that tells its variant from others."""

_Key = tuple[str, str]  # target, metric
_Writing = tuple[str, int]  # writer, seed


def require_readers(*, chexbert: Path | None, radgraph: Path | None) -> None:
    """Check what `read_findings` will need, before reports are written.

    Args:
        chexbert: Folder for `chexbert_labels`.
        radgraph: Folder for `radgraph_f1`.

    Raises:
        InputError: A package is missing, or a file is missing or damaged.
    """
    if chexbert is not None:
        require_chexbert(chexbert)
    if radgraph is not None:
        require_radgraph(radgraph)


def read_findings(
    table: pa.Table, *, synthetic: bool, chexbert: Path | None, radgraph: Path | None
) -> pa.Table:
    """Add what can be read in the reports: findings, and how their RadGraphs agree.

    Args:
        table: Of `judge_reports`.
        synthetic: Whether they are of phantoms, whose own grammar is read exactly.
        chexbert: Folder for `chexbert_labels`, in place of the phantom's grammar.
        radgraph: Folder for `radgraph_f1`.

    Returns:
        With columns `reader` (null without one), `reference_findings`, `generated_findings` (lists
        of names) and `radgraph_rg_er` (null where it was not computed).
    """
    reader = CHEXBERT if chexbert else PHANTOM_GRAMMAR if synthetic else None
    columns = {name: table[name].to_pylist() for name in ("reference", "generated")}
    n = len(table)
    for name, texts in columns.items():
        stated = _stated(texts, reader, chexbert)
        table = table.append_column(f"{name}_findings", pa.array(stated, pa.list_(pa.string())))
    table = table.append_column("reader", pa.array([reader] * n, pa.string()))
    scores = (
        None
        if radgraph is None
        else radgraph_f1(columns["reference"], columns["generated"], radgraph)
    )
    return table.append_column(
        RADGRAPH, pa.nulls(n, pa.float64()) if scores is None else pa.array(scores, pa.float64())
    )


def _stated(texts: list[str], reader: str | None, chexbert: Path | None) -> list[list[str] | None]:
    if chexbert is not None:
        labels = chexbert_labels(texts, chexbert)
        return [[CHEXBERT_FINDINGS[k] for k in np.flatnonzero(of)] for of in labels]
    if reader == PHANTOM_GRAMMAR:
        read = {text: [f for f, there in findings_of(text).items() if there] for text in set(texts)}
        return [read[text] for text in texts]
    return [None] * len(texts)


def score_reports(
    tables: Mapping[str, pa.Table], *, seed: int, baseline: str | None = None
) -> list[Line]:
    """Metrics with intervals by patient, and paired differences of encoders and of writers.

    Args:
        tables: By encoder, of `read_findings`; of the same studies.
        seed: Of the bootstrap and the permutations.
        baseline: As for `score`.
    """
    if not tables:
        return []
    scorer = _Scorer(next(iter(tables.values())), seed)
    written = {encoder: _Written(table, scorer) for encoder, table in tables.items()}
    lines, measured = [], {}
    for encoder, of in written.items():
        for writer in of.writers:
            measured[encoder, writer] = of.measure(writer)
            lines += scorer.lines(encoder, writer, measured[encoder, writer], of)
    _rank(lines, measured)
    for (one, of), (other, to) in combinations(written.items(), 2):
        for writer in (LANGUAGE_MODEL, NEAREST):
            tests = of.tests(writer, to, writer)
            for a, b, sign in ((one, other, 1), (other, one, -1)):
                if baseline in (None, b):
                    pair = measured[a, writer], measured[b, writer]
                    found = scorer.differences(a, writer, *pair, tests, sign, written[a])
                    lines += [line | {"reference": b} for line in found]
    for encoder, of in written.items():
        for writer, other in _WRITERS_COMPARED:
            if other in of.writers:  # not all are in evaluations of older versions
                pair = measured[encoder, writer], measured[encoder, other]
                tests = of.tests(writer, of, other)
                found = scorer.differences(encoder, writer, *pair, tests, 1, of)
                named = {"reference": encoder, "reference_probe": other}
                lines += [line | named for line in found]
    return lines


def _rank(lines: list[Line], measured: Mapping[tuple[str, str], Mapping[_Key, Estimate]]) -> None:
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        if line["value"] is not None and line["probe"] != MOST_FREQUENT:  # of all encoders alike
            groups.setdefault((line["probe"], line["target"], line["metric"]), []).append(line)
    for (writer, target, metric), members in groups.items():
        found = [measured[line["encoder"], writer][target, metric] for line in members]
        mark_best(members, found, metric)


class _Scorer:
    """What all encoders' reports of the same studies share."""

    def __init__(self, table: pa.Table, seed: int) -> None:
        owners = dict(
            zip(table["image_id"].to_pylist(), table["patient_id"].to_pylist(), strict=True)
        )
        self.place = {image: k for k, image in enumerate(owners)}
        self.patients = np.array(list(owners.values()), dtype=str)
        self.section = table["section"][0].as_py()
        self.seed = seed
        self.resamples = PatientResamples(self.patients, seed=seed)
        self.left_out = PatientsLeftOut(self.patients)
        self.swaps = PatientSwaps(self.patients, seed=seed)

    def lines(
        self, encoder: str, writer: str, measured: Mapping[_Key, Estimate], of: _Written
    ) -> Iterator[Line]:
        """One a metric; those that could not be computed say why."""
        for (target, metric), estimate in measured.items():
            line = self._line(encoder, writer, target, metric, estimate)
            if line["value"] is None:
                line["reason"] = _UNDEFINED.get(metric, "no reference states it")
            elif line["ci_low"] is None:
                line["reason"] = _NO_INTERVAL
            yield line | ({"probe_seeds": n} if (n := of.seeds(writer)) > 1 else {})
        nothing = Estimate(math.nan, np.full(1, np.nan), np.full(1, np.nan), 0)
        if of.reader is None:
            line = self._line(encoder, writer, MACRO, _F1, nothing)
            yield line | {"reason": _WITHOUT_READER}
        if of.radgraph is None:
            line = self._line(encoder, writer, self.section, RADGRAPH, nothing)
            yield line | {"reason": _WITHOUT_RADGRAPH}

    def _line(
        self, encoder: str, writer: str, target: str, metric: str, estimate: Estimate
    ) -> Line:
        bounds = interval_of(estimate, metric)
        return {
            "encoder": encoder,
            "task": TASK,
            "target": target,
            "metric": metric,
            "value": _or_none(estimate.point),
            "ci_low": _or_none(bounds.low),
            "ci_high": _or_none(bounds.high),
            "n": len(self.patients),
            "n_patients": self.resamples.n_patients,
            "split": "test",
            "seed": self.seed,
            "features": "patch_tokens",
            "probe": writer,
        }

    def differences(
        self,
        encoder: str,
        writer: str,
        mine: Mapping[_Key, Estimate],
        its: Mapping[_Key, Estimate],
        tests: Mapping[_Key, PermutationTest],
        sign: int,
        of: _Written,
    ) -> list[Line]:
        """Paired by patient, in favour of the first; p-values where each has one seed."""
        found = []
        for (target, metric), estimate in mine.items():
            other = its.get((target, metric))
            if other is None or math.isnan(estimate.point - other.point):
                continue
            difference = in_favour(estimate, other, metric)
            line = self._line(encoder, writer, target, f"{metric}_difference", difference)
            test = tests.get((target, metric))
            if test is not None:
                line |= {"p_value": test.p, "test": "permutation"}
            found.append(line)
        means = {MICRO, MACRO, *(f"{m}-{n}" for m in (MICRO, MACRO) for n in ("5",))}
        add_holm(
            [
                line
                for line in found
                if line["metric"] == f"{_F1}_difference"
                and line["target"] not in means
                and "p_value" in line
            ]
        )
        return found


class _Written:
    """The reports of one encoder, in the order of the studies."""

    def __init__(self, table: pa.Table, scorer: _Scorer) -> None:
        self._scorer = scorer
        self.reader: str | None = table["reader"][0].as_py()
        self.radgraph = None if table[RADGRAPH].null_count else RADGRAPH
        self._rows: dict[_Writing, list[dict]] = {}
        for row in table.to_pylist():
            rows = self._rows.setdefault((row["writer"], row["seed"]), [{}] * len(scorer.place))
            rows[scorer.place[row["image_id"]]] = row
        self._texts: dict[_Writing, TextStatistics] = {}

    @property
    def writers(self) -> list[str]:
        return list(dict.fromkeys(writer for writer, _ in self._rows))

    @property
    def findings(self) -> tuple[str, ...]:
        """What the reader knows."""
        return {CHEXBERT: CHEXBERT_FINDINGS, PHANTOM_GRAMMAR: FINDINGS}[self.reader or CHEXBERT]

    def seeds(self, writer: str) -> int:
        """How many report models wrote."""
        return sum(of == writer for of, _ in self._rows)

    def measure(self, writer: str) -> dict[_Key, Estimate]:
        """Means over seeds."""
        by_seed = [self._measure_one(key) for key in self._rows if key[0] == writer]
        return {key: seed_mean([of[key] for of in by_seed]) for key in by_seed[0]}

    def _measure_one(self, key: _Writing) -> dict[_Key, Estimate]:
        scorer = self._scorer
        both = scorer.resamples, scorer.left_out
        found: dict[_Key, Estimate] = {
            (scorer.section, metric): estimate
            for metric, estimate in text_estimates(self._statistics(key), *both).items()
        }
        if self.radgraph:
            found[scorer.section, RADGRAPH] = score_estimate(self._scores(key), *both)
        for suffix, names in self._groups().items():
            truth, said = (
                self._labels(key, "reference", names),
                self._labels(key, "generated", names),
            )
            for (name, metric), estimate in clinical_estimates(names, truth, said, *both).items():
                if name in (MICRO, MACRO) or not suffix:
                    found[f"{name}{suffix}", f"clinical_{metric}"] = estimate
        return found

    def tests(self, writer: str, to: _Written, its_writer: str) -> dict[_Key, PermutationTest]:
        """Of this one's writer against another's; none where either has several seeds."""
        if self.seeds(writer) > 1 or to.seeds(its_writer) > 1:
            return {}
        (mine,) = (key for key in self._rows if key[0] == writer)
        (its,) = (key for key in to._rows if key[0] == its_writer)
        swaps, section = self._scorer.swaps, self._scorer.section
        texts = text_tests(self._statistics(mine), to._statistics(its), swaps)
        found: dict[_Key, PermutationTest] = {(section, m): test for m, test in texts.items()}
        if self.radgraph and to.radgraph:
            scores = self._scores(mine), to._scores(its)
            found[section, RADGRAPH] = score_test(*scores, swaps)
        for suffix, names in self._groups().items() if self.reader == to.reader else ():
            truth = self._labels(mine, "reference", names)
            said = self._labels(mine, "generated", names), to._labels(its, "generated", names)
            for (name, metric), test in clinical_tests(names, truth, *said, swaps).items():
                if name in (MICRO, MACRO) or not suffix:
                    found[f"{name}{suffix}", f"clinical_{metric}"] = test
        return found

    def _groups(self) -> dict[str, Sequence[str]]:
        """Findings whose mean is taken, by what is added to the mean's name."""
        if self.reader is None:
            return {}
        further = _SUBSETS.get(self.reader, {})
        return dict([("", self.findings), *((f"-{name}", of) for name, of in further.items())])

    def _statistics(self, key: _Writing) -> TextStatistics:
        if key not in self._texts:
            rows = self._rows[key]
            self._texts[key] = text_statistics(
                [row["reference"] for row in rows], [row["generated"] for row in rows]
            )
        return self._texts[key]

    def _scores(self, key: _Writing) -> np.ndarray:
        return np.array([row[RADGRAPH] for row in self._rows[key]], np.float64)

    def _labels(self, key: _Writing, which: str, names: Sequence[str]) -> np.ndarray:
        stated = [set(row[f"{which}_findings"]) for row in self._rows[key]]
        return np.array([[float(name in of) for name in names] for of in stated])


def _or_none(number: float) -> float | None:
    return None if math.isnan(number) else float(number)
