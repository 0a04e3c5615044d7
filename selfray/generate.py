"""Radiographs -> reports by a trained report model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfray.errors import InputError, nearest
from selfray.evals.report_generation import generate_reports
from selfray.evals.report_model import ReportModel
from selfray.evals.report_model_directory import open_report_model, read_report_manifest
from selfray.models.encoder import Encoder
from selfray.models.image_inputs import eight_bit_images
from selfray.models.language_memory import LanguageUse, require_memory
from selfray.models.language_model import LanguageModel, open_language_model
from selfray.models.precision import computes_in_bfloat16
from selfray.models.published import PUBLISHED, load_encoder

_BATCH = 16  # images at a time
_CONVERTED = "language-models"


def generate(
    model: Path, images: Sequence[Path], *, encoder: str | None = None, prompt: str = ""
) -> Iterator[str | InputError]:
    """Write a report for each image that can be read.

    Args:
        model: A report model's directory, or an evaluation with reports, by `selfray evaluate
            --tasks reports`.
        images: Files, each with one radiograph.
        encoder: Which of the evaluation's encoders, by its name there, or where it is now: then
            the report model is that of the same weights; default: the only one.
        prompt: What is known before the image is read, e.g. `Indication: cough`.

    Yields:
        Reports, in the order of the images; in place of an image that cannot be read, why.

    Raises:
        InputError: No report model, several and none named, or an encoder that is not there or has
            other weights than the model was trained with.
    """
    directory, source = _found(model, encoder)
    manifest = read_report_manifest(directory)
    about, settings = manifest["about"], manifest["about"]["config"]
    if list(source.grid) != about["grid"]:
        raise InputError(
            f"{directory} was trained on {about['grid'][0]} × {about['grid'][1]} tokens an image, "
            f"as of features without patches; {source.name} gives {source.grid[0]} × "
            f"{source.grid[1]}. Train a report model on the encoder itself: selfray evaluate "
            f"{source.name} --tasks reports."
        )
    writer = _opened(directory, manifest, prompt, source.device)
    for start in range(0, len(images), _BATCH):
        read = [_read(source, image) for image in images[start : start + _BATCH]]
        readable = [image for image in read if not isinstance(image, InputError)]
        if readable:
            patches = source.features(torch.stack(readable).to(source.device))[1]
            # As training read them: half precision, [B, h, w, D].
            tokens = patches.permute(0, 2, 3, 1).half().cpu().numpy()
            reports = iter(_written(writer, tokens, prompt, settings))
        for image in read:
            yield image if isinstance(image, InputError) else next(reports)


def _read(source: Encoder, image: Path) -> torch.Tensor | InputError:
    """What the encoder is given of a file, [C, S, S], or why the file cannot be used."""
    try:
        return source.preprocess(next(eight_bit_images(image)))
    except InputError as cause:
        return cause


def _opened(
    directory: Path, manifest: dict[str, Any], prompt: str, device: torch.device
) -> ReportModel:
    """The report model on a device, where its language model is known to fit, with this prompt."""
    settings = manifest["about"]["config"]
    bfloat16 = computes_in_bfloat16(settings["precision"], device)
    adapted = (directory / "adapter_config.json").exists()
    language, evaluation = settings["language"], directory.resolve().parent.parent.parent
    # Converted language models lie where the evaluation put them, or beside a model moved from it.
    place = evaluation if (evaluation / _CONVERTED).is_dir() else directory.parent
    visual, longest = manifest["places"], settings["max_new_tokens"]

    def use(path: Path, prompt_tokens: int) -> LanguageUse:
        return LanguageUse(
            device,
            tokens=_BATCH * settings["beams"] * (visual + prompt_tokens + longest),
            # As trained: weights that were not are in half precision.
            dtype=torch.bfloat16 if bfloat16 and path != directory else torch.float32,
            bfloat16=bfloat16,
            lora_rank=language["lora_rank"] if adapted else 0,
            lora_targets=tuple(language["lora_targets"]),
        )

    def open_base(path: Path, template: str) -> LanguageModel:
        opened = open_language_model(
            path, template=template, cache=place / _CONVERTED, use=use(path, 0)
        )
        # Only now is there a tokenizer to count by.
        count, room = len(opened.text_ids(prompt)), opened.prompt_room(visual, longest)
        if room is not None and count > room:
            raise InputError(
                f"the prompt has {count} tokens, at most {room} fit beside {visual} of the image "
                f"and {longest} of the report. Shorten --prompt."
            )
        # Weights are on the CPU so far.
        on_cpu = device.type == "cpu"
        require_memory(opened.network, path, use(path, count), weights_read=on_cpu)
        return opened

    return open_report_model(directory, open_base).to(device)


def _written(
    writer: ReportModel, tokens: np.ndarray, prompt: str, settings: dict[str, Any]
) -> list[str]:
    reports: dict[int, str] = {}
    for places, texts in generate_reports(
        writer,
        tokens,
        np.arange(len(tokens)),
        [prompt] * len(tokens),
        batch_size=_BATCH,
        max_new_tokens=settings["max_new_tokens"],
        beams=settings["beams"],
        candidates=settings["candidates"],
        bfloat16=computes_in_bfloat16(settings["precision"], writer.device),
    ):
        reports |= dict(zip(places.tolist(), texts, strict=True))
    return [reports[place] for place in range(len(tokens))]


def _found(given: Path, name: str | None) -> tuple[Path, Encoder]:
    """A report model, and the encoder that it was trained with, which may have moved since."""
    models = _models(given)
    if name is None and len(models) > 1:
        raise InputError(
            f"{given} has report models of {len(models)} encoders. Name one by --encoder: "
            f"{', '.join(models)}."
        )
    name = next(iter(models)) if name is None else name
    if name in models:
        trained_with = {name: models[name]}
        source = _loaded(
            name,
            f"encoder {name!r}, which the report model was trained with, is not found from here. "
            "Say by --encoder where it is now.",
        )
    else:
        trained_with = models
        source = _loaded(
            name, f"{given} has no report model of {name}, and no encoder is there. "
            f"{nearest(name, models)}",
        )  # fmt: skip
    for directory in trained_with.values():
        if read_report_manifest(directory)["about"]["weights_sha256"] == source.weights_sha256:
            return directory, source
    raise InputError(
        f"{source.name} has other weights than the encoder that a report model of {given} was "
        f"trained with: {', '.join(trained_with)}. Give that encoder by --encoder, or train a "
        "report model with this one: selfray evaluate --tasks reports."
    )


def _models(given: Path) -> dict[str, Path]:
    """The report model itself, or those of an evaluation, of the first seed; by encoder."""
    itself = (given / "report_model.json").is_file()
    found = [given] if itself else sorted(given.glob("reports/*/seed-*/model"))
    if not found:
        raise InputError(
            f"{given} holds no report model. Train one: selfray evaluate ENCODER --data DIR "
            f"--out OUT --tasks reports, then give OUT."
        )
    models: dict[str, Path] = {}
    for directory in found:
        models.setdefault(read_report_manifest(directory)["about"]["encoder"], directory)
    return models


def _loaded(name: str, missing: str) -> Encoder:
    """An encoder; `missing` is the error where nothing of this name is on this machine."""
    try:
        return load_encoder(name)
    except InputError:
        if ":" in name or name in PUBLISHED or Path(name).exists():
            raise
        raise InputError(missing) from None
