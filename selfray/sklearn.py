"""An encoder as a transformer of scikit-learn: radiographs in, features out, in a `Pipeline`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin

from selfray.errors import InputError, nearest
from selfray.models.encoder import Encoder
from selfray.models.image_inputs import ImageInput
from selfray.models.published import load_encoder

TOKENS = ("cls", "patch_mean", "cls+patch_mean")


class EncoderTransformer(TransformerMixin, BaseEstimator):
    """Frozen features of images. Fitting learns nothing; the encoder is loaded when it is needed.

    Features are computed on a GPU where there is one. A pickle or a clone holds the encoder's name
    alone, never its weights. `Pipeline(..., memory=DIR)` keeps features between folds.

    Args:
        encoder: As for `selfray.load_encoder`.
        tokens: Which features: `cls`, `patch_mean`, or `cls+patch_mean`, the two side by side.
        batch_size: Images at a time.
    """

    def __init__(
        self,
        encoder: str = "microsoft/rad-dino",
        tokens: str = "cls+patch_mean",
        batch_size: int = 32,
    ) -> None:
        self.encoder = encoder
        self.tokens = tokens
        self.batch_size = batch_size

    def fit(self, X: Iterable[ImageInput], y: object = None) -> EncoderTransformer:
        """Check `tokens`, and nothing else.

        Args:
            X: Not looked at.
            y: Not looked at.

        Raises:
            InputError: Unknown `tokens`.
        """
        del X, y
        self._kinds()
        return self

    def transform(self, X: Iterable[ImageInput]) -> np.ndarray:
        """Encode images.

        Args:
            X: One-dimensional: paths, Pillow images, or uint8 arrays [H, W] or [H, W, 3]; or one
                array [N, H, W] or [N, H, W, 3]; or a table, DataFrame or array, whose only column
                has paths or images.

        Returns:
            float32 [N, D], or [N, 2 D] for `cls+patch_mean`.

        Raises:
            InputError: There is no such encoder here, `X` is one image or has several columns,
                or an image is none of 8 bits.
        """
        kinds = self._kinds()
        rows = []
        for cls, patches in self._loaded().batches(_images(X), self.batch_size):
            found = {"cls": cls, "patch_mean": patches.mean(dim=(2, 3))}
            rows.append(np.hstack([found[kind].float().cpu().numpy() for kind in kinds]))
        return np.concatenate(rows)

    def get_feature_names_out(self, input_features: object = None) -> np.ndarray:
        """`cls0`, `cls1` and so on, then `patch_mean0` and so on.

        Args:
            input_features: Not looked at: an image has no named features.
        """
        del input_features
        width = self._loaded().width
        names = [f"{kind}{i}" for kind in self._kinds() for i in range(width)]
        return np.asarray(names, dtype=object)

    def _kinds(self) -> Sequence[str]:
        if self.tokens not in TOKENS:
            raise InputError(f"tokens is {self.tokens!r}. {nearest(str(self.tokens), TOKENS)}")
        return self.tokens.split("+")

    def _loaded(self) -> Encoder:
        """The encoder, which `set_params` may have renamed since it was loaded."""
        import torch

        if self.__dict__.get("_named") != self.encoder:
            self._encoder, self._named = load_encoder(self.encoder), self.encoder
            self._encoder.model.to("cuda" if torch.cuda.is_available() else "cpu")
        return self._encoder

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        return {name: v for name, v in state.items() if name not in ("_encoder", "_named")}

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags


def _images(X: Any) -> list[ImageInput]:
    """The images in what scikit-learn's tools pass on.

    Raises:
        InputError: It is one image, or has several columns.
    """
    if isinstance(X, str | PathLike) or not hasattr(X, "__iter__") or getattr(X, "ndim", 1) == 0:
        raise InputError(f"X is one {type(X).__name__}. Give a list of images or paths.")
    names = getattr(X, "columns", None)
    if names is not None or (isinstance(X, np.ndarray) and X.ndim == 2 and X.dtype.kind in "OU"):
        if X.shape[1] != 1:
            raise InputError(
                f"X has {X.shape[1]} columns, allowed: one, of paths or images. Choose that column."
            )
        return list(X[:, 0] if names is None else X[names[0]])
    return list(X)
