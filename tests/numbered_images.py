"""Images that are labelled by their numbers: arrays, files and records, and batches of them."""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from isd_tf.data import batches as batching
from isd_tf.data import datasets
from isd_tf.views import augment

N, SIZE = 23, 12
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 16, 20, 3), np.uint8)
ARRAYS = datasets.ArrayDataset("arrays", IMAGES, np.arange(N), tuple(map(str, range(N))))


def numbered_files(folder):
    paths = []
    for i, image in enumerate(IMAGES):
        paths.append(str(folder / f"{i:02d}.png"))
        Image.fromarray(image).save(paths[-1])
    return datasets.FileDataset("files", tuple(paths), np.arange(N), ())


class NumberedImages(tfds.core.GeneratorBasedBuilder):
    """N images of two sizes, each with its number; some may be a broken file."""

    VERSION = tfds.core.Version("1.0.0")
    broken_file, broken = None, ()

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(num_classes=N),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, image in enumerate(IMAGES):
            image = self.broken_file if i in self.broken else image[: 16 - i % 2]
            yield i, {"image": image, "label": i}


def prepare_records(directory, broken_file=None, broken=(7,)):
    own = {"broken_file": broken_file, "broken": broken if broken_file else ()}
    with tfds.core.registered.skip_registration():
        kind = type("NumberedImages", (NumberedImages,), own)
    builder = kind(data_dir=str(directory))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    assert len(builder.info.splits["train"].filepaths) == 4
    return datasets._open_split(builder, "train")


def take(dataset, steps, first_step=0, views=("weak", "strong"), seed=1, batch=4, **arguments):
    batches = batching.pretraining_batches(
        dataset, views, SIZE, batch, seed, first_step, **arguments
    )
    return [finished(batch) for batch in batches.take(steps)]


def finished(batch):
    """The batch as the networks see it, in numpy."""
    return {
        name: (augment.finish(value) if name.endswith("view") else value).numpy()
        for name, value in batch.items()
    }


def labels_of(batches):
    return np.concatenate([batch["label"] for batch in batches])
