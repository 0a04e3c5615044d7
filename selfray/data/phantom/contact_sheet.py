"""A PNG beside the dataset: examples of every view, site and finding."""

from __future__ import annotations

import cv2
import numpy as np

from selfray.data.dataset import RadiographDataset, write_atomically

_TILE, _STRIP, _COLUMNS = 256, 22, 6
_COLOURS = ((64, 200, 255), (255, 160, 64), (120, 255, 120), (255, 120, 255), (255, 255, 96))


def write_contact_sheet(dataset: RadiographDataset) -> None:
    """Write `contact_sheet.png` into the dataset's directory.

    Args:
        dataset: A phantom dataset with masks.
    """
    tiles = [*_views(dataset), *_findings(dataset), *_label_maps(dataset)]
    while len(tiles) % _COLUMNS:
        tiles.append(np.zeros_like(tiles[0]))
    rows = [np.hstack(tiles[i : i + _COLUMNS]) for i in range(0, len(tiles), _COLUMNS)]
    sheet = np.vstack([_caption(rows[0].shape[1], len(dataset)), *rows])
    done, encoded = cv2.imencode(".png", sheet)
    assert done
    write_atomically(dataset.directory / "contact_sheet.png", encoded.tobytes())


def _caption(width: int, images: int) -> np.ndarray:
    text = f"synthetic phantom: drawn from a parametric anatomy, no real patient ({images} images)"
    strip = np.zeros((36, width, 3), np.uint8)
    cv2.putText(strip, text, (10, 25), cv2.FONT_HERSHEY_SIMPLEX, 0.65, (255,) * 3, 1, cv2.LINE_AA)
    return strip


def _tile(dataset: RadiographDataset, row: int, title: str, masks: list[np.ndarray]) -> np.ndarray:
    size = (_TILE, _TILE)
    gray = cv2.resize(dataset.pixels(row), size, interpolation=cv2.INTER_AREA)
    colour = cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR)
    for index, mask in enumerate(masks):
        large = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        lines, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(colour, lines, -1, _COLOURS[index % len(_COLOURS)], 1)
    strip = np.full((_STRIP, _TILE, 3), 30, np.uint8)
    cv2.putText(strip, title, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255,) * 3, 1, cv2.LINE_AA)
    return np.vstack([strip, colour])


def _views(dataset: RadiographDataset) -> list[np.ndarray]:
    """One image of each site and view, first without any finding where there is one."""
    views, sites = dataset.column("view"), dataset.column("site")
    ill = dataset.labels().sum(axis=1)
    tiles = []
    for view in ("PA", "AP", "LL"):
        for site in sorted(set(sites)):
            rows = np.flatnonzero((views == view) & (sites == site))
            if len(rows):
                row = int(rows[np.argmin(ill[rows])])
                tiles.append(_tile(dataset, row, f"{view}, site {site}", []))
    return tiles


def _findings(dataset: RadiographDataset) -> list[np.ndarray]:
    """Each finding plain and with the contour of its mask."""
    views, ill = dataset.column("view"), dataset.labels()
    tiles = []
    for index, name in enumerate(dataset.findings):
        rows = np.flatnonzero((ill[:, index] == 1) & (views != "LL"))
        if not len(rows):
            continue
        # The least accompanied one shows the finding itself.
        row = int(rows[np.argmin(ill[rows].sum(axis=1))])
        masks = dataset.masks(row, "finding_mask")
        assert masks is not None
        title = name.replace("_", " ")
        tiles += [_tile(dataset, row, title, []), _tile(dataset, row, title, [masks[index]])]
    return tiles


def _label_maps(dataset: RadiographDataset) -> list[np.ndarray]:
    masks = dataset.masks(0)
    assert masks is not None
    groups = {"lungs, heart": [0, 1, 8], "zones": [2, 3, 4, 5, 6, 7], "ribs, clavicles": [9, 10]}
    return [
        _tile(dataset, 0, f"label map: {title}", [masks[i] for i in chosen])
        for title, chosen in groups.items()
    ]
