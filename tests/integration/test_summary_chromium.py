"""A summary of real stages' output: every figure, its captions, and a browser that draws it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from summary_directories import ENCODER, Page, write_dataset, write_judged_evaluation, write_run

from selfray.evaluate import evaluate
from selfray.summary import write_summary

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    data = write_dataset(out / "data")
    write_run(out / "runs/one", data=[str(data)])
    evaluate([ENCODER, "pixels:pca"], data, out / "evaluation", tasks=["classification"])
    return write_summary(out)


def test_every_picture_is_drawn_and_says_what_it_is(page: Path) -> None:
    parsed = Page(page.read_text(encoding="utf-8"))
    images = parsed.all("img")
    # Four test patients: three pictures each, three heads, four queries with five neighbours.
    assert len(images) == 4 * 3 + 3 + 4 * 6
    assert all(image["alt"] and (image["src"] or "").startswith("data:image/") for image in images)
    assert not parsed.unbalanced


def test_every_caption_says_that_it_is_a_phantom(page: Path) -> None:
    parsed = Page(page.read_text(encoding="utf-8"))
    assert any(p.get("class") == "banner" for p in parsed.all("p"))
    within = ("head ", "PA", "LL")  # of the single pictures in a figure that says it
    captions = [c for c in parsed.captions if not c.startswith(within)]
    assert len(captions) >= 8
    assert all(caption.startswith("Synthetic phantom. ") for caption in captions)


def test_no_identifier_of_a_patient_is_on_the_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "secret-" not in text and "image-" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "height"), [(1200, 2400), (500, 2400)])
def test_a_browser_draws_it(page: Path, tmp_path: Path, width: int, height: int) -> None:
    drawn = _screenshot(page, tmp_path, width, height)
    # Paper, and something on every stretch of it.
    assert all(part.std() > 5 for part in drawn[: height // 2].reshape(6, -1))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_a_leak_in_red_above_all_and_fits_the_width(tmp_path: Path) -> None:
    leak = {"kind": "same patient", "encoder": None, "sentence": "12 images.", "count": 12}
    evaluation = write_judged_evaluation(tmp_path / "e", leaks=[leak])
    page = write_summary(evaluation)
    drawn = _screenshot(page, tmp_path, 1400, 7000, colour=True)
    blue, green, red = (drawn[..., c].astype(int) for c in range(3))
    reddish = (red - green > 60) & (red - blue > 40)
    assert reddish[:200].mean() > 0.01
    # Every stretch of 700 pixels has something, and no chart or text reaches into the margin.
    assert all(part.std() > 5 for part in drawn.reshape(10, -1))
    assert (drawn[:, 1300:1370].astype(int).std(axis=(0, 1)) < 1).all()


def _screenshot(
    page: Path, tmp_path: Path, width: int, height: int, *, colour: bool = False
) -> np.ndarray:
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    picture = tmp_path / "page.png"
    subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}",
         f"--window-size={width},{height}", page.as_uri()],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    drawn = cv2.imread(str(picture), cv2.IMREAD_COLOR if colour else cv2.IMREAD_GRAYSCALE)
    assert drawn is not None and drawn.shape[:2] == (height, width)
    return drawn
