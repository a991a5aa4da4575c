"""What length, rate and queue suit a number of images: the figures of docs/settings.md.

    PYTHONPATH=. python benchmarks/auto_settings.py runs/auto_settings.jsonl [GROUP ...]

Trains the quickstart's network, half as wide, by ISD on a few of the images of photo_patches and of
Fashion-MNIST (Debian's package dataset-fashion-mnist), and scores it by 1-NN of the test images in
a bank of all of them, or 10 000: the bank is the same whatever was trained on. Groups:
untrained, rates, long_rates, queues, lengths. What the file holds already is not trained again.
"""

import json
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import isd_tf

WIDTH, BATCH, RATE, TEST = 16, 64, 0.1, 2000
DATASETS = {"photo_patches": 32, "fashion_mnist": 28}  # And the side of their images.
SIZES = (300, 3000, 10_000)
PASSES = (20_000, 60_000, 180_000)  # Images seen, all epochs together.
SHORT, LONG = 40_000, PASSES[-1]


def half(images):
    """The largest power of two of at most half of the images."""
    return 2 ** ((images // 2).bit_length() - 1)


def setting(dataset, images, passes, queue=None, batch=BATCH, rate=RATE, seed=0):
    queue = queue or half(images)
    names = "dataset images passes queue batch rate seed".split()
    return dict(zip(names, (dataset, images, passes, queue, batch, rate, seed), strict=True))


GROUPS = {
    "untrained": [setting(name, 3000, 0) for name in DATASETS],
    "rates": [  # The second three are the first, in proportion to the batch.
        setting(name, 3000, SHORT, batch=batch, rate=rate)
        for batch, rates in ((64, (0.0125, 0.05, 0.2)), (256, (0.05, 0.2, 0.8)))
        for rate in rates
        for name in DATASETS
    ],
    "long_rates": [setting("photo_patches", 3000, LONG, rate=rate) for rate in (0.0125, 0.05)],
    "queues": [
        setting("photo_patches", 3000, SHORT, queue, rate=0.05) for queue in (64, 256, 1024, 12_000)
    ],
    "lengths": [
        setting(name, images, passes) for passes in PASSES for images in SIZES for name in DATASETS
    ],
}


def drawn(dataset, count, what):
    rows = np.random.default_rng(0).permutation(len(dataset))[:count]
    return isd_tf.subsets.take(dataset, rows, what)


def score(dataset, images, passes, queue, batch, rate, seed):
    """1-NN accuracy of the student that such a training leaves."""
    size = DATASETS[dataset]
    everything, test = isd_tf.datasets.load(dataset)
    train = drawn(everything, images, f"{images} images")
    steps = len(train) // batch
    epochs = round(passes / (steps * batch))
    keras.utils.set_random_seed(seed)
    encoder = isd_tf.build_encoder("tiny_resnet", size, WIDTH)
    model = isd_tf.ISD(
        encoder,
        *isd_tf.isd_heads(encoder.output_shape[-1]),
        queue_size=queue,
        teacher_temperature=0.02,
        student_temperature=0.1,
        teacher_momentum=0.99,
        seed=seed,
    )
    model.compile(isd_tf.TorchSGD(isd_tf.CosineByEpoch(rate, epochs, steps)))
    batches = isd_tf.pretraining_batches(train, ("weak", "strong"), size, batch, seed)
    if epochs:
        model.fit(batches, epochs=epochs, steps_per_epoch=steps, shuffle=False, verbose=0)
    bank, queries = (
        isd_tf.evaluation_batches(part, size, 256)
        for part in (drawn(everything, 10_000, "bank"), drawn(test, TEST, "test"))
    )
    scores = isd_tf.knn_accuracy({"student": encoder}, bank, queries, (1,))
    return {"epochs": epochs, "student_1nn": scores["student_1nn"]}


def main(path, groups):
    tf.get_logger().setLevel("ERROR")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    done = {tuple(json.loads(line)["setting"].values()) for line in lines}
    for group in groups:
        for one in GROUPS[group]:
            if tuple(one.values()) in done:
                continue
            start = time.monotonic()
            result = score(**one)
            done.add(tuple(one.values()))
            keras.backend.clear_session()
            line = {"setting": one} | result | {"seconds": round(time.monotonic() - start, 1)}
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:] or GROUPS)
