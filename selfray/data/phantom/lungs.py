"""Fine structure of the lungs and the chest wall: vessels, strands of fibrosis, breasts."""

from __future__ import annotations

import numpy as np

from selfray.data.phantom import anatomy
from selfray.data.phantom.anatomy import Thorax
from selfray.data.phantom.findings import Status
from selfray.data.phantom.projection import Beam, splat


def vessel_tree(t: Thorax, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Branching tubes from both hila to the periphery, as points.

    Returns:
        Points [N, 3], radius [N] and length [N] of the piece at each point, cm.
    """
    hilum_z = t.apex - 0.44 * t.lung_height
    starts, directions, radii = [], [], []
    for side in (-1, 1):
        for _ in range(22):
            goal = np.array(
                [
                    side * rng.uniform(3.0, t.split + t.half_width),
                    rng.uniform(-1, 1) * t.half_depth,
                    t.apex - rng.uniform(0.0, 1.02) * t.lung_height,
                ]
            )
            start = np.array([side * 3.0, 0.5, hilum_z + (0.8 if side > 0 else 0)])
            starts.append(start + rng.normal(0, 0.7, 3))
            directions.append((goal - start) / np.linalg.norm(goal - start))
            radii.append(rng.uniform(0.22, 0.5))
    position, heading, radius = np.array(starts), np.array(directions), np.array(radii)
    points, sizes, lengths = [], [], []
    for _ in range(5):
        steps = 18
        count = len(position)
        reach = rng.uniform(2.0, 4.2, count)
        bend = rng.normal(0, 0.35, (count, 3))
        s = (np.arange(steps) + 0.5) / steps
        curve = heading[:, None] * s[:, None] + 0.5 * bend[:, None] * s[:, None] ** 2
        points.append((position[:, None] + curve * reach[:, None, None]).reshape(-1, 3))
        sizes.append((radius[:, None] * (1 - 0.2 * s)).reshape(-1))
        lengths.append(np.repeat(reach / steps, steps))
        end = position + (heading + 0.5 * bend) * reach[:, None]
        heading = heading + bend
        children = []
        for turn in (-1.0, 1.0):
            aside = rng.normal(0, 0.33, (count, 3)) * turn
            new = heading + aside
            children.append((end, new / np.linalg.norm(new, axis=1, keepdims=True)))
        shrink = rng.uniform(0.62, 0.82, (2, count))
        position = np.concatenate([children[0][0], children[1][0]])
        heading = np.concatenate([children[0][1], children[1][1]])
        radius = np.concatenate([radius * shrink[0], radius * shrink[1]])
    return np.concatenate(points), np.concatenate(sizes), np.concatenate(lengths)


def fibrosis_strands(t: Thorax, status: Status, beam: Beam, rng: np.random.Generator) -> np.ndarray:
    """Reticular lines of fibrosis at the base and periphery, path length in cm [H, W]."""
    total = np.zeros((beam.size, beam.size), np.float32)
    for finding in status.of("fibrosis"):
        count = 900
        z = t.apex - t.lung_height * (1 - rng.beta(1.2, 2.5, count) * 0.9)
        a, b, middle = anatomy.cage(t, z)
        angle = rng.uniform(0, 2 * np.pi, count)
        deep = 1 - rng.beta(1.2, 4, count) * 0.5
        side = rng.choice([-1.0, 1.0], count)
        x = side * np.abs(t.split + deep * a * np.cos(angle))
        centre = np.stack([x, middle + deep * b * np.sin(angle), z], axis=1)
        around = np.linspace(0, 2 * np.pi, 20)
        one, two = rng.normal(0, 1, (2, count, 3))
        radius = rng.uniform(0.2, 0.55, count)[:, None, None]
        ring = (
            np.cos(around)[None, :, None] * one[:, None]
            + np.sin(around)[None, :, None] * two[:, None]
        )
        points = (centre[:, None] + 0.6 * radius * ring).reshape(-1, 3)
        x, y, z = points.T
        inside = anatomy.lung_distance(t, x, y, z)[0] < -0.05
        thick = 0.05 + 0.07 * finding.severity
        volume = np.full(len(points), np.pi * thick**2 * 0.2 * 0.8) * inside
        total += splat(beam, points, volume)
    return total


def breast_path(t: Thorax, beam: Beam) -> np.ndarray:
    """Mass of breasts or pectoral fat in front of the chest, g/cm² [H, W]."""
    total = np.zeros((beam.size, beam.size), np.float32)
    if t.breast < 1.2:
        return total
    r = t.breast
    z = t.apex - t.lung_height * 0.62 + t.breast_droop * t.lung_height
    _, b, middle = anatomy.cage(t, np.array(z))
    for side in (-1, 1):
        centre = np.array([side * (t.split + 3.6 + 0.15 * r), middle - b - 1.8 - t.fat, z])
        half = np.array([1.15 * r, 0.55 * r, 1.2 * r])
        column, row, magnification = beam.project(centre)
        px = beam.size / beam.field * magnification
        if beam.view == "LL":
            ex, depth = half[1], half[0]
        else:
            ex, depth = half[0], half[1]
        rows, columns = np.mgrid[: beam.size, : beam.size].astype(np.float32)
        dz = (row - rows) / (px * half[2])
        # The lower edge of a breast is sharp, the upper one runs out into the chest wall.
        dz = np.where(dz > 0, dz / 1.7, dz)
        q = 1 - ((columns - column) / (px * ex)) ** 2 - dz**2
        total += (2 * depth * 0.55 * np.sqrt(np.maximum(q, 0)) * 0.95).astype(np.float32)
    return total
