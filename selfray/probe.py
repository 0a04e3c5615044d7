"""The probe of a run: how good are the encoder's frozen features now?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from selfray.config import RunConfig
from selfray.data.dataset import RadiographDataset
from selfray.data.sampler import Purpose, generator_at
from selfray.evals.linear_probe import target_values, validation_probe
from selfray.models.encoder import Encoder, vit_encoder
from selfray.models.preprocessing import Preprocessing
from selfray.models.vit import VisionTransformer

Places = Sequence[tuple[RadiographDataset, int]]

_BATCH = 64
_METADATA = ("sex", "age_years")


class Trained(Protocol):
    """Networks in training, of which an encoder is the result."""

    mean: float
    std: float

    @property
    def result(self) -> VisionTransformer:
        """The encoder that the run is for."""
        ...


class Probe:
    """Linear probes on frozen CLS and mean patch tokens, fitted on train, scored on validate.

    Args:
        datasets: The run's data; findings that all of them have are probed.
        config: The run; its seed chooses the images.
        device: Where the encoder is.
    """

    def __init__(
        self, datasets: Sequence[RadiographDataset], config: RunConfig, device: torch.device
    ) -> None:
        self._image_size, self._device = config.encoder.image_size, device
        findings = [f for f in datasets[0].findings if all(f in d.findings for d in datasets)]
        self.names = (*findings, *_METADATA)
        self._train, self._train_labels = self._choose(datasets, "train", config)
        self._validate, self._validate_labels = self._choose(datasets, "validate", config)

    @property
    def possible(self) -> bool:
        """Whether there is any label to probe for, in both splits."""
        return self._labelled(self.names)

    @property
    def judges_findings(self) -> bool:
        """Whether there is a finding to probe for, in both splits."""
        return self._labelled(self.names[: -len(_METADATA)])

    def __call__(self, networks: Trained) -> dict[str, Any]:
        """Probe the encoder; see `selfray.evals.linear_probe.validation_probe`."""
        size, mean, std = self._image_size, (networks.mean,) * 3, (networks.std,) * 3
        encoder = vit_encoder("in training", networks.result, Preprocessing(size, mean, std, size))
        return self.score(lambda places: self._features(encoder, places))

    def score(self, features: Callable[[Places], np.ndarray]) -> dict[str, Any]:
        """The same probe on other features, to compare with.

        Args:
            features: From n places (a dataset and a row each) to features [n, D].
        """
        return validation_probe(
            features(self._train),
            self._train_labels,
            features(self._validate),
            self._validate_labels,
            self.names,
        )

    def _labelled(self, names: Sequence[str]) -> bool:
        """Whether any of the first few targets is known, in both splits."""
        return all(
            not np.isnan(labels[:, : len(names)]).all()
            for labels in (self._train_labels, self._validate_labels)
        )

    def _choose(
        self, datasets: Sequence[RadiographDataset], split: str, config: RunConfig
    ) -> tuple[list[tuple[RadiographDataset, int]], np.ndarray]:
        places = [(d, int(row)) for d in datasets for row in d.rows(split)]
        labels = np.concatenate(
            [target_values(d.column, self.names)[d.rows(split)] for d in datasets]
        )
        generator = generator_at(config.seed, Purpose.PROBE, 0)
        chosen = np.sort(generator.permutation(len(places))[: config.evaluate_images])
        return [places[i] for i in chosen], labels[chosen]

    @torch.inference_mode()
    def _features(self, encoder: Encoder, places: Places) -> np.ndarray:
        def prepare(start: int) -> torch.Tensor:
            batch = places[start : start + _BATCH]
            return torch.stack([encoder.preprocess(d.pixels(row)) for d, row in batch])

        features = []
        with ThreadPoolExecutor(1) as pool:
            for images in pool.map(prepare, range(0, len(places), _BATCH)):
                cls, patches = encoder.features(images.to(self._device))
                features.append(torch.cat([cls, patches.mean((2, 3))], dim=1).float().cpu())
        return torch.cat(features).numpy()
