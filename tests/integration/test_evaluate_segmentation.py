"""Segmentation of a small dataset whose label maps are planted in the pixels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from selfray.data.dataset import (
    DatasetInfo,
    DatasetWriter,
    RadiographDataset,
    encode_bits,
    encode_png,
)
from selfray.errors import InputError
from selfray.evals.segmentation_metrics import segmentation_metrics
from selfray.evaluate import label_maps, patch_tokens, segmentation
from selfray.evaluate.label_maps import measured_box, seen_box
from selfray.evaluate.segmentation import judge_segmentation
from selfray.models.encoder import Encoder, Tokens
from selfray.models.preprocessing import Preprocessing
from selfray.models.published import load_encoder

HEIGHT, WIDTH = 96, 64  # of which the encoder sees the middle, 64 x 64
STEPS = 60
SPLITS = ("train",) * 20 + ("validate",) * 6 + ("test",) * 8
NAMES = ("lung", "heart", "zone")


def planted(noise: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A bright bar on the left (lung), a dark one on the right (heart); a zone within the lung."""
    masks = np.zeros((3, HEIGHT, WIDTH), bool)
    top, bottom = noise.integers(4, 24), noise.integers(72, 92)
    masks[0, top:bottom, 8:24] = True
    masks[1, 40:72, 40:56] = True
    masks[2, top:48, 8:24] = True
    image = noise.normal(120, 5, (HEIGHT, WIDTH)) + 80 * masks[0] - 80 * masks[1] + 30 * masks[2]
    return np.clip(image, 0, 255).astype(np.uint8), masks


def write_dataset(out: Path, **change) -> RadiographDataset:
    """`change` maps a column to a function of (split, masks) that gives its value."""
    info = DatasetInfo(
        name="bars",
        origin="test",
        licence="MIT",
        synthetic=True,
        findings=("effusion",),
        mask_labels=NAMES,
        pixels="8 bit",
    )
    writer = DatasetWriter(out, info)
    noise = np.random.default_rng(0)
    for k, split in enumerate(SPLITS):
        pixels, masks = planted(noise)
        row = {
            "image": encode_png(pixels),
            "image_id": f"i{k}",
            "patient_id": f"p{k}",
            "study_id": f"s{k}",
            "split": split,
            "mask": encode_bits(masks),
            "effusion": 0,
        }
        writer.add(row | {column: value(split, masks) for column, value in change.items()})
    return writer.finish()


class Cells(torch.nn.Module):
    """Mean and darkest of each cell of 8 pixels; it counts the images that it sees."""

    seen = 0

    def forward(self, images: torch.Tensor) -> Tokens:
        self.seen += len(images)
        cells = images[:, 0].unfold(1, 8, 8).unfold(2, 8, 8).flatten(3)  # [B, 8, 8, 64]
        found = torch.cat([cells, cells**2], dim=-1).flatten(1, 2)
        return Tokens(found.mean(dim=1), found)


def cells() -> Encoder:
    preprocessing = Preprocessing(64, (0.5,), (0.5,), shortest_edge=64)
    return Encoder("cells", Cells(), preprocessing, width=128, grid=(8, 8), weights_sha256="0" * 64)


def judged_by(encoder: Encoder, data: RadiographDataset, out: Path, **arguments) -> pa.Table:
    return judge_segmentation(encoder, data, out, tokens=out.parent / "tokens", **arguments)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> RadiographDataset:
    return write_dataset(tmp_path_factory.mktemp("bars") / "data")


@pytest.fixture(scope="module")
def judged(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("judged") / "cells"
    return out, judged_by(cells(), data, out, seeds=(0, 1), steps=STEPS)


def test_each_test_image_has_a_row_a_label_and_a_seed(data, judged):
    rows = judged[1].to_pylist()
    ids = data.column("image_id")[data.rows("test")]
    keys = [(r["image_id"], r["decoder"], r["seed"], r["label"]) for r in rows]
    assert keys == [(i, "linear", s, n) for s in (0, 1) for i in ids for n in NAMES]
    assert {r["unit"] for r in rows} <= {"mm", "px"}


def test_what_is_seen_is_found_and_what_is_outside_the_square_counts_as_missed(data, judged):
    """Rows 16 to 80 are seen: the best Dice of a mask is that of its part in them."""
    reached: dict[str, list[float]] = {name: [] for name in NAMES}
    rows = {(r["image_id"], r["label"]): r for r in judged[1].to_pylist() if r["seed"] == 0}
    for row in data.rows("test"):
        masks = data.masks(int(row))
        assert masks is not None
        for name, mask in zip(NAMES, masks, strict=True):
            found = rows[data.column("image_id")[row], name]
            share = (mask.sum() - mask[16:80].sum()) / mask.sum()
            assert found["outside_share"] == pytest.approx(share)
            assert found["truth_pixels"] == mask.sum()
            best = 2 * (1 - share) / (2 - share)
            assert found["dice"] <= best + 1e-9
            reached[name].append(found["dice"] / best)
    # A logit is 2 pixels. Outlines that are off by a whole one on all sides of the zone's mean of
    # 16 x 32 pixels leave 12 x 28, a Dice of 0.79.
    assert min(np.mean(values) for values in reached.values()) > 0.79


def test_kept_label_maps_are_what_was_scored(data, judged):
    out, table = judged
    files = sorted((out / "label_maps" / "linear-1").iterdir())
    assert [int(f.stem.removeprefix("row-")) for f in files] == data.rows("test")[:6].tolist()
    rows = {(r["image_id"], r["label"]): r for r in table.to_pylist() if r["seed"] == 1}
    for row, file in zip(data.rows("test").tolist(), files, strict=False):
        bits = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        truth = data.masks(row)
        assert truth is not None and bits.shape == (HEIGHT, WIDTH)
        for k, name in enumerate(NAMES):
            found = rows[data.column("image_id")[row], name]
            mask = (bits >> k) & 1 == 1
            assert found["predicted_pixels"] == mask.sum()
            expected = segmentation_metrics(truth[k], mask)
            assert found["dice"] == pytest.approx(expected["dice"])
            assert found["iou"] == pytest.approx(expected["iou"])


def test_what_is_done_is_not_done_again(data, judged, monkeypatch):
    out, table = judged
    encoder = cells()
    monkeypatch.setattr(segmentation, "train_decoder", None)
    again = judged_by(encoder, data, out, seeds=(0, 1), steps=STEPS)
    assert again.equals(table) and encoder.model.seen == 0


def test_interrupted_the_same_call_goes_on_with_the_tokens_and_decoders_that_are_done(
    data, tmp_path, monkeypatch
):
    whole = judged_by(cells(), data, tmp_path / "whole", seeds=(0, 1), steps=5)
    train = segmentation.train_decoder
    trained: list[int] = []

    def interrupted(*arguments):
        trained.append(1)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(segmentation, "train_decoder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judged_by(cells(), data, tmp_path / "out", seeds=(0, 1), steps=5)
    encoder = cells()
    table = judged_by(encoder, data, tmp_path / "out", seeds=(0, 1), steps=5)
    assert len(trained) == 3 and encoder.model.seen == 0
    assert table.equals(whole)


def test_tokens_that_were_written_before_an_interruption_are_not_encoded_again(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(patch_tokens, "CHUNK_ROWS", 16)
    monkeypatch.setattr(patch_tokens, "_BATCH", 16)
    first, forward = cells(), Cells.forward

    def stops(self, images):
        if self.seen == 16:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(Cells, "forward", stops)
    with pytest.raises(KeyboardInterrupt):
        judged_by(first, data, tmp_path / "out", steps=1)
    monkeypatch.setattr(Cells, "forward", forward)
    second = cells()
    judged_by(second, data, tmp_path / "out", steps=1)
    assert second.model.seen == len(SPLITS) - 16


def test_finding_masks_can_be_segmented_and_images_without_one_take_no_part(tmp_path):
    def some(split, masks):
        some.count = getattr(some, "count", 0) + 1
        return encode_bits(masks[1:2]) if some.count % 2 else None

    data = write_dataset(tmp_path / "data", finding_mask=some)
    table = judged_by(cells(), data, tmp_path / "out", labels=["effusion"], steps=60)
    assert table.num_rows == SPLITS.count("test") / 2
    assert np.mean(table["dice"].to_pylist()) > 0.8


def test_another_request_in_the_same_directory_is_refused(data, judged):
    with pytest.raises(InputError, match=r"linear-0.parquet is of other labels than now"):
        judged_by(cells(), data, judged[0], labels=["lung"], steps=STEPS)
    part = judged[0] / "linear-7.parquet"
    part.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"linear-7.parquet is damaged.*made again"):
        judged_by(cells(), data, judged[0], seeds=(7,), steps=STEPS)
    part.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ["lungs"]}, r"has no label 'lungs' to segment. Did you mean 'lung'\? Allowed:"),
        ({"labels": []}, "has no label to segment. Make the dataset with masks"),
        ({"labels": ["effusion"]}, "has no finding_mask in its train split; decoders"),
        ({"decoders": ["unet"]}, "decoder 'unet' is unknown"),
        ({"steps": 0}, "steps is 0. Give 1 or more"),
        ({"seeds": [-1]}, "seed is -1. Give 0 or more"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(data, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message) as refused:
        judged_by(cells(), data, tmp_path / "out", **arguments)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda split, m: encode_bits(m[:, :32]), "mask of row 0 is 32 x 64 pixels, its image 96"),
        (lambda split, m: b"no image", "mask of row 0 does not decode"),
        (lambda split, m: None if split == "test" else encode_bits(m), "has no mask in its test"),
        (
            lambda split, m: encode_bits(m & (np.arange(3) != 1)[:, None, None]),
            "no image of the train split has any pixel of label 'heart'",
        ),
        (
            lambda split, m: encode_bits(m & (split != "validate")),
            "no image of the validate split has any pixel of lung, heart, zone",
        ),
    ],
)
def test_wrong_label_maps_are_refused_in_one_line_without_a_patient(tmp_path, mask, message):
    data = write_dataset(tmp_path / "data", mask=mask)
    with pytest.raises(InputError, match=message) as refused:
        judged_by(cells(), data, tmp_path / "out", steps=1)
    assert "\n" not in str(refused.value) and "p0" not in str(refused.value)


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (1000, 900)])
def test_a_publisher_s_square_is_found_out_by_ramps(shape):
    known = Preprocessing(224, (0,), (1,), shortest_edge=256, filter="bilinear")
    found = measured_box(lambda image: known.square(image) * -3.0 + 7, *shape)
    assert found == pytest.approx(known.seen(*shape), abs=max(shape) / 1000)


def test_tokens_are_kept_as_half_precision_and_described(judged):
    kept = judged[0].parent / "tokens" / "last-block"
    tokens = np.load(kept / "patch_tokens.npy", mmap_mode="r")
    assert tokens.dtype == np.float16 and tokens.shape == (len(SPLITS), 1, 8, 8, 128)
    manifest = json.loads((kept / "manifest.json").read_text())
    assert manifest["weights_sha256"] == "0" * 64
    rows = pq.read_table(kept / "rows.parquet")
    assert rows["image_id"].to_pylist() == [f"i{k}" for k in range(len(SPLITS))]


def test_other_labels_and_steps_share_the_tokens(tmp_path):
    """Also where the images with a finding's mask are others than those with an organ's."""
    data = write_dataset(
        tmp_path / "data",
        mask=lambda split, masks: encode_bits(masks) if masks[0, :14].any() else None,
        finding_mask=lambda split, masks: encode_bits(masks[1:2]),
    )
    first, other = cells(), cells()
    judged_by(first, data, tmp_path / "first", labels=["lung"], steps=3)
    assert first.model.seen == len(SPLITS)
    table = judged_by(other, data, tmp_path / "other", labels=["effusion"], steps=60)
    assert other.model.seen == 0
    assert np.mean(table["dice"].to_pylist()) > 0.8


def tiny() -> Encoder:
    return load_encoder("random:vit_pico/16@64")


def test_a_decoder_of_four_blocks_keeps_them_once_and_others_read_the_last_of_them(
    data, tmp_path, monkeypatch
):
    judged_by(tiny(), data, tmp_path / "a", decoders=["linear-four-blocks"], steps=3)
    monkeypatch.setattr(Encoder, "blocks", None)
    shared = judged_by(tiny(), data, tmp_path / "b", decoders=["vitdet", "linear"], steps=3)
    monkeypatch.undo()
    kept = tmp_path / "tokens"
    assert [p.name for p in kept.iterdir()] == ["four-blocks"]
    tokens = np.load(kept / "four-blocks" / "patch_tokens.npy")
    assert tokens.shape == (len(SPLITS), 4, 4, 4, 128)
    encoder = tiny()
    images = torch.stack([encoder.preprocess(data.pixels(row)) for row in range(len(SPLITS))])
    shown = encoder.blocks(images, encoder.depth)
    for place, block in enumerate((1, 3, 4, 6)):  # of six
        expected = shown[block - 1][1].permute(0, 2, 3, 1).half().numpy()
        np.testing.assert_allclose(tokens[:, place], expected, atol=2e-3, rtol=2e-3)
    (tmp_path / "alone").mkdir()
    alone = judged_by(
        tiny(), data, tmp_path / "alone" / "b", decoders=["vitdet", "linear"], steps=3
    )
    assert alone.equals(shared)


def test_another_image_size_gives_a_finer_grid_of_the_same_part_of_the_image(data, tmp_path):
    own, finer = tiny(), segmentation.encoder_at(tiny(), 128)
    assert finer.grid == (8, 8) and finer.preprocessing.size == 128
    assert seen_box(finer)(HEIGHT, WIDTH) == pytest.approx(seen_box(own)(HEIGHT, WIDTH), abs=1)
    judged_by(tiny(), data, tmp_path / "out", steps=3, image_size=128)
    tokens = np.load(tmp_path / "tokens" / "last-block" / "patch_tokens.npy")
    pixels = finer.preprocess(data.pixels(0))[None]
    assert pixels.shape[-2:] == (128, 128)
    expected = finer.features(pixels)[1].permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(tokens[:1, 0], expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("encoder", "arguments", "message"),
    [
        (tiny, {"image_size": 100}, "segmentation size is 100, .*patch of .*, 16. Use 96 or 112"),
        (tiny, {"image_size": 8}, "segmentation size is 8, .* Use 16 or 32"),
        (cells, {"image_size": 128}, "segmentation size 128: cells takes images of 64 pixels only"),
        (
            cells,
            {"decoders": ["linear-fine-tuned"]},
            "cells is no vision transformer.* Take linear",
        ),
        (
            cells,
            {"decoders": ["linear-four-blocks"]},
            "linear-four-blocks: cells shows its last block only. Take linear.",
        ),
    ],
)
def test_what_an_encoder_is_not_fit_for_is_refused(data, tmp_path, encoder, arguments, message):
    with pytest.raises(InputError, match=message) as refused:
        judged_by(encoder(), data, tmp_path / "out", steps=3, **arguments)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "tokens").exists()


def test_fine_tuning_trains_a_copy_reads_images_and_misses_less_than_random_weights(data, tmp_path):
    encoder = tiny()
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    names = ["linear", "linear-fine-tuned"]
    table = judged_by(encoder, data, tmp_path / "out", decoders=names, steps=60).to_pandas()
    after = encoder.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.grad is not None for parameter in encoder.model.parameters())
    outside = table["outside_share"]
    table["missed"] = 2 * (1 - outside) / (2 - outside) - table["dice"]
    missed = table.groupby("decoder")["missed"].mean()
    assert missed["linear-fine-tuned"] < missed["linear"] / 2
    shutil.rmtree(tmp_path / "tokens")
    again = judged_by(tiny(), data, tmp_path / "again", decoders=names[1:], steps=60).to_pandas()
    assert not (tmp_path / "tokens").exists()
    tuned = table[table["decoder"] == names[1]].drop(columns="missed").reset_index(drop=True)
    assert again.equals(tuned)


def test_images_without_content_teach_nothing_but_where_things_usually_are(tmp_path):
    gray = encode_png(np.full((HEIGHT, WIDTH), 120, np.uint8))
    data = write_dataset(tmp_path / "data", image=lambda split, masks: gray)
    judged_by(tiny(), data, tmp_path / "out", decoders=["linear-fine-tuned"], steps=20)
    maps = sorted((tmp_path / "out" / "label_maps" / "linear-fine-tuned-0").iterdir())
    assert len({file.read_bytes() for file in maps}) == 1


def test_sizes_beyond_reason_and_memory_are_refused(data, tmp_path, monkeypatch):
    encoder = load_encoder("random:vit_pico/16@64")
    with pytest.raises(InputError, match="must be at most 4096"):
        judged_by(encoder, data, tmp_path / "large", image_size=102_400)
    free = SimpleNamespace(available=1000)
    monkeypatch.setattr(label_maps.psutil, "virtual_memory", lambda: free)
    with pytest.raises(InputError, match="need 0 GiB of memory, and 0 are free"):
        judged_by(encoder, data, tmp_path / "memory")
