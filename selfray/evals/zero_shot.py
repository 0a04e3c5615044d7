"""Findings without a label to learn from: is an image nearer to what says so, or what denies it?"""

from __future__ import annotations

import numpy as np
from scipy.special import expit

POSITIVE = ("{finding}.", "There is {finding}.", "{finding} is present.")
NEGATIVE = ("No {finding}.", "There is no {finding}.", "No evidence of {finding}.")

# Names that are no finding themselves, with what says so and what denies it.
_NAMED = {
    "no finding": (
        ("No acute cardiopulmonary abnormality.", "Normal study.", "The lungs are clear."),
        ("Abnormal study.", "There is an abnormality."),
    ),
}


def prompts(finding: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sentences that state a finding, and sentences that deny it.

    Args:
        finding: Its name, e.g. `pleural_effusion`, or CheXpert's `Pleural Effusion`.

    Returns:
        Positive and negative prompts.

    Reference:
        Tiu et al., Expert-level detection of pathologies from unannotated chest X-ray images via
        self-supervised learning, Nature Biomedical Engineering 2022 (CheXzero): "{finding}" and
        "no {finding}"; the other phrases are ours.
    """
    words = " ".join(finding.replace("_", " ").split()).lower()
    if words in _NAMED:
        return _NAMED[words]
    positive, negative = (
        tuple(_capitalised(template.format(finding=words)) for template in templates)
        for templates in (POSITIVE, NEGATIVE)
    )
    return positive, negative


def ensemble(embeddings: np.ndarray) -> np.ndarray:
    """One direction for several prompts that mean the same.

    Args:
        embeddings: [P, E], unit vectors.

    Returns:
        float64 [E], the unit vector of their mean.

    Reference:
        Radford et al., Learning transferable visual models from natural language supervision,
        ICML 2021, section 3.1.4.
    """
    mean = embeddings.astype(np.float64).mean(axis=0)
    return mean / np.linalg.norm(mean)


def zero_shot_scores(
    images: np.ndarray, positive: np.ndarray, negative: np.ndarray, scale: float
) -> np.ndarray:
    """Softmax of the two similarities: exp(s p) / (exp(s p) + exp(s n)).

    Args:
        images: [n, E], unit vectors.
        positive: [E], unit vector of the prompts that state the finding.
        negative: [E], of those that deny it.
        scale: s, the factor with which the encoder was trained. It changes probabilities, not
            their order; CheXzero takes 1.

    Returns:
        float64 [n], 0 to 1. Not calibrated to how frequent the finding is.

    Reference:
        Tiu et al., Nature Biomedical Engineering 2022, Methods (CheXzero).
    """
    # exp(a) / (exp(a) + exp(b)) is the logistic function of a - b, and that does not overflow.
    return expit(scale * (images.astype(np.float64) @ (positive - negative)))


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
