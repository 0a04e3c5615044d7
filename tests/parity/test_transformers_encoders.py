"""Encoders of Hugging Face's layout: features and preprocessing are those of transformers."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from publisher_files import convert, whole_object
from safetensors.torch import load, save_file

from selfray.errors import InputError
from selfray.models.image_processor import read_image_processor
from selfray.models.published import load_encoder

TOLERANCE = 2e-5
HALF = [0.5, 0.5, 0.5]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}

# preprocessor_config.json of the publishers, at smaller sizes. CLIP's, ViT's and BEiT's are of the
# time when a size was one number and scaling to 0..1 was not mentioned.
CLIP_PROCESSOR = {
    "crop_size": 48, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 48,
}  # fmt: skip
SIGLIP_PROCESSOR = {
    "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": HALF, "image_processor_type": "SiglipImageProcessor", "image_std": HALF,
    "processor_class": "SiglipProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
    "size": {"height": 52, "width": 52},
}  # fmt: skip
VIT_PROCESSOR = {
    "do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor",
    "image_mean": HALF, "image_std": HALF, "resample": 2, "size": 48,
}  # fmt: skip
DEIT_PROCESSOR = {
    "crop_size": 48, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "DeiTFeatureExtractor", **IMAGENET, "resample": 3, "size": 55,
}  # fmt: skip
BEIT_PROCESSOR = {
    "crop_size": 48, "do_center_crop": False, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "BeitFeatureExtractor", "image_mean": HALF, "image_std": HALF,
    "reduce_labels": False, "resample": 2, "size": 48,
}  # fmt: skip
DINOV3_PROCESSOR = {
    "crop_size": None, "data_format": "channels_first", "default_to_square": True,
    "device": None, "disable_grouping": None, "do_center_crop": None, "do_convert_rgb": None,
    "do_normalize": True, "do_rescale": True, "do_resize": True, **IMAGENET,
    "image_processor_type": "DINOv3ViTImageProcessorFast", "input_data_format": None,
    "resample": 2, "rescale_factor": 0.00392156862745098, "return_tensors": None,
    "size": {"height": 48, "width": 48},
}  # fmt: skip
BIT_PROCESSOR = {
    "crop_size": {"height": 48, "width": 48}, "do_center_crop": True, "do_convert_rgb": True,
    "do_normalize": True, "do_rescale": True, "do_resize": True, **IMAGENET,
    "image_processor_type": "BitImageProcessor", "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 55},
}  # fmt: skip

# config.json of the publishers, smaller. CLIP's says each setting of the tower twice; the values
# of `vision_config_dict` are those that count.
TOWER = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_channels": 3,
}  # fmt: skip
OF_ITS_TIME = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": None,
    "bad_words_ids": None, "bos_token_id": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "diversity_penalty": 0.0, "do_sample": False,
    "early_stopping": False, "eos_token_id": None, "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False,
    "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "max_length": 20,
    "num_beams": 1, "output_attentions": False, "output_hidden_states": False,
    "pad_token_id": None, "prefix": None, "problem_type": None, "pruned_heads": {},
    "return_dict": True, "task_specific_params": None, "tie_word_embeddings": True,
    "torch_dtype": None, "torchscript": False, "transformers_version": "4.16.0.dev0",
    "use_bfloat16": False,
}  # fmt: skip
CLIP_TOWER = {
    **TOWER, **OF_ITS_TIME, "attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "quick_gelu",
    "image_size": 48, "initializer_factor": 1.0, "initializer_range": 0.02,
    "layer_norm_eps": 1e-05, "model_type": "clip_vision_model", "patch_size": 16,
    "projection_dim": 40,
}  # fmt: skip
CLIP_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 99, "max_position_embeddings": 7, "model_type": "clip_text_model",
}  # fmt: skip
CLIP = {
    "_name_or_path": "clip-vit-large-patch14/", "architectures": ["CLIPModel"],
    "initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "model_type": "clip",
    "projection_dim": 40, "text_config": CLIP_TEXT, "text_config_dict": CLIP_TEXT,
    "torch_dtype": "float32", "vision_config": CLIP_TOWER, "vision_config_dict": CLIP_TOWER,
}  # fmt: skip
# 52 pixels and patches of 16: four are left over at the edge, as with 384 and 14.
SIGLIP_TOWER = {**TOWER, "image_size": 52, "model_type": "siglip_vision_model", "patch_size": 16}
SIGLIP = {
    "architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip",
    "text_config": {**CLIP_TEXT, "model_type": "siglip_text_model", "projection_size": 48},
    "torch_dtype": "float32", "vision_config": SIGLIP_TOWER,
}  # fmt: skip
DINOV3 = {
    **TOWER, "architectures": ["DINOv3ViTModel"], "attention_dropout": 0.0, "drop_path_rate": 0.0,
    "hidden_act": "gelu", "image_size": 224, "initializer_range": 0.02, "key_bias": False,
    "layer_norm_eps": 1e-05, "layerscale_value": 1.0, "mlp_bias": True, "model_type": "dinov3_vit",
    "num_register_tokens": 4, "patch_size": 16, "pos_embed_jitter": None,
    "pos_embed_rescale": 2.0, "pos_embed_shift": None, "proj_bias": True, "query_bias": True,
    "rope_theta": 100.0, "torch_dtype": "float32", "use_gated_mlp": False, "value_bias": True,
}  # fmt: skip
VIT = {
    **TOWER, "architectures": ["ViTModel"], "attention_probs_dropout_prob": 0.0,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "image_size": 48,
    "initializer_range": 0.02, "layer_norm_eps": 1e-12, "model_type": "vit", "patch_size": 16,
    "qkv_bias": True,
}  # fmt: skip
BEIT = {
    **VIT, "model_type": "beit", "layer_scale_init_value": 0.1, "use_mean_pooling": True,
    "use_absolute_position_embeddings": False, "use_relative_position_bias": True,
    "use_shared_relative_position_bias": False, "use_mask_token": False, "num_labels": 5,
}  # fmt: skip
MAE = {
    **VIT, "model_type": "vit_mae", "mask_ratio": 0.75, "norm_pix_loss": False,
    "decoder_hidden_size": 32, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 64,
}  # fmt: skip

# What is published: the class whose parameters are in the file, config.json and
# preprocessor_config.json; then the class whose features count, how it pools, and the number of
# tokens before the patches.
PUBLISHED = {
    "clip": ("CLIPModel", CLIP, CLIP_PROCESSOR, "CLIPVisionModel", "pooler", 1),
    "clip_once": (
        "CLIPModel", {**CLIP, "text_config_dict": None, "vision_config_dict": None},
        CLIP_PROCESSOR, "CLIPVisionModel", "pooler", 1,
    ),
    "clip_vision": (
        "CLIPVisionModel", CLIP_TOWER, CLIP_PROCESSOR, "CLIPVisionModel", "pooler", 1
    ),
    "siglip": ("SiglipModel", SIGLIP, SIGLIP_PROCESSOR, "SiglipVisionModel", "pooler", 0),
    "dinov3": ("DINOv3ViTModel", DINOV3, DINOV3_PROCESSOR, "DINOv3ViTModel", "pooler", 5),
    "vit": ("ViTModel", VIT, VIT_PROCESSOR, "ViTModel", "first", 1),
    "vit_classifier": ("ViTForImageClassification", VIT, VIT_PROCESSOR, "ViTModel", "first", 1),
    "deit": (
        "DeiTForImageClassificationWithTeacher", {**VIT, "model_type": "deit"}, DEIT_PROCESSOR,
        "DeiTModel", "first", 2,
    ),
    "beit": ("BeitForImageClassification", BEIT, BEIT_PROCESSOR, "BeitModel", "pooler", 1),
    "mae": ("ViTMAEForPreTraining", MAE, VIT_PROCESSOR, "ViTMAEModel", "first", 1),
    "msn": (
        "ViTMSNModel", {**VIT, "model_type": "vit_msn"}, VIT_PROCESSOR, "ViTMSNModel", "first", 1
    ),
    "ijepa": (
        "IJepaModel", {**VIT, "model_type": "ijepa"}, VIT_PROCESSOR, "IJepaModel", "mean", 0
    ),
}  # fmt: skip

# Names of parameters in the published files, which transformers' own saving must have written.
NAMES_IN_FILES = {
    "clip": {"vision_model.embeddings.class_embedding", "vision_model.pre_layrnorm.weight",
             "vision_model.encoder.layers.1.self_attn.out_proj.bias", "visual_projection.weight",
             "text_model.final_layer_norm.weight", "text_projection.weight", "logit_scale"},
    "siglip": {"vision_model.head.attention.in_proj_weight", "vision_model.head.probe",
               "text_model.head.weight", "logit_bias"},
    "dinov3": {"embeddings.register_tokens", "layer.1.attention.q_proj.bias", "norm.weight",
               "layer.0.layer_scale1.lambda1", "layer.0.mlp.up_proj.weight"},
    "vit": {"encoder.layer.1.attention.attention.query.weight", "pooler.dense.weight"},
    "vit_classifier": {"vit.encoder.layer.0.output.dense.weight", "classifier.weight"},
    "mae": {"vit.encoder.layer.0.output.dense.weight", "decoder.mask_token"},
}  # fmt: skip


def publish(directory: Path, kind: str) -> Path:
    """Write a directory as published; no parameter is zero or one and could be forgotten."""
    whole, config, processor, *_ = PUBLISHED[kind]
    network = getattr(transformers, whole)
    torch.manual_seed(0)
    model = network(network.config_class.from_dict(json.loads(json.dumps(config))))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(std=0.1))
    model.save_pretrained(directory)
    write_json(directory / "config.json", config)
    write_json(directory / "preprocessor_config.json", processor)
    return directory


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content))


def edit(file: Path, **fields) -> None:
    content = json.loads(file.read_text()) | fields
    write_json(file, {key: value for key, value in content.items() if value != "left out"})


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load((directory / "model.safetensors").read_bytes())


def refusal(directory: Path) -> str:
    with pytest.raises(InputError) as error:
        load_encoder(str(directory))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Directories that tests only read, by kind."""
    root, made = tmp_path_factory.mktemp("published"), {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = publish(root / kind, kind)
        return made[kind]

    return of


@pytest.fixture
def copied(published, tmp_path):
    """Directories that a test may change."""

    def of(kind: str) -> Path:
        return Path(shutil.copytree(published(kind), tmp_path / kind))

    return of


def expected_tokens(directory: Path, kind: str, images: torch.Tensor):
    """Pooled, patches and their number a side, by transformers alone."""
    *_, tower, pooled, prefix = PUBLISHED[kind]
    settings = {"mask_ratio": 0.0} if kind == "mae" else {}
    theirs = getattr(transformers, tower).from_pretrained(directory, **settings).eval()
    order = {"noise": torch.arange(9.0).expand(len(images), -1)} if kind == "mae" else {}
    with torch.no_grad():
        found = theirs(pixel_values=images, **order)
    patches = found.last_hidden_state[:, prefix:]
    means = {"first": lambda: found.last_hidden_state[:, 0], "mean": lambda: patches.mean(1)}
    return means[pooled]() if pooled in means else found.pooler_output, patches


def assert_same_features(directory: Path, kind: str) -> None:
    encoder = load_encoder(str(directory))
    images = torch.randn(3, 3, encoder.image_size, encoder.image_size)
    cls, patches = expected_tokens(directory, kind, images)
    found_cls, found_patches = encoder.features(images)
    torch.testing.assert_close(found_cls, cls, atol=TOLERANCE, rtol=0)
    in_order = found_patches.flatten(2).transpose(1, 2)
    torch.testing.assert_close(in_order, patches, atol=TOLERANCE, rtol=0)
    assert found_patches.shape == (3, 48, *encoder.grid) and encoder.grid == (3, 3)
    assert encoder.width == 48 and encoder.patch_size in (16, 17)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_features_are_those_of_the_publishers_class(published, kind):
    directory = published(kind)
    assert NAMES_IN_FILES.get(kind, set()) <= set(tensors_of(directory))
    assert_same_features(directory, kind)


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_a_file_of_pytorch_is_read_as_well(copied, kind):
    directory = copied(kind)
    tensors = tensors_of(directory)
    (directory / "model.safetensors").unlink()
    if kind == "clip":  # as OpenAI's files have it, and its text's twin
        tensors["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
        tensors["text_model.embeddings.position_ids"] = torch.arange(7)[None]
    torch.save(tensors, directory / "pytorch_model.bin")
    assert_same_features(directory, kind)


def test_shards_are_read_in_their_order_and_all_of_them(copied):
    directory = copied("siglip")
    single = load_encoder(str(directory))
    tensors = tensors_of(directory)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    (directory / "model.safetensors").unlink()
    places = {name: file for file, held in parts.items() for name in held}
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    assert_same_features(directory, "siglip")
    digests = [hashlib.sha256((directory / file).read_bytes()).hexdigest() for file in parts]
    together = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    assert load_encoder(str(directory)).weights_sha256 == together != single.weights_sha256
    (directory / "model-00002-of-00002.safetensors").unlink()
    assert "names model-00002-of-00002.safetensors, which is not beside it" in refusal(directory)
    write_json(directory / "model.safetensors.index.json", {"weight_map": {"a": "../a"}})
    (directory.parent / "a").write_bytes(b"")
    assert "names a, which is not beside it" in refusal(directory)


def test_pickled_shards_are_converted_together_into_one_file(copied):
    directory = copied("siglip")
    tensors = tensors_of(directory)
    names = sorted(tensors)
    (directory / "model.safetensors").unlink()
    parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, held in parts.items():
        torch.save(whole_object({name: tensors[name] for name in held}), directory / file)
    places = {name: file for file, held in parts.items() for name in held}
    write_json(directory / "pytorch_model.bin.index.json", {"weight_map": places})
    convert(refusal(directory))
    assert_same_features(directory, "siglip")


def test_loading_is_exact_silent_and_leaves_torch_and_transformers_alone(published, capfd):
    directory = published("dinov3")
    capfd.readouterr()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    logging = transformers.utils.logging
    verbosity, bars = logging.WARNING, True
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    encoder = load_encoder(str(directory))
    assert torch.equal(torch.get_rng_state(), before)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert capfd.readouterr() == ("", "")
    assert not encoder.model.training
    weights = (directory / "model.safetensors").read_bytes()
    assert encoder.weights_sha256 == hashlib.sha256(weights).hexdigest()
    tower = encoder.model.tower
    assert tower.config._attn_implementation == "sdpa"
    theirs = transformers.DINOv3ViTModel.from_pretrained(directory)
    assert dict(tower.named_buffers()).keys() == dict(theirs.named_buffers()).keys()
    for name, buffer in theirs.named_buffers():
        assert torch.equal(tower.get_buffer(name), buffer), name
    for name, parameter in theirs.named_parameters():
        assert torch.equal(tower.get_parameter(name), parameter), name


def test_half_precision_weights_become_float32(copied):
    directory = copied("dinov3")
    file = directory / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in tensors_of(directory).items()}, file)
    edit(directory / "config.json", torch_dtype="bfloat16")
    encoder = load_encoder(str(directory))
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}


def test_dinov3_takes_any_multiple_of_the_patch(copied):
    directory = copied("dinov3")
    edit(directory / "preprocessor_config.json", size={"height": 80, "width": 80})
    encoder = load_encoder(str(directory))
    images = torch.randn(2, 3, 80, 80)
    cls, _ = expected_tokens(directory, "dinov3", images)
    torch.testing.assert_close(encoder.features(images)[0], cls, atol=TOLERANCE, rtol=0)
    assert encoder.grid == (5, 5)
    edit(directory / "preprocessor_config.json", size={"height": 90, "width": 90})
    assert "images of 90 pixels, no multiple of the patch of 16. Use 80." in refusal(directory)


def test_a_published_name_finds_either_file_and_tells_what_is_known(
    published, tmp_path, monkeypatch
):
    name = "openai/clip-vit-large-patch14-336"
    monkeypatch.setenv("SELFRAY_ENCODERS", str(tmp_path))
    directory = Path(shutil.copytree(published("clip"), tmp_path / name))
    assert load_encoder(name).training_data == ("WIT-400M (private)",)
    torch.save(tensors_of(directory), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert load_encoder(name).name == name


# Preprocessing

SHAPES = ((48, 48), (90, 131), (131, 90), (37, 41), (61, 300))
BY_PILLOW = {
    "CLIPImageProcessorPil": ("clip", {}),
    "SiglipImageProcessorPil": ("siglip", {}),
    "ViTImageProcessorPil": ("vit", {}),
    "DeiTImageProcessorPil": ("deit", {}),
    "BeitImageProcessorPil": ("beit", {}),
    "BitImageProcessorPil": ("clip", {**BIT_PROCESSOR, "feature_extractor_type": "left out"}),
}


@pytest.mark.parametrize("processor", BY_PILLOW)
@pytest.mark.parametrize("resample", [None, 1, 2])
def test_preprocessing_is_that_of_the_publishers_processor(copied, processor, resample):
    kind, fields = BY_PILLOW[processor]
    directory = copied(kind)
    fields = fields | ({} if resample is None else {"resample": resample})
    edit(directory / "preprocessor_config.json", **fields)
    preprocessing = load_encoder(str(directory)).preprocessing
    assert_same_preprocessing(preprocessing, getattr(transformers, processor), directory, 1e-5)


def assert_same_preprocessing(preprocessing, processor, directory, tolerance, shapes=SHAPES):
    try:
        theirs = processor.from_pretrained(directory)
    except ImportError:  # in transformers 5.4, BEiT's of Pillow asks for torchvision
        pytest.skip("this version of the processor needs torchvision")
    std = np.array(preprocessing.std)[:, None, None]
    for height, width in shapes:
        shape = (height, width, 3)
        colour = np.random.default_rng(height).integers(0, 256, shape, dtype=np.uint8)
        for pixels in (colour, colour[..., 0]):
            image = Image.fromarray(pixels).convert("RGB")
            expected = np.asarray(theirs(image, return_tensors="pt")["pixel_values"][0])
            found = preprocessing(pixels)
            assert found.dtype == torch.float32 and found.shape == expected.shape
            assert np.abs((found.numpy() - expected) * std).max() <= tolerance


@pytest.mark.parametrize("resample", [2, 3])
def test_preprocessing_is_that_of_dinov3s_processor(copied, resample):
    pytest.importorskip("torchvision")
    directory = copied("dinov3")
    edit(directory / "preprocessor_config.json", resample=resample)
    preprocessing = load_encoder(str(directory)).preprocessing
    processor = transformers.DINOv3ViTImageProcessor
    assert_same_preprocessing(preprocessing, processor, directory, 1e-5)


def test_torchvisions_processors_differ_by_a_gray_level_where_an_image_shrinks(published):
    pytest.importorskip("torchvision")
    for kind, processor in (("clip", "CLIPImageProcessor"), ("siglip", "SiglipImageProcessor")):
        preprocessing = load_encoder(str(published(kind))).preprocessing
        processor = getattr(transformers, processor)
        shapes = ((90, 131), (231, 190), (733, 931))
        assert_same_preprocessing(preprocessing, processor, published(kind), 1.01 / 255, shapes)


@pytest.mark.parametrize("processor", ["CLIP", "Bit", "Siglip", "ViT", "DeiT", "Beit"])
def test_a_file_that_leaves_fields_out_means_the_processors_defaults(tmp_path, processor):
    file = tmp_path / "preprocessor_config.json"
    write_json(file, {"image_processor_type": f"{processor}ImageProcessorFast"})
    theirs = getattr(transformers, f"{processor}ImageProcessorPil")
    preprocessing = read_image_processor(file, "DINOv3ViT")
    assert_same_preprocessing(preprocessing, theirs, tmp_path, 1e-5)


def test_a_file_that_names_no_processor_means_that_of_the_model(copied):
    directory = copied("vit")
    edit(directory / "preprocessor_config.json", feature_extractor_type="left out")
    theirs = transformers.ViTImageProcessorPil
    preprocessing = load_encoder(str(directory)).preprocessing
    assert_same_preprocessing(preprocessing, theirs, directory, 1e-5)


# Files that are not whole, or of another kind


def test_parameters_are_all_there_and_no_others(copied):
    directory = copied("clip")
    file, tensors = directory / "model.safetensors", tensors_of(directory)
    key = "vision_model.encoder.layers.1.mlp.fc2.bias"
    save_file({name: t for name, t in tensors.items() if name != key}, file)
    # The prefix is the installed version's: older ones have it.
    missing = r"1 missing \((vision_model\.)?encoder\.layers\.1\.mlp\.fc2\.bias\)"
    assert re.search(missing, refusal(directory))
    save_file({**tensors, "vision_model.adapter.weight": torch.zeros(2)}, file)
    assert re.search(r"1 unexpected \((vision_model\.)?adapter\.weight\)", refusal(directory))
    twice = {"embeddings.class_embedding": tensors["vision_model.embeddings.class_embedding"] + 1}
    save_file({**tensors, **twice}, file)
    # The installed version takes either name for this parameter, or one and not the other.
    assert re.search("40 tensors for 39 parameters: some are|1 unexpected", refusal(directory))


def test_a_config_of_another_width_names_the_parameter(copied):
    directory = copied("dinov3")
    edit(directory / "config.json", hidden_size=96)
    said = refusal(directory)
    assert "model.safetensors: embeddings.cls_token is [1, 1, 48]" in said
    assert "config.json asks for [1, 1, 96]" in said


def test_an_untrained_text_tower_is_no_encoder(copied):
    directory = copied("clip")
    tensors = {n: t for n, t in tensors_of(directory).items() if n.startswith("text_model.")}
    save_file(tensors, directory / "model.safetensors")
    assert "missing (" in refusal(directory)


@pytest.mark.parametrize(
    ("kind", "file", "fields", "said"),
    [
        ("vit", "config.json", {"model_type": "vitt"}, "'vitt', which is not supported. Did you"),
        ("vit", "config.json", {"model_type": "swin"}, "dinov2, dinov2_with_registers"),
        ("vit", "config.json", {"model_type": "left out"}, "model_type is None"),
        ("vit", "config.json", {"image_size": [48, 48]}, "image_size is [48, 48]"),
        ("vit", "config.json", {"num_channels": 1}, "num_channels is 1, allowed: 3"),
        ("vit", "config.json", {"num_attention_heads": 5}, "no multiple of num_attention"),
        ("clip_vision", "config.json", {"num_attention_heads": 5}, "not a multiple of the number"),
        ("dinov3", "config.json", {"hidden_act": "bent"}, "model.safetensors: 'bent'"),
        ("vit", "config.json", {"hidden_size": "wide"}, "config.json: "),
        ("vit", "config.json", {"quantization_config": {"quant_method": "x"}}, "quantised"),
        ("vit", "config.json", {"image_size": 64}, "makes images of 48 pixels, config.json asks"),
        ("clip", "config.json", {"vision_config": "left out", "vision_config_dict": "left out"},
         "vision_config is missing"),
        ("siglip", "config.json", {"vision_config": {**SIGLIP_TOWER, "vision_use_head": False}},
         "vision_use_head is false"),
        ("vit", "preprocessor_config.json", {"feature_extractor_type": "ConvNextImageProcessor"},
         "'ConvNextImageProcessor', which is not supported"),
        ("vit", "preprocessor_config.json", {"resample": 9}, "resample is 9, allowed: 0 (nearest)"),
        ("dinov3", "preprocessor_config.json", {"resample": 1}, "allowed: 2 (bilinear), 3"),
        ("vit", "preprocessor_config.json", {"do_resize": False}, "do_resize is False"),
        ("vit", "preprocessor_config.json", {"do_pad": True}, "do_pad is True"),
        ("vit", "preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ("vit", "preprocessor_config.json", {"image_mean": [0.5]}, "image_mean is [0.5]"),
        ("vit", "preprocessor_config.json", {"image_std": None}, "image_std is None"),
        ("vit", "preprocessor_config.json", {"do_normalize": None}, "do_normalize is None"),
        ("clip", "preprocessor_config.json", {"do_center_crop": None}, "without a crop"),
        ("vit", "preprocessor_config.json", {"size": {"height": 48, "width": 32}}, "size.width"),
        ("vit", "preprocessor_config.json", {"size": {"longest_edge": 48}}, "size is {'longest"),
        ("clip", "preprocessor_config.json", {"do_center_crop": False}, "without a crop"),
        ("clip", "preprocessor_config.json", {"crop_size": 50}, "less than the crop of 50"),
        ("deit", "preprocessor_config.json", {"crop_size": 60}, "less than the crop of 60"),
    ],
)  # fmt: skip
def test_a_setting_of_another_kind_of_encoder_is_named(copied, kind, file, fields, said):
    directory = copied(kind)
    edit(directory / file, **fields)
    assert said in refusal(directory)


def test_code_beside_the_weights_is_never_run(copied):
    directory = copied("vit")
    (directory / "modeling_own.py").write_text("raise SystemExit('was run')")
    edit(directory / "config.json", auto_map={"AutoModel": "modeling_own.Own"})
    assert_same_features(directory, "vit")


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_or_damaged_file_is_named(copied, file):
    directory = copied("dinov3")
    content = (directory / file).read_bytes()
    (directory / file).write_bytes(content[: len(content) // 2])
    assert file in refusal(directory)
    (directory / file).unlink()
    assert file in refusal(directory)


def test_without_transformers_the_extra_is_named(published, monkeypatch):
    directory = published("vit")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'selfray[encoders]'" in refusal(directory)
