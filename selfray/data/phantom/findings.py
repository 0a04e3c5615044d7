"""Findings as changes of the anatomy: who has what, where, how severe."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from selfray.data.phantom.anatomy import Thorax, Traits, holds

FINDINGS = (
    "pleural_effusion",
    "pneumothorax",
    "consolidation",
    "nodule",
    "cardiomegaly",
    "fibrosis",
    "atelectasis",
    "rib_fracture",
    "support_device",
)


@dataclass(frozen=True)
class Finding:
    """One finding of a study.

    Attributes:
        name: One of `FINDINGS`.
        side: -1 right, 1 left, 0 both or central.
        severity: 0 (barely visible) to 1.
        place: Meaning depends on the finding: zone, rib number, or position in the lung [3].
        kind: Variant of the finding: device or shape.
    """

    name: str
    side: int
    severity: float
    place: tuple[float, ...] = ()
    kind: str = ""

    @property
    def zone(self) -> str:
        """Upper, mid or lower, by the height of a place in the lung."""
        height = self.place[0] if self.place else 0.0
        return "upper" if height < 0.34 else "mid" if height < 0.67 else "lower"


def nodule_radius(finding: Finding) -> float:
    """Radius of a nodule, cm: 5 to 40 mm across."""
    return 0.25 + 1.75 * finding.severity**1.3


def nodule_diameter_mm(finding: Finding) -> int:
    """Diameter of a nodule in whole millimetres."""
    return round(20 * nodule_radius(finding))


@dataclass(frozen=True)
class Status:
    """What a patient has in one study; `labels` follow from it."""

    findings: tuple[Finding, ...] = field(default=())

    def of(self, name: str) -> list[Finding]:
        return [f for f in self.findings if f.name == name]

    def has(self, name: str) -> bool:
        return any(f.name == name for f in self.findings)

    @property
    def labels(self) -> dict[str, int]:
        return {name: int(self.has(name)) for name in FINDINGS}


def _severity(rng: np.random.Generator) -> float:
    return float(rng.beta(1.5, 1.3))


def _side(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _place(
    t: Thorax, margin: float, low: float, high: float, rng: np.random.Generator
) -> tuple[int, tuple[float, ...]]:
    """Side and place of a lesion that lies inside the lung in every breath."""
    for _ in range(40):
        side = _side(rng)
        place = (rng.uniform(low, high), rng.uniform(0.2, 0.95), rng.uniform(-0.75, 0.75))
        if holds(t, side, place, margin):
            return side, place
    return -1, (0.4, 0.65, 0.1)  # the middle of the right lung is always inside


def draw_chronic(traits: Traits, t: Thorax, rng: np.random.Generator) -> list[Finding]:
    """Findings that a patient keeps from study to study."""
    old = float(np.clip((traits.age - 40) / 50, 0, 1))
    chosen = []
    if rng.random() < 0.10 + 0.24 * old:
        # Borderline hearts are the most common: a large one is seen on a thumbnail.
        chosen.append(Finding("cardiomegaly", 0, _severity(rng) ** 1.7))
    if rng.random() < 0.07 + 0.2 * old:
        chosen.append(Finding("fibrosis", 0, _severity(rng)))
    if rng.random() < 0.12 + 0.12 * old:
        side, place = _place(reshape(t, Status(tuple(chosen))), 0.6, 0.1, 0.85, rng)
        kind = "round" if rng.random() < 0.6 else "lobulated"
        chosen.append(Finding("nodule", side, _severity(rng), place, kind))
    return chosen


def draw_status(
    t: Thorax, chronic: list[Finding], acuity: float, rng: np.random.Generator
) -> Status:
    """Findings of one study, with the co-occurrence that wards see.

    Args:
        t: The patient's chest.
        chronic: What the patient has in every study.
        acuity: 0 for a clinic to 1 for an intensive care unit.
        rng: Source of randomness of this study.
    """
    found = list(chronic)
    failing = any(f.name == "cardiomegaly" for f in found)
    air = None
    if rng.random() < 0.11 + 0.06 * acuity:
        air = Finding("pneumothorax", _side(rng), _severity(rng))
        found.append(air)
    if rng.random() < 0.10 + 0.25 * failing + 0.13 * acuity:
        found += _draw_effusions(air, rng)
    wet = any(f.name == "pleural_effusion" for f in found)
    if rng.random() < 0.13 + 0.12 * acuity:
        side, place = _place(reshape(t, Status(tuple(chronic))), 0.8, 0.15, 0.9, rng)
        found.append(Finding("consolidation", side, _severity(rng), place))
    if rng.random() < 0.09 + 0.18 * wet + 0.15 * acuity:
        kind = "plate" if rng.random() < 0.55 else "lobar"
        found.append(
            Finding("atelectasis", _side(rng), _severity(rng), (float(rng.random()),), kind)
        )
    if rng.random() < 0.11 + 0.25 * (air is not None):
        side = air.side if air else _side(rng)
        place = (float(rng.integers(3, 10)), float(rng.uniform(0.3, 0.75)))
        found.append(Finding("rib_fracture", side, _severity(rng), place))
    return Status((*found, *_draw_devices(air, failing, acuity, rng)))


def _draw_effusions(air: Finding | None, rng: np.random.Generator) -> list[Finding]:
    """One or two effusions, not on the side of a pneumothorax: no air-fluid level is modelled."""
    severity = _severity(rng)
    if air:
        return [Finding("pleural_effusion", -air.side, severity)]
    if rng.random() < 0.4:
        return [
            Finding("pleural_effusion", side, severity * float(rng.uniform(0.6, 1)))
            for side in (-1, 1)
        ]
    return [Finding("pleural_effusion", _side(rng), severity)]


def _draw_devices(
    air: Finding | None, failing: bool, acuity: float, rng: np.random.Generator
) -> list[Finding]:
    devices = []

    def add(kind: str, side: int) -> None:
        devices.append(Finding("support_device", side, float(rng.random()), (), kind))

    if air and rng.random() < 0.45:
        add("chest_tube", air.side)
    if rng.random() < 0.01 + 0.16 * acuity:
        add("tracheal_tube", 0)
        if rng.random() < 0.7:
            add("gastric_tube", 0)
    if rng.random() < 0.03 + 0.14 * acuity:
        add("central_line", _side(rng))
    if rng.random() < 0.03 + 0.07 * failing:
        add("pacemaker", 1 if rng.random() < 0.8 else -1)
    if rng.random() < 0.02 + 0.08 * acuity:
        add("leads", 0)
    return devices


def reshape(thorax: Thorax, status: Status) -> Thorax:
    """The chest as the findings have changed its shape."""
    t = thorax
    for finding in status.findings:
        s = finding.severity
        if finding.name == "cardiomegaly":
            t = replace(t, heart=max(t.heart, 1.0) * (1.08 + 0.24 * s))
        elif finding.name == "fibrosis":
            t = replace(t, dome=t.dome + 0.5 + 1.2 * s, dome_left=t.dome_left + 0.5 + 1.2 * s)
        elif finding.name == "atelectasis" and finding.kind == "lobar":
            rise = 1.0 + 2.0 * s
            t = replace(t, heart_shift=t.heart_shift + finding.side * (0.4 + 0.8 * s))
            if finding.side < 0:
                t = replace(t, dome=t.dome + rise)
            else:
                t = replace(t, dome_left=t.dome_left + rise)
    return t
