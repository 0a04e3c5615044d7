"""A radiologist's report of a study, from a grammar, true to the findings."""

from __future__ import annotations

import numpy as np

from selfray.data.phantom.findings import FINDINGS, Status

_SIDE = {-1: "right", 1: "left"}
_NAMES = {
    "pleural_effusion": "pleural effusion",
    "pneumothorax": "pneumothorax",
    "consolidation": "focal consolidation",
    "nodule": "pulmonary nodule",
    "cardiomegaly": "cardiomegaly",
    "fibrosis": "interstitial fibrosis",
    "atelectasis": "atelectasis",
    "rib_fracture": "displaced rib fracture",
    "support_device": "support device",
}
_DEVICES = {
    "tracheal_tube": "Endotracheal tube in place",
    "gastric_tube": "Nasogastric tube courses below the diaphragm",
    "central_line": "{side} central venous catheter terminates in the superior vena cava",
    "chest_tube": "{side} chest tube in place",
    "pacemaker": "{side} chest wall pacemaker with lead in the right ventricle",
}


def write_report(status: Status, rng: np.random.Generator) -> str:
    """Compose FINDINGS and IMPRESSION.

    Args:
        status: What the study shows.
        rng: Choice of words.
    """
    present, absent, short = [], [], []
    for name in FINDINGS:
        found = status.of(name)
        if not found:
            absent.append(_NAMES[name])
        for finding in found:
            side = _SIDE.get(finding.side, "bilateral")
            if name == "support_device":
                text = _DEVICES[finding.kind].format(side=side.capitalize())
            elif name == "cardiomegaly":
                text = f"{_degree(finding.severity)} cardiomegaly"
            elif name == "nodule":
                size = round(20 * (0.35 + 1.65 * finding.severity**1.3))
                text = f"{side} pulmonary nodule measuring {size} mm"
            else:
                text = f"{_degree(finding.severity)} {side} {_NAMES[name]}"
            present.append(text[0].upper() + text[1:] + ".")
            short.append(text)
    said = [a for a in absent if a != "support device" and rng.random() < 0.8]
    negative = f"No {', '.join(said[:-1])} or {said[-1]}." if len(said) > 1 else ""
    impression = "; ".join(short) if short else "No acute cardiopulmonary abnormality"
    return f"FINDINGS: {' '.join([*present, negative]).strip()}\nIMPRESSION: {impression}."


def _degree(severity: float) -> str:
    return "small" if severity < 0.35 else "moderate" if severity < 0.7 else "large"
