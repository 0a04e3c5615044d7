"""The SGD probe against torch.optim, DINOv2's inputs, and images that tell their label."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trained_probe_data import (
    PlantedImages,
    assert_a_function_of_the_seed,
    assert_unchanged,
    chance,
    micro_encoder,
    other_encoder,
    weights_of,
)

from selfray.evals import sgd_probe as module
from selfray.evals.metrics import auroc_by_column, r2_by_column
from selfray.evals.sgd_probe import (
    LEARNING_RATES,
    SgdClassifiers,
    block_features,
    classifier_inputs,
    sgd_probe,
)

WIDTH, STEPS, BATCH = 3, 6, 16
REAL = torch.tensor([False, True])


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(STEPS, BATCH, 5 * WIDTH))
    targets = np.stack([features[..., 0] > 0, features[..., 1]], axis=-1).astype(float)
    targets[generator.random(targets.shape) < 0.3] = np.nan
    pairs = zip(features, targets, strict=True)
    return [(torch.from_numpy(f).float(), torch.from_numpy(t).float()) for f, t in pairs]


def classifiers() -> SgdClassifiers:
    inputs = classifier_inputs(4, WIDTH)
    return SgdClassifiers(inputs, REAL, steps=STEPS, batch_size=BATCH, seed=1)


def test_every_classifier_is_trained_as_torch_optim_would_train_it_alone(batches):
    ours = classifiers()
    eye = torch.eye(5 * WIDTH)
    biases = torch.from_numpy(ours.outputs(torch.zeros(1, 5 * WIDTH)))
    weights = torch.from_numpy(ours.outputs(eye)) - biases  # [C, F, K]
    assert (biases == 0).all() and 0.005 < float(weights[-1].std()) < 0.02
    for step, (features, targets) in enumerate(batches):
        ours.step(step, features, targets)
    found = ours.outputs(eye)
    assert len(found) == 4 * len(LEARNING_RATES)
    for candidate, expected in enumerate(weights):
        columns = ours.inputs[candidate // len(LEARNING_RATES)].columns
        rate = LEARNING_RATES[candidate % len(LEARNING_RATES)] * BATCH / 256
        theirs = torch.nn.Linear(columns.stop - columns.start, 2)
        with torch.no_grad():
            theirs.weight.copy_(expected[columns].T)
            theirs.bias.zero_()
        optimizer = torch.optim.SGD(theirs.parameters(), lr=rate, momentum=0.9, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0)
        for features, targets in batches:
            outputs, known = theirs(features[:, columns]), ~targets.isnan()
            cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(
                outputs[known[:, 0], 0], targets[known[:, 0], 0]
            )
            squared = torch.nn.functional.mse_loss(outputs[known[:, 1], 1], targets[known[:, 1], 1])
            optimizer.zero_grad()
            (cross_entropy + squared).backward()
            optimizer.step()
            schedule.step()
        after = theirs(eye[:, columns]).detach().numpy()
        np.testing.assert_allclose(found[candidate], after, atol=2e-5)


def test_a_target_without_labels_does_not_move(batches):
    ours = classifiers()
    before = ours.outputs(batches[0][0])
    for step, (features, targets) in enumerate(batches):
        targets[:, 0] = torch.nan
        ours.step(step, features, targets)
    after = ours.outputs(batches[0][0])
    np.testing.assert_array_equal(after[..., 0], before[..., 0])
    assert (after[..., 1] != before[..., 1]).any()


def test_what_diverges_leaves_the_other_targets_alone(batches):
    alone, together = classifiers(), classifiers()
    for step, (features, targets) in enumerate(batches):
        alone.step(step, features, targets)
        targets[:, 1] = torch.inf
        together.step(step, features, targets)
    found, expected = (c.outputs(batches[0][0]) for c in (together, alone))
    assert not np.isfinite(found[..., 1]).any()
    np.testing.assert_array_equal(found[..., 0], expected[..., 0])


def test_inputs_are_those_of_dinov2():
    encoder = micro_encoder()
    images = torch.randn(3, 1, 28, 28)
    features = block_features(encoder, images)
    blocks = encoder.blocks(images, 2)
    inputs = classifier_inputs(encoder.depth, encoder.width)
    assert [(one.blocks, one.patch_mean) for one in inputs] == [
        (1, False), (1, True), (2, False), (2, True)
    ]  # fmt: skip
    for one in inputs:  # as `create_linear_input` has it
        expected = [cls for cls, _ in blocks[-one.blocks :]]
        if one.patch_mean:
            expected.append(blocks[-1][1].flatten(2).mean(dim=2))
        torch.testing.assert_close(features[:, one.columns], torch.cat(expected, dim=1))


def test_another_network_has_its_last_block_only():
    encoder = other_encoder()
    inputs = classifier_inputs(encoder.depth, encoder.width)
    assert [(one.blocks, one.patch_mean) for one in inputs] == [(1, False), (1, True)]
    assert block_features(encoder, torch.randn(2, 1, 28, 28)).shape == (2, 6)


@pytest.mark.parametrize("augmented", [False, True])
def test_finds_what_is_there_and_nothing_in_noise(augmented, monkeypatch):
    monkeypatch.setattr(module, "BATCH_SIZE", 32)
    images, encoder = PlantedImages(), micro_encoder()
    before = weights_of(encoder)
    steps = 60 if augmented else 400
    # By themselves, since one classifier is chosen for all binary targets.
    found, nothing = (
        sgd_probe(encoder, images, splits, augmented=augmented, steps=steps, seed=0).predictions
        for splits in (images.only(0, 2), images.only(1))
    )
    assert_unchanged(encoder, before)
    known = images.known
    assert auroc_by_column(known[:, :1], found[:, :1])[0] == 1
    assert r2_by_column(known[:, 2:], found[:, 1:])[0] > 0.8
    auroc = auroc_by_column(known[:, 1:2], nothing)[0]
    assert abs(auroc - 0.5) < 4 * chance(known[:, 1])


@pytest.mark.parametrize("augmented", [False, True])
def test_numbers_are_a_function_of_the_seed(augmented):
    images, encoder = PlantedImages(20, 20), micro_encoder()
    assert_a_function_of_the_seed(
        lambda seed: sgd_probe(
            encoder, images, images.splits, augmented=augmented, steps=4, seed=seed
        )
    )


def test_large_features_are_met_by_a_lower_learning_rate():
    """Squared errors diverge at the upper rates; what is chosen has not."""
    images, encoder = PlantedImages(40, 20), micro_encoder()
    with torch.no_grad():
        encoder.vit.norm.weight.mul_(20)
    found = sgd_probe(encoder, images, images.splits, augmented=False, steps=150, seed=0)
    assert np.isfinite(found.predictions).all()
    assert found.settings["chosen"]["real"]["learning_rate"] < max(LEARNING_RATES)
