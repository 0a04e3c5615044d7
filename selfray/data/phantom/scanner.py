"""From masses along rays to the pixels of four sites' scanners."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from selfray.data.phantom.physics import transmission


@dataclass(frozen=True)
class Site:
    """A hospital: its scanner and its patients.

    Attributes:
        blur: Detector and focal spot, standard deviation in cm at the detector.
        photons: Detected quanta per cm² behind nothing; sets the noise.
        scatter: Scatter-to-primary ratio behind 20 cm of tissue.
        contrast: Slope of the response curve.
        flatten: Share of the slow variation that the display removes.
    sharpen: Strength of unsharp masking.
        border: Gray value outside of the collimation, 0 to 255.
        acuity: 0 for a clinic to 1 for intensive care.
        portable: Share of AP studies.
        lateral: Share of upright studies with a lateral image.
        low_energy_share: Beam quality at 60 against 100 keV.
        marker: Style of the burnt-in side marker.
    """

    blur: float
    photons: float
    scatter: float
    contrast: float
    flatten: float
    sharpen: float
    border: int
    acuity: float
    portable: float
    lateral: float
    low_energy_share: float
    marker: str


SITES = {
    "A": Site(0.020, 1.5e8, 0.35, 1.00, 0.35, 0.4, 0, 0.1, 0.15, 0.45, 0.45, "R"),
    "B": Site(0.035, 3.0e7, 0.6, 0.90, 0.45, 0.7, 0, 0.9, 0.80, 0.20, 0.60, "L"),
    "C": Site(0.030, 8.0e7, 0.5, 1.10, 0.20, 0.2, 255, 0.4, 0.40, 0.35, 0.50, "R"),
    "D": Site(0.045, 2.5e7, 0.7, 1.25, 0.55, 1.1, 20, 0.5, 0.55, 0.30, 0.65, "L"),
}


def expose(
    grams: dict[str, np.ndarray], site: Site, field: float, rng: np.random.Generator
) -> np.ndarray:
    """The detector's signal as a fraction of the open beam, float32 [H, W], > 0."""
    size = len(grams["soft"])
    pixel = field / size
    primary = transmission(grams, site.low_energy_share).astype(np.float32)
    thick = float(np.clip(grams["soft"].mean() / 20, 0.3, 2.0))
    wide = cv2.resize(primary, (64, 64), interpolation=cv2.INTER_AREA)
    wide = cv2.GaussianBlur(wide, (0, 0), 64 * 5.0 / field, borderType=cv2.BORDER_REPLICATE)
    veil = cv2.resize(np.minimum(wide, 0.25), (size, size), interpolation=cv2.INTER_CUBIC)
    total = primary + site.scatter * thick * 0.6 * veil
    sigma = site.blur / pixel
    if sigma > 0.2:
        total = cv2.GaussianBlur(total, (0, 0), sigma)
    dose = site.photons * np.exp(rng.normal(0, 0.25)) * pixel**2
    return np.maximum(rng.poisson(total * dose).astype(np.float32), 0.5) / np.float32(dose)


def develop(signal: np.ndarray, site: Site, view: str, rng: np.random.Generator) -> np.ndarray:
    """Detector response and display: dense structures bright, uint8 [H, W]."""
    size = len(signal)
    value = -np.log(signal)
    exposed = value > 1.0  # behind tissue; the open beam must not set the window
    exposed |= not exposed.any()
    small = cv2.resize(value, (64, 64), interpolation=cv2.INTER_AREA)
    broad = cv2.GaussianBlur(small, (0, 0), 7.0, borderType=cv2.BORDER_REPLICATE)
    broad = cv2.resize(broad, (size, size), interpolation=cv2.INTER_CUBIC)
    # Every vendor flattens the slow part, so that lung and mediastinum fit one screen.
    flatten = site.flatten + (0.2 if view == "LL" else 0.0)
    value = value - flatten * (broad - broad.mean())
    fine = cv2.GaussianBlur(value, (0, 0), max(0.8, size / 120))
    value = value + site.sharpen * (value - fine)
    low, high = np.percentile(value[::3, ::3][exposed[::3, ::3]], [1.5, 99.5])
    shift, gain = rng.normal(0, 0.06), np.exp(rng.normal(0, 0.16))
    share = (value - low) / max(high - low, 0.3) - 0.46 - shift
    gray = 1 / (1 + np.exp(-4.6 * site.contrast * gain * share))
    return np.clip(gray * 255, 0, 255).astype(np.uint8)


def finish(
    pixels: np.ndarray, site: Site, view: str, supine: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Collimation edges and markers burnt into the image.

    Returns:
        Pixels uint8 [H, W], and bool [H, W]: what lies inside of the collimation.
    """
    size = len(pixels)
    out = pixels.copy()
    edges = (rng.uniform(0, 0.055, 4) * (rng.random(4) < 0.5) * size).astype(int)
    if view == "LL":
        edges[2:] += int(size * rng.uniform(0.03, 0.09))
    seen = np.zeros((size, size), bool)
    seen[edges[0] : size - edges[1], edges[2] : size - edges[3]] = True
    out[~seen] = site.border
    # The letter is on the patient's side that it names: right of the patient is image left.
    column = 0.07 if site.marker == "R" else 0.89
    texts = [(site.marker, column + rng.uniform(-0.02, 0.02), rng.uniform(0.08, 0.2))]
    if supine and rng.random() < 0.7:
        texts.append((str(rng.choice(["AP", "PORT", "SUP"])), 0.1, 0.94))
    for text, x, y in texts:
        spot = (int(x * size), int(y * size))
        scale = size / 224 * 0.5
        cv2.putText(
            out, text, spot, cv2.FONT_HERSHEY_SIMPLEX, scale, 250, max(1, size // 200), cv2.LINE_AA
        )
    return out, seen
