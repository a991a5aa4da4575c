import hashlib

import numpy as np
import pytest
from PIL import Image

from isd_tf import photo_patches


def test_patches_are_always_the_same():
    images, labels = photo_patches.make_patches("test")
    assert images.shape == (2700, 32, 32, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(labels), np.full(18, 150))
    # Pillow's resize is the same everywhere; JPEG decoders may round differently, so PNG only.
    png = np.isin(labels, [i for i, n in enumerate(photo_patches.PHOTOGRAPHS) if n.endswith("png")])
    assert hashlib.sha256(images[png].tobytes()).hexdigest()[:16] == "78782f795462581c"


def test_train_and_test_come_from_disjoint_parts(monkeypatch):
    # Photographs whose columns tell where they are: every test patch lies right of every other.
    ramp = np.tile(np.arange(250, dtype=np.uint8)[:, np.newaxis], [200, 1, 3])
    monkeypatch.setattr(photo_patches, "PHOTOGRAPHS", ("ramp.png",))
    monkeypatch.setattr(
        photo_patches, "_open_photograph", lambda name: Image.fromarray(ramp.reshape(200, 250, 3))
    )
    train, _ = photo_patches.make_patches("train")
    with pytest.raises(ValueError):  # A test part of 75 columns holds no patch of 96.
        photo_patches.make_patches("test")
    assert train.max() < 0.7 * 250


def test_other_splits_are_refused():
    with pytest.raises(ValueError, match="train and test.*'val'"):
        photo_patches.make_patches("val")
