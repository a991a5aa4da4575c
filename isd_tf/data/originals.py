"""The images of a dataset as they are, upright and whole: for people to look at."""

import numpy as np
import tensorflow as tf
from PIL import Image

from isd_tf.data import pixels
from isd_tf.data.datasets import ArrayDataset, Dataset, FileDataset, names_of


def open_original(dataset: Dataset, row: int, max_pixels: int = pixels.MAX_PIXELS) -> Image.Image:
    """Returns an image of a dataset in mode RGB, in its own size.

    Raises:
        UnreadableImage: when it cannot be read; its text says why.
    """
    if isinstance(dataset, ArrayDataset):
        image = dataset.images[row]
        return Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    if isinstance(dataset, FileDataset):
        encoded = pixels.read_file(dataset.paths[row])
    else:
        file, index = names_of(dataset, [row])[0].rsplit(", record ", 1)
        record = tf.data.TFRecordDataset(file).skip(int(index)).take(1).get_single_element()
        encoded = dataset.parse(record)[0].numpy()
    return pixels.open_image(encoded, max_pixels=max_pixels)
