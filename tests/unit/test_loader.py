"""Batches by position: the same whatever was drawn before, by how many threads, on which rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from micro_run import SPLITS, micro_config, write_dataset

from selfray.data.dataset import DatasetWriter, RadiographDataset
from selfray.data.loader import CropBatch, CropLoader
from selfray.errors import InputError
from selfray.pretrain import build_loader

ALL = slice(0, 6)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> RadiographDataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "d")


def _loader(dataset: RadiographDataset, slots: slice = ALL, **changes: Any) -> CropLoader:
    changes = {"batch_size": 6, "crops__global_size": 56, "masks__ratio": (0.1, 0.5)} | changes
    return build_loader(micro_config(dataset.directory, **changes), [dataset], slots)


def _same(one: CropBatch, other: CropBatch) -> bool:
    return (
        torch.equal(one.global_crops, other.global_crops)
        and torch.equal(one.local_crops, other.local_crops)
        and torch.equal(one.masks, other.masks)
        and one.image_ids == other.image_ids
    )


def test_a_batch_is_the_same_whatever_was_made_before(dataset: RadiographDataset) -> None:
    from_start = list(_loader(dataset).batches(0, 6))
    resumed = list(_loader(dataset).batches(3, 6))
    assert all(_same(a, b) for a, b in zip(from_start[3:], resumed, strict=True))
    assert not _same(from_start[3], from_start[4])


def test_the_number_of_threads_does_not_matter(dataset: RadiographDataset) -> None:
    one = _loader(dataset).batch(2)
    assert _same(one, _loader(dataset, engine__loader_threads=4).batch(2))


def test_ranks_make_the_slots_of_the_global_batch(dataset: RadiographDataset) -> None:
    whole = _loader(dataset).batch(1)
    parts = [_loader(dataset, slice(i, i + 2)).batch(1) for i in (0, 2, 4)]
    for name in ("global_crops", "local_crops", "masks"):
        joined = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert torch.equal(joined, getattr(whole, name)), name
    assert sum((part.image_ids for part in parts), ()) == whole.image_ids


def test_parts_are_the_batch_cut_along_the_images(dataset: RadiographDataset) -> None:
    whole = _loader(dataset).batch(0)
    parts = whole.parts(3)
    assert [p.global_crops.shape for p in parts] == [(2, 2, 56, 56)] * 3
    assert torch.equal(torch.cat([p.masks for p in parts], 1), whole.masks)
    assert torch.equal(torch.cat([p.local_crops for p in parts], 1), whole.local_crops)


def test_only_training_images_are_used_and_each_once_a_pass(dataset: RadiographDataset) -> None:
    train = {f"i{i}" for i, split in enumerate(SPLITS) if split == "train"}
    batches = list(_loader(dataset, slice(0, 7), batch_size=7).batches(0, 4))
    first, second = (batches[i].image_ids + batches[i + 1].image_ids for i in (0, 2))
    assert set(first) == set(second) == train
    assert first != second


def test_half_of_the_global_crops_is_masked_in_every_batch(dataset: RadiographDataset) -> None:
    for batch in _loader(dataset).batches(0, 3):
        assert batch.masks.shape == (2, 6, 16)
        shares = batch.masks.float().mean(2)
        assert (shares > 0).sum() == 6
        assert shares.max() <= 0.5


def test_without_local_crops_a_batch_has_none(dataset: RadiographDataset) -> None:
    assert len(_loader(dataset, crops__local_count=0).batch(0).local_crops) == 0


def test_an_image_that_does_not_decode_is_replaced_and_counted(tmp_path: Path) -> None:
    good = write_dataset(tmp_path / "good")
    damaged = _with_damaged(good, tmp_path / "damaged", {"i3", "i4"})
    loader = _loader(damaged, slice(0, 14), batch_size=14)
    batch = loader.batch(0)
    assert batch.bad_images == 3  # i3 and then i4 in the place of i3, i4
    ids = np.array(batch.image_ids)
    assert (ids == "i5").sum() == 3
    assert not {"i3", "i4"} & set(ids)


def test_a_dataset_of_which_nothing_decodes_is_refused(tmp_path: Path) -> None:
    good = write_dataset(tmp_path / "good")
    damaged = _with_damaged(good, tmp_path / "damaged", {f"i{i}" for i in range(24)})
    with pytest.raises(InputError, match="no image of the data decodes"):
        _loader(damaged).batch(0)


def test_a_split_without_images_is_refused(dataset: RadiographDataset, tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "d", _info(dataset))
    row = {"image": dataset.encoded(0), "image_id": "a", "patient_id": "a", "study_id": "a"}
    writer.add({**row, "split": "test"})
    with pytest.raises(InputError, match="no image in split 'train'"):
        _loader(writer.finish())


def _info(dataset: RadiographDataset) -> Any:
    from selfray.data.dataset import DatasetInfo

    return DatasetInfo("micro", "synthetic phantom", "CC0-1.0", True, dataset.findings, (), "noise")


def _with_damaged(good: RadiographDataset, out: Path, ids: set[str]) -> RadiographDataset:
    writer = DatasetWriter(out, _info(good))
    for index, row in enumerate(good.table.to_pylist()):
        row["image"] = b"no image" if row["image_id"] in ids else good.encoded(index)
        writer.add({key: value for key, value in row.items() if value is not None})
    return writer.finish()
