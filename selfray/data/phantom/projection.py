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
    return _deposit(beam, column, row, volumes * magnification**2)


def _deposit(beam: Beam, column: np.ndarray, row: np.ndarray, volume: np.ndarray) -> np.ndarray:
    """Add volumes (magnified, cm³) to pixels; all [N]."""
    size = beam.size
    left, top = np.rint(column).astype(np.int32), np.rint(row).astype(np.int32)
    inside = (left >= -1) & (left <= size) & (top >= -1) & (top <= size)
    if not inside.all():
        column, row, volume = column[inside], row[inside], volume[inside]
        left, top = left[inside], top[inside]
    stride = size + 4  # a border takes what falls half outside
    first = (top + 1) * stride + left + 1
    columns, total = _spline(column - left), np.zeros(stride * stride)
    for down, weight in enumerate(_spline(row - top)):
        part = volume * weight
        for aside, other in enumerate(columns):
            total += np.bincount(first + (down * stride + aside), part * other, stride * stride)
    total *= (size / beam.field) ** 2
    return total.reshape(stride, stride)[2:-2, 2:-2].astype(np.float32)


def _spline(offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quadratic B-spline weights of three pixels around the nearest one.

    Smooth enough that regular samples do not beat with the pixels as a moiré, which bilinear
    weights let through.
    """
    return 0.5 * (0.5 - offset) ** 2, 0.75 - offset**2, 0.5 * (0.5 + offset) ** 2


@dataclass(frozen=True)
class _Pieces:
    """Short straight pieces of tubes; arrays over pieces."""

    middle: np.ndarray  # [N, 3]
    tangent: np.ndarray  # unit, [N, 3]
    length: np.ndarray  # cm
    radius: np.ndarray  # cm
    thickness: np.ndarray  # cm
    flat: np.ndarray  # unit direction of the thickness, [N, 3]; zero where the tube is round


def _cut(tube: Tube, spacing: float) -> list[np.ndarray]:
    """Pieces of one tube about `spacing` cm long: the fields of `_Pieces`."""
    centre = tube.centre
    steps = np.sqrt((np.diff(centre, axis=0) ** 2).sum(1))
    along = np.concatenate([[0.0], np.cumsum(steps)])
    count = max(2, int(np.ceil(along[-1] / spacing)))
    # Positions in units of the given points, so that all values interpolate alike.
    at = np.interp((np.arange(count) + 0.5) * along[-1] / count, along, np.arange(len(centre)))
    left = np.minimum(at.astype(np.int64), len(centre) - 2)
    share = at - left

    def between(value: np.ndarray) -> np.ndarray:
        part = share if value.ndim == 1 else share[:, None]
        return value[left] * (1 - part) + value[left + 1] * part

    def values(given: np.ndarray | float | None) -> np.ndarray:
        array = np.asarray(0.0 if given is None else given, float)
        return between(array) if array.ndim else np.full(count, float(array))

    tangent = np.gradient(centre, axis=0)
    flat = np.zeros(3) if tube.flat is None else tube.flat
    thickness = tube.radius if tube.thickness is None else tube.thickness
    return [
        between(centre),
        between(tangent),
        np.full(count, along[-1] / count),
        values(tube.radius),
        values(thickness),
        between(flat) if flat.ndim == 2 else np.broadcast_to(flat, (count, 3)),
    ]


def _pieces(tubes: list[Tube], spacing: float) -> _Pieces:
    cut = [_cut(tube, spacing) for tube in tubes]
    middle, tangent, *rest = (np.concatenate(field) for field in zip(*cut, strict=True))
    tangent = tangent / np.sqrt((tangent**2).sum(1, keepdims=True))
    return _Pieces(middle, tangent, *rest)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Vector product of [N, 3] and [N, 3]; numpy.cross takes five times as long."""
    (a0, a1, a2), (b0, b1, b2) = a.T, b.T
    return np.stack([a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0], axis=1)


def project_balls(beam: Beam, centres: np.ndarray, radius: float) -> np.ndarray:
    """Chord lengths of a union of equal balls, by the union of their closed-form intervals.

    Args:
        beam: Geometry.
        centres: [K, 3], cm, close together against the distance of the source.
        radius: cm.

    Returns:
        Length in cm, float32 [size, size].
    """
    middle = centres.mean(axis=0)
    reach = float(np.linalg.norm(centres - middle, axis=1).max()) + radius
    step = min(0.3 * beam.field / beam.size, radius / 4)
    count = 2 * int(np.ceil(reach / step)) + 1
    at = (np.arange(count) - count // 2) * step
    right, axis = beam.axes
    offset = centres - middle
    across, depth = offset[:, :2] @ right, offset[:, :2] @ axis
    u, v = np.meshgrid(at, at)
    near = (u[..., None] - across) ** 2 + (v[..., None] - offset[:, 2]) ** 2
    half = np.sqrt(np.maximum(radius**2 - near, 0))  # [count, count, K]
    order = np.argsort(depth - half, axis=-1)
    start = np.take_along_axis(depth - half, order, -1)
    end = np.take_along_axis(depth + half, order, -1)
    covered = np.maximum.accumulate(end, axis=-1)
    begun = np.concatenate([start[..., :1], np.maximum(start[..., 1:], covered[..., :-1])], -1)
    chord = np.maximum(end - begun, 0).sum(-1)
    points = middle + u[..., None] * np.append(right, 0.0) + v[..., None] * [0.0, 0.0, 1.0]
    filled = chord > 0
    return splat(beam, points[filled], chord[filled] * step**2)


def project_tubes(
    beam: Beam, tubes: list[Tube], shell: float = 0.0, inside: float = 1.0
) -> np.ndarray:
    """Sum of the chord lengths of tubes.

    A ray that meets an elliptical section at distance e from its middle, in units of the half
    width w as seen by the beam, has a chord 2 (a b / w) sqrt(1 - e²). Samples at cosines of even
    angles integrate just that profile, so few across suffice. Where a tube points along the
    rays, samples also move along their chords, which fills the section.

    Args:
        beam: Geometry.
        tubes: Any number of tubes.
        shell: Thickness of the wall, cm; 0 for a tube of one material.
        inside: Weight of lengths inside of the wall relative to the wall; 0 for a hollow tube.

    Returns:
        Length in cm, weighted within the wall, float32 [size, size].
    """
    if not tubes:
        return np.zeros((beam.size, beam.size), np.float32)
    pieces = _pieces(tubes, 0.5 * beam.field / beam.size)
    samples = [_samples(beam, pieces, 0.0, 1.0)]
    if shell:
        samples.append(_samples(beam, pieces, shell, inside - 1.0))
    return _deposit(beam, *(np.concatenate(field) for field in zip(*samples, strict=True)))


def _samples(
    beam: Beam, p: _Pieces, shrink: float, weight: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column, row (pixels) and magnified volume (cm³) of samples over the pieces' sections."""
    across = _cross(p.tangent, np.broadcast_to(np.append(beam.axes[1], 0.0) + 1e-6, p.middle.shape))
    slant = np.sqrt((across**2).sum(1))  # sine of the angle between tube and ray
    across /= slant[:, None]
    radius, thickness = np.maximum(p.radius - shrink, 1e-4), np.maximum(p.thickness - shrink, 1e-4)
    area = np.pi * radius * thickness
    flatness = (across * p.flat).sum(1) ** 2
    width = np.sqrt(radius**2 * (1 - flatness) + thickness**2 * flatness)
    count = int(np.clip(np.ceil(3.3 * width.max() * beam.size / beam.field), 2, 128)) + 1
    angle = np.pi / count * (np.arange(count) + 0.5)
    column, row, magnification = beam.project(p.middle)
    # A section is small against the distances, so that perspective is linear across it.
    across_column, across_row, _ = beam.project(p.middle + 0.5 * width[:, None] * across)
    columns = column[:, None] + 2 * (across_column - column)[:, None] * np.cos(angle)
    rows = row[:, None] + 2 * (across_row - row)[:, None] * np.cos(angle)
    steep = np.flatnonzero(slant < 0.8)
    if len(steep):
        # Fades in, as for a tube across the rays it would only add grain.
        chord = np.clip((0.8 - slant[steep]) / 0.3, 0, 1) * area[steep] / (np.pi * width[steep])
        inward = _cross(p.tangent[steep], across[steep])
        far = beam.project(p.middle[steep] + 0.5 * chord[:, None] * inward)
        # An additive recurrence in two dimensions (after Roberts, 2018) leaves no lattice.
        golden = (np.arange(count) * 0.5698402910 + steep[:, None] * 0.7548776662) % 1
        move = 2 * np.sin(angle) * (2 * golden - 1)
        columns[steep] += (far[0] - column[steep])[:, None] * move
        rows[steep] += (far[1] - row[steep])[:, None] * move
    volume = weight * area * p.length * magnification**2
    volumes = volume[:, None] * (2 / count * np.sin(angle) ** 2)
    return columns.reshape(-1), rows.reshape(-1), volumes.reshape(-1)
