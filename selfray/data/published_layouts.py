"""Whose image a file is, where a published dataset says so by its path alone."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import NamedTuple

# "files/p10/p10000032/s50414267/02aa804e.jpg" (PhysioNet, MIMIC-CXR-JPG 2.1.0): subject and study.
_MIMIC = re.compile(r"(?:^|/)p([0-9]{8})/(?:[^/]+/)*?(s[0-9]{8})/")
# "CXR1000_IM-0003-1001.png", "CXR1_1_IM-0001-3001.png", "1000_IM-0003-1001-0001.dcm",
# "CXR1063_IM-0044-84654001.png": so are all 7,470 images called that the reports of OpenI list.
_OPENI = re.compile(r"(?:CXR)?([0-9]+)_(?:[0-9]+_)?IM-[0-9]{4}-[0-9]{4,8}(?:-[0-9]{4})?")


class Place(NamedTuple):
    """Patient and study of an image. Secret: hash them before they are written."""

    patient: str
    study: str


def published_place(file: str) -> Place | None:
    """Patient and study that the path of an image tells, or None.

    MIMIC-CXR has a folder a patient, and in it one a study; the patient is its number, as in the
    headers of the DICOM files. OpenI numbers reports; no patient is known to have two.

    Args:
        file: Path of the image below the ingested folder, with `/`.
    """
    if folders := _MIMIC.search(file):
        return Place(folders[1], folders[2])
    number = openi_number(PurePosixPath(file).name.split(".")[0])
    return None if number is None else Place(f"CXR{number}", f"CXR{number}")


def openi_number(image: str) -> str | None:
    """Number of the report of an OpenI image, or None for other names.

    Args:
        image: Name of the image, without folder and suffix.
    """
    name = _OPENI.fullmatch(image)
    return name[1] if name else None
