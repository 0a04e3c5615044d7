"""Synthetic patients: who they are, what they have, and what their images show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from selfray.data.phantom.anatomy import breathe, draw_thorax, draw_traits
from selfray.data.phantom.findings import FINDINGS, Finding, Status, reshape
from selfray.data.phantom.patients import (
    Study,
    aim,
    draw_image,
    generator,
    patient_rows,
    plan_patient,
)
from selfray.data.phantom.render import MASK_LABELS, render
from selfray.data.phantom.scanner import SITES

SITES_ALL = ("A", "B", "C", "D")
LUNGS = [MASK_LABELS.index("right_lung"), MASK_LABELS.index("left_lung")]
HEART = MASK_LABELS.index("heart")


def draw(number: int, view: str, *findings: Finding, size: int = 96):
    """Pixels and rendering of a patient as if they had just these findings."""
    patient = plan_patient(3, number, ("A",))
    return draw_image(patient, Study(0, Status(findings), (view,)), 0, size)


def centred(number: int, view: str, *findings: Finding, size: int = 96):
    """Rendering without misplacement, at full inspiration."""
    patient = plan_patient(3, number, ("A",))
    thorax = breathe(reshape(patient.thorax, Status(findings)), 1.0, view == "AP")
    beam = replace(aim(view, thorax, size, generator(3, number, 9)), yaw=0.0, roll=0.0)
    beam = replace(beam, centre=(0.0, 0.0), field=44.0, source_height=0.0)
    one, two = generator(3, number, 4), generator(3, number, 5)
    return beam, render(thorax, Status(findings), beam, view == "AP", one, two)


def width(mask: np.ndarray) -> int:
    columns = np.flatnonzero(mask.any(axis=0))
    return int(columns[-1] - columns[0] + 1)


@pytest.fixture(scope="module")
def plans():
    return [plan_patient(0, number, ("A", "B", "C")) for number in range(1500)]


def test_patient_is_a_function_of_seed_and_number():
    first = patient_rows(5, 11, ("A", "B"), 32)
    plan_patient(5, 12, ("A", "B"))
    assert first == patient_rows(5, 11, ("A", "B"), 32)
    assert first != patient_rows(6, 11, ("A", "B"), 32)
    assert first != patient_rows(5, 12, ("A", "B"), 32)


def test_splits_are_about_70_10_20(plans):
    shares = [np.mean([p.split == s for p in plans]) for s in ("train", "validate", "test")]
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.04)


def test_patients_have_one_to_four_images_and_about_two(plans):
    images = np.array([p.images for p in plans])
    assert images.min() == 1
    assert images.max() == 4
    assert 1.7 < images.mean() < 2.3
    assert {len(p.studies) for p in plans} == {1, 2, 3}


def test_traits_are_adult_and_plausible(plans):
    ages, bmis = (np.array([getattr(p.traits, n) for p in plans]) for n in ("age", "bmi"))
    assert ages.min() >= 18
    assert ages.max() <= 95
    assert 15 < bmis.min() < 20
    assert 35 < bmis.max() < 50
    assert 0.45 < np.mean([p.traits.sex == "F" for p in plans]) < 0.55


def test_each_finding_is_in_a_tenth_to_a_third_of_the_images(plans):
    labels = np.array(
        [list(s.status.labels.values()) for p in plans for s in p.studies for _ in s.views]
    )
    for name, share in zip(FINDINGS, labels.mean(axis=0), strict=True):
        assert 0.10 <= share <= 0.32, (name, share)


def test_findings_occur_together_as_on_wards(plans):
    studies = [(p, s.status) for p in plans for s in p.studies]

    def share(name, given):
        return np.mean([status.has(name) for p, status in studies if given(p, status)])

    assert share("pleural_effusion", lambda p, s: s.has("cardiomegaly")) > 1.4 * share(
        "pleural_effusion", lambda p, s: not s.has("cardiomegaly")
    )
    assert share("rib_fracture", lambda p, s: s.has("pneumothorax")) > 1.5 * share(
        "rib_fracture", lambda p, s: not s.has("pneumothorax")
    )
    assert share("fibrosis", lambda p, s: p.traits.age > 70) > 1.4 * share(
        "fibrosis", lambda p, s: p.traits.age < 50
    )
    assert share("support_device", lambda p, s: p.site == "B") > 1.4 * share(
        "support_device", lambda p, s: p.site == "A"
    )
    tubed = [
        any(f.kind == "chest_tube" for f in s.findings) <= s.has("pneumothorax") for _, s in studies
    ]
    assert all(tubed)


def test_sites_differ_in_case_mix():
    views = {
        site: [v for n in range(200) for s in plan_patient(1, n, (site,)).studies for v in s.views]
        for site in SITES
    }
    portable = {site: np.mean([v == "AP" for v in views[site]]) for site in SITES}
    assert portable["A"] < 0.25 < portable["D"] < portable["B"]


@pytest.mark.parametrize("number", range(6))
def test_mask_of_each_finding_is_empty_just_where_its_label_is_0(number):
    patient = plan_patient(2, number, SITES_ALL)
    for study in patient.studies:
        for index, view in enumerate(study.views):
            if view == "LL":
                continue
            _, rendering = draw_image(patient, study, index, 96)
            shown = {n for n, m in zip(FINDINGS, rendering.finding_masks, strict=True) if m.any()}
            labels = study.status.labels
            assert shown <= {n for n in FINDINGS if labels[n]}
            hidden = {n for n in FINDINGS if labels[n]} - shown
            assert not hidden - {"rib_fracture", "support_device"}  # may lie outside of the image


@pytest.mark.parametrize("name", [n for n in FINDINGS if n != "support_device"])
@pytest.mark.parametrize("severity", [0.0, 1.0])
def test_every_finding_changes_the_image_inside_its_mask_most(name, severity):
    places = {
        "rib_fracture": (5.0, 0.45),
        "atelectasis": (0.5,),
        "nodule": (0.4, 0.65, 0.1),
        "consolidation": (0.4, 0.65, 0.1),
    }
    kind = {"atelectasis": "plate", "nodule": "round"}.get(name, "")
    side = 0 if name in ("cardiomegaly", "fibrosis") else -1
    finding = Finding(name, side, severity, places.get(name, ()), kind)
    _, ill = centred(1, "PA", finding, size=128)
    _, well = centred(1, "PA", size=128)
    mask = ill.finding_masks[FINDINGS.index(name)]
    assert mask.any()
    change = np.abs(ill.grams["soft"] - well.grams["soft"])
    change += np.abs(ill.grams["bone"] - well.grams["bone"])
    assert change[mask].mean() > 3 * change[~mask].mean()
    assert change[mask].max() > 0.25  # g/cm²: five per cent of contrast at 60 keV


@pytest.mark.parametrize(
    "name", ["pleural_effusion", "pneumothorax", "consolidation", "nodule", "cardiomegaly"]
)
def test_mask_grows_with_severity(name):
    place = (0.4, 0.65, 0.1) if name in ("nodule", "consolidation") else ()
    side = 0 if name == "cardiomegaly" else -1
    areas = [
        centred(2, "PA", Finding(name, side, s, place, "round"))[1]
        .finding_masks[FINDINGS.index(name)]
        .sum()
        for s in (0.05, 0.5, 1.0)
    ]
    assert areas[0] < areas[1] < areas[2]


@pytest.mark.parametrize("number", range(4))
def test_lungs_are_darker_than_heart_and_right_lung_is_at_image_left(number):
    for view in ("PA", "AP"):
        pixels, rendering = draw(number, view)
        right, left = (rendering.masks[i] for i in LUNGS)
        assert pixels[right].mean() < pixels[rendering.masks[HEART]].mean() - 20
        assert np.nonzero(right)[1].mean() < np.nonzero(left)[1].mean()
        # The apex of the heart points to the patient's left.
        columns = np.nonzero(rendering.masks[HEART])[1]
        assert columns.mean() > (np.nonzero(right)[1].mean() + np.nonzero(left)[1].mean()) / 2


@pytest.mark.parametrize("number", range(3))
def test_zones_part_each_lung_into_three(number):
    _, rendering = draw(number, "PA")
    for lung, zones in ((0, slice(2, 5)), (1, slice(5, 8))):
        parts = rendering.masks[zones]
        assert (parts.sum(axis=0) == rendering.masks[lung]).all()
        heights = [np.nonzero(part)[0].mean() for part in parts]
        assert heights == sorted(heights)


@pytest.mark.parametrize("number", range(4))
def test_heart_is_wider_in_ap_than_in_pa(number):
    def share(view):
        beam, rendering = centred(number, view)
        return width(rendering.masks[HEART]) * beam.field

    assert share("AP") > 1.05 * share("PA")


@pytest.mark.parametrize("number", range(6))
def test_cardiothoracic_ratio_tells_cardiomegaly(number):
    def ratio(*findings):
        _, rendering = centred(number, "PA", *findings, size=128)
        right, left = (rendering.masks[i] for i in LUNGS)
        return width(rendering.masks[HEART]) / width(right | left)

    well = ratio()
    mild, marked = (ratio(Finding("cardiomegaly", 0, s)) for s in (0.0, 1.0))
    assert 0.36 < well < 0.52
    assert well < mild < marked
    assert mild > 0.48
    assert marked > 0.52


def test_studies_of_a_patient_share_the_anatomy():
    patient = next(p for p in (plan_patient(4, n, ("A",)) for n in range(50)) if len(p.studies) > 1)
    lungs = []
    for study in patient.studies:
        bare = replace(study, status=Status(), views=("PA",))
        thorax = breathe(patient.thorax, 1.0, False)
        beam = replace(aim("PA", thorax, 64, generator(0, 0, 0)), yaw=0.0, roll=0.0)
        lungs.append(
            render(thorax, bare.status, beam, False, generator(1, 1, 4), generator(1, 1, 5)).masks
        )
    assert (lungs[0] == lungs[1]).all()
    chronic = [
        {f for f in s.status.findings if f.name in ("cardiomegaly", "fibrosis", "nodule")}
        for s in patient.studies
    ]
    assert chronic[0] == chronic[1]


def test_sex_and_age_and_weight_leave_traces_that_overlap():
    rng = np.random.default_rng(0)
    people = [(t := draw_traits(rng), draw_thorax(t, rng)) for _ in range(600)]
    ages = np.array([t.age for t, _ in people])
    female = np.array([t.sex == "F" for t, _ in people])
    breast, bone, fat, arch = (
        np.array([getattr(c, n) for _, c in people])
        for n in ("breast", "bone_density", "fat", "unfolding")
    )
    assert breast[female].mean() > 1.6 * breast[~female].mean()
    assert (breast[~female] > np.quantile(breast[female], 0.1)).mean() > 0.05
    assert np.corrcoef(ages, bone)[0, 1] < -0.4
    assert np.corrcoef(ages, arch)[0, 1] > 0.6
    assert np.corrcoef([t.bmi for t, _ in people], fat)[0, 1] > 0.7
