"""Zero-shot classification: prompts and scores."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from selfray.evals.zero_shot import ensemble, prompts, zero_shot_scores

CHEXPERT = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip


def test_prompts_are_made_of_the_findings_name() -> None:
    positive, negative = prompts("pleural_effusion")
    assert positive[0] == "Pleural effusion."
    assert negative[0] == "No pleural effusion."
    assert prompts("Pleural Effusion") == (positive, negative)


@pytest.mark.parametrize("name", CHEXPERT)
def test_prompts_of_a_finding_state_it_and_deny_it(name: str) -> None:
    positive, negative = prompts(name)
    assert positive
    assert negative
    assert not set(positive) & set(negative)
    assert all(text[0].isupper() and text.endswith(".") for text in (*positive, *negative))
    if name != "No Finding":
        assert all(name.lower() in text.lower() for text in (*positive, *negative))
        assert not any(text.lower().startswith("no ") for text in positive)


def test_scores_are_the_softmax_of_both_similarities() -> None:
    generator = np.random.default_rng(0)
    images, texts = generator.normal(size=(20, 6)), generator.normal(size=(2, 6))
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    expected = softmax(14.0 * images @ texts.T, axis=1)[:, 0]
    found = zero_shot_scores(images.astype(np.float32), texts[0], texts[1], 14.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (np.argsort(found) == np.argsort(zero_shot_scores(images, *texts, 1.0))).all()
    assert np.isfinite(zero_shot_scores(images, *texts, 1e9)).all()


def test_an_ensemble_is_the_direction_of_the_mean() -> None:
    rows = np.eye(3)[:2]
    np.testing.assert_allclose(ensemble(rows), [0.5**0.5, 0.5**0.5, 0])
