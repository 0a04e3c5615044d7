"""Probes of one site on the patients of another: how far a finding's features carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfray.errors import InputError
from selfray.evals.linear_probe import ProbeData, fit_probes

MIN_PATIENTS = 20
"""Patients with and without a finding that a site's test split must have. With 20 of each, the
standard error of an AUROC of 0.8 is 0.07 (Hanley and McNeil, Radiology 1982, eq. 2); with fewer,
its interval is wider than any difference between sites that could be told."""


@dataclass(frozen=True)
class SiteTransfer:
    """A probe of one site, on the test patients of a site.

    Attributes:
        train_site: Whose train and validate splits the probe is of.
        test_site: Whose test split it is used on.
        finding: What it predicts.
        rows: int64 [n], the images with a label, ascending; the same for every `train_site`.
        predictions: float64 [n], probabilities; None where there is a `reason`.
        reason: Why there are no predictions.
    """

    train_site: str
    test_site: str
    finding: str
    rows: np.ndarray
    predictions: np.ndarray | None
    reason: str | None = None


def transfer_matrix(
    features: np.ndarray,
    labels: np.ndarray,
    findings: Sequence[str],
    *,
    sites: np.ndarray,
    splits: np.ndarray,
    patients: np.ndarray,
) -> list[SiteTransfer]:
    """Fit probes on each site and use them on each.

    A probe is fitted on the train split of its site, with the penalty chosen on that site's
    validate split. Images without a site count for none.

    Args:
        features: [N, D], not standardised.
        labels: [N, K]: 1, 0, or NaN where it is not known.
        findings: K names.
        sites: [N] names, None where not known.
        splits: [N], `train`, `validate` or `test`.
        patients: [N].

    Returns:
        One entry for each site to train on, site to test on and finding, in this order, sites by
        name; the diagonal is a site on itself.

    Raises:
        InputError: There are fewer than two sites.
    """
    names = sorted({site for site in sites if site is not None})
    if len(names) < 2:
        raise InputError(
            f"the data has {len(names)} site{'s' * (len(names) != 1)}; a probe that moves between "
            "sites needs two. Give the table of `selfray ingest` a column site."
        )
    rows = {
        (site, split): np.flatnonzero((sites == site) & (splits == split))
        for site in names
        for split in ("train", "validate", "test")
    }
    tested = np.concatenate([rows[site, "test"] for site in names])
    transfers = []
    for train_site in names:
        fit, choose = rows[train_site, "train"], rows[train_site, "validate"]
        predicted, reasons = _predicted(features, labels, tuple(findings), fit, choose, tested)
        for test_site in names:
            for k, finding in enumerate(findings):
                test = rows[test_site, "test"]
                test = test[~np.isnan(labels[test, k])]
                reason = _too_few(labels[test, k], patients[test]) or reasons.get(finding)
                values = None if reason else predicted[finding][test]
                transfers.append(SiteTransfer(train_site, test_site, finding, test, values, reason))
    return transfers


def _predicted(
    features: np.ndarray,
    labels: np.ndarray,
    findings: tuple[str, ...],
    fit: np.ndarray,
    choose: np.ndarray,
    tested: np.ndarray,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Probabilities by finding, float64 [N], NaN outside of `tested`; and why one has none."""
    for split, rows in (("train", fit), ("validate", choose)):
        if not len(rows):
            return {}, dict.fromkeys(findings, f"the site it is trained on has no {split} images")
    train = ProbeData(features[fit], labels[fit], findings)
    probes = fit_probes(train, ProbeData(features[choose], labels[choose], findings))
    predicted = {}
    for finding, values in probes.predict(features[tested]).items():
        predicted[finding] = np.full(len(features), np.nan)
        predicted[finding][tested] = values
    reasons = {
        finding: f"of the site it is trained on, {reason}"
        for finding, reason in probes.undefined.items()
    }
    return predicted, reasons


def _too_few(labels: np.ndarray, patients: np.ndarray) -> str | None:
    """Why the test patients of a site cannot judge a finding, or None."""
    with_it, without = (len(set(patients[labels == value])) for value in (1, 0))
    if min(with_it, without) >= MIN_PATIENTS:
        return None
    return (
        f"too few test patients: {with_it} with the finding and {without} without, at least "
        f"{MIN_PATIENTS} of each are needed"
    )
