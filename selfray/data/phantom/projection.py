"""Cone-beam projection: rays marched through implicit organs, closed-form chords of tubes.

Patient coordinates are in cm: x to the patient's left, y to the back, z to the head. The beam
is described by an image-right vector r, a ray axis d (source to detector) and z; the detector
stands at depth `detector` behind the origin, the source `source_distance` before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

_AXES = {  # image-right, source-to-detector
    "PA": ((1.0, 0.0), (0.0, -1.0)),
    "AP": ((1.0, 0.0), (0.0, 1.0)),
    "LL": ((0.0, 1.0), (1.0, 0.0)),
}


@dataclass(frozen=True)
class Beam:
    """Where source, patient and detector are.

    Attributes:
        view: PA, AP or LL (lateral with the left side at the detector).
        source_distance: Source to detector, cm.
        detector: Origin of the patient's coordinates to detector, cm.
        yaw: Rotation of the patient about the vertical axis, radians.
        roll: Rotation of the image in its plane, radians.
        source_height: z of the source, cm; above the patient's middle gives a lordotic image.
        centre: Detector point (right, up) at the middle of the image, cm.
        field: Side of the square image on the detector, cm.
        size: Side of the image, pixels.
    """

    view: str
    source_distance: float
    detector: float
    yaw: float
    roll: float
    source_height: float
    centre: tuple[float, float]
    field: float
    size: int

    @property
    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Image-right and ray axis in the patient's (x, y), each float64 [2]."""
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        turn = np.array([[cos, -sin], [sin, cos]])
        right, axis = _AXES[self.view]
        return turn @ np.array(right), turn @ np.array(axis)

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Detector position of points in pixels, and their magnification.

        Args:
            points: [..., 3], cm.

        Returns:
            column, row (pixel centres at whole numbers) and magnification, each [...].
        """
        right, axis = self.axes
        across = points[..., 0] * right[0] + points[..., 1] * right[1]
        depth = points[..., 0] * axis[0] + points[..., 1] * axis[1]
        magnification = self.source_distance / (self.source_distance - self.detector + depth)
        u = across * magnification - self.centre[0]
        v = self.source_height + (points[..., 2] - self.source_height) * magnification
        v = v - self.centre[1]
        cos, sin = np.cos(self.roll), np.sin(self.roll)
        scale = self.size / self.field
        middle = (self.size - 1) / 2
        return (
            (cos * u - sin * v) * scale + middle,
            middle - (sin * u + cos * v) * scale,
            magnification,
        )


Occupancy = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]


def march(
    beam: Beam, organs: Occupancy, half_depth: float, grid: int, planes: int
) -> dict[str, np.ndarray]:
    """Integrate implicit quantities along rays.

    Planes perpendicular to the ray axis are sampled, because on such a plane x and y depend on
    the image column only and z on the row only, which makes most of the work one-dimensional.

    Args:
        beam: Geometry; its roll is applied while the result is enlarged.
        organs: From x, y [P, 1, G], z [P, G, 1] (cm) to named values [P, G, G].
        half_depth: Half the extent of the patient along the ray axis, cm.
        grid: Rays along one side of the image.
        planes: Number of planes.

    Returns:
        By name, the integral over length in cm, float32 [size, size].
    """
    # Corners of a rolled image lie outside of the square, so the grid reaches a little further.
    reach = beam.field * (abs(np.cos(beam.roll)) + abs(np.sin(beam.roll))) / 2 * 1.02
    steps = (np.arange(grid) + 0.5) / grid * 2 - 1
    u = (steps * reach + beam.centre[0]).astype(np.float32)
    v = (-steps * reach + beam.centre[1]).astype(np.float32)
    depths = ((np.arange(planes) + 0.5) / planes * 2 - 1).astype(np.float32) * half_depth
    right, axis = beam.axes.__iter__()
    magnification = beam.source_distance / (beam.source_distance - beam.detector + depths)
    across = u[None, :] / magnification[:, None]
    x = across * right[0] + depths[:, None] * axis[0]
    y = across * right[1] + depths[:, None] * axis[1]
    z = beam.source_height + (v[None, :] - beam.source_height) / magnification[:, None]
    x, y, z = (array.astype(np.float32) for array in (x, y, z))
    sums: dict[str, np.ndarray] = {}
    chunk = max(1, 100_000 // grid**2)
    for start in range(0, planes, chunk):
        part = slice(start, start + chunk)
        values = organs(x[part, None, :], y[part, None, :], z[part, :, None])
        for name, value in values.items():
            added = value.sum(axis=0)
            sums[name] = sums[name] + added if name in sums else added
    slope = (u[None, :] ** 2 + (v[:, None] - beam.source_height) ** 2) / beam.source_distance**2
    length = np.sqrt(1 + slope) * (2 * half_depth / planes)
    return {name: _enlarge(total * length, beam, reach) for name, total in sums.items()}


def _enlarge(values: np.ndarray, beam: Beam, reach: float) -> np.ndarray:
    grid, size = len(values), beam.size
    scale = beam.field / size * grid / (2 * reach)
    cos, sin = np.cos(beam.roll) * scale, np.sin(beam.roll) * scale
    middle_out, middle_in = (size - 1) / 2, (grid - 1) / 2
    # Output pixel (i, j) looks up the unrolled detector point; the inverse of Beam.project.
    matrix = np.array(
        [
            [cos, -sin, middle_in - (cos - sin) * middle_out],
            [sin, cos, middle_in - (sin + cos) * middle_out],
        ]
    )
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    enlarged = cv2.warpAffine(
        values.astype(np.float32),
        matrix,
        (size, size),
        flags=flags,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.maximum(enlarged, 0)


@dataclass(frozen=True)
class Tube:
    """A curved tube of elliptical section.

    Attributes:
        centre: Points along its axis, cm [N, 3].
        radius: Half-axis along `flat`'s normal in the section, cm, scalar or [N].
        thickness: Half-axis along `flat`, cm, scalar or [N].
        flat: Direction of the second half-axis, unit vectors [3] or [N, 3]; None if round.
    """

    centre: np.ndarray
    radius: np.ndarray | float
    thickness: np.ndarray | float | None = None
    flat: np.ndarray | None = None


def resample(points: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Points at equal distances on a polyline.

    Args:
        points: [N, 3], cm.
        spacing: Wanted distance, cm.

    Returns:
        Points [M, 3] at the middle of M equal pieces, and the position of each as a share 0..1.
    """
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    count = max(2, int(np.ceil(along[-1] / spacing)))
    share = (np.arange(count) + 0.5) / count
    return np.stack([np.interp(share * along[-1], along, c) for c in points.T], axis=1), share


def splat(beam: Beam, points: np.ndarray, volumes: np.ndarray) -> np.ndarray:
    """Project small volumes as path length: volume over area, so that no mass is lost.

    Args:
        beam: Geometry.
        points: [N, 3], cm.
        volumes: [N], cm³.

    Returns:
        Path length in cm, float32 [size, size].
    """
    column, row, magnification = beam.project(points)
    size = beam.size
    pixel = beam.field / size
    mass = volumes * magnification**2 / pixel**2
    left, top = np.floor(column).astype(np.int64), np.floor(row).astype(np.int64)
    inside = (left >= -1) & (left < size) & (top >= -1) & (top < size)
    left, top, mass = left[inside], top[inside], mass[inside]
    fx, fy = column[inside] - left, row[inside] - top
    stride = size + 2  # one pixel of border takes what falls half outside
    first = (top + 1) * stride + left + 1
    index = np.concatenate([first, first + 1, first + stride, first + stride + 1])
    weight = np.concatenate(
        [mass * (1 - fx) * (1 - fy), mass * fx * (1 - fy), mass * (1 - fx) * fy, mass * fx * fy]
    )
    total = np.bincount(index, weight, minlength=stride * stride).reshape(stride, stride)
    return total[1:-1, 1:-1].astype(np.float32)


def tube_samples(beam: Beam, tube: Tube, shrink: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Cut a tube into small volumes whose projection is its closed-form chord length.

    A ray that meets an elliptical section at distance e from its middle, in units of the half
    width w as seen by the beam, has a chord 2 (a b / w) sqrt(1 - e²). Chebyshev nodes of the
    second kind integrate just that profile, so few samples across suffice.

    Args:
        beam: Geometry.
        tube: The tube.
        shrink: Taken off both half-axes, cm; for the marrow inside a cortical shell.

    Returns:
        Points [M, 3] and volumes [M], cm and cm³.
    """
    pixel = beam.field / beam.size
    points, share = resample(tube.centre, 0.6 * pixel)
    positions = np.linspace(0, 1, len(tube.centre))

    def along(value: np.ndarray | float) -> np.ndarray:
        array = np.asarray(value, float)
        return (
            np.full(len(points), array) if array.ndim == 0 else np.interp(share, positions, array)
        )

    tangent = np.gradient(points, axis=0)
    step = np.linalg.norm(tangent, axis=1)
    tangent = tangent / np.maximum(step, 1e-9)[:, None]
    total = np.linalg.norm(np.diff(tube.centre, axis=0), axis=1).sum()
    axis = np.append(beam.axes[1], 0.0)
    across = np.cross(tangent, axis)
    norm = np.linalg.norm(across, axis=1, keepdims=True)
    across = across / np.maximum(norm, 1e-3)
    radius = np.maximum(along(tube.radius) - shrink, 1e-4)
    if tube.flat is None:
        width, area = radius, np.pi * radius**2
    else:
        assert tube.thickness is not None
        thickness = np.maximum(along(tube.thickness) - shrink, 1e-4)
        flat = np.broadcast_to(tube.flat, tube.centre.shape)
        flat = np.stack([np.interp(share, positions, c) for c in flat.T], axis=1)
        normal = np.cross(tangent, flat)
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
        width = np.hypot(radius * (across * normal).sum(1), thickness * (across * flat).sum(1))
        area = np.pi * radius * thickness
    count = int(np.clip(np.ceil(2.2 * width.max() / pixel), 1, 64)) + 2
    angle = np.pi * np.arange(1, count + 1) / (count + 1)
    nodes, weights = np.cos(angle), 2 / (count + 1) * np.sin(angle) ** 2
    spread = points[:, None, :] + (width[:, None] * nodes)[..., None] * across[:, None, :]
    volumes = (area * total / len(points))[:, None] * weights
    return spread.reshape(-1, 3), volumes.reshape(-1)


def project_tubes(beam: Beam, tubes: list[Tube], shrink: float = 0.0) -> np.ndarray:
    """Sum of the chord lengths of tubes, cm, float32 [size, size]."""
    if not tubes:
        return np.zeros((beam.size, beam.size), np.float32)
    samples = [tube_samples(beam, tube, shrink) for tube in tubes]
    return splat(
        beam, np.concatenate([s[0] for s in samples]), np.concatenate([s[1] for s in samples])
    )
