"""Student and teacher: the forward passes and the losses of one step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray.models.heads import DinoHead
from selfray.models.vit import VisionTransformer
from selfray.objectives.centering import centered_targets, sinkhorn_targets, update_center
from selfray.objectives.dino import dino_loss
from selfray.objectives.ibot import ibot_loss
from selfray.objectives.koleo import koleo_loss


class Crops(Protocol):
    """What a step needs of a batch; see `selfray.data.loader.CropBatch`."""

    @property
    def global_crops(self) -> Tensor: ...
    @property
    def local_crops(self) -> Tensor: ...
    @property
    def masks(self) -> Tensor: ...


@dataclass(frozen=True)
class Targets:
    """What the teacher says of one part of a batch.

    Attributes:
        dino: Probabilities of the global crops' CLS tokens, [2, B, K].
        ibot: Probabilities of the masked patches, [M, K].
    """

    dino: Tensor
    ibot: Tensor


class StudentTeacher(nn.Module):
    """Both networks, and the running centres of the teacher's scores.

    Args:
        encoder: The student's encoder; the teacher starts as its copy.
        head: The student's DINO head.
        ibot_head: A head of its own for iBOT, or None to share the DINO head.
        mean: Mean of the pixels after scaling to 0..1.
        std: Standard deviation of the same.
        centering: `sinkhorn` or `centering`.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        head: DinoHead,
        ibot_head: DinoHead | None,
        *,
        mean: float,
        std: float,
        centering: str,
    ) -> None:
        super().__init__()
        self.student = nn.ModuleDict({"encoder": encoder, "dino_head": head})
        if ibot_head is not None:
            self.student["ibot_head"] = ibot_head
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.mean, self.std, self.centering = mean, std, centering
        prototypes = head.last_layer.weight_v.shape[0]
        self.register_buffer("dino_center", torch.zeros(prototypes))
        self.register_buffer("ibot_center", torch.zeros(prototypes))
        self.dino_center: Tensor
        self.ibot_center: Tensor

    @property
    def depth(self) -> int:
        """Blocks of the encoder."""
        return encoder_of(self.student).depth

    @property
    def trained(self) -> nn.Module:
        """What the optimizer moves: the student."""
        return self.student

    @property
    def result(self) -> VisionTransformer:
        """The encoder that the run is for: the teacher's."""
        return encoder_of(self.teacher)

    @torch.no_grad()
    def teacher_targets(
        self, parts: Sequence[Crops], temperature: float
    ) -> tuple[list[Targets], dict[str, Tensor]]:
        """Targets of a whole batch, whatever the parts it is computed in.

        Args:
            parts: The batch, cut along the images.
            temperature: Of the teacher.

        Returns:
            Targets of each part, and what to watch: `teacher_entropy` (nats, mean over images)
            and `mean_cosine` (between CLS tokens of different images; 1 means collapse).
        """
        cls_scores, patch_scores, cls_tokens = [], [], []
        for part in parts:
            cls, patches = self._encode(self.teacher, part.global_crops)
            cls_tokens.append(cls[: part.masks.shape[1]])
            cls_scores.append(self.teacher["dino_head"](cls))
            patch_scores.append(self._ibot_head(self.teacher)(_masked(patches, part.masks)))
        dino = self._balance(torch.cat(cls_scores), self.dino_center, temperature)
        ibot = self._balance(torch.cat(patch_scores), self.ibot_center, temperature)
        dino_parts = dino.split([len(s) for s in cls_scores])
        ibot_parts = ibot.split([len(s) for s in patch_scores])
        watched = {
            "teacher_entropy": -(dino * dino.clamp(min=1e-30).log()).sum(1).mean(),
            "mean_cosine": mean_cosine(torch.cat(cls_tokens)),
        }
        return [
            Targets(d.unflatten(0, (2, -1)), i) for d, i in zip(dino_parts, ibot_parts, strict=True)
        ], watched

    def losses(
        self, part: Crops, targets: Targets, temperature: float, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """The loss terms of one part of a batch, before their weights.

        Args:
            part: Crops and masks of B images.
            targets: The teacher's, for the same part.
            temperature: Of the student.
            weights: By term; `ibot` and `koleo` of weight 0 are not computed and given as 0, the
                DINO terms are always computed.

        Returns:
            Scalars `dino_global`, `dino_local`, `ibot`, `koleo`.
        """
        images = part.masks.shape[1]
        cls, patches = self._encode(self.student, part.global_crops, part.masks.flatten(0, 1))
        global_scores = self.student["dino_head"](cls).unflatten(0, (2, images))
        local_scores = global_scores[:0]
        if len(part.local_crops):
            local_cls, _ = self._encode(self.student, part.local_crops)
            local_scores = self.student["dino_head"](local_cls).unflatten(0, (-1, images))
        dino_global, dino_local = dino_loss(targets.dino, global_scores, local_scores, temperature)
        zero = cls.new_zeros(())
        return {
            "dino_global": dino_global,
            "dino_local": dino_local,
            "ibot": self._ibot(patches, part.masks, targets.ibot, temperature)
            if weights["ibot"]
            else zero,
            # One KoLeo for each of the two global crops, summed as upstream: crops of one image
            # must not push each other away.
            "koleo": sum((koleo_loss(crop) for crop in cls.chunk(2)), zero)
            if weights["koleo"]
            else zero,
        }

    def _ibot(self, patches: Tensor, masks: Tensor, targets: Tensor, temperature: float) -> Tensor:
        counts = masks.flatten(0, 1).sum(1)  # [2·B]
        return ibot_loss(
            targets,
            self._ibot_head(self.student)(_masked(patches, masks)),
            (1 / counts.clamp(min=1)).repeat_interleave(counts),
            len(counts),
            temperature,
        )

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student.

        Args:
            momentum: Share of the teacher that stays, 0 to 1.
        """
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum
        )

    def _encode(
        self, network: nn.ModuleDict, crops: Tensor, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """CLS [C·B, D] and patch tokens [C·B, N, D] of crops uint8 [C, B, S, S]."""
        images = crops.flatten(0, 1).unsqueeze(1).float().div_(255).sub_(self.mean).div_(self.std)
        tokens = encoder_of(network)(images, masks)
        return tokens.cls, tokens.patches

    def _ibot_head(self, network: nn.ModuleDict) -> nn.Module:
        return network["ibot_head"] if "ibot_head" in network else network["dino_head"]

    def _balance(self, scores: Tensor, center: Tensor, temperature: float) -> Tensor:
        if self.centering == "sinkhorn":
            return sinkhorn_targets(scores, temperature)
        targets = centered_targets(scores, center, temperature)
        update_center(center, scores)
        return targets


def encoder_of(network: nn.ModuleDict) -> VisionTransformer:
    """The encoder of a student or a teacher."""
    return cast(VisionTransformer, network["encoder"])


def mean_cosine(features: Tensor) -> Tensor:
    """Mean cosine between the features of different images.

    Args:
        features: [n, D]; of a lone feature the value says nothing.
    """
    n = max(2, len(features))
    total = F.normalize(features.float(), dim=-1).sum(0).square().sum()
    return (total - n) / (n * (n - 1))


def _masked(patches: Tensor, masks: Tensor) -> Tensor:
    """The masked patches [M, D] of patches [2·B, N, D], by masks [2, B, N]."""
    return patches.flatten(0, 1)[masks.flatten().nonzero().squeeze(1)]
