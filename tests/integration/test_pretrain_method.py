"""One step of the method: what it computes, what it changes, and what must not matter to it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import torch
from micro_run import micro_config
from safetensors.torch import load_file
from torch import Tensor

from selfray import pretrain
from selfray.config import PretrainConfig
from selfray.data.loader import CropBatch
from selfray.errors import RunStopped
from selfray.initialise import initialise
from selfray.objectives.student_teacher import StudentTeacher
from selfray.pretrain import (
    build_loader,
    build_run_optimizer,
    scheduled,
)
from selfray.pretrain import pretrain as run_pretrain
from selfray.run_loop import open_data, put_back, state_tensors


class Bench:
    """Networks, optimizer and batches as in a run, to take single steps."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        loader = build_loader(config, open_data(config), slice(0, config.batch_size))
        self.batch: Callable[[int], CropBatch] = loader.batch
        self.networks, _, _ = initialise(config)
        self.optimizer = build_run_optimizer(config, self.networks)
        self.autocast = pretrain.autocast(config, torch.device("cpu"))

    def step(self, step: int, batch: CropBatch | None = None) -> dict[str, float]:
        torch.manual_seed(step)
        values = scheduled(self.config, step, 0)
        terms = pretrain._step(
            self.networks, self.optimizer, batch or self.batch(step), self.config, values,
            self.autocast,
        )  # fmt: skip
        return {name: float(value) for name, value in terms.items()}


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The gradients of each step, before they are clipped."""
    caught: list[dict[str, Tensor]] = []
    clip = pretrain.clip_gradients

    def catch(student: torch.nn.Module, largest: float) -> Tensor:
        named = student.named_parameters()
        caught.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        return clip(student, largest)

    monkeypatch.setattr(pretrain, "clip_gradients", catch)
    return caught


def _assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor within a share of its own largest element, or of a millionth of the largest."""
    floor = 1e-6 * max(float(t.abs().max()) for t in other.values())
    assert set(one) == set(other)
    for name, tensor in other.items():
        scale = max(float(tensor.abs().max()), floor)
        assert float((one[name] - tensor).abs().max()) <= tolerance * scale, name


def _tensors(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that can be reached from an object, through attributes and containers."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            name = f"{id(key):x}" if isinstance(key, Tensor) else str(key)
            yield from _tensors(inner, f"{path}/{name}", seen)
    elif isinstance(value, list | tuple | set):
        for index, inner in enumerate(value):
            yield from _tensors(inner, f"{path}/{index}", seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(vars(value), path, seen)


@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
def test_every_tensor_that_changes_in_a_step_is_in_the_checkpoint(
    micro_data: Path, centering: str
) -> None:
    bench = Bench(micro_config(micro_data, loss__centering=centering, heads__separate=True))
    bench.step(0)
    found = dict(_tensors([bench.networks, bench.optimizer], "", set()))
    before = {path: tensor.detach().clone() for path, tensor in found.items()}
    bench.step(1)
    after = dict(_tensors([bench.networks, bench.optimizer], "", set()))
    assert set(after) == set(before)
    changed = {path for path, tensor in after.items() if not torch.equal(tensor, before[path])}
    saved = {t.data_ptr() for t in state_tensors(bench.networks, bench.optimizer).values()}
    missing = {path for path in changed if after[path].data_ptr() not in saved}
    assert not missing
    pointers = {after[path].data_ptr() for path in changed}
    student, teacher = bench.networks.student, bench.networks.teacher
    state = bench.optimizer.state[student["encoder"].norm.weight]
    centers = [bench.networks.dino_center, bench.networks.ibot_center]
    for tensor in [
        *(p for p in student.parameters() if p.requires_grad),
        teacher["encoder"].norm.weight, teacher["ibot_head"].last_layer.weight_v,
        *state.values(), *(centers if centering == "centering" else []),
    ]:  # fmt: skip
        assert tensor.data_ptr() in pointers


def test_what_was_put_back_goes_on_bit_for_bit(micro_data: Path) -> None:
    config = micro_config(micro_data, loss__centering="centering", heads__separate=True)
    first, second = Bench(config), Bench(micro_config(micro_data, seed=5, heads__separate=True))
    first.step(0)
    saved = {n: t.clone() for n, t in state_tensors(first.networks, first.optimizer).items()}
    second.networks.centering = "centering"
    put_back(second.networks, second.optimizer, saved)
    batch = first.batch(1)
    assert first.step(1, batch) == second.step(1, batch)
    ours, theirs = (state_tensors(b.networks, b.optimizer) for b in (first, second))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_teacher_is_the_moving_average_of_the_student(micro_data: Path, tmp_path: Path) -> None:
    config = micro_config(micro_data, steps=3, checkpoint_every=1, teacher__momentum=(0.9, 1.0))
    run = run_pretrain(config, tmp_path / "run")
    files = sorted(run.glob("checkpoints/step_*/tensors.safetensors"))
    first, second, third = ({n: t.double() for n, t in load_file(f).items()} for f in files)
    momenta = [json.loads(line)["teacher_momentum"] for line in (run / "metrics.jsonl").open()]
    assert momenta[0] == 0.9
    moved = 0
    for before, after, momentum in ((first, second, momenta[1]), (second, third, momenta[2])):
        for name, teacher in after.items():
            if name.startswith("networks.teacher."):
                student = after[name.replace("networks.teacher.", "networks.student.")]
                expected = momentum * before[name] + (1 - momentum) * student
                # One rounding to float32 of each of three terms.
                torch.testing.assert_close(teacher, expected, rtol=3e-7, atol=3e-8)
                moved += not torch.equal(teacher, before[name])
    assert moved > 20


def _overfit(config: PretrainConfig, steps: int) -> dict[str, float]:
    bench = Bench(config)
    batch = bench.batch(0)
    return [bench.step(step, batch) for step in range(steps)][-1]


def test_one_batch_can_be_learned_by_heart(micro_data: Path) -> None:
    """Targets spread 8 images evenly over 64 prototypes.

    A student that does not look at the image gets ln 64 at best; one that knows each image by
    heart gets down to ln 64 - ln 8, since an image's targets cover 64 / 8 prototypes. Half of
    what there is to gain is asked for.
    """
    config = micro_config(
        micro_data, steps=150, batch_size=8, heads__prototypes=64, heads__batch_norm=True,
        encoder__layerscale_init=1.0, encoder__drop_path=0.0, loss__koleo_weight=0.0,
        optimizer__learning_rate=5e-2, optimizer__weight_decay=(0.0, 0.0),
        teacher__momentum=(0.9, 1.0), loss__teacher_temperature=(0.04, 0.04),
    )  # fmt: skip
    last = _overfit(config, 150)
    assert last["loss_dino_global"] + last["loss_dino_local"] < math.log(64) - 0.5 * math.log(8)


@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(
    micro_data: Path, centering: str, gradients: list[dict[str, Tensor]]
) -> None:
    terms = []
    for parts in (1, 2, 4):
        config = micro_config(
            micro_data, batch_size=8, engine__accumulate=parts, encoder__drop_path=0.0,
            loss__koleo_weight=0.0, loss__centering=centering,
        )  # fmt: skip
        terms.append(Bench(config).step(0))
    for other in (1, 2):
        # Sums of some hundred float32 in another order, behind a softmax at temperature 0.04
        # that multiplies a rounding of 6e-8 by 25 and more.
        _assert_close(gradients[other], gradients[0], 1e-4)
        assert terms[other] == pytest.approx(terms[0], rel=1e-4)


def test_activation_checkpointing_gives_the_same_gradients(
    micro_data: Path, gradients: list[dict[str, Tensor]]
) -> None:
    for engine in (False, True):
        Bench(micro_config(micro_data, engine__activation_checkpointing=engine)).step(0)
    _assert_close(gradients[1], gradients[0], 0.0)


def test_bfloat16_stays_close_to_float32(micro_data: Path) -> None:
    single, half = (
        Bench(micro_config(micro_data, engine__precision=precision))
        for precision in ("float32", "bfloat16")
    )
    for step in range(3):
        batch = single.batch(step)
        exact, rough = single.step(step, batch), half.step(step, batch)
        assert rough != exact
        # bfloat16 keeps 8 bits: scores move by 2^-9, logits at temperature 0.04 by 0.05.
        assert rough["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert {p.dtype for p in half.networks.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "changes",
    [
        {"heads__batch_norm": True},
        {"loss__centering": "centering"},
        {"masks__probability": 0.0},
        {"crops__local_count": 0},
        {"heads__separate": True, "encoder__registers": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_images_train_without_a_number_that_is_none(
    micro_data: Path, value: int, changes: dict[str, Any]
) -> None:
    bench = Bench(micro_config(micro_data, **changes))
    real = bench.batch(0)
    batch = CropBatch(
        torch.full_like(real.global_crops, value), torch.full_like(real.local_crops, value),
        real.masks, real.image_ids, 0,
    )  # fmt: skip
    for step in range(3):
        assert all(map(math.isfinite, bench.step(step, batch).values()))
    assert all(torch.isfinite(p).all() for p in bench.networks.parameters())


def test_what_is_watched_is_what_it_says(micro_data: Path) -> None:
    bench = Bench(micro_config(micro_data, batch_size=6, masks__probability=0.0))
    batch = bench.batch(0)
    teacher = bench.networks.teacher
    images = (batch.global_crops.flatten(0, 1)[:, None].double() / 255 - 0.5307) / 0.2583
    with torch.no_grad():
        cls = teacher["encoder"](images.float()).cls
        scores = teacher["dino_head"](cls).double().numpy()
    x = cls[:6].double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosines = (x @ x.T)[~np.eye(6, dtype=bool)]
    targets = np.exp(scores / 0.04)
    for _ in range(3):
        targets /= targets.sum(0)
        targets /= targets.sum(1, keepdims=True)
    entropy = -(targets * np.log(targets)).sum(1).mean()
    watched = bench.step(0, batch)
    assert watched["mean_cosine"] == pytest.approx(cosines.mean(), abs=1e-5)
    assert watched["teacher_entropy"] == pytest.approx(entropy, rel=1e-3)


def _not_finite(step: int, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(range(1, 99))
    original = StudentTeacher.losses

    def losses(self: StudentTeacher, *arguments: Any) -> dict[str, Tensor]:
        terms = original(self, *arguments)
        if next(steps) == step:
            terms["koleo"] = (
                terms["koleo"] * torch.nan if what == "loss" else _steep(terms["koleo"])
            )
        return terms

    monkeypatch.setattr(StudentTeacher, "losses", losses)


def _steep(value: Tensor) -> Tensor:
    """Finite itself, with a gradient that is not."""
    return value + torch.sqrt((value - value.detach()).clamp(min=0))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_none_stops_the_run_and_says_where(
    micro_data: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _not_finite(5, what, monkeypatch)
    with pytest.raises(RunStopped, match=r"step 5: .* not finite"):
        run_pretrain(micro_config(micro_data), tmp_path / "run")
    (record,) = (tmp_path / "run").glob("not_finite_step_00000005*.json")
    content = json.loads(record.read_text())
    assert content["step"] == 5
    assert len(content["image_ids"]) == 4
    assert set(content["image_ids"]) <= {f"i{i}" for i in range(14)}
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4]
    for file in (tmp_path / "run").glob("checkpoints/step_*/tensors.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(file).values())


def test_the_metrics_hold_every_term_of_every_step(micro_data: Path, tmp_path: Path) -> None:
    config = micro_config(micro_data, steps=2)
    run = run_pretrain(config, tmp_path / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        terms = ("loss_dino_global", "loss_dino_local", "loss_ibot", "loss_koleo")
        weights = np.array([1.0, 1.0, 1.0, 0.1])
        assert record["loss"] == pytest.approx(weights @ [record[t] for t in terms], rel=1e-5)
        assert {"learning_rate", "weight_decay", "teacher_momentum", "teacher_temperature",
                "student_temperature", "gradient_norm", "teacher_entropy", "mean_cosine",
                "images_per_second", "memory_gib", "bad_images"} <= set(record)  # fmt: skip


@pytest.mark.slow
def test_memory_does_not_grow(micro_data: Path) -> None:
    bench = Bench(micro_config(micro_data, encoder__arch="vit_nano"))
    cv2.setNumThreads(1)
    used = []
    for step in range(400):
        bench.step(step)
        used.append(psutil.Process().memory_info().rss)
    assert max(used[200:]) - max(used[:100]) < 20 * 2**20
