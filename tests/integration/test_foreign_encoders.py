"""An encoder of another publisher goes through features, evaluation and the summary page."""

import json

import transformers

from selfray.evaluate import evaluate, results_table
from selfray.feature_directory import open_features
from selfray.features import extract_features
from selfray.summary import write_summary

CLIP_PROCESSOR = {
    "crop_size": {"height": 48, "width": 48}, "do_center_crop": True, "do_convert_rgb": True,
    "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "CLIPImageProcessor", "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 48},
}  # fmt: skip


def write_clip(directory):
    config = transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
        image_size=48, patch_size=16,
    )  # fmt: skip
    transformers.CLIPVisionModel(config).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(CLIP_PROCESSOR))
    return str(directory)


def test_a_clip_is_evaluated_and_shown_beside_others(micro_data, tmp_path, capsys):
    clip = write_clip(tmp_path / "clip")
    out = tmp_path / "evaluation"
    evaluate([clip, "random:vit_pico/16@64"], micro_data, out)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {line["encoder"] for line in lines} >= {clip, "random:vit_pico/16@64"}
    assert "clip" in results_table(out)
    page = write_summary(out).read_text()
    assert "has no attention of a CLS token to draw" in page


def test_int8_features_of_a_clip_keep_their_promise(micro_data, tmp_path):
    clip = write_clip(tmp_path / "clip")
    features = open_features(
        extract_features(clip, micro_data, tmp_path / "features", precision="int8")
    )
    assert features.manifest["backend"].startswith("openvino-int8")
    assert features.manifest["fidelity"]["cosine"] >= 0.998


def test_a_dataset_that_the_encoder_saw_is_told_of(tmp_path, capsys):
    from PIL import Image
    from radiograph_files import soft_image

    (tmp_path / "nih-test").mkdir()
    image = Image.fromarray(soft_image(90, 80, white=255).astype("uint8"))
    image.save(tmp_path / "nih-test" / "1.png")
    from selfray.models.encoder_directory import save_encoder
    from selfray.models.vit import Shape, VisionTransformer

    model = VisionTransformer(Shape(48, 1, 3), patch_size=14, image_size=28)
    save_encoder(model, tmp_path / "rad-dino", mean=0.5, std=0.2, card={"synthetic": True})
    extract_features(str(tmp_path / "rad-dino"), tmp_path / "nih-test", tmp_path / "f")
    assert "was trained on NIH ChestX-ray14" in capsys.readouterr().err
