"""Two ranks compute what one does: the same batch, the same gradients, the same end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from micro_run import in_child, micro_config, terminate, within_step
from safetensors.torch import load_file, save_file
from two_ranks import RANKS, on_ranks

from selfray import distributed, pretrain
from selfray.config import PretrainConfig
from selfray.errors import InputError, Interrupted
from selfray.objectives.centering import sinkhorn_targets, update_center
from selfray.objectives.koleo import koleo_loss
from selfray.pretrain import pretrain as run_pretrain

_BEFORE_BATCH_NORM = ("mlp.0.bias", "mlp.2.bias")  # of the heads; a block's are mlp.fc1, mlp.fc2


def _config(data: Path, **changes: Any) -> PretrainConfig:
    """Everything that looks at the whole batch, and no drop path, whose draws differ by rank.

    LayerScale 1, as in the recipe with batch norm: at 1e-5 all CLS tokens are alike, batch norm
    magnifies what rounding leaves of their differences, and one rank's gradient in float32 is
    15 % away from the same one's in float64.
    """
    fixed: dict[str, Any] = {
        "steps": 3, "batch_size": 6, "checkpoint_every": 2, "encoder__drop_path": 0.0,
        "encoder__layerscale_init": 1.0, "heads__batch_norm": True, "heads__separate": True,
    }  # fmt: skip
    return micro_config(data, **(fixed | changes))


def _with_gradients(config: PretrainConfig, run: Path, keep: Path) -> None:
    """Run, and keep the first step's gradients as they are after averaging over ranks."""
    clip = pretrain.clip_gradients

    def catch(student: torch.nn.Module, largest: float) -> torch.Tensor:
        if not keep.exists():
            named = student.named_parameters()
            save_file({n: p.grad.clone() for n, p in named if p.grad is not None}, keep)
        return clip(student, largest)

    pretrain.clip_gradients = catch
    run_pretrain(config, run)


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def _assert_close_run(run: Path, other: Path, share: float) -> None:
    """All weights within a share of the way that they went since the first step.

    Not the biases before batch norm, which have no effect: their gradient is 0 but for rounding,
    and Adam makes steps of full size of that.
    """
    last, theirs, first = (
        load_file(path / "checkpoints" / step / "tensors.safetensors")
        for path, step in (
            (run, "step_00000003"),
            (other, "step_00000003"),
            (other, "step_00000001"),
        )
    )
    assert set(last) == set(theirs)
    for kind in ("networks.student.", "networks.teacher."):
        names = [n for n in theirs if n.startswith(kind) and not n.endswith(_BEFORE_BATCH_NORM)]
        moved = sum((theirs[n] - first[n]).square().sum() for n in names) ** 0.5
        apart = sum((theirs[n] - last[n]).square().sum() for n in names) ** 0.5
        assert apart + moved > 0
        assert apart <= share * moved, kind


@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
def test_two_ranks_give_the_gradients_and_the_weights_of_one(
    micro_data: Path, tmp_path: Path, centering: str
) -> None:
    config = _config(micro_data, loss__centering=centering)
    assert in_child(lambda: _with_gradients(config, tmp_path / "one", tmp_path / "one.grad")) == 0
    on_ranks(lambda rank: _with_gradients(config, tmp_path / "two", tmp_path / f"{rank}.grad"))
    one = load_file(tmp_path / "one.grad")
    for rank in range(RANKS):
        two = load_file(tmp_path / f"{rank}.grad")
        assert set(two) == set(one)
        for name, tensor in one.items():
            # Batch norm takes away what a bias before it adds: its gradient is 0, the sum of
            # terms of the size of those of the weight beside it, and what is left is rounding.
            summands = one.get(name.replace(".bias", ".weight"), tensor)
            scale = max(float(tensor.abs().max()), float(summands.abs().max()))
            # float32 sums in another order: 6e-8, times 25 for the teacher's temperature, times
            # some tens of terms.
            assert float((two[name] - tensor).abs().max()) <= 1e-4 * scale, name
    for mine, theirs in zip(_records(tmp_path / "one"), _records(tmp_path / "two"), strict=True):
        for name in ("loss", "loss_dino_local", "loss_ibot", "loss_koleo", "gradient_norm"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-3), name
    # Adam divides by a gradient's own size, so that of those near 0 the sign is chance.
    _assert_close_run(tmp_path / "two", tmp_path / "one", share=0.05)


def test_a_run_begun_on_two_ranks_ends_on_one(micro_data: Path, tmp_path: Path) -> None:
    config = _config(micro_data)

    def stopped(rank: int) -> None:
        if rank == 1:  # the other rank has to hear of it
            within_step(2, terminate, pretrain, pytest.MonkeyPatch())
        with pytest.raises(Interrupted):
            run_pretrain(config, tmp_path / "run")

    on_ranks(stopped)
    assert [r["step"] for r in _records(tmp_path / "run")] == [1, 2]
    run_pretrain(config, tmp_path / "run")
    run_pretrain(config, tmp_path / "one")
    assert [r["step"] for r in _records(tmp_path / "run")] == [1, 2, 3]
    _assert_close_run(tmp_path / "run", tmp_path / "one", share=0.05)


def test_sums_over_ranks_are_those_of_the_whole_batch_also_for_uneven_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(7, 5, generator=generator, dtype=torch.float64) * 2 - 1
    tokens = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    targets, center = sinkhorn_targets(scores, 0.05), torch.zeros(5, dtype=torch.float64)
    update_center(center, scores)
    tokens.requires_grad_()
    loss = koleo_loss(tokens)
    loss.backward()

    def of_rank(rank: int) -> None:
        distributed.start()
        # All masked patches can fall on one rank.
        for cut in (7, 5, 0):
            mine = slice(0, cut) if rank == 0 else slice(cut, 7)
            torch.testing.assert_close(sinkhorn_targets(scores[mine], 0.05), targets[mine])
            own_center = torch.zeros(5, dtype=torch.float64)
            update_center(own_center, scores[mine])
            torch.testing.assert_close(own_center, center)
        part = tokens.detach()[3 * rank : 3 * rank + 3].requires_grad_()
        own_loss = koleo_loss(part)
        torch.testing.assert_close(own_loss, loss.detach())
        own_loss.backward()
        assert part.grad is not None
        assert tokens.grad is not None
        # Each rank's loss is the whole one, so that gradients add up to as many times it.
        expected = RANKS * tokens.grad[3 * rank : 3 * rank + 3]
        torch.testing.assert_close(part.grad, expected)

    on_ranks(of_rank)


def test_a_batch_that_cannot_be_shared_out_is_refused(micro_data: Path, tmp_path: Path) -> None:
    def of_rank(rank: int) -> None:
        with pytest.raises(InputError, match=r"batch_size 5 cannot be shared out over 2 ranks"):
            run_pretrain(_config(micro_data, batch_size=5), tmp_path / "run")
        parts = _config(micro_data, batch_size=6, engine__accumulate=2)
        with pytest.raises(
            InputError, match=r"3 images of batch_size 6 cannot be cut into engine.accumulate 2"
        ):
            run_pretrain(parts, tmp_path / "run")

    on_ranks(of_rank)
    assert not (tmp_path / "run").exists()
