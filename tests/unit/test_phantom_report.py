"""Thousands of reports, read back with phrases written down here, against the labels."""

from __future__ import annotations

import re

import pytest

from selfray.data.phantom.findings import FINDINGS, reshape
from selfray.data.phantom.patients import generator, plan_patient
from selfray.data.phantom.report import write_report

# What a reader takes for the finding, whether stated or denied.
MENTION = {
    "pleural_effusion": r"pleural effusion|pleural fluid",
    "pneumothorax": r"pneumothorax",
    "consolidation": r"consolidation|consolidative|pneumonia",
    "nodule": r"nodule|mass\b",
    "cardiomegaly": r"cardiomegaly|(?:mildly|moderately|markedly) enlarged|enlarged cardiac"
    r"|enlargement of the heart",
    "fibrosis": r"fibrosis|fibrotic",
    "atelectasis": r"atelectasis|basal collapse",
    "rib_fracture": r"fracture",
    "support_device": r"tube|catheter|central line|drain\b|pacemaker|leads|lead\b|electrodes",
}
NEGATION = re.compile(r"^(?:\d\. )?(?:No|There is no|No evidence of)\b")
NORMAL = {
    "cardiomegaly": r"heart is normal in size|silhouette is within normal|Heart size is normal",
}
CLEAR = re.compile(r"[Ll]ungs are clear")
FORBIDDEN = re.compile(
    r"\b(?:he|she|his|her|him|man|woman|men|women|male|female|gentleman|lady|old|elderly|young"
    r"|age|aged|year|years|weight|obese|obesity|bmi|habitus|breast|breasts|overweight|slim)\b",
    re.IGNORECASE,
)


def studies(count: int, sites=("A", "B", "C", "D")):
    for number in range(count):
        patient = plan_patient(7, number, sites)
        for study in patient.studies:
            thorax = reshape(patient.thorax, study.status)
            words = generator(7, number, 7, study.number)
            yield patient, study, write_report(thorax, study.status, study.views, words)


def read(report: str) -> tuple[set[str], set[str]]:
    """Findings that a report states, and those that it denies."""
    stated, denied = set(), set()
    for sentence in re.split(r"(?<=[.:;])\s+", report):
        bare = sentence.removeprefix("FINDINGS: ").removeprefix("IMPRESSION: ")
        for name in FINDINGS:
            if re.search(MENTION[name], bare, re.IGNORECASE):
                (denied if NEGATION.match(bare) else stated).add(name)
            if name in NORMAL and re.search(NORMAL[name], bare):
                denied.add(name)
        if CLEAR.search(bare):
            denied |= {"consolidation", "nodule", "fibrosis", "atelectasis"}
        if re.search(r"No acute cardiopulmonary|Normal study", bare):
            denied |= set(FINDINGS) - {"support_device"}
    return stated, denied


@pytest.fixture(scope="module")
def reports():
    return list(studies(1500))


def test_reports_state_every_finding_and_deny_only_what_is_absent(reports):
    assert len(reports) > 2000
    for _, study, report in reports:
        present = {name for name, label in study.status.labels.items() if label}
        stated, denied = read(report)
        assert stated == present, report
        assert not denied & present, report


def test_each_finding_is_often_stated_and_often_denied(reports):
    read_back = [read(report) for _, _, report in reports]
    for name in FINDINGS:
        assert sum(name in stated for stated, _ in read_back) > 100
        if name != "support_device":
            assert sum(name in denied for _, denied in read_back) > 300


def test_reports_are_silent_about_sex_age_and_weight(reports):
    for _, _, report in reports:
        assert not FORBIDDEN.search(report), report


def test_reports_name_only_sides_that_are_ill(reports):
    for _, study, report in reports:
        sides = {f.side for f in study.status.findings}
        for word, side in (("right", -1), ("left", 1)):
            # A pacemaker's lead ends in the right ventricle whatever its side is.
            text = report.replace("right ventricle", "")
            if re.search(rf"\b{word}\b", text, re.IGNORECASE):
                assert side in sides, report


def test_stated_size_of_a_nodule_is_its_size(reports):
    seen = 0
    for _, study, report in reports:
        for finding in study.status.of("nodule"):
            # Half-axis as the drawing uses it, from the severity, by hand.
            size = round(20 * (0.25 + 1.75 * finding.severity**1.3))
            assert 5 <= size <= 40
            assert f"{size} mm" in report
            assert ("mass" in report) == (size >= 30) or "nodule or mass" in report
            seen += 1
    assert seen > 200


def test_reports_vary_in_words_and_keep_their_sections(reports):
    texts = [report for _, _, report in reports]
    assert len(set(texts)) > 0.7 * len(texts)
    for text in texts:
        assert re.fullmatch(r"FINDINGS: [^\n]+\nIMPRESSION: [^\n]+\.", text), text
        assert "  " not in text
        assert "{" not in text
