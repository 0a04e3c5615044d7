"""Sections of the summary behind the main results: what is on the page for given lines."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from summary_directories import Page, result, write_evaluation

from selfray.data.dataset import (
    DatasetInfo,
    DatasetWriter,
    RadiographDataset,
    encode_bits,
    encode_png,
)
from selfray.summary import write_summary
from selfray.summary.curve_charts import Course, share_chart
from selfray.summary.efficiency_section import efficiency_section
from selfray.summary.inputs import Evaluation, read_evaluation
from selfray.summary.segmentation_overlay import segmentation_overlay
from selfray.summary.segmentation_section import segmentation_section
from selfray.summary.sites_section import sites_section
from selfray.summary.subgroups_section import subgroups_section

HOSTILE = """<script>alert("x")</script>'$x^{" onload="#00aa01 --> \x00"""
SECTIONS = (efficiency_section, subgroups_section, sites_section, segmentation_section)
NOTE = "Synthetic phantom. "


def evaluation_of(tmp_path: Path, lines: list[dict]) -> Evaluation:
    return read_evaluation(write_evaluation(tmp_path / "e", lines))


def taken_apart(html: str) -> Page:
    page = Page(html)
    assert not page.unbalanced and not page.open
    assert all(td.get("data-value") is not None for td in page.all("td"))
    assert all(th.get("scope") in {"col", "row"} for th in page.all("th"))
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in page.all("svg"))
    assert page.captions and all(caption.startswith(NOTE) for caption in page.captions)
    return page


def values(page: Page) -> list[float]:
    return [float(v) for td in page.all("td") if (v := td.get("data-value"))]


def rows(html: str) -> list[list[str]]:
    """Text of the cells of each row, tags removed."""
    found = re.findall(r"<tr[^>]*>(.*?)</tr>", html, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in found]
    return [[re.sub(r"<[^>]*>", "", cell).strip() for cell in row] for row in cells]


def segmented(encoder: str, label: str, metric: str, value: float | None, **fields) -> dict:
    return result(encoder, label, metric, value, **{"task": "segmentation", **fields})


def by_part(encoder: str, part: str, value: float | None, **fields) -> dict:
    return result(
        encoder, **{"target": "macro", "metric": "auroc", **fields}, value=value, trained_on=part
    )


def of_group(encoder: str, group: str, value: float | None, **fields) -> dict:
    return result(
        encoder, "macro", "auroc", value, **{"grouped_by": "sex", "subgroup": group, **fields}
    )


def of_sites(encoder: str, trained: str, tested: str, value: float | None, **fields) -> dict:
    place = {"grouped_by": "site", "subgroup": tested, "trained_on": f"site {trained}"}
    return result(encoder, **{"target": "macro", "metric": "auroc", **fields}, value=value, **place)


@pytest.mark.parametrize("section", SECTIONS)
def test_nothing_is_shown_where_there_is_nothing(
    tmp_path: Path, section: Callable[[Evaluation, str], str]
) -> None:
    lines = [result("run", "macro", "auroc", 0.8), result("run", "age_years", "r2", 0.3)]
    lines.append(
        result("run", "macro", "auroc_difference", 0.1, reference="pixels:pca")
        | {"trained_on": "5 % of patients", "grouped_by": "sex", "subgroup": "F"}
    )
    assert section(evaluation_of(tmp_path, lines), NOTE) == ""


def test_parts_of_the_training_are_in_their_order_and_only_shares_are_drawn(tmp_path: Path) -> None:
    parts = ["100 % of patients", "8 a class", "5 % of patients", "32 a class", "10 % of patients"]
    lines = [by_part("run", part, 0.6 + k / 100) for k, part in enumerate(parts)]
    html = efficiency_section(evaluation_of(tmp_path, lines), NOTE)
    page = taken_apart(html)
    assert rows(html)[0] == [
        "Findings, macro-AUROC", "5 %", "10 %", "100 %", "8 a class", "32 a class"
    ]  # fmt: skip
    assert values(page) == [0.62, 0.64, 0.6, 0.61, 0.63]
    (chart,) = page.all("svg")
    told = chart["aria-label"] or ""
    assert "run: 0.620 [0.570, 0.670] at 5 %, 0.640 [0.590, 0.690] at 10 %, " in told
    assert "at 100 %" in told and "0.610" not in told


def test_a_missing_number_of_a_part_says_why_and_the_curve_goes_on(tmp_path: Path) -> None:
    why = "1 % of the patients have no nodule"
    lines = [
        by_part("run", "1 % of patients", None, target="nodule", reason=why),
        by_part("run", "5 % of patients", 0.7, target="nodule"),
        by_part("run", "1 % of patients", 0.6),
        by_part("other", "5 % of patients", 0.65),
    ]
    html = efficiency_section(evaluation_of(tmp_path, lines), NOTE)
    page = taken_apart(html)
    assert [cell for row in rows(html) for cell in row].count(why) == 1
    assert ["● run", why, "0.700 [0.650, 0.750]"] in rows(html)
    assert ["■ other", "not recorded", "0.650 [0.600, 0.700]"] in rows(html)
    assert "<details>" in html and html.index("nodule") > html.index("<details>")
    assert len(page.all("svg")) == 2


def test_a_draw_without_both_classes_does_not_hide_the_mean_of_the_others(tmp_path: Path) -> None:
    lacking = by_part("run", "1 % of patients", None, reason="lacks both classes")
    lines = [lacking, by_part("run", "1 % of patients", 0.625), lacking]
    page = taken_apart(efficiency_section(evaluation_of(tmp_path, lines), NOTE))
    assert values(page) == [0.625] and "lacks" not in page.words


def test_curves_say_how_many_draws_they_are_the_mean_of(tmp_path: Path) -> None:
    lines = [by_part("run", "5 % of patients", 0.7, probe_seeds=5)]
    assert "the mean over 5 draws" in efficiency_section(evaluation_of(tmp_path, lines), NOTE)
    lines = [by_part("run", "5 % of patients", 0.7)]
    (tmp_path / "once").mkdir()
    assert "draws" not in efficiency_section(evaluation_of(tmp_path / "once", lines), NOTE)


def points(path: str) -> list[tuple[float, float]]:
    pairs = re.findall(r"[ML]\s*(-?[0-9.]+)\s+(-?[0-9.]+)", path)
    return [(float(x), float(y)) for x, y in pairs]


def test_the_axis_of_shares_is_logarithmic_and_the_band_is_the_interval() -> None:
    low, high = [0.55, 0.6, None], [0.62, 0.78, None]
    course = Course("run", 2, [1.0, 10.0, 100.0], [0.6, 0.7, 0.8], low, high, ["", "", ""])
    svg = share_chart([course], title="t", axis="a", zero=0.5)
    (line,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: ?var\(--series-2\)', svg)
    (x0, y0), (x1, y1), (x2, y2) = points(line)
    # Four coordinates, each rounded to a tenth of a pixel.
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2) and y1 < y0
    # The band is drawn once and shifted down to its place.
    shapes = re.findall(r'd="([^"]*)"/>\s*</defs>.*?<use [^>]*y="(\d+)"', svg, re.DOTALL)
    drawn, shift = next(shape for shape in shapes if len(points(shape[0])) > 4)
    band = {(x, round(y + float(shift), 2)) for x, y in points(drawn)}
    for x, value in ((x0, 0.55), (x0, 0.62), (x1, 0.6), (x1, 0.78)):
        wanted = (x, y0 + (value - 0.6) * (y1 - y0) / 0.1)
        assert any(point == pytest.approx(wanted, abs=0.3) for point in band)
    assert max(x for x, _ in band) == pytest.approx(x1, abs=0.1)
    assert "FillBetween" not in svg


def test_subgroups_show_counts_numbers_and_the_gap(tmp_path: Path) -> None:
    counts = {"n": 1200, "n_patients": 90, "n_positive": 31}
    lines = [
        of_group("run", "F", 0.8, **counts),
        of_group("run", "M", 0.7, n=50, n_patients=40, n_positive=7),
        of_group("other", "F", 0.75, **counts),
        result("run", "macro", "auroc_gap", 0.1, grouped_by="sex"),
        result("other", "macro", "auroc_gap", 0.02, grouped_by="sex"),
    ]
    html = subgroups_section(evaluation_of(tmp_path, lines), NOTE)
    page = taken_apart(html)
    assert rows(html) == [
        ["Findings, macro-AUROC, by sex", "Images", "Patients", "Positives", "● run", "■ other"],
        ["F", "1,200", "90", "31", "0.800 [0.750, 0.850]", "0.750 [0.700, 0.800]"],
        ["M", "50", "40", "7", "0.700 [0.650, 0.750]", "not recorded"],
        [
            "gap: largest minus smallest", "", "", "", "0.100 [0.050, 0.150]",
            "0.020 [−0.030, 0.070]",
        ],
    ]  # fmt: skip
    (chart,) = page.all("svg")
    assert "run: 0.100 [0.050, 0.150]; other: 0.020 [−0.030, 0.070]" in str(chart["aria-label"])
    assert "A gap whose 95 % interval contains 0 shows nothing" in page.words


def test_a_group_that_is_too_small_has_words_and_no_number(tmp_path: Path) -> None:
    why = "too few: 12 with, 300 without"
    lines = [
        of_group("run", "F", 0.8),
        of_group("run", "M", None, reason=why, n=312),
        result("run", "macro", "auroc_gap", None, grouped_by="sex", reason="one group is left"),
    ]
    html = subgroups_section(evaluation_of(tmp_path, lines), NOTE)
    page = taken_apart(html)
    assert ["M", "312", "402", why] in rows(html)
    assert ["gap: largest minus smallest", "", "", "one group is left"] in rows(html)
    assert not page.all("svg")
    assert values(page) == [812, 402, 0.8, 312, 402]


def test_without_a_mean_a_finding_comes_first_and_the_gaps_of_all_targets_beside_it(
    tmp_path: Path,
) -> None:
    lines = [
        result("run", target, metric, 0.3, grouped_by="view", subgroup="PA")
        for target, metric in (("sex", "auroc"), ("nodule", "auroc"), ("age_years", "r2"))
    ]
    lines += [
        result("run", target, "auroc_gap", value, grouped_by="view")
        for target, value in (("sex", 0.11), ("nodule", 0.22))
    ]
    html = subgroups_section(evaluation_of(tmp_path, lines), NOTE)
    page = taken_apart(html)
    opened = rows(html.partition("<details>")[0])
    assert [row[0] for row in opened] == [
        "nodule, AUROC, by view", "PA", "gap: largest minus smallest",
        "Gap by view", "Sex, AUROC", "nodule, AUROC",
    ]  # fmt: skip
    assert [row[1] for row in opened[4:]] == ["0.110 [0.060, 0.160]", "0.220 [0.170, 0.270]"]
    assert "nodule" in str(page.all("svg")[0]["aria-label"])


def test_groups_of_probes_of_one_site_are_no_subgroups(tmp_path: Path) -> None:
    lines = [of_sites("run", "A", "B", 0.6)]
    assert subgroups_section(evaluation_of(tmp_path, lines), NOTE) == ""


def test_every_probe_has_its_own_tables(tmp_path: Path) -> None:
    lines = [of_group("run", "F", 0.7, probe="fine-tune"), of_group("run", "F", 0.8)]
    page = taken_apart(subgroups_section(evaluation_of(tmp_path, lines), NOTE))
    assert [c.partition(". ")[2][:24] for c in page.captions] == [
        "By sex, probe linear. Im", "By sex, probe fine-tuned"
    ]  # fmt: skip


def test_the_transfer_matrix_has_train_sites_in_rows_and_test_sites_in_columns(
    tmp_path: Path,
) -> None:
    grid = {("A", "A"): 0.8, ("A", "B"): 0.6, ("B", "A"): 0.65, ("B", "B"): 0.7}
    lines = [of_sites("run", *cell, value) for cell, value in grid.items()]
    lines.append(of_group("run", "A", 0.82, grouped_by="site"))
    html = sites_section(evaluation_of(tmp_path, lines), NOTE)
    page = taken_apart(html)
    assert rows(html) == [
        ["trained on ↓, tested on →", "A", "B"],
        ["A", "0.800 [0.750, 0.850]", "0.600 [0.550, 0.650]"],
        ["B", "0.650 [0.600, 0.700]", "0.700 [0.650, 0.750]"],
        ["all of the train split", "0.820 [0.770, 0.870]", "not recorded"],
    ]
    own = [td["data-value"] for td in page.all("td") if td.get("class") == "own"]
    assert own == ["0.8", "0.7"]
    assert "same site 0.750, another site 0.625" in page.words


def test_colour_is_deeper_where_the_number_is_higher_on_one_scale(tmp_path: Path) -> None:
    numbers = {"run": 0.9, "other": 0.7, "chance": 0.5, "below": 0.4}
    lines = [of_sites(encoder, "A", "B", value) for encoder, value in numbers.items()]
    html = sites_section(evaluation_of(tmp_path, lines), NOTE)
    depths = re.findall(r'data-value="(\S+)" style="[^"]*series-0\) (\d+)%', html)
    # From chance to the highest of all encoders, 50 % at most: 0.7 is halfway.
    assert depths == [("0.9", "50"), ("0.7", "25"), ("0.5", "0"), ("0.4", "0")]


def test_findings_of_the_matrix_are_folded_and_missing_cells_say_why(tmp_path: Path) -> None:
    lines = [
        of_sites("run", "A", "B", 0.6, target="nodule"),
        of_sites("run", "B", "A", None, target="nodule", reason="too few: 2 with, 9 without"),
        of_sites("run", "A", "B", 0.7),
    ]
    html = sites_section(evaluation_of(tmp_path, lines), NOTE)
    taken_apart(html)
    opened, folded = html.split("<details>")
    assert "0.700" in opened and "nodule" not in opened
    assert "nodule, AUROC" in folded and "too few: 2 with, 9 without" in folded


def test_a_site_without_a_probe_says_why(tmp_path: Path) -> None:
    why = "the site has no images in the train split"
    lines = [
        of_sites("run", "A", "B", 0.6, target="nodule"),
        result("run", "nodule", "auroc", None, trained_on="site C", reason=why),
        result("run", "sex", "auroc", None, trained_on="site C", reason=why),
        result("run", "nodule", "auroc", 0.9, trained_on="site A"),
    ]
    html = sites_section(evaluation_of(tmp_path, lines), NOTE)
    taken_apart(html)
    assert rows(html)[1:] == [["A", "0.600 [0.550, 0.650]"], ["C", why]]


def test_what_features_say_of_the_machine_is_called_a_warning(tmp_path: Path) -> None:
    lines = [
        result("run", "site", "auroc", 0.98),
        result("run", "site=A", "auroc", 0.99),
        result("run", "scanner", "auroc", None, reason="one scanner only"),
        result("run", "site", "auprc", 0.77),
    ]
    html = sites_section(evaluation_of(tmp_path, lines), NOTE)
    page = taken_apart(html)
    assert rows(html)[:2] == [
        ["Encoder", "site, AUROC", "scanner, AUROC"],
        ["● run", "0.980 [0.930, 1.030]", "one scanner only"],
    ]
    assert html.index("site=A") > html.index("<details>")
    assert "warning sign" in page.words and "which site, scanner or view an image is" in page.words
    assert "0.770" not in page.words


def test_segmentation_has_labels_by_encoder_and_decoder_with_the_best_marked(
    tmp_path: Path,
) -> None:
    lines = [
        segmented("run", "left_lung", "dice", 0.9, best=True),
        segmented("other", "left_lung", "dice", 0.89, like_best=True),
        segmented("run", "left_lung", "dice", 0.7, probe="vitdet"),
        segmented("run", "macro", "dice", 0.85),
        segmented("run", "left_lung", "hd95", 12.3456, unit="mm", n=790),
        segmented("other", "left_lung", "hd95", 9.0, unit="mm", n=1801),
        segmented("run", "nodule", "hd95", None, reason="no image has it", unit="mm"),
    ]
    html = segmentation_section(evaluation_of(tmp_path, lines), NOTE)
    taken_apart(html)
    assert rows(html) == [
        ["Dice", "Images", "● runlinear", "● runViTDet decoder", "■ otherlinear"],
        [
            "left lung", "812", "0.900 [0.850, 0.950]", "0.700 [0.650, 0.750]",
            "0.890† [0.840, 0.940]",
        ],
        ["mean over the labels", "", "0.850 [0.800, 0.900]", "not recorded", "not recorded"],
        ["HD95 (mm)", "Images", "● runlinear", "■ otherlinear"],
        ["left lung", "790 to 1,801", "12.35 [12.30, 12.40]", "9.00 [8.95, 9.05]"],
        ["nodule", "812", "no image has it", "not recorded"],
    ]  # fmt: skip
    assert re.findall("<b>([0-9.]+)</b>", html) == ["0.900"]


def write_label_maps(out: Path, data: RadiographDataset, masks: dict[int, np.ndarray]) -> None:
    """What `judge_segmentation` leaves of the encoder `run` and its linear decoder."""
    maps = out / "label_maps/linear-0"
    maps.mkdir(parents=True)
    for row, mask in masks.items():
        (maps / f"row-{row:07d}.png").write_bytes(encode_bits(mask))
    described = json.dumps({"encoder": "run", "labels": list(data.mask_labels)})
    table = pa.table({"image_id": ["secret"]}).replace_schema_metadata({"selfray": described})
    pq.write_table(table, out / "linear-0.parquet")


def write_masked(out: Path) -> RadiographDataset:
    """Five test images with two masks each."""
    info = DatasetInfo("tiny", "test", "MIT", True, (), ("left_lung", "$x^{"), "noise")
    writer, noise = DatasetWriter(out, info), np.random.default_rng(0)
    for number in range(5):
        image = encode_png(noise.integers(0, 256, (60, 70), dtype=np.uint8))
        masks = np.zeros((2, 60, 70), bool)
        masks[:, 10 : 20 + number, 30:50] = True
        writer.add(
            {"image": image, "image_id": f"secret-{number}", "patient_id": f"secret-{number}",
             "study_id": f"secret-{number}", "split": "test", "view": "PA",
             "mask": encode_bits(masks)}
        )  # fmt: skip
    writer.finish()
    return RadiographDataset(out)


def with_label_maps(tmp_path: Path, masks: dict[int, np.ndarray]) -> Evaluation:
    data = write_masked(tmp_path / "data")
    lines = [
        segmented("other", "macro", "dice", 0.9),
        segmented("run", "macro", "dice", 0.8),
        segmented("run", "macro", "dice", 0.85, probe="vitdet"),
    ]
    out = write_evaluation(tmp_path / "e", lines, data=data.directory, fingerprint=data.fingerprint)
    write_label_maps(out / "segmentation/run-1", data, masks)
    return read_evaluation(out)


def test_label_maps_that_are_kept_are_drawn_at_most_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def overlay(pixels, truth, prediction, labels) -> bytes:
        drawn.append((truth, prediction))
        return segmentation_overlay(pixels, truth, prediction, labels)

    monkeypatch.setattr("selfray.summary.segmentation_pictures.segmentation_overlay", overlay)
    masks = {row: np.zeros((2, 60, 70), bool) for row in range(5)}
    for row, mask in masks.items():
        mask[1, :, row : row + 9] = True
    evaluation = with_label_maps(tmp_path, masks)
    html = segmentation_section(evaluation, NOTE)
    page = Page(html)
    assert not page.unbalanced and not page.open
    images = page.all("img")
    assert len(images) == len(drawn) == 3
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in images)
    assert all("left lung, $x^{" in str(image["alt"]) for image in images)
    assert "Label maps by run, linear," in page.words and "secret" not in html
    data = RadiographDataset(tmp_path / "data")
    for row, (truth, prediction) in enumerate(drawn):
        np.testing.assert_array_equal(truth, data.masks(row))
        np.testing.assert_array_equal(prediction, masks[row])


@pytest.mark.parametrize("shape", [(2, 60, 71), (2, 6, 7)])
def test_a_label_map_of_another_size_than_its_image_is_told(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    evaluation = with_label_maps(tmp_path, {0: np.zeros(shape, bool)})
    html = segmentation_section(evaluation, NOTE)
    assert "not of its image's size" in Page(html).words and "<img" not in html


def test_label_maps_of_data_that_is_gone_are_left_out_with_the_reason(tmp_path: Path) -> None:
    evaluation = with_label_maps(tmp_path, {0: np.zeros((2, 60, 70), bool)})
    shutil.rmtree(tmp_path / "data")
    html = segmentation_section(evaluation, NOTE)
    assert "Label maps are not drawn:" in html and "0.800" in html and "<img" not in html


def everything(encoder: str, label: str) -> list[dict]:
    """A line for each part of each section, with names from outside wherever they can be."""
    return [
        by_part(encoder, "5 % of patients", 0.7, probe=label),
        by_part(encoder, "5 % of patients", None, target=label, reason=label),
        by_part(encoder, "10 % of patients", 0.7, target=label),
        of_group(encoder, label, 0.7, grouped_by=label, n_positive=label),
        result(encoder, "macro", "auroc_gap", 0.1, grouped_by=label),
        of_sites(encoder, label, label, 0.7),
        of_sites(encoder, label, "B", 0.6, target=label),
        result(encoder, f"site={label}", "auroc", 0.9),
        segmented(encoder, label, "dice", 0.9, probe=label, unit=label),
        segmented(encoder, "macro", "dice", 0.9, probe=label, reason=label),
    ]


@pytest.mark.parametrize("section", SECTIONS)
def test_hostile_names_are_text(tmp_path: Path, section: Callable[[Evaluation, str], str]) -> None:
    html = section(evaluation_of(tmp_path, everything(HOSTILE, HOSTILE)), NOTE)
    page = taken_apart(html)
    assert not page.all("script") and "\x00" not in html
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert '<script>alert("x")</script>' in page.words


def test_the_page_holds_every_section_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    path = write_summary(write_evaluation(tmp_path / "e", everything("run", "label")))
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.unbalanced and not page.open
    heads = ("Label efficiency", "Subgroups", "Sites and machines", "Segmentation")
    places = [text.index(f"<h3>{name}</h3>") for name in heads]
    assert places == sorted(places) and places[-1] < text.index('id="pictures"')
    assert not re.search(r"https?:|url\(\s*['\"]?[^#)'\"]|@import|//\w", text)
    assert all(caption.startswith(NOTE) for caption in page.captions)


def test_lines_that_are_cut_short_do_no_harm(tmp_path: Path) -> None:
    lines = [
        by_part("run", "0 % of patients", 0.7),
        by_part("run", "many", 0.7),
        of_group("run", "F", 0.7) | {"grouped_by": None},
        {"encoder": "run", "target": "macro", "metric": "auroc", "trained_on": ["5 % of patients"]},
        {"encoder": "run", "target": "macro", "metric": "dice", "task": "segmentation"},
        {"encoder": "run", "target": "macro", "metric": "auroc", "grouped_by": "sex"},
        {"encoder": "run", "target": "macro", "metric": "auroc", "trained_on": "5 % of patients"},
        {"encoder": "run", "target": "macro", "metric": "auroc_gap", "grouped_by": "site",
         "subgroup": 3, "trained_on": "site "},
    ]  # fmt: skip
    out = write_evaluation(tmp_path / "e", lines)
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(by_part("run", "7 % of patients", 0.7))[:-9])
    evaluation = read_evaluation(out)
    for section in SECTIONS:
        Page(section(evaluation, NOTE))
    assert "0.700" not in efficiency_section(evaluation, NOTE)
