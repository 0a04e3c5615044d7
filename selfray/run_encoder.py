"""From a run's networks to `RUN/encoder/`, which other tools load."""

from __future__ import annotations

from typing import Any

from selfray.data.dataset import RadiographDataset
from selfray.models.encoder_directory import save_encoder
from selfray.models.text_tower import FOLDER, save_text_tower
from selfray.objectives.image_text import ImageText
from selfray.objectives.student_teacher import StudentTeacher, encoder_of
from selfray.run_directory import RunDirectory


def write_run_encoder(run: RunDirectory, networks: StudentTeacher, step: int) -> None:
    """Write the teacher, its heads and a model card to `RUN/encoder/`.

    Args:
        run: Whose teacher this is.
        networks: Holds the teacher.
        step: Steps done.

    Raises:
        InputError: The disk is full.
    """
    teacher = networks.teacher
    heads = {
        name: {key: tensor.detach().cpu() for key, tensor in teacher[name].state_dict().items()}
        for name in ("dino_head", "ibot_head")
        if name in teacher
    }
    with run.needs_room():
        save_encoder(
            encoder_of(teacher),
            run.path / "encoder",
            mean=networks.mean,
            std=networks.std,
            card=_card(run, step),
            heads=heads,
        )


def write_language_encoder(run: RunDirectory, networks: ImageText, step: int) -> None:
    """Write the image encoder to `RUN/encoder/`, and the text side to `RUN/text_encoder/`.

    Args:
        run: Whose networks these are.
        networks: Hold both encoders.
        step: Steps done.

    Raises:
        InputError: The disk is full.
    """
    encoder = run.path / "encoder"
    with run.needs_room():
        save_encoder(
            networks.encoder,
            encoder,
            mean=networks.mean,
            std=networks.std,
            card={**_card(run, step), "supervision": "reports"},
        )
        save_text_tower(
            run.path / FOLDER,
            networks.text_encoder,
            encoder=encoder,
            image_projection=networks.image_projection.weight,
            text_projection=networks.text_projection.weight,
            logit_scale=networks.logits.scale,
            logit_bias=networks.logits.bias,
        )


def _card(run: RunDirectory, step: int) -> dict[str, Any]:
    """What the model card says of the run."""
    infos = [RadiographDataset(path).info for path in run.config.data]
    probes = [record for record in run.probes() if record["step"] == step]
    return {
        "synthetic": all(info["synthetic"] for info in infos),
        "data": [
            {key: info[key] for key in ("name", "origin", "licence", "fingerprint")}
            | {"images": info["counts"]["images"]}
            for info in infos
        ],
        "recipe": run.config.recipe,
        "init": run.config.init or "random weights",
        "step": step,
        "batch_size": run.config.batch_size,
        "validation": {
            key: probes[-1][key] for key in ("macro_auroc", "sex_auroc", "age_r2")
        } if probes else {},
    }  # fmt: skip
