"""Projection of shapes against numerical integration and against Beer–Lambert in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from selfray.data.phantom.physics import transmission
from selfray.data.phantom.projection import Beam, Tube, march, project_tubes, splat

BEAM = Beam("PA", 180.0, 14.0, 0.0, 0.0, 0.0, (0.0, 0.0), 20.0, 160)


def rays(beam: Beam) -> tuple[np.ndarray, np.ndarray]:
    """Source [3] and unit directions [H, W, 3] of all pixels, from the definition of a beam."""
    right = {"PA": [1, 0, 0], "AP": [1, 0, 0], "LL": [0, 1, 0]}[beam.view]
    axis = {"PA": [0, -1, 0], "AP": [0, 1, 0], "LL": [1, 0, 0]}[beam.view]
    cos, sin = np.cos(beam.yaw), np.sin(beam.yaw)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]])
    right, axis, up = turn @ right, turn @ axis, np.array([0, 0, 1.0])
    source = -(beam.source_distance - beam.detector) * axis + beam.source_height * up
    at = ((np.arange(beam.size) + 0.5) / beam.size - 0.5) * beam.field
    column, row = np.meshgrid(at, -at)
    cos, sin = np.cos(beam.roll), np.sin(beam.roll)
    u = cos * column + sin * row + beam.centre[0]
    v = -sin * column + cos * row + beam.centre[1]
    detector = u[..., None] * right + v[..., None] * up + beam.detector * axis
    direction = detector - source
    return source, direction / np.linalg.norm(direction, axis=-1, keepdims=True)


def integrate(beam: Beam, inside) -> np.ndarray:
    """Length inside a shape along each ray, by 900 samples in float64, cm [H, W]."""
    source, direction = rays(beam)
    middle = beam.source_distance - beam.detector
    total = np.zeros(direction.shape[:2])
    steps = np.linspace(middle - 9, middle + 9, 900)
    for step in steps:
        total += inside(source + step * direction)
    return total * (steps[1] - steps[0])


def tube_inside(start, end, radius, thickness=None, flat=None):
    start, end = np.array(start, float), np.array(end, float)
    axis = (end - start) / np.linalg.norm(end - start)

    def inside(points):
        offset = points - start
        along = offset @ axis
        offset = offset - along[..., None] * axis
        if flat is None:
            within = (offset**2).sum(-1) < radius**2
        else:
            second = np.cross(axis, flat)
            within = (offset @ flat / thickness) ** 2 + (offset @ second / radius) ** 2 < 1
        return within & (along > 0) & (along < np.linalg.norm(end - start))

    return inside


SMALL = replace(BEAM, size=64, field=14.0)
TURNED = replace(SMALL, yaw=0.2, roll=0.1, source_height=4.0, centre=(0.5, -0.3))


@pytest.mark.parametrize(
    "beam", [SMALL, TURNED, replace(TURNED, view="LL"), replace(SMALL, view="AP")]
)
@pytest.mark.parametrize(
    ("start", "end"),
    [((-5, 1, -1), (5, 1, 2)), ((1, -2, -5), (0, 3, 5)), ((-1, -3, 0), (1, 3, 1))],
)
def test_chord_of_a_round_tube_equals_numerical_integration(beam, start, end):
    tube = Tube(np.array([start, end], float), 1.6)
    closed = project_tubes(beam, [tube])
    numeric = integrate(beam, tube_inside(start, end, 1.6))
    assert np.abs(closed - numeric).mean() < 0.03 * numeric.max()
    assert closed.sum() == pytest.approx(numeric.sum(), rel=0.01)


@pytest.mark.parametrize("view", ["PA", "LL"])
def test_chord_of_a_flat_tube_equals_numerical_integration(view):
    beam, flat = replace(SMALL, view=view, roll=0.3), np.array([0.0, 1.0, 0.0])
    start, end = (-4.0, 0.0, -3.0), (4.0, 0.0, 3.0)
    tube = Tube(np.array([start, end]), 1.8, 0.7, flat)
    closed = project_tubes(beam, [tube])
    numeric = integrate(beam, tube_inside(start, end, 1.8, 0.7, flat))
    assert np.abs(closed - numeric).mean() < 0.03 * numeric.max()
    assert closed.sum() == pytest.approx(numeric.sum(), rel=0.01)


def test_hollow_tube_is_the_difference_of_two_tubes():
    path = np.array([[-5.0, 0, 0], [0, 1, 1], [5, 0, 2]])
    wall = project_tubes(SMALL, [Tube(path, 1.5)], shell=0.4, inside=0.0)
    outer, inner = project_tubes(SMALL, [Tube(path, 1.5)]), project_tubes(SMALL, [Tube(path, 1.1)])
    np.testing.assert_allclose(wall, outer - inner, atol=0.02 * outer.max())


def test_marched_ball_has_the_closed_form_chord():
    beam, centre, radius = TURNED, np.array([0.5, 1.0, -0.5]), 4.0

    def organs(x, y, z):
        r = np.sqrt((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2)
        return {"ball": np.clip(0.5 - (r - radius) / 0.3, 0, 1)}

    marched = march(beam, organs, 9.0, 64, 90)["ball"]
    source, direction = rays(beam)
    along = direction @ (centre - source)
    near = ((centre - source) ** 2).sum() - along**2
    chord = 2 * np.sqrt(np.maximum(radius**2 - near, 0))
    assert np.abs(marched - chord).mean() < 0.05
    assert np.abs(marched - chord)[chord > 4].max() < 0.25


def test_splatted_volume_is_kept():
    rng = np.random.default_rng(0)
    points, volumes = rng.uniform(-3, 3, (200, 3)), rng.uniform(0.1, 1, 200)
    length = splat(BEAM, points, volumes)
    magnification = 180 / (180 - 14 - points[:, 1])
    pixel = BEAM.field / BEAM.size
    assert length.sum() * pixel**2 == pytest.approx((volumes * magnification**2).sum(), rel=1e-5)


def test_a_nearer_source_magnifies_what_is_far_from_the_detector():
    points = np.array([[-3.0, -5.0, 0.0], [3.0, -5.0, 0.0]])

    def width(beam):
        column, _, _ = beam.project(points)
        return column[1] - column[0]

    assert width(replace(BEAM, view="AP", source_distance=100.0)) > 1.1 * width(BEAM)


def test_transmission_is_beer_lambert_at_two_energies():
    rng = np.random.default_rng(1)
    grams = {m: rng.uniform(0, 8, (5, 5)) for m in ("soft", "bone", "metal")}
    # NIST mass attenuation in cm²/g at 60 and 100 keV, entered a second time.
    low = 0.2048 * grams["soft"] + 0.3148 * grams["bone"] + 1.205 * grams["metal"]
    high = 0.1693 * grams["soft"] + 0.1855 * grams["bone"] + 0.3717 * grams["metal"]
    expected = 0.6 * np.exp(-low) + 0.4 * np.exp(-high)
    np.testing.assert_allclose(transmission(grams, 0.6), expected, rtol=1e-12)


def test_two_energies_harden_the_beam():
    thin, thick = (transmission({"soft": np.array([g])}, 0.5)[0] for g in (5.0, 40.0))
    assert -np.log(thick) / 40 < -np.log(thin) / 5
