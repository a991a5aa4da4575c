"""photo_patches: patches of the photographs and textures in scikit-image's wheel.

A small labelled dataset of real images that needs no download: 18 classes, one a photograph; the
left 70% of each photograph gives training patches, the rest test patches, so that no pixel is in
both. Patches are squares of 48 to 96 pixels, reduced to 32x32.
"""

import pathlib

import numpy as np
from PIL import Image

PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "color.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
CLASS_NAMES = tuple(name.split(".")[0] for name in PHOTOGRAPHS)
PATCH_SIZE = 32
PATCH_SIDES = (48, 96)
TRAIN_SHARE = 0.7
PATCHES_PER_CLASS = {"train": 600, "test": 150}


def make_patches(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the patches of a split, always the same ones.

    Args:
        split: "train" or "test".

    Returns:
        Images uint8 [N, 32, 32, 3] and labels int64 [N] (the photograph's place in PHOTOGRAPHS);
        N is 10 800 for train and 2700 for test.

    Raises:
        ValueError: for another split.
        FileNotFoundError: when scikit-image lacks a photograph.
    """
    if split not in PATCHES_PER_CLASS:
        raise ValueError(f"photo_patches has the splits train and test. Received: {split!r}.")
    count = PATCHES_PER_CLASS[split]
    patches = []
    for label, name in enumerate(PHOTOGRAPHS):
        photograph = _open_photograph(name)
        border = round(photograph.width * TRAIN_SHARE)
        left, right = (0, border) if split == "train" else (border, photograph.width)
        # Cut first: Pillow's resize looks beyond its box.
        part = photograph.crop((left, 0, right, photograph.height))
        # RandomState's streams are frozen by numpy's compatibility policy.
        random = np.random.RandomState([label, split == "test"])
        for _ in range(count):
            side = random.randint(PATCH_SIDES[0], PATCH_SIDES[1] + 1)
            x = random.randint(0, part.width - side + 1)
            y = random.randint(0, part.height - side + 1)
            patch = part.resize(
                (PATCH_SIZE, PATCH_SIZE), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side)
            )
            patches.append(np.asarray(patch))
    return np.stack(patches), np.repeat(np.arange(len(PHOTOGRAPHS), dtype=np.int64), count)


def _open_photograph(name):
    import skimage  # A second, and only here.

    path = pathlib.Path(skimage.__file__).parent / "data" / name
    if not path.exists():
        raise FileNotFoundError(
            f"photo_patches needs {name} from scikit-image's wheel, which is not at {path}. "
            "Install the version of scikit-image that requirements_lock.txt names."
        )
    with Image.open(path) as photograph:
        return photograph.convert("RGB")
