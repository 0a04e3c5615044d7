"""The contrastive losses and their gradients equal open_clip's, on one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfray.objectives.clip import clip_loss, siglip_loss, similarities

open_clip_loss = pytest.importorskip("open_clip.loss")


def _parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 16, 12, generator=generator, dtype=torch.float64)
    return [t.requires_grad_() for t in (images, texts, *torch.tensor([9.0, -3.0]).double())]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_loss_equals_open_clips(name: str) -> None:
    ours, theirs = _parameters(), _parameters()
    found = similarities(ours[0], ours[1])
    unit = [F.normalize(features, dim=-1) for features in theirs[:2]]
    if name == "clip":
        loss = clip_loss(found, ours[2])
        reference = open_clip_loss.ClipLoss()(*unit, theirs[2])
    else:
        loss = siglip_loss(found, ours[2], ours[3])
        reference = open_clip_loss.SigLipLoss()(*unit, theirs[2], theirs[3])
    torch.testing.assert_close(loss, reference, rtol=1e-10, atol=0)
    loss.backward()
    reference.backward()
    for one, other in zip(ours, theirs, strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)
