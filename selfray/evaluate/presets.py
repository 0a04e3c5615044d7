"""Published protocols by name: which findings of which dataset, split how, judged by what.

In the comments, [V] marks what was read in the dataset's own files or the publication's abstract,
[S] what was read in secondary sources: reimplementations, citations and derived works.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from selfray.data.dataset import SPLITS, RadiographDataset
from selfray.errors import InputError, nearest
from selfray.evaluate.targets import Target

_RAD_DINO = "Pérez-García et al., Nature Machine Intelligence 2025"
_RADJEPA = "RadJEPA, as cited in secondary sources"
# Files that ingest refuses are missing from an official split.
_SHARE_REFUSED = 0.01


@dataclass(frozen=True)
class Published:
    """A number to stand beside.

    Attributes:
        who: Encoder or method.
        what: What was measured.
        value: 0 to 1.
        source: Where it was published.
    """

    who: str
    what: str
    value: float
    source: str


@dataclass(frozen=True)
class Preset:
    """A protocol.

    Attributes:
        name: To call it by.
        dataset: Common name of the dataset.
        known_by: Words of which a dataset's name or origin must have one, in small letters; empty
            where any dataset with the label maps will do.
        findings: As the publisher writes them.
        other_names: By finding, what else its column may be called.
        label_maps: By structure, the labels that are taken together.
        split: The rule.
        test_images: Images of official test splits; empty where there is none.
        metric: The headline: mean over findings of `auprc` or `auroc`, or `dice`.
        published: Numbers to compare with.
        source: Of the protocol.
    """

    name: str
    dataset: str
    known_by: tuple[str, ...]
    findings: tuple[str, ...]
    split: str
    metric: str
    source: str
    other_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    label_maps: dict[str, tuple[str, ...]] = field(default_factory=dict)
    test_images: tuple[int, ...] = ()
    published: tuple[Published, ...] = ()


@dataclass(frozen=True)
class AppliedPreset:
    """A protocol on a dataset.

    Attributes:
        targets: The findings' columns, named as in the dataset.
        label_maps: By structure, labels of the dataset's `mask`.
        metric: The headline.
    """

    targets: tuple[Target, ...]
    label_maps: dict[str, tuple[str, ...]]
    metric: str


_OWN_SPLIT = "by patient; no official split is published"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="vindr-cxr",
            dataset="VinDr-CXR",
            known_by=("vindr", "vinbigdata"),
            # [S] the seven; [V] their spelling, in the dataset's files.
            findings=(
                "Lung Opacity", "Cardiomegaly", "Pleural thickening", "Aortic enlargement",
                "Pulmonary fibrosis", "Tuberculosis", "Pleural effusion",
            ),
            other_names={"Pulmonary fibrosis": ("fibrosis",)},
            split="official test images (3,000); train and validate from the official 15,000",
            test_images=(3000,),  # [V]
            metric="auprc",
            published=(
                Published("RAD-DINO", "mean AUPRC, linear probe", 0.528, _RAD_DINO),  # [S]
                Published("RadJEPA", "mean AUPRC, linear probe", 0.552, _RADJEPA),  # [S]
            ),
            source=f"{_RAD_DINO}; Nguyen et al., Scientific Data 2022",
        ),
        Preset(
            name="rsna-pneumonia",
            dataset="RSNA Pneumonia Detection Challenge 2018",
            known_by=("rsna",),
            findings=("Pneumonia",),
            other_names={"Pneumonia": ("target", "lung_opacity")},
            # [V] Labels of the challenge's test images were not published.
            split="by patient of NIH (the challenge's patientId is an image's); no official split",
            metric="auprc",
            published=(
                Published("RAD-DINO", "AUPRC, linear probe", 0.710, _RAD_DINO),  # [S]
                Published("RAD-DINO", "AUROC, linear probe", 0.884, _RAD_DINO),  # [S]
                Published("RadJEPA", "AUPRC, linear probe", 0.727, _RADJEPA),  # [S]
                Published("RadJEPA", "AUROC, linear probe", 0.892, _RADJEPA),  # [S]
            ),
            # [S] The images are NIH's: encoders trained on NIH ChestX-ray14 have seen them.
            source=f"{_RAD_DINO}; Shih et al., Radiology: Artificial Intelligence 2019",
        ),
        Preset(
            name="chexpert-5",
            dataset="CheXpert",
            known_by=("chexpert",),
            # [V] the five of the publication.
            findings=(
                "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion",
            ),
            split="official: 200 studies (234 images) to validate, or 500 (668 images) to test",
            test_images=(668, 234),  # [S] and [V] that it is 500 and 200 studies
            metric="auroc",
            published=(
                # [V], abstract; fine-tuned networks, not probes.
                Published(
                    "ensemble of CNNs, fine-tuned", "mean AUROC, 200 studies to validate", 0.940,
                    "Pham et al., Neurocomputing 2021",
                ),
                Published(
                    "ensemble of CNNs, fine-tuned", "mean AUROC, 500 studies to test", 0.930,
                    "Pham et al., Neurocomputing 2021",
                ),
            ),
            source="Irvin et al., AAAI 2019",
        ),
        Preset(
            name="nih-14",
            dataset="NIH ChestX-ray14",
            known_by=("nih", "chestxray14", "ray14"),
            # [V]
            findings=(
                "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema",
                "Fibrosis", "Hernia", "Infiltration", "Mass", "Nodule", "Pleural_Thickening",
                "Pneumonia", "Pneumothorax",
            ),
            other_names={
                "Effusion": ("pleural_effusion",),
                "Infiltration": ("infiltrate",),
                "Fibrosis": ("pulmonary_fibrosis",),
            },
            split="official test_list.txt (25,596 images); the rest from train_val_list.txt",
            test_images=(25596,),  # [S], [V] that the split is by patient
            metric="auroc",
            # No number for linear probes on the official split could be read at its source.
            source="Wang et al., CVPR 2017",
        ),
        Preset(
            name="candid-ptx",
            dataset="CANDID-PTX",
            known_by=("candid",),
            findings=("Pneumothorax", "Chest tube", "Rib fracture"),  # [S]
            other_names={
                "Chest tube": ("chest_tubes", "intercostal_chest_tube"),
                "Rib fracture": ("rib_fractures", "acute_rib_fracture"),
            },
            split=_OWN_SPLIT,
            metric="auprc",
            source=f"{_RAD_DINO}; Feng et al., Radiology: Artificial Intelligence 2021",
        ),
        Preset(
            name="anatomy",
            dataset="any with label maps of lungs, lung zones and ribs",
            known_by=(),
            findings=(),
            label_maps={
                "lungs": ("right_lung", "left_lung"),
                "lung zones": (
                    "right_upper_zone", "right_middle_zone", "right_lower_zone",
                    "left_upper_zone", "left_middle_zone", "left_lower_zone",
                ),
                "ribs": ("ribs",),
            },
            split=_OWN_SPLIT,
            metric="dice",
            published=(
                # [S]; other images than yours, so an order of magnitude and no mark to beat.
                Published("RAD-DINO", "Dice of lungs, UPerNet", 0.980, _RAD_DINO),
                Published("RAD-DINO", "Dice of lung zones, UPerNet", 0.912, _RAD_DINO),
                Published("RAD-DINO", "Dice of ribs, UPerNet", 0.853, _RAD_DINO),
                Published("RadJEPA", "Dice of lungs", 0.983, _RADJEPA),
                Published("RadJEPA", "Dice of lung zones", 0.937, _RADJEPA),
                Published("RadJEPA", "Dice of ribs", 0.896, _RADJEPA),
            ),
            source=_RAD_DINO,
        ),
    )
}  # fmt: skip


def find_preset(name: str) -> Preset:
    """A protocol by its name.

    Raises:
        InputError: There is none of this name.
    """
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown. {nearest(name, PRESETS)}")
    return PRESETS[name]


def apply_preset(preset: Preset, dataset: RadiographDataset) -> AppliedPreset:
    """Find a protocol's findings, label maps and splits in a dataset.

    Names match whatever their capitals and separators: `Pleural effusion` is `pleural_effusion`.

    Args:
        preset: Of `PRESETS`.
        dataset: Opened.

    Raises:
        InputError: It is another dataset, or lacks a finding, a label map or a split, or a finding
            has one class only where it is fitted or judged.
    """
    _require_dataset(preset, dataset)
    _require_splits(preset, dataset)
    columns = {_plain(name): name for name in dataset.findings}
    targets = []
    for finding in preset.findings:
        names = [finding, *preset.other_names.get(finding, ())]
        column = next((columns[_plain(n)] for n in names if _plain(n) in columns), None)
        if column is None:
            raise InputError(
                f"preset {preset.name}: {dataset.directory} has no finding {_plain(finding)!r}. "
                f"{nearest(_plain(finding), dataset.findings)}"
            )
        _require_classes(preset, dataset, column)
        targets.append(Target(column, "finding", column))
    for label in (label for labels in preset.label_maps.values() for label in labels):
        if label not in dataset.mask_labels:
            raise InputError(
                f"preset {preset.name}: {dataset.directory} has no label map {label!r}. "
                f"{nearest(label, dataset.mask_labels)}"
            )
    return AppliedPreset(tuple(targets), dict(preset.label_maps), preset.metric)


def preset_rows() -> list[tuple[str, str, str, str, str]]:
    """The table of presets: name, dataset, what is judged, headline, split; a header first."""
    rows = [("preset", "dataset", "judged", "headline", "split")]
    for preset in PRESETS.values():
        judged = ", ".join(preset.findings or preset.label_maps)
        rows.append((preset.name, preset.dataset, judged, preset.metric, preset.split))
    return rows


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _require_dataset(preset: Preset, dataset: RadiographDataset) -> None:
    said = f"{dataset.info['name']} {dataset.info['origin']}".lower()
    if preset.known_by and not set(re.split(r"[^a-z0-9]+", said)) & set(preset.known_by):
        raise InputError(
            f"preset {preset.name} is for {preset.dataset}, and name and origin of "
            f"{dataset.directory} say none of {', '.join(preset.known_by)}. If it is that dataset, "
            "ingest it with --origin."
        )


def _require_splits(preset: Preset, dataset: RadiographDataset) -> None:
    counts = {split: len(dataset.rows(split)) for split in SPLITS}
    empty = [split for split, count in counts.items() if not count]
    if empty:
        raise InputError(
            f"preset {preset.name}: {dataset.directory} has no images in {' and '.join(empty)}. "
            f"Give the table of `selfray ingest` a column split: {preset.split}."
        )
    official = preset.test_images
    if official and not any(
        (1 - _SHARE_REFUSED) * count <= counts["test"] <= count for count in official
    ):
        raise InputError(
            f"preset {preset.name}: {dataset.directory} has {counts['test']} test images, the "
            f"official split has {' or '.join(map(str, official))}. Give the table of `selfray "
            f"ingest` a column split: {preset.split}."
        )


def _require_classes(preset: Preset, dataset: RadiographDataset, column: str) -> None:
    values = dataset.column(column)
    for split in ("train", "test"):
        found = set(values[dataset.rows(split)]) - {None}
        if not {0.0, 1.0} <= {v for v in found if not np.isnan(v)}:
            raise InputError(
                f"preset {preset.name}: {column!r} has not both classes in the {split} split of "
                f"{dataset.directory}. Label the finding there, or use a custom evaluation."
            )
