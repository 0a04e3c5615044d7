"""An encoder in the files of other runtimes, each read back and compared before it has its name."""

FORMATS = {
    "huggingface": "transformers' AutoModel",
    "dinov2": "DINOv2's own class",
    "timm": "timm.create_model",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "torch.export.load",
}
"""What `--to` can be, and what opens it."""
