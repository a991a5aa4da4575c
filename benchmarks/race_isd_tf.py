"""isd_tf's side of `make benchmark`: each function sets up one kind of row."""

import numpy as np
import race
import tensorflow as tf

import isd_tf
from isd_tf.evaluation import features, knn
from isd_tf.networks.heads import HEADS
from isd_tf.views import augment, python_crops

# More than stands ready in the pipeline when its turn comes.
PREPARED_BATCHES = 10


def step(variant, sizes, folder):
    """Training steps on two ready views."""
    train = tf.function(model_of(sizes).train_step)
    shape = [2, sizes["batch"], sizes["image_size"], sizes["image_size"], 3]
    views = tf.random.stateless_normal(shape, [0, 0])
    batch = {"teacher_view": views[0], "student_view": views[1]}
    work = lambda: train(batch)["loss"].numpy()  # noqa: E731
    return lambda: race.timed(work, sizes["batch"], sizes["calls"])


def views(variant, sizes, folder):
    """Batches of finished pairs of views."""
    batches = iter(pairs(sizes, folder))
    work = lambda: finished(next(batches))  # noqa: E731
    return lambda: race.timed(work, sizes["batch"], sizes["calls"], PREPARED_BATCHES)


def host(variant, sizes, folder):
    """Batches as tf.data hands them over."""
    batches = iter(pairs(sizes, folder))
    work = lambda: next(batches)  # noqa: E731
    return lambda: race.timed(work, sizes["batch"], sizes["calls"], PREPARED_BATCHES)


def training(variant, sizes, folder):
    """Everything of a training: images, views, steps, and all logs read at each."""
    train = model_of(sizes).make_train_function()
    batches = iter(pairs(sizes, folder))
    work = lambda: {name: float(value) for name, value in train(batches).items()}  # noqa: E731
    return lambda: race.timed(work, sizes["batch"], sizes["calls"], PREPARED_BATCHES)


def neighbors(variant, sizes, folder):
    """The search of knn_accuracy, which is handed the bank chunk by chunk."""
    bank, queries = np.load(f"{folder}/bank.npy"), np.load(f"{folder}/queries.npy")

    def search():
        nearest = knn.NearestNeighbors(queries, sizes["k"])
        for first in range(0, len(bank), knn.BANK_CHUNK):
            nearest.add(bank[first : first + knn.BANK_CHUNK])
        return nearest.rows

    np.save(f"{folder}/rows_isd_tf.npy", search())
    return lambda: race.timed(search, len(queries), sizes["calls"], discarded=0)


def evaluation(variant, sizes, folder):
    """Features of evaluation views, from the images or by the encoder alone."""
    encoder = isd_tf.build_encoder(sizes["encoder"], sizes["image_size"])
    dataset = images_of(sizes, folder)
    batches = isd_tf.evaluation_batches(dataset, sizes["image_size"], sizes["batch"])
    # Whole batches only, so that each call does the same work.
    batches = batches.filter(lambda images, labels: tf.shape(images)[0] == sizes["batch"])
    if variant == "encoder alone":
        batches = batches.take(2).cache()
        for _ in batches:  # fills the cache
            pass
    chunks = features.in_chunks({"encoder": encoder}, batches.repeat(), sizes["batch"])
    return lambda: race.timed(lambda: next(chunks), sizes["batch"], sizes["calls"], 3)


def model_of(sizes):
    encoder = isd_tf.build_encoder(sizes["encoder"], sizes["image_size"])
    heads = HEADS[sizes["heads"]](encoder.output_shape[-1])
    model = isd_tf.ISD(encoder, *heads, sizes["queue_size"], *sizes["temperatures"], 0.99)
    model.compile(isd_tf.TorchSGD(sizes["learning_rate"]))
    return model


def images_of(sizes, folder):
    if sizes["images"] == "files":
        paths = tuple(f"{folder}/{i}.jpg" for i in range(sizes["files"]))
        return isd_tf.datasets.FileDataset("files", paths)
    return isd_tf.datasets.ArrayDataset("arrays", np.load(f"{folder}/{sizes['images']}.npy"))


def pairs(sizes, folder):
    if sizes.get("by_pillow"):
        python_crops.cykooz_resizer = None  # As under Linux on ARM.
    dataset, views = images_of(sizes, folder), ("weak", "strong")
    return isd_tf.pretraining_batches(dataset, views, sizes["image_size"], sizes["batch"], seed=0)


def finished(batch):
    """Both views of a batch of `pretraining_batches` as a training step sees them."""
    return augment.finish(batch["teacher_view"]), augment.finish(batch["student_view"])


if __name__ == "__main__":
    for pool in ("intra", "inter"):
        getattr(tf.config.threading, f"set_{pool}_op_parallelism_threads")(race.CORES)
    makers = (step, views, host, training, neighbors, evaluation)
    race.serve({maker.__name__: maker for maker in makers})
