"""Pairs of views of JPEG files, images per second, and what guarding against broken files costs.

    PYTHONPATH=. python benchmarks/views.py [torchvision]

Reads 256 JPEG files of 500x375 made from scikit-image's photographs; two views of 224x224 (weak and
strong) of each. With "torchvision" (pip install torch torchvision) the same by torchvision's
transforms and a DataLoader of two workers, in alternation.
"""

import os
import pathlib
import statistics
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import skimage
from PIL import Image

import isd_tf

FILES, BATCH, ROUNDS = 256, 32, 5


def write_files(folder):
    photographs = [
        Image.open(pathlib.Path(skimage.__file__).parent / "data" / name).convert("RGB")
        for name in ("astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
    ]
    random = np.random.default_rng(0)
    paths = []
    for i in range(FILES):
        photograph = photographs[i % 4]
        side = random.integers(200, 400)
        corner = random.integers(0, 100, 2)
        box = (*corner, corner[0] + side, corner[1] + side * 3 // 4)
        paths.append(f"{folder}/{i}.jpg")
        photograph.resize((500, 375), box=box).save(paths[-1], quality=90)
    return tuple(paths)


def ours(paths):
    dataset = isd_tf.datasets.FileDataset("files", paths)
    batches = isd_tf.pretraining_batches(dataset, ("weak", "strong"), 224, BATCH, seed=0)
    iterator = iter(batches)

    def run():
        for _ in range(FILES // BATCH):
            next(iterator)

    return run


def torchvisions(paths):
    import torch
    from torchvision import transforms as t

    normalize = [t.ToTensor(), t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    weak = t.Compose([t.RandomResizedCrop(224, (0.2, 1)), t.RandomHorizontalFlip(), *normalize])
    strong = t.Compose(
        [
            t.RandomResizedCrop(224, (0.2, 1)),
            t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            t.RandomGrayscale(0.2),
            t.RandomApply([t.GaussianBlur(13, (0.1, 2.0))], 0.5),
            t.RandomHorizontalFlip(),
            *normalize,
        ]
    )

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return FILES

        def __getitem__(self, i):
            with Image.open(paths[i]) as image:
                image = image.convert("RGB")
            return weak(image), strong(image)

    loader = torch.utils.data.DataLoader(Pairs(), BATCH, num_workers=2, persistent_workers=True)

    def run():
        for _ in loader:
            pass

    return run


def main(names):
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(folder)
        contestants = {"isd_tf": ours(paths)}
        if "torchvision" in names:
            contestants["torchvision"] = torchvisions(paths)
        rates = {name: [] for name in contestants}
        for run in contestants.values():
            run()
        for _ in range(ROUNDS):
            for name, run in contestants.items():
                start = time.perf_counter()
                run()
                rates[name].append(FILES / (time.perf_counter() - start))
        for name, values in rates.items():
            print(
                f"{name}: {statistics.median(values):.0f} images/s (two views each), "
                f"{min(values):.0f} to {max(values):.0f} in {ROUNDS} rounds"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
