"""From scores of label maps to result lines: means by patient, differences, units."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from selfray.evals.bootstrap import PatientResamples
from selfray.evaluate import segmented
from selfray.evaluate.segmented import score_segmentation

LABELS = ("lung", "heart")


def scores(shift: float, units: tuple[str, ...] = ("px",), seeds: int = 1) -> pa.Table:
    """30 patients with two images each; the heart of every fifth image is in one mask only."""
    noise = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        for image in range(60):
            for label in LABELS:
                missed = label == "heart" and image % 5 == 0
                dice = 0.0 if missed else float(np.clip(noise.normal(0.7 + shift, 0.1), 0, 1))
                rows.append(
                    {"image_id": f"i{image}", "patient_id": f"p{image // 2}", "decoder": "linear",
                     "seed": seed, "label": label, "dice": dice, "iou": dice / (2 - dice),
                     "hd95": None if missed else 5.0 + image, "asd": None if missed else 2.0,
                     "unit": units[image % len(units)]}
                )  # fmt: skip
    return pa.Table.from_pylist(rows)


def line_of(lines: list[dict], **fields) -> dict:
    (found,) = [x for x in lines if all(x.get(k) == v for k, v in fields.items())]
    return found


def test_means_and_intervals_are_those_of_resampled_patients():
    table = scores(0)
    lines = score_segmentation({"a": table}, seed=3)
    frame = table.to_pandas()
    lung = frame[frame["label"] == "lung"]
    line = line_of(lines, target="lung", metric="dice")
    assert line["value"] == pytest.approx(lung["dice"].mean())
    assert (line["n"], line["n_patients"]) == (60, 30)
    drawn = PatientResamples(lung["patient_id"].to_numpy(), seed=3)
    by_patient = lung.groupby("patient_id")["dice"].agg(["sum", "count"])
    times = drawn.multiplicity.astype(float)
    means = times @ by_patient["sum"].to_numpy() / (times @ by_patient["count"].to_numpy())
    # The BCa interval of a symmetric mean lies near the percentiles; 30 patients widen it by 4 %.
    low, high = np.quantile(means, [0.025, 0.975])
    assert abs(line["ci_low"] - low) < 0.005 and abs(line["ci_high"] - high) < 0.005
    mean = line_of(lines, target="macro", metric="dice")
    assert mean["value"] == pytest.approx(frame["dice"].mean())


def test_distances_leave_out_images_where_a_mask_is_empty_and_say_how_many_are_left():
    lines = score_segmentation({"a": scores(0)}, seed=0)
    heart = line_of(lines, target="heart", metric="hd95")
    assert heart["n"] == 48 and heart["unit"] == "px"
    assert heart["value"] == pytest.approx(np.mean([5 + k for k in range(60) if k % 5]))


def test_millimetres_and_pixels_are_not_averaged_together():
    lines = score_segmentation({"a": scores(0, units=("mm", "px"))}, seed=0)
    lung = line_of(lines, target="lung", metric="hd95")
    assert (lung["n"], lung["unit"]) == (30, "mm")
    assert lung["value"] == pytest.approx(np.mean([5 + k for k in range(0, 60, 2)]))
    assert line_of(lines, target="lung", metric="dice")["n"] == 60


def test_the_better_encoder_is_marked_and_the_difference_is_paired():
    lines = score_segmentation({"a": scores(0), "b": scores(0.02)}, seed=0)
    better = line_of(lines, encoder="b", target="lung", metric="dice")
    assert better["best"] is True
    assert line_of(lines, encoder="a", target="lung", metric="dice")["like_best"] is False
    difference = line_of(lines, encoder="b", reference="a", target="lung", metric="dice_difference")
    other = line_of(lines, encoder="a", reference="b", target="lung", metric="dice_difference")
    assert difference["value"] == pytest.approx(0.02, abs=0.003) == -other["value"]
    assert difference["ci_low"] > 0 and difference["p_value"] <= difference["p_holm"] < 0.01
    assert (other["p_value"], other["p_holm"]) == (difference["p_value"], difference["p_holm"])
    assert difference["ci_high"] - difference["ci_low"] < better["ci_high"] - better["ci_low"]


def test_several_seeds_give_their_mean():
    table = scores(0, seeds=3)
    line = line_of(score_segmentation({"a": table}, seed=0), target="lung", metric="dice")
    frame = table.to_pandas()
    assert line["value"] == pytest.approx(frame[frame["label"] == "lung"]["dice"].mean())
    assert line["probe_seeds"] == 3


def test_a_pair_is_tested_once_and_a_baseline_s_pairs_alone(monkeypatch):
    tested: list[int] = []
    test = segmented.PermutationTest

    def counted(*arguments):
        tested.append(1)
        return test(*arguments)

    monkeypatch.setattr(segmented, "PermutationTest", counted)
    tables = {"a": scores(0), "b": scores(0.02), "c": scores(0.01)}
    lines = score_segmentation(tables, seed=0)
    assert len(tested) == 3 * len(LABELS)
    assert sum("p_value" in line for line in lines) == 6 * (len(LABELS) + 1)
    tested.clear()
    lines = score_segmentation(tables, seed=0, baseline="b")
    assert len(tested) == 2 * len(LABELS)
    assert {(x["encoder"], x["reference"]) for x in lines if "reference" in x} == {
        ("a", "b"), ("c", "b"),
    }  # fmt: skip
