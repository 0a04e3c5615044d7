"""What counts as near enough, and how many images a CPU takes at once."""

import numpy as np
import pytest
from scipy.spatial.distance import cosine

from selfray import inference
from selfray.inference import COSINE, EXACT, _fidelity, _kept, cpu_batch_size
from selfray.models.published import load_encoder

DRAWS = np.random.default_rng(0)


def test_nearness_is_scipys_cosine_of_the_worst_image():
    reference = DRAWS.normal(3, 1, (6, 40))
    found = reference + DRAWS.normal(0, 0.05, reference.shape)
    measured = _fidelity(found, reference)
    worst = min(1 - cosine(f, r) for f, r in zip(found, reference, strict=True))
    assert measured["cosine"] == pytest.approx(worst, abs=1e-9)
    mean = reference.mean(axis=0)
    centred = min(1 - cosine(f - mean, r - mean) for f, r in zip(found, reference, strict=True))
    assert measured["centred_cosine"] == pytest.approx(centred, abs=1e-9)
    assert measured["centred_cosine"] < measured["cosine"]
    largest = np.abs(found - reference).max() / np.abs(reference).max()
    assert measured["difference"] == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
@pytest.mark.parametrize("spoilt", [np.nan, np.inf, 0.0])
def test_no_promise_is_kept_by_features_that_are_not_finite_or_missing(precision, spoilt):
    reference = DRAWS.normal(size=(4, 8)).astype(np.float32)
    found = reference.copy()
    found[2] = spoilt
    with np.errstate(invalid="ignore"):
        assert not _kept(precision, _fidelity(found, reference))
    assert _kept(precision, _fidelity(reference, reference))


def test_promises_are_those_of_the_documentation():
    assert EXACT == 2e-5 and COSINE == {"bf16": 0.9999, "int8": 0.998}


def test_a_batch_fills_a_core_within_the_memory(monkeypatch):
    encoder = load_encoder("random:vit_pico/16@64")  # 17 tokens, 128 wide
    assert cpu_batch_size(encoder, 1) == 64
    large = load_encoder("random:vit_pico/14@518")  # 1,370 tokens
    assert cpu_batch_size(large, 1) == 1
    image = 4 * (17 * 128 * 20 + 3 * 64 * 64)

    class Little:
        available = 2 * 2 * 10 * image  # half of it may be used, by two streams

    monkeypatch.setattr(inference.psutil, "virtual_memory", lambda: Little)
    assert cpu_batch_size(encoder, 2) == 10
    Little.available = 0
    assert cpu_batch_size(encoder, 2) == 1
