"""A radiologist's report of a study: a grammar of phrases, true to what the image shows.

It says nothing about sex, age, weight or body mass index, as real reports do not either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from selfray.data.phantom.anatomy import Thorax
from selfray.data.phantom.devices import tip_above_carina
from selfray.data.phantom.findings import Finding, Status, nodule_diameter_mm

_SIDE = {-1: "right", 1: "left", 0: "bilateral"}
_ORDINAL = (
    "",
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
)
_LUNG = ("consolidation", "nodule", "fibrosis", "atelectasis")

# Sentences of the section FINDINGS; short forms serve the IMPRESSION.
_PRESENT: dict[str, tuple[str, ...]] = {
    "pleural_effusion": (
        "There is a {amount} {side} pleural effusion.",
        "{Amount} {side} pleural effusion is present.",
        "{Amount} pleural fluid collection on the {side}.",
        "Blunting of the {side} costophrenic angle, in keeping with a {amount} pleural effusion.",
    ),
    "pleural_effusion_supine": (
        "Hazy veil-like opacity over the {side} hemithorax, in keeping with a {amount} layering "
        "pleural effusion.",
        "{Amount} {side} pleural effusion, layering posteriorly.",
    ),
    "pneumothorax": (
        "There is a {amount} {side} pneumothorax.",
        "{Amount} {side} pneumothorax with a visible visceral pleural line.",
        "A {side} apical pleural line without peripheral lung markings indicates a {amount} "
        "pneumothorax.",
    ),
    "consolidation": (
        "{Extent} consolidation in the {side} {zone} zone.",
        "There is {extent} airspace consolidation in the {side} {zone} lung zone with air "
        "bronchograms.",
        "{Extent} consolidative opacity projects over the {side} {zone} zone, concerning for "
        "pneumonia.",
    ),
    "nodule": (
        "A {size} mm {thing} is seen in the {side} {zone} zone.",
        "{side_} {zone} zone pulmonary {thing} measuring approximately {size} mm.",
        "Well-defined {thing} of {size} mm in the {side} {zone} lung zone.",
    ),
    "cardiomegaly": (
        "The cardiac silhouette is {degree} enlarged.",
        "{Degree} cardiomegaly.",
        "{Degree} enlargement of the heart.",
    ),
    "fibrosis": (
        "{Degree} bibasal reticular opacities with reduced lung volumes, in keeping with "
        "pulmonary fibrosis.",
        "{Degree} interstitial fibrosis with a peripheral and basal predominance.",
        "Coarse reticulation at both bases, consistent with {degree} fibrotic lung disease.",
    ),
    "atelectasis_plate": (
        "Linear atelectasis at the {side} base.",
        "Platelike atelectasis in the {side} lower zone.",
        "Band-like {side} basal opacity, in keeping with subsegmental atelectasis.",
    ),
    "atelectasis_lobar": (
        "{side_} lower lobe atelectasis with elevation of the hemidiaphragm.",
        "Volume loss at the {side} base, in keeping with lower lobe atelectasis.",
        "{side_} basal collapse with mediastinal shift.",
    ),
    "rib_fracture": (
        "{Displaced} fracture of the {place} {side} {rib} rib.",
        "There is a {displaced} {side} {rib} rib fracture.",
        "Cortical step of the {place} {side} {rib} rib, consistent with a fracture.",
    ),
}
_SHORT: dict[str, tuple[str, ...]] = {
    "pleural_effusion": ("{Amount} {side} pleural effusion.",),
    "pneumothorax": ("{Amount} {side} pneumothorax.",),
    "consolidation": (
        "{side_} {zone} zone consolidation.",
        "{side_} {zone} zone consolidation, likely pneumonia.",
    ),
    "nodule": ("{side_} pulmonary {thing} of {size} mm; CT is suggested.",),
    "cardiomegaly": ("{Degree} cardiomegaly.", "Enlarged cardiac silhouette."),
    "fibrosis": ("{Degree} pulmonary fibrosis.", "Changes of {degree} interstitial fibrosis."),
    "atelectasis": ("{side_} basal atelectasis.",),
    "rib_fracture": ("{side_} {rib} rib fracture.",),
}
_DEVICES: dict[str, tuple[str, ...]] = {
    "tracheal_tube": (
        "Endotracheal tube with its tip {tip:.1f} cm above the carina.",
        "The endotracheal tube terminates {tip:.1f} cm above the carina.",
    ),
    "gastric_tube": (
        "Nasogastric tube courses below the diaphragm into the stomach.",
        "An enteric tube projects over the stomach.",
    ),
    "central_line": (
        "{side_} central venous catheter with its tip in the superior vena cava.",
        "{side_}-sided central line terminates over the superior vena cava.",
    ),
    "chest_tube": (
        "{side_} chest tube in place.",
        "A {side}-sided pleural drain is present.",
    ),
    "pacemaker": (
        "{side_} chest wall pacemaker with a lead projecting over the right ventricle.",
        "A {side}-sided pacemaker is noted.",
    ),
    "leads": (
        "Monitoring leads overlie the chest.",
        "ECG electrodes and leads project over the thorax.",
    ),
}
_ABSENT: dict[str, tuple[str, ...]] = {
    "pleural_effusion": ("pleural effusion", "pleural fluid"),
    "pneumothorax": ("pneumothorax",),
    "consolidation": ("focal consolidation", "airspace consolidation"),
    "nodule": ("pulmonary nodule", "suspicious nodule or mass"),
    "fibrosis": ("interstitial fibrosis", "fibrotic change"),
    "atelectasis": ("atelectasis",),
    "rib_fracture": ("displaced rib fracture", "acute rib fracture"),
}
_LEADS = ("No ", "No evidence of ", "There is no ")
_NORMAL_HEART = (
    "The heart is normal in size.",
    "Cardiac silhouette is within normal limits.",
    "Heart size is normal.",
    "No cardiomegaly.",
)
_CLEAR_LUNGS = ("The lungs are clear.", "Lungs are clear bilaterally.", "Both lungs are clear.")
_NOTHING = (
    "No acute cardiopulmonary abnormality.",
    "No acute cardiopulmonary process.",
    "Normal study.",
)


def write_report(
    thorax: Thorax, status: Status, views: Sequence[str], rng: np.random.Generator
) -> str:
    """Compose the sections FINDINGS and IMPRESSION of one study.

    Args:
        thorax: The chest, for the position of devices.
        status: What the study shows.
        views: Its projections, of PA, AP and LL.
        rng: Choice of words.
    """
    supine = "AP" in views
    text = [_devices(thorax, status, rng), _lungs(status, rng), _pleura(status, supine, rng)]
    text += [_heart(status, rng), _bones(status, rng)]
    found = " ".join(part for part in text if part)
    return f"FINDINGS: {found}\nIMPRESSION: {_impression(status, rng)}"


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _words(finding: Finding) -> dict[str, str]:
    """The slots of the templates for one finding."""
    level = 0 if finding.severity < 0.34 else 1 if finding.severity < 0.67 else 2
    side = _SIDE[finding.side]
    zone = finding.zone
    size = nodule_diameter_mm(finding)
    words = {
        "amount": ("small", "moderate", "large")[level],
        "degree": ("mild", "moderate", "marked")[level],
        "extent": ("subtle", "patchy", "dense")[level],
        "displaced": ("minimally displaced", "displaced", "markedly displaced")[level],
        "side": side,
        "side_": side.capitalize(),
        "zone": zone,
        "size": str(size),
        "thing": "mass" if size >= 30 else "nodule",
        "place": "posterolateral" if finding.place and finding.place[-1] < 0.5 else "anterolateral",
        "rib": _ORDINAL[int(finding.place[0])] if finding.name == "rib_fracture" else "",
    }
    graded = ("amount", "degree", "extent", "displaced")
    return words | {word.capitalize(): words[word].capitalize() for word in graded}


def _merged(found: list[Finding]) -> list[Finding]:
    """Two effusions become one bilateral statement when they are of about the same size."""
    if len(found) == 2 and abs(found[0].severity - found[1].severity) < 0.25:
        return [Finding(found[0].name, 0, max(f.severity for f in found), found[0].place)]
    return found


def _state(found: list[Finding], key: str, rng: np.random.Generator) -> str:
    sentences = []
    for finding in found:
        words = _words(finding)
        if key == "cardiomegaly":
            words["degree"] = {"mild": "mildly", "moderate": "moderately", "marked": "markedly"}[
                words["degree"]
            ]
        sentences.append(_pick(rng, _PRESENT[key]).format(**words))
    return " ".join(sentences)


def _deny(names: list[str], rng: np.random.Generator) -> str:
    """One sentence that negates findings, or nothing."""
    if not names:
        return ""
    things = [_pick(rng, _ABSENT[name]) for name in names]
    last = things.pop()
    listed = f"{', '.join(things)} or {last}" if things else last
    return f"{_pick(rng, _LEADS)}{listed}."


def _absent(
    status: Status, names: Sequence[str], rng: np.random.Generator, share: float
) -> list[str]:
    absent = [name for name in names if not status.has(name) and rng.random() < share]
    return [absent[i] for i in rng.permutation(len(absent))]


def _lungs(status: Status, rng: np.random.Generator) -> str:
    if not any(status.has(name) for name in _LUNG) and rng.random() < 0.6:
        return _pick(rng, _CLEAR_LUNGS)
    parts = []
    for name in _LUNG:
        for finding in status.of(name):
            key = f"{name}_{finding.kind}" if name == "atelectasis" else name
            parts.append(_state([finding], key, rng))
    parts.append(_deny(_absent(status, _LUNG, rng, 0.5), rng))
    return " ".join(part for part in parts if part)


def _pleura(status: Status, supine: bool, rng: np.random.Generator) -> str:
    key = "pleural_effusion_supine" if supine else "pleural_effusion"
    parts = [_state(_merged(status.of("pleural_effusion")), key, rng)]
    parts.append(_state(status.of("pneumothorax"), "pneumothorax", rng))
    parts.append(_deny(_absent(status, ("pleural_effusion", "pneumothorax"), rng, 0.85), rng))
    return " ".join(part for part in parts if part)


def _heart(status: Status, rng: np.random.Generator) -> str:
    if status.has("cardiomegaly"):
        return _state(status.of("cardiomegaly"), "cardiomegaly", rng)
    return _pick(rng, _NORMAL_HEART) if rng.random() < 0.85 else ""


def _bones(status: Status, rng: np.random.Generator) -> str:
    if status.has("rib_fracture"):
        return _state(status.of("rib_fracture"), "rib_fracture", rng)
    return _deny(_absent(status, ("rib_fracture",), rng, 0.4), rng)


def _devices(thorax: Thorax, status: Status, rng: np.random.Generator) -> str:
    sentences = []
    for finding in status.of("support_device"):
        side = _SIDE[finding.side]
        tip = tip_above_carina(finding)
        template = _pick(rng, _DEVICES[finding.kind])
        sentences.append(template.format(side=side, side_=side.capitalize(), tip=tip))
    return " ".join(sentences)


def _impression(status: Status, rng: np.random.Generator) -> str:
    lines = []
    for name, templates in _SHORT.items():
        for finding in _merged(status.of(name)):
            lines.append(_pick(rng, templates).format(**_words(finding)))
    if not lines:
        return _pick(rng, _NOTHING[:2] if status.findings else _NOTHING)
    if len(lines) == 1:
        return lines[0]
    return " ".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))
