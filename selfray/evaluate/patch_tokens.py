"""Patch tokens of images of a dataset, made once and kept.

They depend on the encoder and the images alone: what is trained on them shares them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from selfray.data.dataset import SPLITS, RadiographDataset
from selfray.data.image_source import DatasetImages
from selfray.errors import BadImage, InputError
from selfray.evals.segmentation_decoders import blocks_read
from selfray.feature_directory import (
    CHUNK_ROWS,
    FeatureWriter,
    is_feature_directory,
    read_manifest,
    require_same,
)
from selfray.feature_directory import FORMAT_NAME as FEATURES_FORMAT
from selfray.models.encoder import Encoder
from selfray.progress import progress_bar

_BATCH = 32  # images that are encoded at a time
_DECODING_THREADS = 2


class PatchTokens:
    """Kept patch tokens of one encoder and dataset.

    Args:
        encoder: Frozen; its device is used.
        data: Whose images.
        rows: int64 [N], of which images, ascending.
        out: Directory of these, made if need be: `last-block` and `four-blocks` lie in it.
    """

    def __init__(
        self, encoder: Encoder, data: RadiographDataset, rows: np.ndarray, out: Path
    ) -> None:
        self._encoder, self._data, self._rows, self._out = encoder, data, rows, out

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Where rows of the dataset, each one of these, are in `of_blocks`."""
        return np.searchsorted(self._rows, rows)

    def of_last_block(self) -> np.ndarray:
        """float16 [N, h, w, D], memory-mapped, as `Encoder.features` gives them."""
        return self.of_blocks([self._encoder.depth - 1])[:, -1]

    def of_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        """float16 [N, L, h, w, D], memory-mapped.

        Args:
            blocks: Which, ascending, from 0; the last is the encoder's last.

        Raises:
            InputError: What lies there is of something else, or tokens are not finite.
            BadImage: An image does not decode.
        """
        several = self._out / "four-blocks"
        if len(blocks) > 1:
            return self._kept(several, blocks)
        if is_feature_directory(several):  # the last of them is the one wanted
            depth = self._encoder.depth
            return self._kept(several, blocks_read("upernet", depth))[:, -1:]
        return self._kept(self._out / "last-block", blocks)

    def _kept(self, out: Path, blocks: Sequence[int]) -> np.ndarray:
        encoder, images = self._encoder, DatasetImages(self._data)
        chosen = hashlib.sha256(self._rows.astype("<i8").tobytes()).hexdigest()
        shape = [len(self._rows), len(blocks), *encoder.grid, encoder.width]
        manifest = {
            "format": FEATURES_FORMAT,
            "version": 1,
            "encoder": encoder.name,
            "weights_sha256": encoder.weights_sha256,
            "preprocessing": encoder.preprocessing.description(),
            "precision": "exact",
            "arrays": {"patch_tokens": {"shape": shape, "dtype": "float16"}},
            "blocks": list(blocks),
            "dataset": images.description
            | {"fingerprint": f"{self._data.fingerprint[:12]}, images {chosen[:12]}"},
        }
        if is_feature_directory(out):
            require_same(out, read_manifest(out, "manifest.json"), manifest)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            with FeatureWriter(out) as writer:
                if writer.begun(manifest) is None:
                    writer.begin(manifest)
                writer.open(manifest)
                _encode(encoder, images, self._rows, blocks, writer)
                writer.finish(images.table().select(["image_id"]).take(pa.array(self._rows)))
        return np.load(out / "patch_tokens.npy", mmap_mode="r", allow_pickle=False)


def rows_with_label_maps(data: RadiographDataset) -> np.ndarray:
    """Images of any split with a label map, int64, ascending."""
    labelled = np.logical_or.reduce(
        [
            data.table[column].is_valid().to_numpy(zero_copy_only=False)
            for column in ("mask", "finding_mask")
        ]
    )
    rows = np.sort(np.concatenate([data.rows(split) for split in SPLITS]))
    return rows[labelled[rows]]


def _encode(
    encoder: Encoder,
    images: DatasetImages,
    rows: np.ndarray,
    blocks: Sequence[int],
    writer: FeatureWriter,
) -> None:
    """Write the tokens of the chunks that are not done."""
    done = writer.done()
    chunks = [c for c in range(-(-len(rows) // CHUNK_ROWS)) if c not in done]
    missing = [np.arange(len(rows))[c * CHUNK_ROWS : (c + 1) * CHUNK_ROWS] for c in chunks]
    wanted = rows[np.concatenate(missing)].tolist() if missing else []
    squares = images.prepared(wanted, encoder.preprocessing.square, workers=_DECODING_THREADS)
    with progress_bar(
        total=len(rows), initial=len(rows) - len(wanted), unit="image", desc="patch tokens"
    ) as bar:
        for chunk, places in zip(chunks, missing, strict=True):
            for start in range(0, len(places), _BATCH):
                batch = places[start : start + _BATCH]
                prepared = [_usable(next(squares), int(rows[place])) for place in batch]
                inputs = torch.from_numpy(np.stack(prepared)).to(encoder.device)
                shown = encoder.blocks(
                    encoder.preprocessing.normalise(inputs), encoder.depth - blocks[0]
                )
                patches = torch.stack([shown[b - blocks[0]][1] for b in blocks], dim=1)
                writer.write(batch.tolist(), {"patch_tokens": _half(patches, encoder)})
                bar.update(len(batch))
            writer.finish_chunk(chunk, {})


def _usable(square: np.ndarray | str, row: int) -> np.ndarray:
    if isinstance(square, str):
        raise BadImage(f"image of row {row} {square}. Make the dataset anew.")
    return square


def _half(patches: torch.Tensor, encoder: Encoder) -> np.ndarray:
    """[B, L, D, h, w] to float16 [B, L, h, w, D]."""
    values = patches.permute(0, 1, 3, 4, 2).half().cpu().numpy()
    if not np.isfinite(values).all():
        raise InputError(
            f"{encoder.name}: patch tokens are not finite in float16. Check the encoder's weights: "
            "a diverged run gives such values."
        )
    return values
