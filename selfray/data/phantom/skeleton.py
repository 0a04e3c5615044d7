"""Bones, airways and the chalk of age as tubes, whose projection has a closed form."""

from __future__ import annotations

import numpy as np

from selfray.data.phantom.anatomy import Array, Thorax, arch_height, cage, carina_height
from selfray.data.phantom.projection import Tube

FRONT = np.array([0.0, 1.0, 0.0])  # flattened from front to back


def rib_path(t: Thorax, number: int, side: int) -> Array:
    """Centreline of a rib from its head to the end of its bone, cm [N, 3]."""
    spacing = t.lung_height * 0.098
    z0 = t.apex + 0.2 - (number - 1) * spacing
    extent = {1: 0.72, 2: 0.78, 11: 0.5, 12: 0.36}.get(number, 0.82 if number < 8 else 0.74)
    drop = {1: 2.2, 2: 4.2, 3: 6.0}.get(number, min(7.2 + 0.55 * (number - 4), 9.5))
    drop *= t.lung_height / 25
    s = np.linspace(0, 1, 72)
    phi = np.pi * (s * extent - 0.02)  # 0 at the back, pi at the sternum
    # A rib leaves the spine level, falls steeply at the side, and runs on falling to the front.
    z = z0 - drop * (0.25 * s + 0.75 * s**1.7) + 0.5 * np.sin(np.pi * np.clip(s * 3, 0, 1))
    a, b, middle = cage(t, z)
    outward = 0.45
    sine = np.sin(np.clip(phi, 0.0, np.pi))
    x = (t.split + a + outward) * sine**0.9
    back = np.where(np.cos(phi) > 0, 1.0, -1.0)
    u = np.maximum(x - t.split, 0) / (a + outward)
    inner = np.minimum(x / np.maximum(t.split, 1), 1)
    y = middle + back * (b + outward) * np.sqrt(np.maximum(1 - u**2, 0)) * (0.8 + 0.2 * inner)
    # A curved spine takes the heads of the ribs along, not the whole cage.
    bent = spine_shift(t, z) * np.clip(1 - 2.5 * s, 0, 1) ** 2
    path = np.stack([side * x + bent, y, z], axis=1)
    return path[x > 2.0]


def spine_shift(t: Thorax, z: Array) -> Array:
    """Sideward position of the spine, cm."""
    return t.scoliosis * np.sin(np.pi * (t.apex - z) / t.lung_height)


def ribs(t: Thorax) -> list[Tube]:
    """Twelve pairs of ribs."""
    tubes = []
    for side in (-1, 1):
        for number in range(1, 13):
            path = rib_path(t, number, side)
            s = np.linspace(0, 1, len(path))
            height = (0.62 if number > 1 else 0.75) * (0.85 + 0.3 * s)
            height = height * (0.75 if number > 10 else 1.0)
            middle = np.array([0.0, cage(t, path[:, 2])[2].mean(), 0.0])
            flat = path - middle
            flat[:, 2] = 0
            flat /= np.linalg.norm(flat, axis=1, keepdims=True)
            tubes.append(Tube(path, height, 0.36, flat))
    return tubes


def cartilages(t: Thorax) -> list[Tube]:
    """Rib cartilages 1 to 7, from the end of the bone up to the sternum."""
    tubes = []
    for side in (-1, 1):
        for number in range(1, 8):
            end = rib_path(t, number, side)[-1]
            rise = 0.3 + 0.35 * max(number - 3, 0)
            goal = np.array([side * 2.0, end[1] - 0.8, end[2] + rise])
            s = np.linspace(0, 1, 12)[:, None]
            tubes.append(Tube(end + (goal - end) * s - [0, 0, 0.8] * np.sin(np.pi * s), 0.55))
    return tubes


def clavicles(t: Thorax) -> list[Tube]:
    """Both collar bones, from the sternum over the apices to the shoulders."""
    tubes = []
    rise = 1.2 if t.arms_up else 2.2
    for side in (-1, 1):
        s = np.linspace(0, 1, 50)
        x = 1.5 + (t.shoulder - 4.2) * s
        z = t.apex - 4.3 + rise * s + 0.45 * np.sin(2 * np.pi * s)
        _, _, middle = cage(t, z)
        y = middle - 5.2 + 5.5 * s**1.6 - 1.0 * np.sin(2 * np.pi * s)
        radius = 0.58 + 0.45 * (np.abs(s - 0.5) * 2) ** 3
        tubes.append(Tube(np.stack([side * x, y, z], 1), radius))
    return tubes


def vertebra_levels(t: Thorax) -> Array:
    """z of the middle of each vertebral body from C6 down to L2."""
    pitch = t.lung_height * 0.099
    return t.apex + 0.6 + pitch * (2.5 - np.arange(17)) * np.linspace(0.92, 1.06, 17)


def spine(t: Thorax) -> list[Tube]:
    """Vertebral bodies, waisted, with dense end plates by their flat ends."""
    tubes = []
    half = t.lung_height * 0.099 * 0.41
    s = np.linspace(-1, 1, 9)
    for index, z in enumerate(vertebra_levels(t)):
        x, y = spine_centre(t, z)
        size = 1.15 + 0.05 * index
        path = np.stack([np.full(9, x), np.full(9, y), z + half * s], axis=1)
        waist = 1 - 0.10 * np.sqrt(1 - s**2)
        tubes.append(Tube(path, size * 1.3 * waist, size * waist, FRONT))
    return tubes


def spurs(t: Thorax) -> list[Tube]:
    """Degenerative spurs at the edges of the lower thoracic discs."""
    tubes = []
    half = t.lung_height * 0.099 * 0.41
    for index, z in enumerate(vertebra_levels(t)[6:], start=6):
        x, y = spine_centre(t, z)
        edge = 1.3 * (1.15 + 0.05 * index)
        for side in (-1, 1):
            start = np.array([x + side * (edge - 0.5), y - 0.8, z + half])
            tip = np.array([side * (0.5 + 0.7 * t.spurs), 0.0, 0.35 * t.spurs])
            tubes.append(Tube(np.stack([start, start + tip]), np.array([0.32, 0.2])))
    return tubes


def spine_centre(t: Thorax, z: float) -> tuple[float, float]:
    """x and y of the spine at height z, cm."""
    level = np.array([z])
    return (
        float(spine_shift(t, level)[0]),
        float(cage(t, level)[2][0] + t.half_depth * 0.68),
    )


def vertebral_arches(t: Thorax) -> list[Tube]:
    """Pedicles, laminae, transverse and spinous processes."""
    tubes = []
    for z in vertebra_levels(t):
        x, y = spine_centre(t, z)
        back = y + 1.6
        tubes.append(Tube(np.array([[x, back + 0.6, z], [x, back + 3.0, z - 1.8]]), 0.36))
        for side in (-1, 1):
            root = np.array([x + side * 1.15, back, z + 0.3])
            tubes.append(
                Tube(np.stack([root - np.array([0, 0.8, 0]), root + np.array([0, 0.8, 0])]), 0.42)
            )
            tip = root + np.array([side * 2.0, 1.2, 0.2])
            tubes.append(Tube(np.stack([root, tip]), np.array([0.4, 0.3])))
            tubes.append(Tube(np.stack([root, [x, back + 1.2, z - 0.3]]), 0.4))
    return tubes


def scapulae(t: Thorax) -> list[Tube]:
    """Shoulder blades: thick borders, a thin plate, spine, socket and acromion."""
    tubes = []
    out = 3.2 if t.arms_up else 0.3
    for side in (-1, 1):
        back = t.half_depth
        top = np.array([side * (t.split + 4.3 + out), back * 0.75, t.apex - 2.5])
        tip = np.array([side * (t.split + 5.6 + 1.5 * out), back * 0.95, t.apex - 15.5])
        socket = np.array([side * (t.shoulder - 4.4), 2.0, t.apex - 3.6])
        inner = _bowed(top, tip, np.array([-side * 0.5, 0.4, 0]))
        outer = _bowed(socket, tip, np.array([-side * 0.7, 0.0, 0]))
        acromion = socket + np.array([side * 1.6, 1.5, 2.6])
        tubes += [
            Tube(inner, 0.22),
            Tube(outer, 0.42),
            Tube(_bowed(top + np.array([0, 0, -2.0]), acromion, np.array([0, 1.0, 0.3])), 0.38),
            Tube(np.stack([top, socket + np.array([0, 0, 1.5])]), 0.25),
            Tube(
                np.stack([socket + np.array([0, 0, 1.7]), socket, socket - np.array([0, 0, 1.7])]),
                0.85,
            ),
        ]
        plate = (inner + outer) / 2
        gap = np.linalg.norm(outer - inner, axis=1)
        flat = np.cross(top - socket, tip - top)
        flat /= np.linalg.norm(flat)
        tubes.append(Tube(plate, gap / 2, 0.10, flat))
    return tubes


def _bowed(start: Array, end: Array, bow: Array) -> Array:
    s = np.linspace(0, 1, 24)[:, None]
    return start + (end - start) * s + bow * np.sin(np.pi * s)


def humeri(t: Thorax) -> list[Tube]:
    """Heads and shafts of the upper arms."""
    tubes = []
    s = np.linspace(-1, 1, 15)
    ball = 2.1 * np.sqrt(1 - 0.98 * s**2)
    for side in (-1, 1):
        head = np.array([side * (t.shoulder - 1.9), 0.6, t.apex - 3.3])
        away = [side * 14.0, -1.0, -9.0] if t.arms_up else [side * 2.5, -1.0, -26.0]
        tubes.append(Tube(head + np.stack([0 * s, 0 * s, 2.1 * s], axis=1), ball))
        tubes.append(Tube(np.stack([head, head + away]), 1.15))
    return tubes


def sternum(t: Thorax) -> list[Tube]:
    """Manubrium and body of the breast bone."""
    z = t.apex - t.lung_height * np.linspace(0.16, 0.66, 20)
    _, b, middle = cage(t, z)
    path = np.stack([0 * z, middle - b - 0.3, z], axis=1)
    return [Tube(path, np.interp(np.arange(20), [0, 4, 6, 19], [2.6, 1.7, 1.3, 1.6]), 0.5, FRONT)]


def airways(t: Thorax) -> list[Tube]:
    """Trachea and main bronchi, air."""
    carina = carina_height(t)
    lean = 0.4 * t.unfolding
    windpipe = np.array(
        [[0.0, -2.5, t.apex + 8], [0.0, -0.8, t.apex], [-lean, 0.8, carina + 3], [0, 1.4, carina]]
    )
    tubes = [Tube(windpipe, 0.88, 0.75, FRONT)]
    for side, down, out in ((-1, -3.2, 3.0), (1, -2.4, 4.2)):
        end = np.array([side * out, 1.6, carina + down])
        path = np.stack([[0, 1.4, carina + 0.3], end, end + np.array([side * 1.0, 0.6, -1.8])])
        tubes.append(Tube(path, np.array([0.62, 0.42, 0.05])))
    return tubes


def arch_calcification(t: Thorax) -> list[Tube]:
    """Chalk in the wall of the aortic arch: a thin sickle inside of its left edge."""
    turn = np.linspace(-0.5, 1.2, 24)
    reach = 2.0 * t.mediastinum + 0.5 + 0.9 * t.unfolding
    radius = 1.5
    x = reach - radius + radius * np.cos(turn) + 0.3 * t.scoliosis
    path = np.stack([x, np.full(24, -0.5), arch_height(t) + radius * np.sin(turn)], axis=1)
    return [Tube(path, 0.11, 0.9, FRONT)]
