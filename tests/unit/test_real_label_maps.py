"""Shadows of a label map: where the radiograph at the same pose shows the structure."""

from __future__ import annotations

import gzip
import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def loaded(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses, and the other script, look it up there
    specification.loader.exec_module(module)
    return module


real = loaded("real_radiographs")
maps = loaded("real_label_maps")


@pytest.mark.parametrize("view", ["PA", "AP", "LL"])
def test_a_shadow_is_where_the_radiograph_shows_the_structure(view: str) -> None:
    """A rod off centre, near the back, so that a wrong side, depth or turn moves its shadow."""
    soft, bone = np.zeros((2, 120, 140, 200), np.float32)
    rod = np.zeros_like(bone)
    rod[30:90, 105:125, 55:75] = 1
    pose = real.Pose(
        view=view, turn=5, tilt=-4, roll=3, source_mm=1000, shift=(6, 15), zoom=1.2, kev=70,
        photons=1e9, scatter=0.0, equalised=0.0,
    )  # fmt: skip
    image = real.radiograph(real.Body(soft=soft, bone=rod), pose, np.random.default_rng(0))
    (shadow,) = maps.shadows({"rod": rod}, pose)
    _, bone_attenuation = real.attenuation(pose.kev)
    shown = image / bone_attenuation * 10 >= maps.LEAST_MM  # mm of bone of 1 g/cm³
    assert shadow.sum() > 500
    assert (shadow & shown).sum() / (shadow | shown).sum() > 0.99


def test_the_label_map_lands_on_the_grid_of_the_body() -> None:
    header = bytearray(352)
    struct.pack_into("<3h", header, 42, 40, 40, 20)
    struct.pack_into("<3f", header, 80, 1.45, 1.45, 2.9)
    struct.pack_into("<3f", header, 108, 352.0, 1.0, 0.0)
    struct.pack_into("<12f", header, 280, -1.45, 0, 0, 0, 0, 1.45, 0, 0, 0, 0, 2.9, 0)
    hounsfield = np.full((20, 40, 40), -1000, np.int16)
    hounsfield[2:18, 5:35, 5:35] = 0
    hounsfield[12:16, 8:14, 6:16] = 1000
    labels = np.where(hounsfield == 1000, 10, 0).astype(np.uint8)
    body = real.read_body(gzip.compress(bytes(header) + hounsfield.tobytes()))
    parts = maps.read_anatomy(gzip.compress(bytes(header) + labels.tobytes()))
    assert parts.keys() == maps.STRUCTURES.keys() and not parts["heart"].any()
    lung = parts["left_lung"]
    assert lung.shape == body.bone.shape
    # The same voxels, but for a rim on which one is interpolated from HU and the other from labels.
    seen, labelled = body.bone > 0.3, lung > 0.5
    assert labelled.sum() > 300 and (seen & labelled).sum() / (seen | labelled).sum() > 0.8
