"""Draw `docs/images/drr.png`: radiographs computed from a CT, as `make demo-real` trained on them.

    python scripts/draw_computed.py demo-real/radiographs demo-real/continued docs/images/drr.png

Rows: radiograph, attention of the CLS token in the last block, first three principal components of
the patch tokens as colours. No radiograph of the other packages is drawn.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np

from selfray.data.dataset import RadiographDataset
from selfray.models.published import Encoder, load_encoder
from selfray.summary.pictures import draw_examples

VIEWS = ("PA", "PA", "AP", "LL")
SIDE = 256  # pixels: twice what the encoder was trained on, for finer maps
TILE = 134  # pixels
GAP = 3


def main(data: Path, run: Path, out: Path) -> None:
    dataset, trained = RadiographDataset(data), load_encoder(str(run))
    encoder = Encoder(
        trained.name, trained.model, mean=trained.mean, std=trained.std, image_size=SIDE
    )
    examples = draw_examples(encoder, dataset, computed(dataset))
    strips = [
        [cv2.cvtColor(example.radiograph, cv2.COLOR_GRAY2RGB) for example in examples],
        [example.attention for example in examples],
        [example.patches for example in examples],
    ]
    picture = np.vstack([np.hstack(list(map(tile, strip))) for strip in strips])
    cv2.imwrite(
        str(out), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 9]
    )


def computed(dataset: RadiographDataset) -> list[int]:
    """One row for each of `VIEWS`, in the order in which they were computed."""
    views, sites = dataset.column("view"), dataset.column("site")
    left = {v: iter(np.flatnonzero((views == v) & (sites == "computed"))) for v in VIEWS}
    return [int(next(left[view])) for view in VIEWS]


def tile(picture: np.ndarray) -> np.ndarray:
    small = cv2.resize(picture, (TILE, TILE), interpolation=cv2.INTER_AREA)
    return cv2.copyMakeBorder(small, 0, GAP, 0, GAP, cv2.BORDER_CONSTANT, value=(255, 255, 255))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
