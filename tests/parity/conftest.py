"""timm needs torchvision, whose compiled part loads only beside a torch of the same build."""

import importlib.util
import sys

import torch

# Named when torchvision is imported, called by nothing here. A torchvision built for CUDA does
# not find them beside torch for the CPU, and then neither timm nor transformers can be imported.
_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("torchvision::nms", "torchvision::qnms")

if importlib.util.find_spec("torchvision"):
    try:
        import torchvision
    except RuntimeError:
        for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        for operator in _OPERATORS:
            torch.library.define(operator, _BOXES)
        import torchvision  # noqa: F401
