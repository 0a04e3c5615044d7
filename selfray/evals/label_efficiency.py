"""How many labelled patients a probe needs: linear probes on parts of the training split.

Parts are drawn by patient, with all images of each, and are nested: with the same seed, the
patients of a small part are also in every larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from selfray.errors import InputError
from selfray.evals.linear_probe import STRENGTHS, Features, ProbeData, fit_probes
from selfray.progress import progress_bar


class Drawn(NamedTuple):
    """One probe on a part of the training split.

    Attributes:
        target: Its name.
        fraction: Of the training patients, or None.
        per_class: Patients with and without the finding, each, or None.
        seed: Of the draw.
    """

    target: str
    fraction: float | None
    per_class: int | None
    seed: int

    @property
    def trained_on(self) -> str:
        """The part in words: `5 % of patients`, `8 a class`."""
        if self.fraction is not None:
            return f"{100 * self.fraction:g} % of patients"
        return f"{self.per_class} a class"


@dataclass(frozen=True)
class LabelEfficiency:
    """What probes on parts of the training split predict.

    Attributes:
        predictions: Float64 [M] of the test images; see `FittedProbes.predict`.
        undefined: Why there is no prediction, for all others.
    """

    predictions: dict[Drawn, np.ndarray] = field(default_factory=dict)
    undefined: dict[Drawn, str] = field(default_factory=dict)


def draw_patients(
    patients: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int,
    fraction: float | None = None,
    per_class: int | None = None,
    finding: str = "the finding",
) -> np.ndarray:
    """Draw patients, and take all images of them.

    The draw depends on the seed and on which patients there are, not on the order of the images.
    Exactly one of `fraction` and `per_class` is given.

    Args:
        patients: [N] identifiers, of each image's patient.
        labels: [N] of one finding: 1, 0, or NaN where it is not known. Only `per_class` uses them:
            a patient is positive with an image labelled 1, negative with one labelled 0 and none
            labelled 1.
        seed: >= 0. Larger parts with the same seed hold the smaller ones.
        fraction: Of the patients, above 0 to 1; at least one is drawn.
        per_class: So many positive and as many negative patients, >= 1.
        finding: The finding's name, for the error.

    Returns:
        int64 [n], ascending rows.

    Raises:
        InputError: A fraction or number out of range, both or none, or too few patients of a class.
    """
    if (fraction is None) == (per_class is None):
        raise InputError("a part of the patients is a fraction or a number a class. Give one.")
    names, of_image = np.unique(patients, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise InputError(f"fraction of the patients is {fraction}. Allowed: above 0, up to 1.")
        drawn = order[: max(1, round(fraction * len(names)))]
    else:
        drawn = _draw_per_class(order, of_image, labels, per_class or 0, finding)
    return np.flatnonzero(np.isin(of_image, drawn))


def _draw_per_class(
    order: np.ndarray, of_image: np.ndarray, labels: np.ndarray, per_class: int, finding: str
) -> np.ndarray:
    """Numbers of the first patients of each class, in a random order [P] of all."""
    if per_class < 1:
        raise InputError(f"patients a class are {per_class}. Allowed: 1 and more.")
    positive, negative = (order[np.isin(order, group)] for group in _classes(of_image, labels))
    if min(len(positive), len(negative)) < per_class:
        raise InputError(
            f"{finding} has {len(positive)} positive and {len(negative)} negative patients, "
            f"fewer than {per_class} a class. Draw fewer."
        )
    return np.concatenate([positive[:per_class], negative[:per_class]])


def _classes(patients: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The patients with a finding, and those known not to have it."""
    positive = np.unique(patients[labels == 1])
    return positive, np.setdiff1d(patients[labels == 0], positive)


def label_efficiency(
    train: ProbeData,
    validate: ProbeData,
    test_features: Features,
    patients: np.ndarray,
    *,
    fractions: Sequence[float],
    per_class: Sequence[int],
    seeds: Sequence[int],
    strengths: Sequence[float] = STRENGTHS,
) -> LabelEfficiency:
    """Fit linear probes on parts of the training patients, and predict the test images.

    The penalty is chosen on the whole validation split, whatever the part: the curves show what
    fewer training labels cost, not what fewer labels in all would.

    Args:
        train: Features and targets of the training split.
        validate: The same targets of other patients.
        test_features: [M, D].
        patients: [N] identifiers of the training images' patients.
        fractions: Parts of the patients, each above 0 to 1, for all targets.
        per_class: Patients a class, for each binary target by itself.
        seeds: One draw of each part for each seed; 100 % are the same whatever the seed, and are
            fitted once, under the first.
        strengths: Penalties to choose from.

    Raises:
        InputError: A fraction or number out of range, or features that are not finite.
    """
    binary = [train.names[k] for k in train.columns(real=False)]
    drawn = [
        Drawn(target, fraction, k, seed)
        for target, fraction, k in [
            *(("", fraction, None) for fraction in fractions),  # all targets at once
            *((name, None, k) for k in per_class for name in binary),
        ]
        for seed in (seeds[:1] if fraction == 1 else seeds)
    ]
    result = LabelEfficiency()
    with progress_bar(total=len(drawn), desc="label efficiency", unit="fit") as bar:
        for part in drawn:
            names = (part.target,) if part.target else train.names
            fit, choose = _only(train, names), _only(validate, names)
            _predict(result, part, fit, choose, test_features, patients, strengths)
            bar.update()
    return result


def _predict(
    result: LabelEfficiency,
    part: Drawn,
    train: ProbeData,
    validate: ProbeData,
    test_features: Features,
    patients: np.ndarray,
    strengths: Sequence[float],
) -> None:
    """Fit the targets of one part, and add what comes of it to the result."""
    if part.per_class is not None:
        counts = [len(group) for group in _classes(patients, train.targets[:, 0])]
        if part.per_class >= 1 and min(counts) < part.per_class:
            result.undefined[part] = (
                f"the train split holds {counts[0]} positive and {counts[1]} negative patients"
            )
            return
    rows = draw_patients(
        patients,
        train.targets[:, 0],
        seed=part.seed,
        fraction=part.fraction,
        per_class=part.per_class,
        finding=train.names[0],
    )
    fit = train.take(rows)
    probes = fit_probes(fit, validate, strengths)
    for name, values in probes.predict(test_features).items():
        result.predictions[part._replace(target=name)] = values
    for name, reason in probes.undefined.items():
        lacking = _lacking(fit, name)
        why = f"the part of {part.trained_on} holds {lacking}" if lacking else reason
        result.undefined[part._replace(target=name)] = why


def _only(data: ProbeData, names: Sequence[str]) -> ProbeData:
    columns = [data.names.index(name) for name in names]
    return replace(data, targets=data.targets[:, columns], names=tuple(names))


def _lacking(train: ProbeData, name: str) -> str:
    """What a part of the training split lacks to fit a target; nothing, if it can be fitted."""
    known = train.targets[:, train.names.index(name)]
    known = known[~np.isnan(known)]
    if not len(known):
        return "no label"
    if name in train.numbers:
        return "" if len(np.unique(known)) > 1 else "a single value"
    return "" if 0 < known.mean() < 1 else "no negative" if known[0] else "no positive"
