"""Which findings a report of the phantom states: the reverse of `report.py`.

It reads what `report.py` writes without error, and also takes text that a model has made up of the
same words, where it reads sentence by sentence.
"""

from __future__ import annotations

import re

from selfray.data.phantom.findings import FINDINGS
from selfray.data.report_text import sentences

# What states a finding where it is not denied.
_STATED = {
    "pleural_effusion": r"effusions?|pleural fluid",
    "pneumothorax": r"pneumothorax|pneumothoraces",
    "consolidation": r"consolidations?|consolidative|pneumonia",
    "nodule": r"nodules?|mass|masses",
    "cardiomegaly": r"cardiomegaly|enlarged cardiac|enlargement of the (?:heart|cardiac)"
    r"|(?:heart|cardiac silhouette) is (?:\w+ )?enlarged",
    "fibrosis": r"fibrosis|fibrotic",
    "atelectasis": r"atelectasis|basal collapse",
    "rib_fracture": r"fractures?",
    "support_device": r"tubes?|catheters?|lines? terminates|central line|pleural drain|pacemaker"
    r"|leads?|electrodes",
}
_MENTIONS = {name: re.compile(rf"\b(?:{_STATED[name]})\b", re.IGNORECASE) for name in FINDINGS}
# "without" denies nothing here: "a pleural line without peripheral lung markings".
_DENIAL = re.compile(r"\b(?:no|not)\b", re.IGNORECASE)
# A sentence that lacks its full stop, as models write them, may run into the next.
_CLAUSE = re.compile(r"(?<=\w)\s+(?=(?:There (?:is|are)|FINDINGS:|IMPRESSION:)(?!\w))")


def findings_of(report: str) -> dict[str, int]:
    """The findings that a report states, in either section.

    A finding is stated by a sentence that names it, and denied by one that names it after "no" or
    "not", which reaches over lists to the end of the sentence. Stated once counts, whatever else
    is denied. Reports of the phantom state each finding that the study has; one that a report does
    not mention, is not there.

    Args:
        report: Text of a study, of one section or more; any other text is read, too.

    Returns:
        By name of `FINDINGS`, 1 where stated, 0 where denied or not mentioned.
    """
    clauses = [clause for part in sentences(report) for clause in _CLAUSE.split(part)]
    return {name: int(any(_states(clause, name) for clause in clauses)) for name in FINDINGS}


def _states(clause: str, name: str) -> bool:
    denial = _DENIAL.search(clause)
    return _MENTIONS[name].search(clause, 0, denial.start() if denial else len(clause)) is not None
