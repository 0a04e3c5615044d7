"""Small images for probes that are trained step by step: a bright half tells the label."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from selfray.evals.stepwise import Labelled, LabelledSplits, TrainedProbe
from selfray.models.encoder import Encoder, Tokens, vit_encoder
from selfray.models.preprocessing import Preprocessing
from selfray.models.vit import Shape, VisionTransformer

SIZE = 28
TEST = 80


class FewTokens(nn.Module):
    """A network that is no vision transformer: the mean of each quarter of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tokens:
        """[B, 1, 28, 28] to CLS [B, 3] and patches [B, 4, 3]."""
        patches = nn.functional.avg_pool2d(images, SIZE // 2).flatten(1)[..., None] * self.scale
        patches = patches * torch.tensor([1.0, 2.0, 3.0])
        return Tokens(patches.mean(dim=1), patches)


def preprocessing() -> Preprocessing:
    return Preprocessing(SIZE, (0.5,), (0.25,))


def micro_encoder(seed: int = 0) -> Encoder:
    """A vision transformer of two blocks whose LayerScale lets them do something."""
    torch.manual_seed(seed)
    network = VisionTransformer(
        Shape(24, 2, 2), patch_size=7, image_size=SIZE, registers=1, layerscale_init=0.5
    )
    return vit_encoder("micro", network, preprocessing())


def other_encoder() -> Encoder:
    return Encoder("other", FewTokens(), preprocessing(), width=3, grid=(2, 2))


class PlantedImages:
    """Images of noise, some with a bright lower half; called, they are what a probe reads.

    Attributes:
        pixels: float32 [N, 1, 28, 28].
        splits: Targets: the bright half; noise; a number that is twice as bright as the half is.
    """

    def __init__(self, train: int = 120, validate: int = 60, seed: int = 3) -> None:
        generator = np.random.default_rng(seed)
        count = train + validate + TEST
        planted, noise = (np.arange(count) % 2).astype(float), generator.integers(0, 2, count)
        self.pixels = torch.from_numpy(generator.normal(0, 0.1, (count, 1, SIZE, SIZE))).float()
        self.pixels[:, :, SIZE // 2 :] += torch.from_numpy(planted).float()[:, None, None, None]
        self.targets = np.stack([planted, noise, 50 + 20 * planted], axis=1).astype(np.float64)
        first, second = np.arange(train), np.arange(train, train + validate)
        self.splits = LabelledSplits(
            train=Labelled(first, self.targets[first]),
            validate=Labelled(second, self.targets[second]),
            test_rows=np.arange(train + validate, count),
            real=np.array([False, False, True]),
        )

    @property
    def known(self) -> np.ndarray:
        """Targets of the test images, [80, 3]."""
        return self.targets[self.splits.test_rows]

    def only(self, *columns: int) -> LabelledSplits:
        """The splits with some of the targets."""
        taken = list(columns)
        train, validate = (
            Labelled(split.rows, split.targets[:, taken])
            for split in (self.splits.train, self.splits.validate)
        )
        return LabelledSplits(train, validate, self.splits.test_rows, self.splits.real[taken])

    def __call__(self, row: int, generator: np.random.Generator | None) -> Tensor:
        image = self.pixels[row]
        return image if generator is None else image + 0.1 * float(generator.normal())


def assert_a_function_of_the_seed(train: Callable[[int], TrainedProbe]) -> None:
    """The same seed gives the same numbers, another one others."""
    first, again, other = train(0), train(0), train(1)
    np.testing.assert_array_equal(again.predictions, first.predictions)
    assert again.settings == first.settings
    assert (other.predictions != first.predictions).any()


def weights_of(encoder: Encoder) -> dict[str, Tensor]:
    return copy.deepcopy(encoder.model.state_dict())


def assert_unchanged(encoder: Encoder, before: dict[str, Tensor]) -> None:
    after = encoder.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not encoder.model.training


def chance(known: np.ndarray) -> float:
    """Standard deviation of the AUROC of a score that knows nothing (Mann and Whitney, 1947)."""
    positive = int(known.sum())
    negative = len(known) - positive
    return float(np.sqrt((positive + negative + 1) / (12 * positive * negative)))
