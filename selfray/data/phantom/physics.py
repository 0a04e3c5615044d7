"""Attenuation of tissues and Beer–Lambert's law at two energies."""

from __future__ import annotations

import numpy as np

# Mass attenuation coefficients in cm²/g at 60 and 100 keV, densities in g/cm³.
# Reference: NIST, Tables of X-Ray Mass Attenuation Coefficients (Hubbell and Seltzer), table 4:
# ICRU-44 soft tissue and cortical bone; table 3: iron.
MASS_ATTENUATION = {
    "soft": np.array([0.2048, 0.1693]),
    "bone": np.array([0.3148, 0.1855]),
    "metal": np.array([1.205, 0.3717]),
}
# A filtered 120 kV beam has its mean between the two; a 90 kV beam leans to the lower one.
SOFT_TISSUE = 1.06
# Adipose tissue as the soft tissue that attenuates alike: 0.95 g/cm³ × 0.1974 / 0.2048.
FAT = 0.916
CORTICAL_BONE = 1.92


def transmission(grams: dict[str, np.ndarray], low_energy_share: float) -> np.ndarray:
    """Share of the primary beam that arrives at the detector.

    Args:
        grams: Mass per area along each ray by material of `MASS_ATTENUATION`, g/cm² [H, W].
        low_energy_share: Share of detected energy at 60 keV, 0 to 1; the rest is at 100 keV.

    Returns:
        Transmission in (0, 1], [H, W].

    Reference:
        Beer–Lambert: I / I0 = sum over energies of w exp(-sum over materials of mu/rho * g).
    """
    total = None
    for index, share in enumerate((low_energy_share, 1.0 - low_energy_share)):
        exponent = sum(MASS_ATTENUATION[m][index].astype(g.dtype) * g for m, g in grams.items())
        term = share * np.exp(-exponent)
        total = term if total is None else total + term
    assert total is not None
    return total
