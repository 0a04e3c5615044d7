"""Pictures of what an encoder sees: attention, patch tokens as colour, nearest neighbours."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from selfray.data.dataset import RadiographDataset
from selfray.errors import InputError
from selfray.feature_directory import Features, is_feature_directory, open_features

if TYPE_CHECKING:
    import torch

    from selfray.models.encoder import Encoder

EXAMPLES = 6
QUERIES = 4
NEIGHBOURS = 5
_SIDE = 256  # pixels of a picture
_CHUNK = 65_536  # rows of features compared at a time


@dataclass(frozen=True)
class Example:
    """One radiograph as an encoder sees it.

    Attributes:
        findings: Names of those that are present.
        view: E.g. PA; empty where not known.
        radiograph: After the encoder's preprocessing, uint8 [S, S].
        attention: CLS in the last block, mean over heads, uint8 [S, S, 3] RGB.
        heads: Each head likewise.
        patches: First three principal components of the patch tokens as RGB over the radiograph,
            uint8 [S, S, 3].
    """

    findings: tuple[str, ...]
    view: str
    radiograph: np.ndarray
    attention: np.ndarray
    heads: list[np.ndarray]
    patches: np.ndarray


@dataclass(frozen=True)
class Neighbour:
    """An image near a query; the query itself has cosine 1 and all its findings as shared.

    Attributes:
        radiograph: uint8 [H, W].
        view: E.g. PA; empty where not known.
        cosine: Between CLS tokens.
        shared: Findings that both have.
        others: Further findings that it has.
    """

    radiograph: np.ndarray
    view: str
    cosine: float
    shared: tuple[str, ...]
    others: tuple[str, ...]


def choose_rows(dataset: RadiographDataset, count: int, *, healthy: bool) -> list[int]:
    """Test images to show: of different patients, frontal before lateral, each finding in turn.

    Args:
        dataset: Its test split is taken; all of it where there is no test split.
        count: At most so many.
        healthy: Begin with an image without any finding.

    Returns:
        Row numbers, the same ones at each call.
    """
    rows = dataset.rows("test")
    rows = rows if len(rows) else np.arange(len(dataset))
    lateral = np.array([view in {"LL", "LATERAL"} for view in dataset.column("view")[rows]])
    rows = rows[np.argsort(lateral, kind="stable")]
    labels = np.nan_to_num(dataset.labels()[rows])
    wanted = [np.flatnonzero(column) for column in labels.T]
    if healthy:
        wanted.insert(0, np.flatnonzero(~labels.any(axis=1)))
    wanted += [np.arange(len(rows))] * count
    patients = dataset.column("patient_id")[rows]
    chosen: list[int] = []
    shown: set[str] = set()
    for candidates in wanted:
        fresh = [int(i) for i in candidates if patients[i] not in shown]
        if fresh and len(chosen) < count:
            shown.add(patients[fresh[0]])
            chosen.append(int(rows[fresh[0]]))
    return chosen


def draw_examples(
    encoder: Encoder, dataset: RadiographDataset, rows: Sequence[int]
) -> list[Example]:
    """Attention and patch tokens of a few images.

    Args:
        encoder: On the CPU.
        dataset: Where the images are.
        rows: Which of them. The principal components are fitted on all of these together, so that
            a colour means the same in each.
    """
    import torch

    images = torch.stack([encoder.preprocess(dataset.pixels(row)) for row in rows])
    side = encoder.image_size // encoder.patch_size
    attention = encoder.attention(images).unflatten(2, (side, side)).numpy()
    _, patches = encoder.features(images)
    colours = patch_colours(patches.permute(0, 2, 3, 1).numpy())
    examples = []
    for k, row in enumerate(rows):
        radiograph = _shown(encoder, images[k])
        examples.append(
            Example(
                findings=_findings(dataset, row),
                view=_view(dataset, row),
                radiograph=radiograph,
                attention=_overlay(radiograph, attention[k].mean(axis=0)),
                heads=[_overlay(radiograph, head) for head in attention[k]],
                patches=_tinted(radiograph, _enlarge(colours[k], cv2.INTER_LINEAR)),
            )
        )
    return examples


def patch_colours(patches: np.ndarray) -> np.ndarray:
    """First three principal components of patch tokens, as colours.

    Args:
        patches: [B, h, w, D]; components are fitted on all B images together.

    Returns:
        uint8 [B, h, w, 3]; each component from its 2nd to its 98th percentile.
    """
    tokens = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    tokens = tokens - tokens.mean(axis=0)
    _, directions = np.linalg.eigh(tokens.T @ tokens)
    components = tokens @ directions[:, :-4:-1]
    # The sign of a component is arbitrary; this makes it the same on every machine.
    components *= np.sign((components**3).sum(axis=0))
    low, high = np.percentile(components, (2, 98), axis=0)
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    return (scaled.clip(0, 1) * 255).astype(np.uint8).reshape(*patches.shape[:3], 3)


def find_features(evaluation: Path, encoder: str) -> Features | None:
    """The features of an encoder in an evaluation directory, if they are still there."""
    if is_feature_directory(Path(encoder)):
        return open_features(Path(encoder))
    for manifest in sorted((evaluation / "features").glob("*/manifest.json")):
        if is_feature_directory(manifest.parent):
            features = open_features(manifest.parent)
            if features.manifest.get("encoder") == encoder:
                return features
    return None


def nearest_neighbours(features: Features, dataset: RadiographDataset) -> list[list[Neighbour]]:
    """Test images, each with the images of other patients that are nearest to it.

    Args:
        features: Of all rows of the dataset.
        dataset: Where the images are.

    Returns:
        At most `QUERIES` lists: the query, then at most `NEIGHBOURS` by falling cosine.

    Raises:
        InputError: The features are of another dataset.
    """
    if len(features.cls) != len(dataset):
        raise InputError(
            f"the features have {len(features.cls)} rows and {dataset.directory} has "
            f"{len(dataset)} images. Extract them again."
        )
    rows = choose_rows(dataset, QUERIES, healthy=False)
    patients = dataset.column("patient_id")
    queries = _unit(features.cls[rows])
    cosines = np.concatenate(
        [
            queries @ _unit(features.cls[start : start + _CHUNK]).T
            for start in range(0, len(dataset), _CHUNK)
        ],
        axis=1,
    )
    shown = []
    for row, cosine in zip(rows, cosines, strict=True):
        cosine[patients == patients[row]] = -np.inf
        near = [int(i) for i in np.argsort(-cosine, kind="stable")[:NEIGHBOURS]]
        pairs = [(i, float(cosine[i])) for i in near if np.isfinite(cosine[i])]
        shown.append([_neighbour(dataset, row, i, value) for i, value in [(row, 1.0), *pairs]])
    return shown


def data_uri(pixels: np.ndarray) -> str:
    """A picture as a JPEG data URI.

    Args:
        pixels: uint8 [H, W] or RGB [H, W, 3].
    """
    bgr = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    done, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert done
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()


def _neighbour(dataset: RadiographDataset, query: int, row: int, cosine: float) -> Neighbour:
    sought, found = _findings(dataset, query), _findings(dataset, row)
    pixels = dataset.pixels(row)
    scale = _SIDE / max(pixels.shape)
    size = [max(1, round(side * scale)) for side in reversed(pixels.shape)]
    return Neighbour(
        radiograph=cv2.resize(pixels, size, interpolation=cv2.INTER_AREA),
        view=_view(dataset, row),
        cosine=cosine,
        shared=tuple(f for f in found if f in sought),
        others=tuple(f for f in found if f not in sought),
    )


def _findings(dataset: RadiographDataset, row: int) -> tuple[str, ...]:
    return tuple(f for f in dataset.findings if dataset.table[f][row].as_py() == 1)


def _view(dataset: RadiographDataset, row: int) -> str:
    return dataset.table["view"][row].as_py() or ""


def _unit(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _shown(encoder: Encoder, image: torch.Tensor) -> np.ndarray:
    """What the encoder is given, as gray again: same crop, so that maps lie on it."""
    ends = [np.full((encoder.image_size,) * 2, gray, np.uint8) for gray in (0, 255)]
    black, white = (float(encoder.preprocess(end)[0, 0, 0]) for end in ends)
    gray = (image[0].numpy() - black) / (white - black) * 255
    return _enlarge(gray.round().clip(0, 255).astype(np.uint8), cv2.INTER_AREA)


def _overlay(radiograph: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Attention [h, w] in colour over the radiograph [S, S]; what is high is also opaque."""
    from matplotlib import colormaps

    low, high = np.percentile(attention, (1, 99.5))
    scaled = ((attention - low) / max(high - low, 1e-12)).clip(0, 1).astype(np.float32)
    strength = _enlarge(scaled, cv2.INTER_CUBIC).clip(0, 1)
    colour = colormaps["inferno"](strength)[..., :3] * 255
    opacity = (0.25 + 0.6 * strength)[..., None]
    return (radiograph[..., None] * (1 - opacity) + colour * opacity).astype(np.uint8)


def _tinted(radiograph: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Colours [S, S, 3] over the radiograph [S, S], so that both can be read."""
    return cv2.addWeighted(colours, 0.65, cv2.cvtColor(radiograph, cv2.COLOR_GRAY2RGB), 0.35, 0)


def _enlarge(picture: np.ndarray, interpolation: int) -> np.ndarray:
    return cv2.resize(picture, (_SIDE, _SIDE), interpolation=interpolation)
