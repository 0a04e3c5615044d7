"""Tubes, lines and pacemakers."""

from __future__ import annotations

import numpy as np

from selfray.data.phantom import anatomy
from selfray.data.phantom.anatomy import Thorax
from selfray.data.phantom.findings import Finding, Status
from selfray.data.phantom.projection import Beam, Tube, project_tubes
from selfray.data.phantom.skeleton import FRONT


def _curve(*points: tuple[float, float, float]) -> np.ndarray:
    """A smooth line through points, cm [N, 3]."""
    from scipy.interpolate import CubicSpline

    array = np.array(points, float)
    knots = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(array, axis=0), axis=1))])
    return CubicSpline(knots, array)(np.linspace(0, knots[-1], 60))


def tip_above_carina(finding: Finding) -> float:
    """Distance of an endotracheal tube's tip from the carina, cm."""
    return 1.5 + 5.0 * finding.severity


def device_parts(t: Thorax, finding: Finding) -> tuple[list[Tube], list[Tube]]:
    """Plastic and metal tubes of one device."""
    side, top, low = finding.side, t.apex, t.apex - t.lung_height
    s = finding.severity
    if finding.kind == "tracheal_tube":
        tip = anatomy.carina_height(t) + tip_above_carina(finding)
        return [Tube(_curve((0.3, -2, top + 9), (0.0, -1.2, top + 2), (0.1, 1.0, tip)), 0.42)], []
    if finding.kind == "gastric_tube":
        line = _curve(
            (0.6, -2, top + 9),
            (0.4, 1.5, top),
            (0.8, 2, top - 10),
            (0.9, 1, low + 5),
            (5.0, -1, low + 0.5),
        )
        return [Tube(line, 0.26)], []
    if finding.kind == "central_line":
        line = _curve(
            (side * 4.5, -2, top + 4.0),
            (side * 3.0, -2.5, top - 1.5),
            (-1.6, -1.5, top - 6),
            (-2.0, -1, top - 9 - 3 * s),
        )
        return [Tube(line, 0.13)], []
    if finding.kind == "chest_tube":
        a = t.split + t.half_width
        line = _curve(
            (side * (a + 5), 0, low + 9),
            (side * (a - 0.5), 0, low + 11),
            (side * (a - 2.5), 1, top - 8),
            (side * 5.5, 1, top - 4),
        )
        return [Tube(line, 0.38)], []
    if finding.kind == "leads":
        return [], _leads(t, s)
    x = side * (t.split + 4.5)
    generator = Tube(
        np.array(
            [
                [x - 2.0, -t.half_depth, top - 5.2],
                [x, -t.half_depth, top - 5.0],
                [x + 2.0, -t.half_depth, top - 5.2],
            ]
        ),
        1.9,
        0.3,
        np.array([0.0, 1.0, 0.0]),
    )
    lead = _curve(
        (x, -5, top - 4.0),
        (side * 5, -3.5, top - 2.4),
        (-1.2, -2.5, top - 5.0),
        (-2.4, -2, top - 12),
        (-1.5, -3, low + 7.0),
        (3.5, -5, low + 5.5),
    )
    return [], [generator, Tube(lead, 0.09)]


def _leads(t: Thorax, position: float) -> list[Tube]:
    """Electrodes on the skin and their wires."""
    tubes = []
    front = -t.half_depth - 2.2 - t.fat
    for x, z in ((-9.5, 8.0), (9.5, 8.0 - 2 * position), (8.0 + 2 * position, -6.0)):
        disc = np.array([[x, front, z - 0.5], [x, front, z + 0.5]])
        wire = _curve((x, front, z), (0.7 * x + 2, front, z - 5), (0.4 * x + 4, front, -20.0))
        tubes += [Tube(disc, 0.55, 0.06, FRONT), Tube(wire, 0.07)]
    return tubes


def device_tubes(
    t: Thorax, status: Status, beam: Beam
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Metal (g/cm²), plastic as soft tissue (g/cm²), and the mask of all devices."""
    metal = np.zeros((beam.size, beam.size), np.float32)
    plastic, seen = metal.copy(), metal.copy()
    for finding in status.of("support_device"):
        soft, hard = device_parts(t, finding)
        wall = project_tubes(beam, soft, 0.1, 0.35) * 2.3
        steel = project_tubes(beam, hard)
        plastic += wall
        metal += np.minimum(steel, 1.0) * 2.5
        seen += wall + steel * 5
    return metal, plastic, seen > 0.15
