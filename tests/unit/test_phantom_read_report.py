"""The reader of phantom reports gives the labels of the studies, and any text without an error."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfray.data.phantom.findings import FINDINGS, Finding, Status, reshape
from selfray.data.phantom.patients import generator, plan_patient
from selfray.data.phantom.read_report import findings_of
from selfray.data.phantom.report import write_report

SITES = ("A", "B", "C", "D")


@pytest.fixture(scope="module")
def studies() -> list[tuple[tuple[str, ...], dict[str, int], str]]:
    written = []
    for seed in (1, 20, 300):
        for number in range(700):
            patient = plan_patient(seed, number, SITES)
            for study in patient.studies:
                thorax = reshape(patient.thorax, study.status)
                words = generator(seed, number, 7, study.number)
                report = write_report(thorax, study.status, study.views, words)
                written.append((study.views, study.status.labels, report))
    return written


def test_every_report_reads_as_the_labels_of_its_study(studies):
    assert len(studies) > 3000
    assert set(Counter(views for views, _, _ in studies)) == {("AP",), ("PA",), ("PA", "LL")}
    for _, labels, report in studies:
        # Also of findings that are there: none is left unmentioned.
        assert findings_of(report) == labels, report
    for name in FINDINGS:
        assert {labels[name] for _, labels, _ in studies} == {0, 1}


def test_either_section_states_what_is_there_but_devices(studies):
    for _, labels, report in studies:
        findings, impression = report.split("\nIMPRESSION: ")
        assert findings_of(findings) == labels
        assert findings_of(impression) == labels | {"support_device": 0}, report


@pytest.mark.parametrize("name", FINDINGS)
def test_each_wording_of_a_single_finding_is_read(name):
    thorax = plan_patient(0, 0, SITES).thorax
    kinds = {
        "support_device": (
            "tracheal_tube", "gastric_tube", "central_line", "chest_tube", "pacemaker", "leads",
        ),
        "atelectasis": ("plate", "lobar"),
    }.get(name, ("",))  # fmt: skip
    for number in range(200):
        rng = np.random.default_rng(number)
        kind, side = kinds[number % len(kinds)], (-1, 1)[number % 2]
        place = (float(3 + number % 7),) if name == "rib_fracture" else (rng.random(),)
        status = Status((Finding(name, side, rng.random(), place, kind),))
        report = write_report(thorax, status, (("AP",), ("PA", "LL"))[number % 2], rng)
        assert findings_of(report) == status.labels, report


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("", set()),
        ("The lungs are clear.", set()),
        ("No nodule, pneumothorax or pleural effusion.", set()),
        ("The heart is not enlarged.", set()),
        ("No pneumothorax. Small left pleural effusion", {"pleural_effusion"}),
        ("No pneumothorax There is a fracture", {"rib_fracture"}),
        ("Mild cardiomegaly. No cardiomegaly.", {"cardiomegaly"}),
        ("pleural line without peripheral lung markings indicates pneumothorax", {"pneumothorax"}),
        ("Chest tube, no pneumothorax", {"support_device"}),
        ("massive nodular fractured tubed", set()),
    ],
)
def test_text_that_a_model_may_write_is_read_by_sentence(text, stated):
    assert {name for name, label in findings_of(text).items() if label} == stated


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2999), st.randoms(use_true_random=False), st.integers(0, 400), st.text())
def test_shuffled_and_truncated_words_never_raise(studies, number, random, length, noise):
    words = [*studies[number][2].split(), *noise.split()]
    random.shuffle(words)
    for text in (" ".join(words)[:length], studies[number][2][:length] + noise, noise):
        read = findings_of(text)
        assert tuple(read) == FINDINGS
        assert set(read.values()) <= {0, 1}
