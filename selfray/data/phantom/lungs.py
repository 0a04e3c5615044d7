"""Fine structure of the lungs and the chest wall: vessels, strands of fibrosis, breasts."""

from __future__ import annotations

import cv2
import numpy as np

from selfray.data.phantom import anatomy
from selfray.data.phantom.anatomy import Thorax
from selfray.data.phantom.findings import Status
from selfray.data.phantom.projection import Beam, splat


def vessel_tree(t: Thorax, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tapering, forking tubes from both hila to the periphery, as points.

    Returns:
        Points [N, 3], radius [N] and length [N] of the piece at each point, cm.
    """
    position, heading, radius = _stems(t, rng)
    points, sizes, lengths = [], [], []
    for generation in range(7):
        count, steps = len(position), 16 if generation < 4 else 7
        reach = rng.uniform(1.3, 3.2, count) * (1.15 - 0.1 * generation)
        bend = rng.normal(0, 0.28, (count, 3))
        s = (np.arange(steps) + 0.5) / steps
        curve = heading[:, None] * s[:, None] + 0.5 * bend[:, None] * s[:, None] ** 2
        points.append((position[:, None] + curve * reach[:, None, None]).reshape(-1, 3))
        sizes.append((radius[:, None] * (1 - 0.2 * s)).reshape(-1))
        lengths.append(np.repeat(reach / steps, steps))
        end = position + (heading + 0.5 * bend) * reach[:, None]
        aside = rng.normal(0, 0.38, (count, 3))
        # The thinner child turns off further, as flow demands (Murray's law: r³ is kept).
        share = rng.uniform(0.5, 0.85, count)
        thick, thin = share ** (1 / 3), (1 - share) ** (1 / 3)
        forward = heading + bend
        position = np.concatenate([end, end])
        heading = np.concatenate([forward - 0.35 * aside, forward + aside])
        heading /= np.linalg.norm(heading, axis=1, keepdims=True)
        radius = 0.93 * np.concatenate([radius * thick, radius * thin])
    return np.concatenate(points), np.concatenate(sizes), np.concatenate(lengths)


def _stems(t: Thorax, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, direction and radius of the segmental arteries and veins."""
    starts, directions, radii = [], [], []
    hilum = t.apex - 0.45 * t.lung_height
    for side in (-1, 1):
        z = hilum + (0.8 if side > 0 else 0.0)
        for index in range(22):
            turn = (index + rng.uniform(-0.3, 0.3)) / 22 * 2 * np.pi
            goal = np.array(
                [
                    side * (t.split + rng.uniform(-0.2, 0.9) * t.half_width),
                    rng.uniform(-0.9, 0.9) * t.half_depth,
                    z + np.sin(turn) * 0.5 * t.lung_height,
                ]
            )
            down = np.sin(turn) < -0.5
            start = np.array([side * 3.1, 0.3, z + np.sin(turn) * 1.5]) + rng.normal(0, 0.4, 3)
            starts.append(start)
            directions.append((goal - start) / np.linalg.norm(goal - start))
            radii.append(rng.uniform(0.2, 0.36) * (1.25 if down else 1.0))
        # The descending pulmonary artery is the largest vessel of a hilum.
        starts.append(np.array([side * 3.3, 0.8, z + 0.5]))
        directions.append(np.array([side * 0.25, 0.1, -0.96]))
        radii.append(0.62)
    return np.array(starts), np.array(directions), np.array(radii)


def fibrosis_strands(t: Thorax, status: Status, beam: Beam, rng: np.random.Generator) -> np.ndarray:
    """Reticular lines of fibrosis at the base and periphery, path length in cm [H, W]."""
    total = np.zeros((beam.size, beam.size), np.float32)
    for finding in status.of("fibrosis"):
        count = 1300
        z = t.apex - t.lung_height * (1 - rng.beta(1.2, 2.5, count) * 0.9)
        a, b, middle = anatomy.cage(t, z)
        angle = rng.uniform(0, 2 * np.pi, count)
        deep = 1 - rng.beta(1.2, 4, count) * 0.5
        side = rng.choice([-1.0, 1.0], count)
        x = side * np.abs(t.split + deep * a * np.cos(angle))
        centre = np.stack([x, middle + deep * b * np.sin(angle), z], axis=1)
        around = np.linspace(0, 2 * np.pi, 28, endpoint=False)[None, :, None]
        one, two = rng.normal(0, 1, (2, count, 1, 3))
        one /= np.linalg.norm(one, axis=2, keepdims=True)
        two -= (one * two).sum(2, keepdims=True) * one
        two /= np.linalg.norm(two, axis=2, keepdims=True)
        radius = rng.uniform(0.25, 0.6, count)[:, None, None]
        ring = radius * (np.cos(around) * one + np.sin(around) * two)
        points = (centre[:, None] + ring).reshape(-1, 3)
        inside = anatomy.lung_distance(t, *points.T)[0] < -0.05
        thick = 0.07 + 0.06 * finding.severity
        length = np.repeat(2 * np.pi / 28 * radius.reshape(-1), 28)
        layer = splat(beam, points, np.pi * thick**2 * 0.8 * length * inside)
        sigma = max(0.5, thick / 2 * beam.size / beam.field)
        total += cv2.GaussianBlur(layer, (0, 0), sigma)
    return total


def breast_path(t: Thorax, beam: Beam) -> np.ndarray:
    """Mass of breasts or pectoral fat in front of the chest, g/cm² [H, W]."""
    total = np.zeros((beam.size, beam.size), np.float32)
    if t.breast < 1.2:
        return total
    r = t.breast
    z = t.apex - t.lung_height * 0.62 + t.breast_droop * t.lung_height
    _, _, middle = anatomy.cage(t, np.array(z))
    skin = float(middle) - t.half_depth - 2.2 - t.fat
    rows, columns = np.mgrid[: beam.size, : beam.size].astype(np.float32)
    # Lying down, a breast spreads to the side.
    flat, aside = (1.0, 3.4) if t.arms_up else (0.7, 4.8)
    for side in (-1, 1):
        centre = np.array([side * (t.split + aside + 0.15 * r), skin + 0.1 * r + 0.4, z])
        column, row, magnification = beam.project(centre)
        px = float(beam.size / beam.field * magnification)
        seen, depth = (0.6, 1.15) if beam.view == "LL" else (1.15, 0.6)
        dz = (float(row) - rows) / (px * 1.1 * r)
        # The lower edge of a breast is sharp, the upper one runs out into the chest wall.
        dz = np.where(dz > 0, dz / 1.7, dz)
        q = 1 - ((columns - float(column)) / (px * seen * r)) ** 2 - dz**2
        # Only the half in front of the chest wall adds tissue.
        total += flat * depth * r * 0.95 * np.maximum(q, 0) ** 0.7
    return total
