"""A report model on disk: one directory, safetensors and JSON, all of it or nothing.

`report_model.json`, `projector.safetensors`, and the language model in Hugging Face's layout. Where
its own weights were not trained, they stay where they are: their path and hash are kept, and of
adapters `adapter_model.safetensors`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from selfray.errors import InputError
from selfray.evals.report_model import ReportModel
from selfray.models.encoder_directory import replace_directory
from selfray.models.language_model import LanguageModel
from selfray.models.language_model_files import quiet, transformers_library
from selfray.models.weights_file import load_exactly, read_tensors

FORMAT = "selfray-report-model"
VERSION = 1
_MANIFEST = "report_model.json"


def save_report_model(
    model: ReportModel, directory: Path, *, about: dict[str, Any], whole: bool
) -> None:
    """Write a trained report model; what was there stays until all is written.

    Args:
        model: With adapters or without.
        directory: To make, or to replace by this one.
        about: For the manifest, e.g. the encoder's name and `weights_sha256`; can be JSON.
        whole: Whether the language model is written with adapters merged into it, so that the
            directory needs no other. Where it is the small decoder or was trained in full, it is
            always written.

    Raises:
        InputError: `directory` exists and is no report model.
    """
    if directory.exists() and not (directory / _MANIFEST).exists():
        raise InputError(f"{directory} exists and is no report model. Choose another.")
    new = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    language = model.language
    adapted = hasattr(model.network, "merge_and_unload")
    referenced = bool(language.source) and not whole and not model.fully_trained
    with quiet(transformers_library("a report model")):
        if not referenced:
            network = model.merged_network() if adapted else model.network
            network.save_pretrained(new)
            language.tokenizer.save_pretrained(new)
        elif adapted:
            model.network.save_pretrained(new)
            (new / "README.md").unlink(missing_ok=True)  # peft's empty form
    projector = {n: t.detach().float().cpu() for n, t in model.projector.state_dict().items()}
    save_file(projector, new / "projector.safetensors")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "width": model.width,
        "places": model.projector.mean.shape[0],
        "visual_side": model.visual_side,
        "projector_layers": model.projector_layers,
        "template": language.template,
        "end_id": language.end_id,
        "pad_id": language.pad_id,
        "language_model": {"source": language.source, "sha256": language.sha256}
        if referenced
        else None,
        "about": about,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (new / _MANIFEST).write_text(text + "\n", encoding="utf-8")
    replace_directory(directory, new)


def open_report_model(
    directory: Path, open_base: Callable[[Path, str], LanguageModel]
) -> ReportModel:
    """Open what `save_report_model` wrote; the model is on the CPU.

    Args:
        directory: Of the report model.
        open_base: Opens the language model in a directory or file, with a template: where and
            within which memory is the caller's.

    Raises:
        InputError: No report model, a damaged one, or the language model that it refers to has
            other weights now.
    """
    manifest = read_report_manifest(directory)
    referenced = manifest["language_model"]
    base = Path(referenced["source"]) if referenced else directory
    language = open_base(base, manifest["template"])
    if referenced and language.sha256 != referenced["sha256"]:
        raise InputError(
            f"{directory} belongs to a language model with other weights than {base} has. Put "
            "those weights back, or save the report model whole."
        )
    if not referenced:
        language.source, language.sha256 = "", ""
    language.end_id, language.pad_id = manifest["end_id"], manifest["pad_id"]
    model = ReportModel(
        language,
        manifest["width"],
        visual_side=manifest["visual_side"],
        projector_layers=manifest["projector_layers"],
        seed=0,
    )
    file = directory / "projector.safetensors"
    model.projector.mean = torch.zeros(manifest["places"], manifest["width"])
    load_exactly(model.projector, read_tensors(file), file)
    if (directory / "adapter_config.json").exists():
        model.open_lora(directory)
    return model.eval()


def read_report_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a report model, with what `save_report_model` was told as `about`.

    Raises:
        InputError: No report model, or a damaged one.
    """
    file = directory / _MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as cause:
        raise InputError(
            f"{directory} is no report model: {_MANIFEST} is missing. Give the directory that "
            "`selfray evaluate --tasks reports` wrote."
        ) from cause
    except ValueError as cause:
        raise InputError(f"{file} is no JSON: {cause}. Copy it anew.") from cause
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise InputError(
            f"{file} is of version {manifest.get('version')}, this program knows {VERSION}. Open "
            "it with the version of selfray that wrote it."
        )
    return manifest
