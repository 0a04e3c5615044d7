"""A parametric thorax: who the patient is, and the implicit organs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from selfray.data.phantom.physics import FAT, SOFT_TISSUE

Array = np.ndarray


@dataclass(frozen=True)
class Traits:
    """Who the patient is.

    Attributes:
        sex: F or M.
        age: Years, 18 to 95.
        height: cm.
        weight: kg.
    """

    sex: str
    age: float
    height: float
    weight: float

    @property
    def bmi(self) -> float:
        return self.weight / (self.height / 100) ** 2


@dataclass(frozen=True)
class Thorax:
    """Shape of one patient's chest in one breath and posture; all lengths in cm.

    Attributes:
        apex: z of the lung apices.
        lung_height: Apex to the lateral costophrenic sulcus.
        half_width, half_depth: Inner half-axes of the cage at its widest, less the split.
        split: Distance of each hemithorax's axis from the midline.
        tilt: How far forward the cage leans from apex to base.
        dome: Height of the right diaphragm above the sulcus; `dome_left` likewise.
        heart: Half-width of the heart, as a factor; `heart_shift` moves it to the left.
        unfolding: Aortic elongation, 0 to 1.5.
        calcification: Aortic wall calcification, 0 to 1.
        lung_density: g/cm³.
        fat: Thickness of subcutaneous fat.
        shoulder: Half-width at the shoulders.
        breast: Radius of the breasts, 0 for none; `breast_droop` their height relative to mid.
        bone_density: Factor on bone mineral.
        kyphosis: Backward curve of the spine, cm.
        scoliosis: Sideward curve of the spine, cm.
        cartilage: Calcification of rib cartilage, 0 to 1.
        spurs: Degenerative spurs of the spine, 0 to 1.
        stomach: Half-width of the gas in the stomach, 0 for none.
        mediastinum: Half-width of the great vessels, as a factor.
        arms_up: False when the arms hang beside the chest.
    """

    apex: float
    lung_height: float
    half_width: float
    half_depth: float
    split: float
    tilt: float
    dome: float
    dome_left: float
    heart: float
    heart_shift: float
    unfolding: float
    calcification: float
    lung_density: float
    fat: float
    shoulder: float
    breast: float
    breast_droop: float
    bone_density: float
    kyphosis: float
    scoliosis: float
    cartilage: float
    spurs: float
    stomach: float
    mediastinum: float
    arms_up: bool


def draw_traits(rng: np.random.Generator) -> Traits:
    """Draw a patient; ranges follow adult hospital populations, cut at 18 and 95 years."""
    sex = "F" if rng.random() < 0.5 else "M"
    age = float(np.clip(18 + 77 * rng.beta(2.2, 1.7), 18, 95))
    height = float(rng.normal(176.5, 7.0) if sex == "M" else rng.normal(163.5, 6.5))
    bmi = float(np.clip(np.exp(rng.normal(np.log(26.0), 0.19)), 15.5, 48))
    return Traits(sex, age, height, bmi * (height / 100) ** 2)


def draw_thorax(traits: Traits, rng: np.random.Generator) -> Thorax:
    """Draw the chest of a patient at full inspiration, upright."""
    male = traits.sex == "M"
    # The signs by which a radiologist guesses an age come on slowly from the twenties.
    old = np.clip((traits.age - 25) / 65, 0, 1)
    stature = traits.height / 170
    heavy = traits.bmi - 26
    width = (13.4 if male else 12.8) * stature**0.6 * (1 + 0.004 * heavy) * rng.normal(1, 0.06)
    height = (24.8 if male else 24.1) * stature**0.8 * rng.normal(1, 0.07) * (1 - 0.0035 * heavy)
    height *= 1 - 0.07 * old  # a stiff cage and flat discs
    depth = (9.2 if male else 8.4) * (1 + 0.006 * heavy + 0.18 * old) * rng.normal(1, 0.06)
    fat = float(np.clip(0.35 + 0.13 * (traits.bmi - 18) + rng.normal(0, 0.25), 0.25, 5.0))
    if not male:
        fat *= 1.12
        breast = float(np.clip(rng.normal(4.8 + 0.17 * heavy, 1.4), 0.0, 9.0))
    else:  # fat shapes a breast on heavy men, and a pectoral muscle does on strong ones
        breast = float(np.clip(rng.normal(1.8 + 0.2 * heavy, 1.6), 0.0, 8.0))
    dome = float(rng.normal(5.2, 0.7) + 0.06 * max(heavy, 0))
    return Thorax(
        apex=float(height / 2),
        lung_height=float(height),
        half_width=float(width - 4.6),
        half_depth=float(depth),
        split=4.6,
        tilt=float(rng.normal(2.2, 0.5)),
        dome=dome,
        dome_left=dome - float(rng.normal(1.3, 0.6)),
        heart=float(
            (1.0 if male else 0.95) * (1 + 0.004 * heavy) * np.clip(rng.normal(1, 0.07), 0.8, 1.08)
        ),
        heart_shift=float(rng.normal(0, 0.5)),
        unfolding=float(np.clip(1.4 * old - 0.1 + rng.normal(0, 0.15), 0, 1.5)),
        calcification=float(np.clip((traits.age - 50) / 35 + rng.normal(0, 0.2), 0, 1)),
        lung_density=float(np.clip(rng.normal(0.255 - 0.03 * old, 0.022), 0.17, 0.32)),
        fat=fat,
        shoulder=float((18.6 if male else 17.5) * stature**0.7 * rng.normal(1, 0.06) + 0.5 * fat),
        breast=breast,
        breast_droop=float(rng.normal(-0.06 - 0.08 * old, 0.03)),
        bone_density=float(
            np.clip((1.14 if male else 1.08) - (0.42 if male else 0.52) * old, 0.45, 1.3)
            * rng.normal(1, 0.06)
        ),
        kyphosis=float(np.clip(rng.normal(1.2 + 3.2 * old, 0.6), 0, 6)),
        scoliosis=float(rng.normal(0, 0.4 + 0.35 * old)),
        cartilage=float(np.clip(1.3 * old * rng.uniform(0.6, 1.3) - 0.15, 0, 1)),
        spurs=float(np.clip(1.2 * old * rng.uniform(0.6, 1.3) - 0.15, 0, 1)),
        stomach=float(np.clip(rng.normal(2.0, 1.0), 0, 4)),
        mediastinum=float(rng.normal(1, 0.06)),
        arms_up=True,
    )


def occupied(distance: Array, softness: float = 0.5) -> Array:
    """Share of a sample inside a surface: a ramp across `softness` cm of signed distance."""
    return np.clip(0.5 - distance / softness, 0, 1)


def cage(t: Thorax, z: Array, side: float = 0.0) -> tuple[Array, Array, Array]:
    """Half-axes a, b and middle y of a hemithorax's section at height z, cm."""
    share = (t.apex - z) / t.lung_height
    up = np.clip(1 - share / 0.78, 0, 1)
    profile = np.sqrt(np.maximum(1 - up**2.35, 1e-4))
    a = t.half_width * profile * (1 - 0.06 * np.clip(share - 0.85, 0, 1))
    b = t.half_depth * np.sqrt(np.maximum(1 - np.clip(1 - share / 0.85, 0, 1) ** 2.1, 1e-4))
    y = t.tilt * (0.55 - share) + 0.4 * t.kyphosis * (0.6 - np.abs(share - 0.45))
    return a, b, y


def cage_distance(t: Thorax, x: Array, y: Array, z: Array) -> Array:
    """Signed distance (approximate) to the inner surface of the cage, negative inside."""
    a, b, middle = cage(t, z)
    u = np.abs(x) - t.split
    r = np.sqrt((u / a) ** 2 + ((y - middle) / b) ** 2)
    return (r - 1) * (0.5 * (a + b))


def diaphragm(t: Thorax, x: Array, y: Array) -> Array:
    """z of the diaphragm over (x, y), cm."""
    right = x < 0
    height = np.where(right, t.dome, t.dome_left)
    across = np.abs(x) - 6.0
    reach = np.where(across > 0, t.half_width + t.split - 5.4, 11.0)
    q = (across / reach) ** 2 + ((y + 1.5) / (t.half_depth * 1.12)) ** 2
    low = t.apex - t.lung_height - 0.6
    return low + height * np.maximum(1 - q, 0) ** 0.6 - 1.5 * np.maximum(q - 1, 0)


def heart_ellipsoids(t: Thorax) -> list[tuple[Array, Array, Array]]:
    """Centre [3], half-axes [3] and axes [3, 3] of the left and right heart and its base."""
    low = t.apex - t.lung_height - 0.6
    base = low + 0.55 * (0.6 * t.dome + 0.4 * t.dome_left) + 1.0
    k = t.heart * (t.half_width + t.split) / 13.0
    shift = t.heart_shift
    long_axis = np.array([0.72, -0.30, -0.62])
    long_axis /= np.linalg.norm(long_axis)
    second = np.cross(long_axis, [0.0, 1.0, 0.0])
    second /= np.linalg.norm(second)
    frame = np.stack([long_axis, second, np.cross(long_axis, second)])
    upright = np.eye(3)
    front = -0.36 * t.half_depth
    return [
        (np.array([3.0 * k + shift, front, base + 3.3 * k]), np.array([6.2, 4.4, 4.6]) * k, frame),
        (
            np.array([-1.0 * k + shift, front + 0.8, base + 3.6 * k]),
            np.array([3.6, 4.2, 4.6]) * k,
            upright,
        ),
        (
            np.array([1.0 * k + shift, front + 0.6, base + 7.0 * k]),
            np.array([3.1, 3.0, 4.0]) * k,
            upright,
        ),
    ]


def ellipsoid_distance(
    centre: Array, half_axes: Array, frame: Array, x: Array, y: Array, z: Array
) -> Array:
    dx, dy, dz = x - np.float32(centre[0]), y - np.float32(centre[1]), z - np.float32(centre[2])
    r = 0.0
    for axis, half in zip(frame, half_axes, strict=True):
        part = [np.float32(c / half) * d for c, d in zip(axis, (dx, dy, dz), strict=True) if c]
        total = part[0]
        for other in part[1:]:
            total = total + other
        r = r + total * total
    return (np.sqrt(r) - 1) * np.float32(half_axes.min())


def mediastinum_distance(t: Thorax, x: Array, y: Array, z: Array) -> Array:
    """Signed distance to spine, vessels and airways between the lungs, negative inside.

    Its half-width varies with depth: thin in front, where the lungs nearly meet, the great
    vessels in the middle, the spine at the back.
    """
    arch = arch_height(t)
    m = t.mediastinum
    left = 2.0 * m + (0.7 + 1.0 * t.unfolding) / (1 + ((z - arch) / 1.7) ** 4)
    left = left + (0.9 * m) * np.exp(-(((z - arch + 4.3) / 2.0) ** 2))
    right = 2.2 * m + (0.3 + 0.8 * t.unfolding) * np.exp(-(((z - arch + 2.8) / 3.0) ** 2))
    spread = 0.6 * np.clip((z - t.apex + 4.0) / 3.0, 0, 2)
    centre = 0.3 * t.scoliosis
    vessels = np.where(x > centre, left + spread, right + spread)
    _, _, middle = cage(t, z)
    depth = y - middle
    ridge = np.sqrt(
        np.clip(1.02 - np.abs(depth + 0.1 * t.half_depth) / (0.52 * t.half_depth), 0, 1)
    )
    half = 0.7 + (vessels - 0.7) * ridge
    bone = 1 - ((depth - 0.82 * t.half_depth) / (0.34 * t.half_depth)) ** 2
    half = np.maximum(half, 1.6 * np.sqrt(np.maximum(bone, 0)))
    return np.abs(x - centre) - half


def arch_height(t: Thorax) -> float:
    """z of the middle of the aortic arch, cm."""
    return t.apex - 0.27 * t.lung_height


def body_distance(t: Thorax, x: Array, y: Array, z: Array) -> Array:
    """Signed distance to the skin, negative inside."""
    share = (t.apex - z) / t.lung_height
    wall = 2.1 + t.fat
    chest = t.half_width + t.split + wall + 0.8 + 0.10 * t.fat * np.clip(share - 0.5, 0, 1)
    neck = 5.8 + 0.35 * t.fat
    rise = 1 / (1 + np.exp(-(share + 0.07) / 0.035))
    waist = 1 / (1 + np.exp(-(share - (0.33 if t.arms_up else 0.9)) / 0.05))
    half_x = neck + (t.shoulder - neck) * rise + (chest - t.shoulder) * waist
    _, _, middle = cage(t, z)
    upper = 6.0 + 0.4 * t.fat
    trunk = t.half_depth + wall + 0.2
    fill = np.clip((share + 0.15) / 0.5, 0, 1)
    half_y = upper + (trunk - upper) * fill * (2 - fill)
    r = (np.abs(x / half_x) ** 2.8 + np.abs((y - middle) / half_y) ** 2.8) ** (1 / 2.8)
    return (r - 1) * half_y


def carina_height(t: Thorax) -> float:
    """z of the fork of the trachea, cm."""
    return t.apex - 0.36 * t.lung_height


def lung_distance(t: Thorax, x: Array, y: Array, z: Array) -> tuple[Array, Array]:
    """Signed distances to the lungs (with the pleural space) and to the heart."""
    chambers = [ellipsoid_distance(*e, x, y, z) for e in heart_ellipsoids(t)]
    # A smooth minimum fills the furrows between the chambers, as fat does.
    heart = -0.9 * np.log(sum(np.exp(np.minimum(-d / 0.9, 30.0)) for d in chambers) + 1e-9)
    lung = np.maximum(cage_distance(t, x, y, z), 0.85 * (diaphragm(t, x, y) - z))
    lung = np.maximum(lung, -mediastinum_distance(t, x, y, z))
    return np.maximum(lung, -heart), heart


def soft_density(t: Thorax, x: Array, y: Array, z: Array) -> Array:
    """Density of the trunk before the lungs are cut out, as soft tissue, g/cm³."""
    skin = body_distance(t, x, y, z)
    inner = occupied(skin + np.float32(t.fat))
    return FAT * occupied(skin) + (SOFT_TISSUE - FAT) * inner


def place_in_lung(t: Thorax, side: int, place: tuple[float, ...]) -> np.ndarray:
    """Point at shares (apex to base, midline to wall, front -1 to back 1) of a lung, cm."""
    z = t.apex - place[0] * t.lung_height * 0.82
    a, b, middle = cage(t, np.array(z))
    return np.array([side * (2.8 + place[1] * (t.split + a - 3.8)), middle + 0.8 * place[2] * b, z])


def holds(t: Thorax, side: int, place: tuple[float, ...], margin: float) -> bool:
    """Whether a place is inside the lung, `margin` cm from its surface, in any breath."""
    for chest in (
        t,
        breathe(replace(t, dome=t.dome + 1.5, dome_left=t.dome_left + 1.5), 0.0, True),
    ):
        point = place_in_lung(chest, side, place)
        if lung_distance(chest, *(point[i : i + 1] for i in range(3)))[0][0] > -margin:
            return False
    return True


def breathe(t: Thorax, inspiration: float, supine: bool) -> Thorax:
    """The chest at another depth of breath.

    Args:
        t: At full inspiration.
        inspiration: 1 is full, 0 is a shallow breath.
        supine: Lying widens the mediastinum and lifts the diaphragm.
    """
    lift = (1 - inspiration) * 3.2 + (1.0 if supine else 0)
    return replace(
        t,
        dome=t.dome + lift,
        dome_left=t.dome_left + lift,
        heart=t.heart * (1 + 0.03 * lift / 2),
        mediastinum=t.mediastinum * (1.12 if supine else 1.0) * (1 + 0.02 * lift),
        lung_density=t.lung_density * (1 + 0.06 * lift),
        arms_up=not supine,
    )
