"""The chest as implicit functions: healthy organs, and what findings change in them.

Positions x, y, z are arrays that broadcast against each other, in cm; shares are 0 to 1.
"""

from __future__ import annotations

import numpy as np

from selfray.data.phantom import anatomy
from selfray.data.phantom.anatomy import Array, Thorax, occupied
from selfray.data.phantom.findings import Finding, Status, nodule_radius
from selfray.data.phantom.projection import Occupancy

_FLUID = 1.02  # g/cm³
_AIR = 0.002
# Waves per cm that make the edge of a consolidation ragged; their phases come from its place.
_RIPPLES = ((1.9, 0.4, 0.7), (-0.6, 1.5, 1.2), (0.5, -0.8, 2.1), (2.9, 1.4, -1.8), (-1.6, 2.2, 2.8))


def chest(t: Thorax, status: Status, supine: bool) -> Occupancy:
    """Quantities to integrate along rays.

    Returns:
        Function of x, y, z to: `soft`, density of soft tissue in g/cm³; and the shares of
        `right_lung`, `left_lung`, `heart` and `finding:NAME` for each diffuse finding.
    """

    def organs(x: Array, y: Array, z: Array) -> dict[str, Array]:
        lung_distance, heart_distance = anatomy.lung_distance(t, x, y, z)
        lung = occupied(lung_distance)
        right = (x < 0).astype(np.float32)
        density, values = _lung_density(t, status, supine, lung, x, y, z)
        body = anatomy.soft_density(t, x, y, z) * (1 - _stomach_gas(t, x, y, z))
        return values | {
            "soft": body * (1 - lung) + lung * density,
            "right_lung": lung * right,
            "left_lung": lung * (1 - right),
            "heart": occupied(heart_distance),
        }

    return organs


def _lung_density(
    t: Thorax, status: Status, supine: bool, lung: Array, x: Array, y: Array, z: Array
) -> tuple[Array, dict[str, Array]]:
    """Density inside of the lungs and pleural space, g/cm³, and where findings changed it."""
    values: dict[str, Array] = {}
    density = np.full_like(lung, t.lung_density)
    wall = anatomy.cage_distance(t, x, y, z)

    def note(name: str, inside: Array) -> None:
        key = f"finding:{name}"
        values[key] = values[key] + inside if key in values else inside

    for finding in status.findings:
        severity, side = finding.severity, x * finding.side > 0
        if finding.name == "consolidation":
            inside = consolidation(t, finding, x, y, z) * lung * side
            density = density + inside * (0.30 + 0.45 * severity)
        elif finding.name == "atelectasis":
            inside = atelectasis(t, finding, x, y, z) * lung * side
            density = density + inside * (0.65 if finding.kind == "plate" else 0.5)
        elif finding.name == "fibrosis":
            low = np.clip((t.apex - z) / t.lung_height * 1.6 - 0.5, 0, 1)
            inside = low * np.clip(1 + wall / 3.5, 0, 1) * lung
            density = density + inside * (0.10 + 0.22 * severity)
            inside = inside * (0.15 + 0.2 * severity)
        else:
            continue
        note(finding.name, inside)
    # Air and fluid in the pleural space displace the lung, whatever is in it.
    for finding in status.of("pneumothorax"):
        outside = occupied(-(wall + pleural_gap(t, finding, z)))
        inside = outside * lung * (x * finding.side > 0)
        density = density * (1 - inside) + _AIR * inside
        note(finding.name, inside)
    for finding in status.of("pleural_effusion"):
        inside = effusion(t, finding, supine, wall, x, y, z) * lung * (x * finding.side > 0)
        density = density * (1 - inside) + _FLUID * inside
        note(finding.name, inside)
    return density, values


def _stomach_gas(t: Thorax, x: Array, y: Array, z: Array) -> Array | float:
    if t.stomach <= 0.3:
        return 0.0
    centre = np.array([6.0, -1.0, t.apex - t.lung_height - 2.6 + t.dome_left])
    half = np.array([t.stomach + 0.8, 2.2, 1.3])
    return occupied(anatomy.ellipsoid_distance(centre, half, np.eye(3), x, y, z))


def pleural_gap(t: Thorax, finding: Finding, z: Array) -> Array:
    """Distance of a collapsed lung from the cage at height z, widest at the apex, cm."""
    fall = 1.5 - 0.7 * finding.severity
    share = np.clip(1.25 - (t.apex - z) / t.lung_height * fall, 0.0, 1.3)
    return (0.8 + 3.4 * finding.severity) * share


def pleural_line(t: Thorax, status: Status) -> Occupancy:
    """The visceral pleura of collapsed lungs, too thin for the planes that suffice elsewhere.

    Returns:
        Function of x, y, z to the share `pleura`.
    """

    def organs(x: Array, y: Array, z: Array) -> dict[str, Array]:
        distance = anatomy.cage_distance(t, x, y, z)
        total = np.zeros_like(distance)
        for finding in status.of("pneumothorax"):
            gap = pleural_gap(t, finding, z)
            sheet = np.clip(1 - np.abs(distance + gap) / 0.2, 0, 1) * (gap > 0.25)
            total = total + sheet * ((x * finding.side > 3) & (z > anatomy.diaphragm(t, x, y)))
        return {"pleura": total}

    return organs


def consolidation(t: Thorax, finding: Finding, x: Array, y: Array, z: Array) -> Array:
    """Share of filled air space: a cloud with a ragged edge."""
    cx, cy, cz = anatomy.place_in_lung(t, finding.side, finding.place).tolist()
    radius = 2.6 + 2.8 * finding.severity
    r = np.sqrt((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2)
    wave = np.zeros_like(r)
    for index, (a, b, c) in enumerate(_RIPPLES):
        wave += np.sin(a * x + b * y + c * z + 40 * finding.place[index % len(finding.place)])
    return np.clip(1.25 - r / radius + 0.16 * wave, 0, 1)


def nodule_balls(t: Thorax, finding: Finding) -> tuple[np.ndarray, float]:
    """Centres [K, 3] and radius of the balls whose union is the nodule, cm."""
    centre = anatomy.place_in_lung(t, finding.side, finding.place)
    radius = nodule_radius(finding)
    if finding.kind == "round":
        return centre[None], radius
    bulges = np.array([[-0.5, 0.2, 0.3], [0.4, -0.3, 0.45], [0.1, 0.3, -0.5]])
    return centre + radius * bulges, 0.7 * radius


def effusion(
    t: Thorax, finding: Finding, supine: bool, wall: Array, x: Array, y: Array, z: Array
) -> Array:
    """Share of pleural fluid: a meniscus upright, a layer along the back when lying.

    Args:
        t: The chest.
        finding: The effusion.
        supine: True when the patient lies.
        wall: Signed distance to the cage, cm.
        x: Position, as y and z.
        y: Position.
        z: Position.
    """
    s = finding.severity
    a, b, middle = anatomy.cage(t, z)
    above_base = z - (t.apex - t.lung_height)
    if supine:
        depth = (1.2 + 4.5 * s) * np.clip(1.2 - above_base / t.lung_height, 0.2, 1)
        return occupied(middle + b - depth - y, 0.6)
    # The meniscus climbs along the wall, at the side more than in front and behind.
    climb = (2.4 + 2.0 * s) * (np.abs(x) / (t.split + a)) ** 3 + 0.8 * np.exp(wall / 1.2)
    return occupied(above_base - 1.0 - 9.0 * s - climb)


def atelectasis(t: Thorax, finding: Finding, x: Array, y: Array, z: Array) -> Array:
    """Share of collapsed lung: plates above the diaphragm, or a basal wedge by the spine."""
    if finding.kind == "plate":
        first = _plate(t, finding, 0, x, y, z)
        return (
            np.maximum(first, _plate(t, finding, 1, x, y, z)) if finding.severity > 0.5 else first
        )
    height = anatomy.diaphragm(t, x, y)
    reach = 3.5 + 2.5 * finding.severity
    wedge = np.clip((reach - 0.55 * (z - height) - 0.75 * (np.abs(x) - 2.5)) / 1.5, 0, 1)
    return wedge * (y > -1)


def _plate(t: Thorax, finding: Finding, number: int, x: Array, y: Array, z: Array) -> Array:
    """One subsegmental plate, nearly level, so that frontal rays meet it edge on."""
    place = finding.place[0]
    x0, y0 = 6.0 + 2.0 * place - 1.5 * number, 1.0 - 3.0 * number
    base = float(anatomy.diaphragm(t, np.array(finding.side * x0), np.array(y0)))
    level = base + 1.8 + 2.2 * number + place
    across, deep = np.abs(x) - x0, (y - y0) / 4.0
    off = np.abs(z - level - (0.35 - 0.6 * number) * across)
    extent = (across / (2.2 + 1.8 * finding.severity)) ** 2 + deep**2
    return np.clip(1.2 - off / (0.22 + 0.22 * finding.severity), 0, 1) * np.clip(
        3 - 3 * extent, 0, 1
    )
