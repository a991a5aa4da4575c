import hashlib

import numpy as np
import pytest
from PIL import Image

from isd_tf.data import photo_patches


def test_patches_are_always_the_same():
    images, labels = photo_patches.make_patches("test")
    assert images.shape == (2700, 32, 32, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(labels), np.full(18, 150))
    # Pillow's resize is the same everywhere; JPEG decoders may round differently, so PNG only.
    png = np.isin(labels, [i for i, n in enumerate(photo_patches.PHOTOGRAPHS) if n.endswith("png")])
    assert hashlib.sha256(images[png].tobytes()).hexdigest()[:16] == "5aa1f37e80c37497"


def test_train_and_test_come_from_disjoint_parts(monkeypatch):
    # A photograph whose left 70% is black and whose rest is white.
    photograph = np.zeros([200, 400, 3], np.uint8)
    photograph[:, 280:] = 255
    monkeypatch.setattr(photo_patches, "PHOTOGRAPHS", ("black_and_white.png",))
    monkeypatch.setattr(photo_patches, "_open_photograph", lambda _: Image.fromarray(photograph))
    train, _ = photo_patches.make_patches("train")
    test, _ = photo_patches.make_patches("test")
    assert train.max() == 0 and test.min() == 255


def test_other_splits_are_refused():
    with pytest.raises(ValueError, match="train and test.*'val'"):
        photo_patches.make_patches("val")
