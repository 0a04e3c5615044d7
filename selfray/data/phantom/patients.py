"""Patient k as a pure function of (seed, k, sites): studies, images, rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from selfray.data.dataset import encode_bits, encode_png
from selfray.data.phantom.anatomy import Thorax, Traits, breathe, draw_thorax, draw_traits
from selfray.data.phantom.findings import Status, draw_chronic, draw_status, reshape
from selfray.data.phantom.projection import Beam
from selfray.data.phantom.render import Rendering, render
from selfray.data.phantom.report import write_report
from selfray.data.phantom.scanner import SITES, develop, expose, finish


def generator(seed: int, patient: int, *position: int) -> np.random.Generator:
    """Randomness by position: the same whatever was drawn before."""
    counter = [0, *position, *([0] * (3 - len(position)))]
    return np.random.Generator(np.random.Philox(key=[seed, patient], counter=counter))


@dataclass(frozen=True)
class Study:
    """Plan of one study."""

    number: int
    status: Status
    views: tuple[str, ...]


@dataclass(frozen=True)
class Patient:
    """Plan of one patient; nothing is drawn yet."""

    seed: int
    number: int
    site: str
    split: str
    traits: Traits
    thorax: Thorax
    studies: tuple[Study, ...]

    @property
    def images(self) -> int:
        return sum(len(study.views) for study in self.studies)


def plan_patient(seed: int, number: int, sites: tuple[str, ...]) -> Patient:
    """Everything about a patient but the pixels.

    Args:
        seed: Of the dataset, >= 0.
        number: Which patient, >= 0.
        sites: Sites to draw from.
    """
    rng = generator(seed, number, 1)
    site = str(rng.choice(sites))
    split = str(rng.choice(["train", "validate", "test"], p=[0.7, 0.1, 0.2]))
    traits = draw_traits(rng)
    thorax = draw_thorax(traits, rng)
    chronic = draw_chronic(traits, thorax, rng)
    studies, left = [], 4
    for index in range(int(rng.choice([1, 2, 3], p=[0.6, 0.27, 0.13]))):
        draws = generator(seed, number, 2, index)
        status = draw_status(thorax, chronic, SITES[site].acuity, draws)
        views = ("AP",) if draws.random() < SITES[site].portable else ("PA",)
        if views == ("PA",) and draws.random() < SITES[site].lateral and left > 1:
            views = ("PA", "LL")
        left -= len(views)
        studies.append(Study(index, status, views))
        if left == 0:
            break
    return Patient(seed, number, site, split, traits, thorax, tuple(studies))


def draw_image(
    patient: Patient, study: Study, index: int, size: int
) -> tuple[np.ndarray, Rendering]:
    """Expose one image.

    Returns:
        Pixels uint8 [size, size] and what the beam met.
    """
    rng = generator(patient.seed, patient.number, 3, study.number * 8 + index)
    view, site = study.views[index], SITES[patient.site]
    supine = view == "AP"
    inspiration = rng.beta(2.2, 2.0) if supine else rng.beta(6, 1.8)
    thorax = breathe(reshape(patient.thorax, study.status), float(inspiration), supine)
    beam = aim(view, thorax, size, rng)
    shared = generator(patient.seed, patient.number, 4)
    study_rng = generator(patient.seed, patient.number, 5, study.number)
    rendering = render(thorax, study.status, beam, supine, shared, study_rng)
    signal = expose(rendering.grams, site, beam.field, rng)
    pixels, seen = finish(develop(signal, site, view, rng), site, view, supine, rng)
    masks, finding_masks = rendering.masks & seen, rendering.finding_masks & seen
    return pixels, replace(rendering, masks=masks, finding_masks=finding_masks)


def aim(view: str, t: Thorax, size: int, rng: np.random.Generator) -> Beam:
    """Position patient, tube and detector as a radiographer does: not quite straight."""
    supine = view == "AP"
    thick = t.half_depth + t.fat + 3.0 if view != "LL" else t.half_width + t.split + t.fat + 3.0
    across = 2 * (t.half_width + t.split)
    return Beam(
        view=view,
        source_distance=float(rng.uniform(95, 115) if supine else rng.uniform(178, 185)),
        detector=thick + (2.5 if supine else 1.5),
        yaw=float(rng.normal(0, 0.08 if supine else 0.05)),
        roll=float(rng.normal(0, 0.06 if supine else 0.035)),
        source_height=float(rng.normal(6.0 if supine else -1.0, 3.0)),
        centre=(float(rng.normal(0, 1.7)), float(rng.normal(-0.5, 2.2))),
        # The beam is collimated to the patient, more or less generously.
        field=1.12 * (across + float(rng.uniform(2, 15))),
        size=size,
    )


def patient_rows(seed: int, number: int, sites: tuple[str, ...], size: int) -> list[dict[str, Any]]:
    """The dataset rows of one patient, pixels encoded."""
    return list(_rows(plan_patient(seed, number, sites), size))


def metadata(patient: Patient) -> dict[str, Any]:
    """Sex, age, weight and body mass index as a record keeps them: about one in 20 is missing."""
    traits = patient.traits
    known = generator(patient.seed, patient.number, 6).random(4) > 0.05
    return {
        "sex": traits.sex if known[0] else None,
        "age_years": round(traits.age, 1) if known[1] else None,
        "weight_kg": round(traits.weight, 1) if known[2] else None,
        "bmi": round(traits.bmi, 1) if known[3] else None,
    }


def _rows(patient: Patient, size: int) -> Iterator[dict[str, Any]]:
    name, described = f"P{patient.number:06d}", metadata(patient)
    for study in patient.studies:
        words = generator(patient.seed, patient.number, 7, study.number)
        shape = reshape(patient.thorax, study.status)
        report = write_report(shape, study.status, study.views, words)
        for index, view in enumerate(study.views):
            pixels, rendering = draw_image(patient, study, index, size)
            yield {
                "image": encode_png(pixels),
                "image_id": f"{name}-S{study.number + 1}-I{index + 1}",
                "patient_id": name,
                "study_id": f"{name}-S{study.number + 1}",
                "split": patient.split,
                "view": view,
                "site": patient.site,
                **described,
                "pixel_spacing_mm": rendering.pixel_spacing_mm,
                "mask": encode_bits(rendering.masks),
                "finding_mask": encode_bits(rendering.finding_masks),
                "report": report,
                **study.status.labels,
            }
