"""The same radiograph twice: the same pixels, or a copy that was saved, resized or edited anew.

Radiographs of different patients look alike: on the phantom, cosines of 0.99 and more between
images of different patients are common in trained and in random features, also after centring, and
hashes of 64 bits come as near as those of edited copies. So hashes and features only propose pairs,
and the finest details of the two images decide (docs/leaks.md has the measurements).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import scipy.fft
from PIL import Image

from selfray.progress import progress_bar

HASH_SIDE = 16
MAX_HASH_DISTANCE = 40
"""Bits of 256. Of copies that were re-encoded, resized, made brighter, windowed, stamped, turned by
2 degrees or cropped by 2 %, 98 % and more are as near; of other patients' images, 3 in a million
pairs."""

MIN_COSINE = 0.99
"""Of centred features: what counts as one image to an encoder."""

SAME_DETAILS = 0.75
"""Correlation of details from which on two images are one. On the phantom copies have 0.80 and more
(lowest after histogram equalisation), the most alike pairs of other patients 0.66 and less."""

_DETAIL_SIDE = 128
_SEARCH_ROWS = 512  # of a block: at most 0.2 GB of products with 100,000 images


def pixel_sha256(pixels: np.ndarray) -> str:
    """SHA-256 of an image's size and gray values, uint8 [H, W]: the same for the same pixels."""
    head = "{}x{}\0".format(*pixels.shape).encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def perceptual_hash(pixels: np.ndarray) -> np.ndarray:
    """What an image looks like from afar, in 256 bits.

    The image is made 64 x 64; a bit says whether one of its 16 x 16 lowest cosine frequencies is
    above their median.

    Args:
        pixels: uint8 [H, W].

    Returns:
        bool [256].

    Reference:
        Zauner, Implementation and benchmarking of perceptual image hash functions, 2010, 3.2.1; as
        `imagehash.phash(image, hash_size=16)`.
    """
    side = 4 * HASH_SIDE
    small = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
    frequencies = np.asarray(scipy.fft.dctn(np.asarray(small, np.float64)))
    low = frequencies[:HASH_SIDE, :HASH_SIDE]
    return (low > np.median(low)).ravel()


@dataclass(frozen=True)
class ImagePrints:
    """By what images are known again.

    Attributes:
        sha256: N digests, see `pixel_sha256`.
        hashes: bool [N, 256], see `perceptual_hash`.
    """

    sha256: np.ndarray
    hashes: np.ndarray


def image_prints(pixels: Callable[[int], np.ndarray], count: int, threads: int = 1) -> ImagePrints:
    """Read every image once.

    Args:
        pixels: Gives an image by its row, uint8 [H, W]; called from several threads.
        count: N images.
        threads: That read.
    """

    def one(row: int) -> tuple[str, np.ndarray]:
        image = pixels(row)
        return pixel_sha256(image), perceptual_hash(image)

    digests, hashes = [], np.empty((count, HASH_SIDE**2), bool)
    with (
        progress_bar(total=count, unit="image", desc="look for copies") as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        for digest, hashed in pool.map(one, range(count)):
            hashes[len(digests)] = hashed
            digests.append(digest)
            bar.update()
    return ImagePrints(np.array(digests), hashes)


def nearest_hash(queries: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each image the one that looks most like it.

    Args:
        queries: bool [n, 256].
        others: bool [m, 256], m >= 1.

    Returns:
        Positions in `others` and distances in bits, int64 [n] each.
    """
    # With bits as 1 and -1, a product of two hashes is 256 minus twice their distance.
    signs = [np.where(hashes, 1, -1).astype(np.float32) for hashes in (queries, others)]
    where, product = _best_product(*signs)
    return where, np.rint((queries.shape[1] - product) / 2).astype(np.int64)


def nearest_cosine(queries: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each image the one with the most similar features, after centring.

    Without centring, features of all radiographs point one way.

    Args:
        queries: [n, D].
        others: [m, D], m >= 1; their mean is taken off both.

    Returns:
        Positions in `others`, int64 [n], and cosines, float32 [n]; 0 where features are the mean.
    """
    mean = others.mean(axis=0, dtype=np.float64).astype(np.float32)
    unit = []
    for features in (queries, others):
        centred = np.asarray(features, np.float32) - mean
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        unit.append(np.divide(centred, length, out=np.zeros_like(centred), where=length > 0))
    return _best_product(*unit)


def _best_product(queries: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position and value of each query's largest product with the others."""
    where = np.empty(len(queries), np.int64)
    best = np.empty(len(queries), np.float32)
    with progress_bar(total=len(queries), unit="image", desc="compare images") as bar:
        for first in range(0, len(queries), _SEARCH_ROWS):
            block = slice(first, first + _SEARCH_ROWS)
            products = queries[block] @ others.T
            where[block] = products.argmax(axis=1)
            best[block] = np.take_along_axis(products, where[block, None], axis=1)[:, 0]
            bar.update(len(products))
    return where, best


def copies_among(
    pixels: Callable[[int], np.ndarray], rows: np.ndarray, others: np.ndarray
) -> np.ndarray:
    """Those images whose details are those of the other image of their pair.

    Args:
        pixels: Gives an image by its row, uint8 [H, W].
        rows: int64 [n].
        others: int64 [n], the rows of what each may be a copy of.

    Returns:
        Of `rows`, those that are copies.
    """
    pairs = zip(rows, others, strict=True)
    with progress_bar(total=len(rows), unit="pair", desc="compare details") as bar:
        same = []
        for row, other in pairs:
            same.append(same_details(pixels(int(row)), pixels(int(other))) >= SAME_DETAILS)
            bar.update()
    return rows[np.array(same, bool)]


def same_details(one: np.ndarray, other: np.ndarray) -> float:
    """How far two images agree in their details: the correlation of what blurring removes.

    Details are taken at 128 x 128 pixels, divided by their local contrast, and compared in place;
    where that does not say the same image, again after the second image was fitted to the first by
    an affine map, so that a crop or a turn does not hide a copy.

    Args:
        one: uint8 [H, W].
        other: uint8 [H', W'].

    Returns:
        -1 to 1; 0 for an image without details.

    Reference:
        Evangelidis and Psarakis, Parametric image alignment using enhanced correlation coefficient
        maximization, IEEE TPAMI 2008, for the fit.
    """
    small = [_resized(image) for image in (one, other)]
    inside = np.ones((_DETAIL_SIDE, _DETAIL_SIDE), bool)
    in_place = _correlation(_details(small[0]), _details(small[1]), inside)
    if in_place >= SAME_DETAILS:
        return in_place
    warp = np.eye(2, 3, dtype=np.float32)
    end = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 60, 1e-4)
    try:
        everywhere = np.full(inside.shape, 255, np.uint8)
        _, warp = cv2.findTransformECC(
            small[0], small[1], warp, cv2.MOTION_AFFINE, end, everywhere, 5
        )
    except cv2.error:  # it found no fit
        return in_place
    back = {"M": warp, "dsize": inside.shape}
    fitted = cv2.warpAffine(
        small[1],
        **back,
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    shown = cv2.warpAffine(
        inside.astype(np.uint8), **back, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    )
    inside &= shown > 0
    if inside.mean() < 0.5:  # little is left to compare: it is another image
        return in_place
    return max(in_place, _correlation(_details(small[0]), _details(fitted), inside))


def _resized(image: np.ndarray) -> np.ndarray:
    shrinks = min(image.shape) > _DETAIL_SIDE
    kernel = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(image, (_DETAIL_SIDE, _DETAIL_SIDE), interpolation=kernel).astype(np.float32)


def _details(image: np.ndarray) -> np.ndarray:
    """Structure of up to a few pixels, of even contrast: float32, the shape of the image."""
    fine = image - cv2.GaussianBlur(image, (0, 0), 2)
    # One gray value is added, so that the noise of black borders stays small.
    return fine / (np.sqrt(cv2.GaussianBlur(fine * fine, (0, 0), 6)) + 1)


def _correlation(one: np.ndarray, other: np.ndarray, where: np.ndarray) -> float:
    x, y = (image[where] - image[where].mean() for image in (one, other))
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / scale if scale > 0 else 0.0
