"""embed.py's work beside the bare encoder, which gets finished views from memory.

    python benchmarks/embedding.py --model=runs/x/saved_model --images=photos --count=4096

In each of the rounds, one after the other in one process: the signature `encode` on batches in
memory, reading and decoding alone, and the embedding of the collection to its last file. Prints
images a second and core-milliseconds an image (of all threads, which other programs on the machine
change less), and the rates over the bare encoder's of the same round: the median, lowest and
highest. Each start costs about 2 core-seconds, so let --count be thousands. Without --images,
random arrays of the size of its views, which need no decoding.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np  # noqa: E402

from isd_tf.data import datasets, subsets  # noqa: E402
from isd_tf.data.batches import sized_batches  # noqa: E402
from isd_tf.serving import embed  # noqa: E402
from isd_tf.serving.collection import SHARD_IMAGES  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="SavedModel, or the folder of its versions")
    parser.add_argument("--images", help="as embed.py's; default random arrays")
    parser.add_argument("--count", type=int, default=4096, help="of images; default 4096")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    asked = parser.parse_args()
    encoder = embed.load_encoder(asked.model)
    size = encoder.image_size
    if asked.images:
        all_images = datasets.load_collection(asked.images)
        dataset = subsets.take(all_images, np.arange(asked.count), "some")
    else:
        shape = asked.count, size, size, 3
        values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        dataset = datasets.ArrayDataset("random arrays", values)
    batch = embed.batch_size(size, SHARD_IMAGES)

    def batches():
        return sized_batches(dataset, size, batch)

    held = list(batches())

    def embed_all():
        with tempfile.TemporaryDirectory() as folder:
            collection = embed.begin(pathlib.Path(folder, "out"), encoder, dataset)
            embed.embed_shards(encoder, dataset, collection, collection.missing)
            collection.finish()

    works = {
        "bare encoder": lambda: [found.numpy() for _, found, *_ in embed.embedded(encoder, held)],
        "reading alone": lambda: [len(batch[0]) for batch in batches()],
        "embedding": embed_all,
    }
    embed_all()  # Finds cold caches; the files were read just now.
    # Seconds and core-seconds [rounds, works, 2].
    times = np.array([[timed(work) for work in works.values()] for _ in range(asked.rounds)])
    print(f"{encoder.name}, {size} x {size}, batches of {batch}, {len(dataset)} images")
    for i, name in enumerate(works):
        seconds, core_seconds = np.median(times[:, i], axis=0)
        line = f"{name}: {len(dataset) / seconds:.4g} images/s, "
        line += f"{1000 * core_seconds / len(dataset):.3g} core-ms an image"
        if i:
            for what, ratios in zip(
                ("rate", "by cores"), (times[:, 0] / times[:, i]).T, strict=True
            ):
                low, middle, high = ratios.min(), np.median(ratios), ratios.max()
                line += f"; {what} {middle:.2f} ({low:.2f} to {high:.2f}) of the bare encoder's"
        print(line, flush=True)


def timed(work):
    wall, cores = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cores


if __name__ == "__main__":
    main()
