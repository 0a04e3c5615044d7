"""From predictions and labels to result lines: points, intervals, differences, p-values, ranks.

Nothing here runs an encoder or fits a probe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from selfray.evals.bootstrap import Estimate, Interval, mean_estimate
from selfray.evals.metrics import binary_resampled, real_resampled
from selfray.evals.paired_tests import (
    PatientSwaps,
    PermutationTest,
    delong_test,
    holm,
    mean_test,
    permutation_test,
)
from selfray.evals.subgroups import Subgroups, gap, subgroup_results
from selfray.evaluate.held_out import ALL_TRAINING, SITE, HeldOut, Judged
from selfray.evaluate.measure import (
    Measures,
    Ruler,
    Series,
    by_series,
    in_favour,
    interval_of,
    mark_best,
)
from selfray.progress import progress_bar

COMPARED = ("auroc", "auprc", "r2", "mae")
"""Metrics that get paired differences."""
_RANKED = ("auroc", "r2")
# Its resamples are all biased upward: of a calibrated probe, no interval of 1,000 held the truth.
_WITHOUT_INTERVAL = frozenset({"ece"})
_COMMON = ("encoder", "task", "target", "n", "n_patients", "split", "seed", "features", "probe")

Line = dict[str, Any]
_PValues = dict[tuple[Series, str], tuple[float, str]]  # p and the name of the test


def score(
    judged: Sequence[Judged], held_out: HeldOut, *, seed: int, baseline: str | None = None
) -> list[Line]:
    """Every number of an evaluation that comes from predictions.

    Args:
        judged: Encoders with their predictions for the same images.
        held_out: Those images.
        seed: Of the bootstrap and the permutations.
        baseline: Compare each encoder with this one only; None: with each other one.
    """
    ruler = Ruler(held_out, seed)
    measured = {
        one.encoder: ruler.measure(one)
        for one in progress_bar(iterable=judged, desc="resampling", unit="encoder")
    }
    writer = _LineWriter(held_out, seed)
    lines = [line for one in judged for line in writer.lines(one, measured[one.encoder])]
    lines += _rank(lines, measured)
    for one in judged:
        lines += writer.subgroups(one, ruler)
    pairs = [
        (one, other)
        for one, other in combinations(judged, 2)
        if baseline in (None, one.encoder, other.encoder)
    ]
    swaps = PatientSwaps(held_out.patients, seed=seed)
    for one, other in progress_bar(iterable=pairs, desc="comparing", unit="pair"):
        p_values = _p_values(one, other, held_out, swaps)
        for mine, its in ((one, other), (other, one)):
            if baseline in (None, its.encoder):
                found = list(writer.differences(mine, its, measured, p_values))
                _correct(found, held_out)
                lines += found
    return lines


def _p_values(one: Judged, other: Judged, held_out: HeldOut, swaps: PatientSwaps) -> _PValues:
    """Of every series that both have, with one seed, on the whole train split.

    AUROC of a single target by DeLong's test, all else by permutation, which takes its time and is
    left out for k-NN.
    """
    tests: dict[tuple[Series, str], list[PermutationTest]] = {}
    found: _PValues = {}
    theirs = by_series(other)
    for series, mine in by_series(one).items():
        its = theirs.get(series, [])
        if len(mine) != 1 or len(its) != 1 or series.trained_on != ALL_TRAINING:
            continue
        known, target = held_out.known(series.target), held_out.target(series.target)
        number = target.kind == "number"
        metrics = real_resampled if number else binary_resampled
        if series.probe != "knn":
            permuted = permutation_test(metrics, known, mine[0], its[0], swaps)
            for metric in permuted.keys() & set(COMPARED):
                found[series, metric] = (permuted[metric].p, "permutation")
                if target.family:
                    mean = (series._replace(target=target.family), metric)
                    tests.setdefault(mean, []).append(permuted[metric])
        if not number:
            p = delong_test(known, mine[0], its[0], held_out.patients).p
            if not math.isnan(p):  # as where one encoder makes no mistake at all
                found[series, "auroc"] = (p, "DeLong")
    return found | {key: (mean_test(of).p, "permutation") for key, of in tests.items()}


def _correct(lines: list[Line], held_out: HeldOut) -> None:
    """Add p-values after Holm, over the members of each family."""
    families: dict[tuple[str, str, str], list[Line]] = {}
    names = {target.name: target.family for target in held_out.targets}
    for line in lines:
        family = names.get(line["target"], "")
        if family and line.get("p_value") is not None:
            families.setdefault((family, line["metric"], line["probe"]), []).append(line)
    for members in families.values():
        add_holm(members)


def add_holm(lines: Sequence[Line]) -> None:
    """Add p-values after Holm's correction for the number of these lines."""
    for line, p in zip(lines, holm([line["p_value"] for line in lines]), strict=True):
        line["p_holm"] = float(p)


def _rank(lines: list[Line], measured: dict[str, Measures]) -> list[Line]:
    """Mark the best encoder of each series and metric, and those that may be it too; rank them.

    Returns:
        Lines with the ranks, of each target's main metric.
    """
    groups: dict[tuple[Series, str], list[Line]] = {}
    for line in lines:
        if line["value"] is not None and "trained_on" not in line:
            series = Series(line["target"], line["probe"], ALL_TRAINING)
            groups.setdefault((series, line["metric"]), []).append(line)
    ranks: list[Line] = []
    for (series, metric), members in groups.items():
        if metric in _WITHOUT_INTERVAL:
            continue
        found = [measured[line["encoder"]][series, metric] for line in members]
        for line, rank in zip(members, mark_best(members, found, metric), strict=False):
            if metric in _RANKED:
                shown = {name: line[name] for name in _COMMON}
                ranks.append(
                    shown
                    | {"metric": "rank", "of_metric": metric, "value": rank.rank}
                    | {"ci_low": rank.low, "ci_high": rank.high, "probability_best": rank.best}
                )
    return ranks


class _LineWriter:
    def __init__(self, held_out: HeldOut, seed: int) -> None:
        self._held_out, self._seed = held_out, seed
        self._number_names = {t.name for t in held_out.targets if t.kind == "number"}

    def lines(self, judged: Judged, measured: Measures) -> Iterator[Line]:
        """One line a metric of a series, and one a target that has none."""
        seeds = by_series(judged)
        for (series, metric), one in measured.items():
            line = self._line(judged, series, metric)
            line |= _values(one, metric)
            if len(seeds.get(series, ())) > 1:
                line["probe_seeds"] = len(seeds[series])
            if math.isnan(one.point):
                lacking = (
                    "a second value" if series.target in self._number_names else "both classes"
                )
                line["reason"] = f"the test split lacks {lacking}"
            yield line
        for fit, reason in judged.undefined.items():
            metric = self._main_metric(fit.target)
            yield self._line(judged, Series(*fit[:3]), metric) | {"reason": reason}

    def differences(
        self, one: Judged, other: Judged, measured: dict[str, Measures], p_values: _PValues
    ) -> Iterator[Line]:
        """One line a metric of a series that both have, `one` minus `other`, paired by patient.

        A positive difference is in favour of `one`, also where lower numbers are better.
        """
        ours, theirs = measured[one.encoder], measured[other.encoder]
        for (series, metric), mine in ours.items():
            its = theirs.get((series, metric))
            comparable = metric in COMPARED and series.trained_on == ALL_TRAINING
            if its is None or not comparable or math.isnan(mine.point) or math.isnan(its.point):
                continue
            line = self._line(one, series, f"{metric}_difference")
            line |= _values(in_favour(mine, its, metric), line["metric"])
            line["reference"] = other.encoder
            p, test = p_values.get((series, metric), (math.nan, ""))
            if not math.isnan(p):
                line |= {"p_value": p, "test": test}
            yield line

    def subgroups(self, judged: Judged, ruler: Ruler) -> Iterator[Line]:
        """One line a subgroup and one a gap, for the main metric of linear probes.

        Of probes that were fitted on one site, the sites they are used on are the subgroups.
        """
        found: dict[tuple[Series, str], Subgroups] = {}
        for series, predictions in by_series(judged).items():
            on_site = series.trained_on.startswith(SITE)
            if series.probe != "linear" or not (on_site or series.trained_on == ALL_TRAINING):
                continue
            target = self._held_out.target(series.target)
            itself = {target.name, target.family, "age" if target.name == "age_years" else ""}
            attributes = [a for a in self._held_out.groups if a not in itself]
            for attribute in ["site"] if on_site else attributes:
                found[series, attribute] = subgroup_results(
                    ruler.metrics(target.name)[0],
                    self._main_metric(target.name),
                    self._held_out.known(target.name),
                    predictions[0],
                    self._held_out.groups[attribute],
                    ruler.resamples,
                    ruler.left_out,
                )
        for (series, attribute), of in found.items():
            yield from self._group_lines(judged, series, attribute, of)
        yield from self._group_means(judged, found)

    def _group_lines(
        self, judged: Judged, series: Series, attribute: str, found: Subgroups
    ) -> Iterator[Line]:
        metric = self._main_metric(series.target)
        for group in found.groups:
            images = self._held_out.groups[attribute] == group.group
            line = self._line(judged, series, metric, images)
            line |= {"grouped_by": attribute, "subgroup": group.group}
            if group.estimate is None or math.isnan(group.value):
                yield line | {
                    "reason": f"too few patients: {self._patients(series.target, images)}"
                }
            else:
                yield line | _values(group.estimate, metric)
        if series.trained_on == ALL_TRAINING and not math.isnan(found.gap):
            line = self._line(judged, series, f"{metric}_gap") | {"grouped_by": attribute}
            yield line | _numbers(found.gap, found.gap_interval)

    def _group_means(
        self, judged: Judged, found: dict[tuple[Series, str], Subgroups]
    ) -> Iterator[Line]:
        """Means over those targets of a family that have enough patients in every group."""
        members: dict[tuple[Series, str], list[Subgroups]] = {}
        for (series, attribute), of in found.items():
            family = self._held_out.target(series.target).family
            if family and all(group.estimate for group in of.groups):
                key = (series._replace(target=family), attribute)
                members.setdefault(key, []).append(of)
        for (series, attribute), subgroups in members.items():
            of_group: dict[str, list[Estimate]] = {}
            for of in subgroups:
                for group in of.groups:
                    if group.estimate is not None:
                        of_group.setdefault(group.group, []).append(group.estimate)
            means = {name: mean_estimate(parts) for name, parts in of_group.items()}
            for name, mean in means.items():
                images = self._held_out.groups[attribute] == name
                line = self._line(judged, series, "auroc", images)
                line |= {"grouped_by": attribute, "subgroup": name, "targets": len(subgroups)}
                yield line | _values(mean, "auroc")
            apart, bounds = gap(list(means.values()))
            if series.trained_on == ALL_TRAINING and not math.isnan(apart):
                line = self._line(judged, series, "auroc_gap") | {"grouped_by": attribute}
                yield line | {"targets": len(subgroups)} | _numbers(apart, bounds)

    def _patients(self, target: str, images: np.ndarray) -> str:
        """How many patients some images are of, by class."""
        known = np.where(images, self._held_out.known(target), np.nan)
        patients = self._held_out.patients
        if target in self._number_names:
            return str(len(set(patients[~np.isnan(known)])))
        with_it, without = (len(set(patients[known == value])) for value in (1, 0))
        return f"{with_it} with, {without} without"

    def _main_metric(self, target: str) -> str:
        return "r2" if target in self._number_names else "auroc"

    def _line(
        self, judged: Judged, series: Series, metric: str, images: np.ndarray | None = None
    ) -> Line:
        """The fields that every line has."""
        members = self._held_out.family(series.target) or [series.target]
        labels = np.stack([self._held_out.known(name) for name in members], axis=1)
        if images is not None:
            labels = np.where(images[:, None], labels, np.nan)
        target = self._held_out.target(members[0])
        known = ~np.isnan(labels).all(axis=1)
        line: Line = {
            "encoder": judged.encoder,
            "task": target.task,
            "target": series.target,
            "metric": metric,
            "value": None,
            "ci_low": None,
            "ci_high": None,
            "n": int(known.sum()),
            "n_patients": len(set(self._held_out.patients[known])),
            "split": "test",
            "seed": self._seed,
            "features": judged.inputs[series.probe],
            "probe": series.probe,
        }
        if series.trained_on != ALL_TRAINING:
            line["trained_on"] = series.trained_on
        if members == [series.target] and target.kind == "binary" and known.any():
            line["n_positive"] = int(np.nansum(labels))
            line["prevalence"] = float(np.nanmean(labels))
        return line


def _values(estimate: Estimate, metric: str) -> Line:
    bounds = interval_of(estimate, metric)
    if metric in _WITHOUT_INTERVAL:
        bounds = Interval(math.nan, math.nan, 0)
    line = _numbers(estimate.point, bounds)
    return line | ({"resamples_left_out": bounds.left_out} if bounds.left_out else {})


def _numbers(value: float, bounds: Interval) -> Line:
    numbers = {"value": value, "ci_low": bounds.low, "ci_high": bounds.high}
    return {name: None if math.isnan(number) else number for name, number in numbers.items()}
