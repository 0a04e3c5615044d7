"""One study of one patient in one beam: masses along every ray, and masks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import cv2
import numpy as np

from selfray.data.phantom import skeleton
from selfray.data.phantom.anatomy import Thorax
from selfray.data.phantom.devices import device_tubes
from selfray.data.phantom.findings import FINDINGS, Finding, Status, nodule_radius
from selfray.data.phantom.lesions import chest, nodule_balls, pleural_line
from selfray.data.phantom.lungs import breast_path, fibrosis_strands, vessel_tree
from selfray.data.phantom.physics import CORTICAL_BONE, SOFT_TISSUE
from selfray.data.phantom.projection import (
    Beam,
    Occupancy,
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
        pixel_spacing_mm: Side of a pixel on the detector.
    """

    grams: dict[str, np.ndarray]
    masks: np.ndarray
    finding_masks: np.ndarray
    pixel_spacing_mm: float


def render(
    t: Thorax,
    status: Status,
    beam: Beam,
    supine: bool,
    anatomy_rng: np.random.Generator,
    study_rng: np.random.Generator,
) -> Rendering:
    """Project one study.

    Args:
        t: The chest, findings' changes of shape included.
        status: The findings.
        beam: Geometry.
        supine: True when the patient lies.
        anatomy_rng: Randomness that all images of a patient share (vessels).
        study_rng: Randomness that the images of a study share (strands of fibrosis).
    """
    if beam.view == "LL":  # the arms are held up, out of the beam
        t = replace(t, shoulder=min(t.shoulder, t.split + t.half_width + t.fat + 2.5))
    organs = chest(t, status, supine)
    half_depth = t.half_depth + t.fat + 3.5 if beam.view != "LL" else t.shoulder + 1.0
    grid = max(32, beam.size // 2)  # organs are smooth; fine structure is projected apart
    paths = march(beam, organs, half_depth, grid, 44)
    soft = paths["soft"] + _vessels(t, status, beam, organs, anatomy_rng)
    soft -= SOFT_TISSUE * project_tubes(beam, skeleton.airways(t))
    soft += breast_path(t, beam) + fibrosis_strands(t, status, beam, study_rng)
    if status.has("pneumothorax"):
        soft += 0.6 * march(beam, pleural_line(t, status), half_depth, grid, 160)["pleura"]
    nodules, nodule_mask = _nodules(t, status, beam, organs)
    metal, plastic, device_mask = device_tubes(t, status, beam)
    ribs, collar, bone = _bones(t, status, beam)
    found = {
        "nodule": nodule_mask,
        "support_device": device_mask,
        "rib_fracture": _fracture_mask(t, status, beam),
    }
    masks = _label_maps(paths, beam, ribs > 0.12, collar > 0.12)
    return Rendering(
        {"soft": np.maximum(soft + nodules + plastic, 0), "bone": bone, "metal": metal},
        masks,
        _finding_masks(paths, status, masks[MASK_LABELS.index("heart")], found),
        round(10 * beam.field / beam.size, 4),
    )


def _nodules(
    t: Thorax, status: Status, beam: Beam, organs: Occupancy
) -> tuple[np.ndarray, np.ndarray]:
    """Mass of nodules beyond the lung that they replace, g/cm², and their mask."""
    total = np.zeros((beam.size, beam.size), np.float32)
    mask = total > 0
    for finding in status.of("nodule"):
        centres, radius = nodule_balls(t, finding)
        path = project_balls(beam, centres, radius)
        around = organs(*centres.mean(0).astype(np.float32)[:, None])["soft"]
        # The small ones that a radiograph shows at all are calcified.
        chalk = 1.5 * np.clip((0.6 - nodule_radius(finding)) / 0.35, 0, 1)
        total += path * (max(0.5, 1.04 - float(around[0])) + float(chalk))
        mask |= path > max(0.25 * float(path.max()), 1e-6)
    return total, mask


def _bones(t: Thorax, status: Status, beam: Beam) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bone of the ribs, of the clavicles, and of all bones together, g/cm²."""
    wall = CORTICAL_BONE * t.bone_density
    tubes = skeleton.ribs(t)
    for finding in status.of("rib_fracture"):
        tubes = _break(tubes, finding)
    ribs = project_tubes(beam, tubes, 0.13, 0.16) * wall * 0.75
    collar = project_tubes(beam, skeleton.clavicles(t), 0.2, 0.18) * wall * 0.7
    blades = skeleton.scapulae(t) + ([] if beam.view == "LL" else skeleton.humeri(t))
    rest = project_tubes(beam, skeleton.spine(t), 0.15, 0.25) * wall * 0.5
    rest += project_tubes(beam, blades, 0.15, 0.22) * wall * 0.35
    rest += project_tubes(beam, skeleton.vertebral_arches(t)) * 0.35 * t.bone_density
    rest += project_tubes(beam, skeleton.sternum(t)) * 0.18 * t.bone_density
    return ribs, collar, ribs + collar + rest + _ageing(t, beam)


def _fracture_mask(t: Thorax, status: Status, beam: Beam) -> np.ndarray:
    """Discs around broken ribs, 13 mm in radius."""
    canvas = np.zeros((beam.size, beam.size), np.uint8)
    for finding in status.of("rib_fracture"):
        path = skeleton.rib_path(t, int(finding.place[0]), finding.side)
        spot = path[int(finding.place[1] * len(path))]
        column, row, magnification = (float(v) for v in beam.project(spot))
        radius = max(2, round(1.3 * magnification * beam.size / beam.field))
        cv2.circle(canvas, (round(column), round(row)), radius, 1, -1)
    return canvas > 0


def _ageing(t: Thorax, beam: Beam) -> np.ndarray:
    """Chalk and spurs that come with the years, g/cm²."""
    total = np.zeros((beam.size, beam.size), np.float32)
    if t.calcification > 0.05:
        total += project_tubes(beam, skeleton.arch_calcification(t)) * 0.5 * t.calcification
    if t.cartilage > 0.05:
        total += project_tubes(beam, skeleton.cartilages(t), 0.2, 0.5) * 0.4 * t.cartilage
    if t.spurs > 0.1:
        total += project_tubes(beam, skeleton.spurs(t)) * 0.7 * t.spurs
    return total


def _break(tubes: list[Tube], finding: Finding) -> list[Tube]:
    """Split one rib and shift its far piece down."""
    index = (0 if finding.side < 0 else 12) + int(finding.place[0]) - 1
    tube = tubes[index]
    assert tube.flat is not None
    at = int(finding.place[1] * len(tube.centre))
    shift = np.array([0.0, 0.0, -(0.25 + 0.55 * finding.severity)])
    radius = np.broadcast_to(tube.radius, len(tube.centre))
    near = Tube(tube.centre[:at], radius[:at], tube.thickness, tube.flat[:at])
    far = Tube(tube.centre[at + 1 :] + shift, radius[at + 1 :], tube.thickness, tube.flat[at + 1 :])
    return [*tubes[:index], near, *tubes[index + 1 :], far]


def _vessels(
    t: Thorax, status: Status, beam: Beam, organs: Occupancy, rng: np.random.Generator
) -> np.ndarray:
    """Mass of vessels beyond the lung that they replace, g/cm² [H, W]."""
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


def _label_maps(
    paths: dict[str, np.ndarray], beam: Beam, ribs: np.ndarray, collar: np.ndarray
) -> np.ndarray:
    """Masks in the order of `MASK_LABELS`, bool [K, H, W]."""
    lungs = np.stack([paths["right_lung"] > 2.5, paths["left_lung"] > 2.5])
    heart = paths["heart"] > 2.0
    if beam.view != "LL":
        lungs &= ~heart
    zones = np.zeros((2, 3, beam.size, beam.size), bool)
    for parts, lung in zip(zones, lungs, strict=True):
        rows = np.flatnonzero(lung.any(axis=1))
        if len(rows):
            edges = np.linspace(rows[0], rows[-1] + 1, 4).round().astype(int)
            for part, (top, bottom) in zip(parts, itertools.pairwise(edges), strict=True):
                part[top:bottom] = lung[top:bottom]
    return np.stack([*lungs, *zones.reshape(6, beam.size, beam.size), heart, ribs, collar])


def _finding_masks(
    paths: dict[str, np.ndarray], status: Status, heart: np.ndarray, found: dict[str, np.ndarray]
) -> np.ndarray:
    """Masks in the order of `FINDINGS`, bool [K, H, W]."""
    thresholds = {"pneumothorax": 0.6, "fibrosis": 0.25}
    masks = np.zeros((len(FINDINGS), *heart.shape), bool)
    for mask, name in zip(masks, FINDINGS, strict=True):
        if name == "cardiomegaly":
            mask[:] = heart & status.has(name)
        elif name in found:
            mask[:] = found[name]
        elif status.has(name):
            mask[:] = paths[f"finding:{name}"] > thresholds.get(name, 0.5)
    return masks
