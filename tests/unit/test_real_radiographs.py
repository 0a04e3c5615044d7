"""The script of `make demo-real`: what it computes, what it says when a package is missing."""

from __future__ import annotations

import gzip
import importlib.util
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from selfray.data.radiograph import read_radiograph, to_eight_bits

SCRIPT = Path(__file__).parents[2] / "scripts" / "real_radiographs.py"
specification = importlib.util.spec_from_file_location("real_radiographs", SCRIPT)
assert specification is not None and specification.loader is not None
real = importlib.util.module_from_spec(specification)
sys.modules["real_radiographs"] = real  # dataclasses look their module up there
specification.loader.exec_module(real)

STRAIGHT = real.Pose(
    view="PA", turn=0, tilt=0, roll=0, source_mm=1800, shift=(0, 0), zoom=1.0, kev=70,
    photons=1e7, scatter=0.0, equalised=0.0,
)  # fmt: skip


def test_a_package_that_cannot_be_had_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "made" / "files"
    done = subprocess.run(
        [sys.executable, SCRIPT, out], capture_output=True, text=True, check=False,
        env=os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull},
    )  # fmt: skip
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "pneumonia-model-package==0.3.0 could not be downloaded" in done.stderr
    assert not list(out.parent.iterdir())


def box() -> real.Body:
    """Soft tissue of 20 cm with a rod of bone on the patient's right, near the back."""
    soft, bone = np.zeros((2, 120, 140, 200), np.float32)
    soft[:, 2:138, 30:170] = 1
    bone[:, 110:116, 60:66] = 1
    return real.Body(soft=soft, bone=bone)


def exposed(pose: real.Pose) -> np.ndarray:
    return real.radiograph(box(), pose, np.random.default_rng(0))


def test_a_ray_is_weakened_as_beer_and_lambert_say() -> None:
    image = exposed(STRAIGHT)
    water, bone = real.attenuation(70)
    middle = real.SIDE // 2
    soft_tissue = water * 136 * real.PIXEL_MM / 10
    assert image[middle, middle] == pytest.approx(soft_tissue, rel=0.03)
    rod = image[middle, middle - 60 : middle - 20].max() - image[middle, middle]
    assert rod == pytest.approx(bone * 6 * real.PIXEL_MM / 10, rel=0.15)


def test_energy_turn_and_view_change_what_is_seen() -> None:
    def rod(pose: real.Pose) -> int:
        row = exposed(pose)[real.SIDE // 2]
        return int(np.argmax(row - np.median(row[60:196])))

    middle = real.SIDE // 2
    low, high = exposed(replace(STRAIGHT, kev=45)), exposed(replace(STRAIGHT, kev=75))
    assert low[middle, middle] > high[middle, middle] > 0
    assert rod(STRAIGHT) < middle  # the patient's right is on the left
    assert abs(rod(replace(STRAIGHT, turn=20)) - rod(STRAIGHT)) > 5
    # Near the back, the rod is nearer to the source in PA: thrown further out than in AP.
    assert rod(STRAIGHT) < rod(replace(STRAIGHT, view="AP"))


def test_an_inverted_file_is_read_like_one_that_is_not(tmp_path: Path) -> None:
    image = exposed(STRAIGHT)
    for name, inverted in (("a.dcm", False), ("b.dcm", True)):
        real.write_dicom(tmp_path / name, image, "PA", inverted=inverted)
    plain, inverse = (
        to_eight_bits(read_radiograph(tmp_path / name).pixels) for name in ("a.dcm", "b.dcm")
    )
    np.testing.assert_array_equal(plain, inverse)
    assert plain.std() > 20


def test_a_ct_is_turned_to_head_up_patients_left_to_the_right() -> None:
    """RAS on disk: x to the right, y to the front, z up; a stone lies right, front, up."""
    voxels = np.full((40, 60, 60), -1000, np.int16)  # [z, y, x]
    voxels[4:36, 8:52, 8:52] = 40
    voxels[28:32, 38:44, 38:44] = 1500
    header = bytearray(352)
    struct.pack_into("<8h", header, 40, 3, 60, 60, 40, 1, 1, 1, 1)
    struct.pack_into("<8f", header, 76, 1, 3, 3, 4, 0, 0, 0, 0)
    struct.pack_into("<3f", header, 108, 352, 1, 0)
    struct.pack_into("<12f", header, 280, 3, 0, 0, 0, 0, 3, 0, 0, 0, 0, 4, 0)
    body = real.read_body(gzip.compress(bytes(header) + voxels.tobytes()))
    z, y, x = (
        axis.mean() / size
        for axis, size in zip(np.nonzero(body.bone), body.bone.shape, strict=True)
    )
    assert z < 0.5 and y < 0.5 and x < 0.5
    assert body.soft.max() == pytest.approx(1.15) and body.bone.max() > 0.3
