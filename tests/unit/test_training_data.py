"""A dataset that an encoder was trained on is recognised by its name or origin."""

import pytest

from selfray.models.published import PUBLISHED, load_encoder
from selfray.models.training_data import mentioned


@pytest.mark.parametrize(
    ("texts", "seen"),
    [
        (("nih-test", "a folder of files"), ["NIH ChestX-ray14"]),
        (("hospital", "frontal images of MIMIC_CXR 2.1"), ["MIMIC-CXR"]),
        (("CheXpert-v1.0-small", "and PadChest"), ["CheXpert", "PadChest"]),
        (("chest", "CXR of our hospital, brackets"), []),
        (("unih", "mimicry"), []),
    ],
)
def test_rad_dinos_training_data_are_found_by_whole_words(texts, seen):
    assert mentioned(PUBLISHED["microsoft/rad-dino"].training_data, *texts) == seen


def test_a_folder_named_as_a_published_encoder_has_its_training_data(tmp_path):
    from selfray.models.encoder_directory import save_encoder
    from selfray.models.vit import Shape, VisionTransformer

    model = VisionTransformer(Shape(48, 1, 3), patch_size=14, image_size=28)
    for name, known in (("rad-dino", True), ("ours", False)):
        save_encoder(model, tmp_path / name, mean=0.5, std=0.2, card={"synthetic": True})
        assert ("BRAX" in load_encoder(str(tmp_path / name)).training_data) == known
