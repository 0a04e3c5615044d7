"""One study of one patient in one beam: masses along every ray, and masks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import cv2
import numpy as np

from selfray.data.phantom import anatomy
from selfray.data.phantom.anatomy import Thorax, occupied
from selfray.data.phantom.devices import device_tubes
from selfray.data.phantom.findings import FINDINGS, Finding, Status, nodule_radius
from selfray.data.phantom.lungs import breast_path, fibrosis_strands, vessel_tree
from selfray.data.phantom.physics import CORTICAL_BONE, SOFT_TISSUE
from selfray.data.phantom.projection import (
    Beam,
    Tube,
    march,
    project_balls,
    project_tubes,
    splat,
)

MASK_LABELS = (
    "right_lung",
    "left_lung",
    "right_upper_zone",
    "right_middle_zone",
    "right_lower_zone",
    "left_upper_zone",
    "left_middle_zone",
    "left_lower_zone",
    "heart",
    "ribs",
    "clavicles",
)


@dataclass(frozen=True)
class Rendering:
    """What the beam meets.

    Attributes:
        grams: Mass per area by material, g/cm² [H, W].
        masks: bool [len(MASK_LABELS), H, W].
        finding_masks: bool [len(FINDINGS), H, W].
    """

    grams: dict[str, np.ndarray]
    masks: np.ndarray
    finding_masks: np.ndarray


def smooth_noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Noise of unit variance with `cells` bumps along a side, float32 [size, size]."""
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def organ_function(t: Thorax, status: Status, supine: bool):
    """Implicit quantities of the chest: density of soft tissue, and lengths by structure."""
    effusions = {f.side: f for f in status.of("pleural_effusion")}
    air = {f.side: f for f in status.of("pneumothorax")}

    def organs(x, y, z):
        lung_d, heart_d = anatomy.lung_distance(t, x, y, z)
        cage_d = anatomy.cage_distance(t, x, y, z)
        lung = occupied(lung_d)
        body = anatomy.soft_density(t, x, y, z)
        right = (x < 0).astype(np.float32)
        values = {"heart": occupied(heart_d)}
        density = np.float32(t.lung_density) * np.ones_like(lung)
        for finding in status.of("consolidation"):
            inside = consolidation(t, finding, x, y, z) * lung
            density = density + inside * (0.30 + 0.45 * finding.severity)
            _add(values, finding.name, inside)
        for finding in status.of("atelectasis"):
            inside = atelectasis(t, finding, x, y, z) * lung
            density = density + inside * (0.75 if finding.kind == "plate" else 0.5)
            _add(values, finding.name, inside)
        for finding in status.of("fibrosis"):
            low = np.clip((t.apex - z) / t.lung_height * 1.6 - 0.5, 0, 1)
            inside = low * np.clip(1 + cage_d / 3.5, 0, 1) * lung
            density = density + inside * (0.10 + 0.22 * finding.severity)
            _add(values, finding.name, inside * (0.15 + 0.2 * finding.severity))
        for side, finding in air.items():
            gap = pleural_gap(t, finding, z)
            inside = occupied(-(cage_d + gap), 0.5) * lung * (x * side > 0)
            density = density * (1 - inside) + 0.002 * inside
            _add(values, "pneumothorax", inside)
        for side, finding in effusions.items():
            inside = effusion(t, finding, supine, cage_d, x, y, z) * lung * (x * side > 0)
            density = density * (1 - inside) + 1.02 * inside
            _add(values, "pleural_effusion", inside)
        if t.stomach > 0.3:
            centre = np.array([6.0, -1.0, t.apex - t.lung_height - 0.6 + t.dome_left - 2.0])
            gas = anatomy.ellipsoid_distance(
                centre, np.array([t.stomach + 0.8, 2.2, 1.3]), np.eye(3), x, y, z
            )
            body = body * (1 - occupied(gas))
        values["soft"] = body * (1 - lung) + lung * density
        values["right_lung"] = lung * right
        values["left_lung"] = lung * (1 - right)
        return values

    return organs


def _add(values: dict, name: str, inside) -> None:
    key = "finding:" + name
    values[key] = values[key] + inside if key in values else inside


def pleural_gap(t, finding, z):
    """Distance of a collapsed lung from the cage at height z, widest at the apex, cm."""
    fall = 1.5 - 0.7 * finding.severity
    share = np.clip(1.25 - (t.apex - z) / t.lung_height * fall, 0.0, 1.3)
    return (0.8 + 3.4 * finding.severity) * share


def pleural_line(t, status):
    """The visceral pleura of collapsed lungs, too thin for the planes that suffice elsewhere."""

    def organs(x, y, z):
        distance = anatomy.cage_distance(t, x, y, z)
        total = 0.0
        for finding in status.of("pneumothorax"):
            gap = pleural_gap(t, finding, z)
            sheet = np.clip(1 - np.abs(distance + gap) / 0.2, 0, 1) * (gap > 0.25)
            total = total + sheet * ((x * finding.side > 3) & (z > anatomy.diaphragm(t, x, y)))
        return {"pleura": total}

    return organs


def consolidation(t, finding, x, y, z):
    """Share of filled air space: a cloud with a ragged edge, within one lung."""
    place = np.array(finding.place)
    centre = anatomy.place_in_lung(t, finding.side, finding.place)
    radius = 2.6 + 2.8 * finding.severity
    r = _distance(centre, x, y, z)
    wave = sum(
        np.sin(a * x + b * y + c * z + 40 * p)
        for (a, b, c), p in zip(_RIPPLES, np.tile(place, 2), strict=False)
    )
    cloud = np.clip(1.25 - r / radius + 0.16 * wave, 0, 1)
    return cloud * (x * finding.side > 0)


_RIPPLES = ((1.9, 0.4, 0.7), (-0.6, 1.5, 1.2), (0.5, -0.8, 2.1), (2.9, 1.4, -1.8), (-1.6, 2.2, 2.8))


def nodule_balls(t: Thorax, finding: Finding) -> tuple[np.ndarray, float]:
    """Centres [K, 3] and radius of the balls whose union is the nodule, cm."""
    centre = anatomy.place_in_lung(t, finding.side, finding.place)
    radius = nodule_radius(finding)
    if finding.kind == "round":
        return centre[None], radius
    bulges = np.array([[-0.5, 0.2, 0.3], [0.4, -0.3, 0.45], [0.1, 0.3, -0.5]])
    return centre + radius * bulges, 0.7 * radius


def _distance(centre, x, y, z):
    cx, cy, cz = (float(c) for c in centre)
    return np.sqrt((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2)


def effusion(t, finding, supine, cage_d, x, y, z):
    """Share of pleural fluid: a meniscus upright, a posterior layer on the back."""
    s = finding.severity
    if supine:
        _, b, middle = anatomy.cage(t, z)
        depth = (1.2 + 4.5 * s) * np.clip(
            1.2 - (z - (t.apex - t.lung_height)) / t.lung_height, 0.2, 1
        )
        return occupied(middle + b - depth - y, 0.6)
    a, _, _ = anatomy.cage(t, z)
    base = t.apex - t.lung_height + 1.0 + 9.0 * s
    # The meniscus climbs along the wall, at the side more than in front and behind.
    climb = (2.4 + 2.0 * s) * (np.abs(x) / (t.split + a)) ** 3 + 0.8 * np.exp(cage_d / 1.2)
    return occupied(z - base - climb, 0.5)


def diaphragm_at(t: Thorax, x: float, y: float) -> float:
    """z of the diaphragm at one point, cm."""
    return float(anatomy.diaphragm(t, np.array(x), np.array(y)))


def atelectasis(t, finding, x, y, z):
    """Share of collapsed lung: plates above the diaphragm, or a basal wedge by the spine."""
    side = x * finding.side > 0
    if finding.kind == "plate":
        total = 0.0
        for k in range(2 if finding.severity > 0.5 else 1):
            # Subsegmental plates lie nearly level, so that frontal rays meet them edge on.
            x0, y0 = 6.0 + 2.0 * finding.place[0] - 1.5 * k, 1.0 - 3.0 * k
            level = diaphragm_at(t, finding.side * x0, y0) + 1.8 + 2.2 * k + finding.place[0]
            across, deep = np.abs(x) - x0, (y - y0) / 4.0
            off = np.abs(z - level - (0.35 - 0.6 * k) * across)
            extent = (across / (2.2 + 1.8 * finding.severity)) ** 2 + deep**2
            thick = 0.22 + 0.25 * finding.severity
            total = total + np.clip(1.2 - off / thick, 0, 1) * np.clip(3 - 3 * extent, 0, 1)
        return np.minimum(total, 1) * side
    height = anatomy.diaphragm(t, x, y)
    reach = 3.5 + 2.5 * finding.severity
    wedge = np.clip((reach - 0.55 * (z - height) - 0.75 * (np.abs(x) - 2.5)) / 1.5, 0, 1)
    return wedge * side * (y > -1)


def render(
    t: Thorax, status: Status, beam: Beam, supine: bool, anatomy_rng, study_rng
) -> Rendering:
    """Project one study.

    Args:
        t: The chest, findings' changes of shape included.
        status: The findings.
        beam: Geometry.
        supine: True when the patient lies.
        anatomy_rng: Randomness that all images of a patient share (vessels).
        study_rng: Randomness that the images of a study share.
    """
    if beam.view == "LL":  # the arms are held up, out of the beam
        t = replace(t, shoulder=min(t.shoulder, t.split + t.half_width + t.fat + 2.5))
    organs = organ_function(t, status, supine)
    half_depth = t.half_depth + t.fat + 3.5 if beam.view != "LL" else t.shoulder + 1.0
    grid = max(32, round(beam.size * 0.5))
    paths = march(beam, organs, half_depth, grid, 44)
    soft = paths["soft"]
    if status.has("pneumothorax"):
        line = march(beam, pleural_line(t, status), half_depth, grid, 160)
        soft = soft + 0.6 * line["pleura"]
    bone, masks_bone = _bones(t, status, beam, study_rng)
    soft = soft + _vessels(t, status, beam, organs, anatomy_rng)
    soft = soft - SOFT_TISSUE * project_tubes(beam, anatomy.airways(t))
    for finding in status.of("nodule"):
        centres, radius = nodule_balls(t, finding)
        path = project_balls(beam, centres, radius)
        around = organs(*centres.mean(0).astype(np.float32)[:, None])["soft"]
        # The small ones that a radiograph shows at all are calcified.
        chalk = 1.5 * np.clip((0.6 - nodule_radius(finding)) / 0.35, 0, 1)
        soft = soft + path * (max(0.5, 1.04 - float(around[0])) + chalk)
        paths["finding:nodule"] = path / path.max() * 0.6 if path.max() > 0 else path
    soft = soft + breast_path(t, beam) + fibrosis_strands(t, status, beam, study_rng)
    metal, devices, device_mask = device_tubes(t, status, beam, study_rng)
    grams = {"soft": np.maximum(soft + devices, 0), "bone": bone, "metal": metal}
    masks = _label_maps(paths, beam, masks_bone)
    finding_masks = _finding_masks(paths, status, masks[8], masks_bone["fracture"], device_mask)
    return Rendering(grams, masks, finding_masks)


def _bones(t, status, beam, rng):
    shell, size = t.bone_density, beam.size
    tubes = anatomy.ribs(t)
    fracture = np.zeros((size, size), bool)
    for finding in status.of("rib_fracture"):
        index = (0 if finding.side < 0 else 12) + int(finding.place[0]) - 1
        tubes, spot = _break(tubes, index, finding)
        column, row, magnification = beam.project(spot)
        radius = 1.3 * magnification / beam.field * size
        canvas = np.zeros((size, size), np.uint8)
        cv2.circle(
            canvas, (round(float(column)), round(float(row))), max(2, round(float(radius))), 1, -1
        )
        fracture |= canvas > 0
    wall = CORTICAL_BONE * shell
    cage = project_tubes(beam, tubes, 0.13, 0.16) * wall * 0.75
    collar = project_tubes(beam, anatomy.clavicles(t), 0.2, 0.18) * wall * 0.7
    blades = anatomy.scapulae(t) + ([] if beam.view == "LL" else anatomy.humeri(t))
    rest = project_tubes(beam, anatomy.spine(t), 0.15, 0.25) * wall * 0.5
    rest += project_tubes(beam, blades, 0.15, 0.22) * wall * 0.35
    rest += project_tubes(beam, anatomy.vertebral_arches(t)) * 0.35 * shell
    rest += project_tubes(beam, anatomy.sternum(t)) * 0.18 * shell
    rest += _ageing(t, beam)
    masks = {"ribs": cage > 0.12, "clavicles": collar > 0.12, "fracture": fracture}
    return cage + collar + rest, masks


def _ageing(t: Thorax, beam: Beam) -> np.ndarray:
    """Chalk and spurs that come with the years, g/cm²."""
    total = np.zeros((beam.size, beam.size), np.float32)
    if t.calcification > 0.05:
        total += project_tubes(beam, anatomy.arch_calcification(t)) * 0.5 * t.calcification
    if t.cartilage > 0.05:
        total += project_tubes(beam, anatomy.cartilages(t), 0.2, 0.5) * 0.4 * t.cartilage
    if t.spurs > 0.1:
        total += project_tubes(beam, anatomy.spurs(t)) * 0.7 * t.spurs
    return total


def _break(tubes: list[Tube], index: int, finding: Finding) -> tuple[list[Tube], np.ndarray]:
    """Split one rib, shift the far piece, and thicken the ends."""
    tube = tubes[index]
    n = len(tube.centre)
    at = int(finding.place[1] * n)
    gap = 0.25 + 0.55 * finding.severity
    shift = np.array([0.0, 0.0, -gap])
    radius = np.broadcast_to(tube.radius, n)
    assert tube.flat is not None
    near = Tube(tube.centre[:at], radius[:at], 0.36, tube.flat[:at])
    far = Tube(tube.centre[at + 1 :] + shift, radius[at + 1 :], 0.36, tube.flat[at + 1 :])
    return [*tubes[:index], near, far, *tubes[index + 1 :]], tube.centre[at]


def _vessels(t, status, beam, organs, rng):
    points, radius, length = vessel_tree(t, rng)
    x, y, z = points.T.astype(np.float32)
    values = organs(x, y, z)
    inside = values["right_lung"] + values["left_lung"]
    contrast = np.clip(1.05 - values["soft"], 0, 1) * (values["soft"] > 0.05) * inside
    if status.has("consolidation"):
        # Bronchi run beside the vessels and stay full of air: air bronchograms.
        contrast -= 0.9 * values["finding:consolidation"] * (radius > 0.1)
    volume = np.pi * radius**2 * length * contrast
    pixel = beam.field / beam.size
    total = np.zeros((beam.size, beam.size), np.float32)
    edges = [0, 0.05, 0.1, 0.16, 0.26, 0.45, 9]
    for low, high in itertools.pairwise(edges):
        chosen = (radius >= low) & (radius < high)
        if chosen.any():
            layer = splat(beam, points[chosen], volume[chosen])
            # A chord profile 2 sqrt(r² - d²) has the standard deviation r / 2.
            sigma = float(radius[chosen].mean()) / 2 / pixel
            total += cv2.GaussianBlur(layer, (0, 0), sigma) if sigma > 0.3 else layer
    return total


def _label_maps(paths, beam, bones):
    lungs = np.stack([paths["right_lung"] > 2.5, paths["left_lung"] > 2.5])
    heart = paths["heart"] > 2.0
    if beam.view != "LL":
        lungs &= ~heart
    masks = np.zeros((len(MASK_LABELS), beam.size, beam.size), bool)
    masks[:2] = lungs
    for index, lung in enumerate(lungs):
        rows = np.flatnonzero(lung.any(axis=1))
        if len(rows):
            edges = np.linspace(rows[0], rows[-1] + 1, 4).round().astype(int)
            for zone in range(3):
                part = slice(edges[zone], edges[zone + 1])
                masks[2 + 3 * index + zone, part] = lung[part]
    masks[8], masks[9], masks[10] = heart, bones["ribs"], bones["clavicles"]
    return masks


def _finding_masks(paths, status, heart, fracture, devices):
    masks = np.zeros((len(FINDINGS), *heart.shape), bool)
    thresholds = {"pneumothorax": 0.6, "nodule": 0.15, "fibrosis": 0.25}
    for index, name in enumerate(FINDINGS):
        if not status.has(name):
            continue
        if name == "cardiomegaly":
            masks[index] = heart
        elif name == "rib_fracture":
            masks[index] = fracture
        elif name == "support_device":
            masks[index] = devices
        else:
            masks[index] = paths["finding:" + name] > thresholds.get(name, 0.5)
    return masks
