"""Embeds a collection by a SavedModel: reads, encodes and writes at the same time."""

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from isd_tf.data import datasets, subsets
from isd_tf.data.batches import sized_batches
from isd_tf.data.datasets import Dataset, FileDataset
from isd_tf.data.decoding import Unreadable
from isd_tf.data.folders import shown
from isd_tf.data.looks import GROUP
from isd_tf.data.pixels import MAX_PIXELS
from isd_tf.serving.collection import SHARD_IMAGES, Collection, Shard, Skipped
from isd_tf.serving.export import MODEL_CARD
from isd_tf.serving.saved_encoder import SIGNATURE, open_saved_model

# What is encoded at a time: so many images, but no more than so many pixels. Of more, activations
# leave the caches, and the allocator maps the views' memory (above 32 MB) anew for each batch.
BATCH, BATCH_PIXELS = 256, 2**21


class SavedEncoder(NamedTuple):
    """An encoder that `export_encoder` has written."""

    name: str
    sha256: str  # of its weights and the image size
    image_size: int  # S
    dimension: int  # D
    max_pixels: int
    embed: Callable[[tf.Tensor], tf.Tensor]  # views [b, S, S, 3] to unit rows [b, D]


def load_encoder(path: str | os.PathLike) -> SavedEncoder:
    """Loads a SavedModel, or of a folder of versions the newest.

    Raises:
        FileNotFoundError: when there is none, or no model card in it.
        ValueError: when it has no signature that takes what the card says.
    """
    path, loaded = open_saved_model(path)
    if not (path / MODEL_CARD).exists():
        raise FileNotFoundError(
            f"{shown(str(path))} has no {MODEL_CARD}, which says how it takes images. Export the "
            "encoder by --stages=export of run.py."
        )
    card = json.loads((path / MODEL_CARD).read_text())
    size = card["input"]["image_size"]
    encode = loaded.signatures[SIGNATURE]
    (argument,) = encode.structured_input_signature[1].values()
    if argument.shape.as_list() != [None, size, size, 3]:
        raise ValueError(
            f"The signature {SIGNATURE} of {shown(str(path))} must take views of the {size} x "
            f"{size} pixels that its {MODEL_CARD} tells of. Received: {argument.shape}."
        )

    def embed(views):
        # `loaded` has the variables, which live as long as it.
        return loaded.signatures[SIGNATURE](**{argument.name: views})["embedding"]

    digest = hashlib.sha256(f"views of {size}".encode())
    # All values, and no names, which Keras counts up.
    weights = tf.train.load_checkpoint(str(path / "variables" / "variables"))
    for key, shape in sorted(weights.get_variable_to_shape_map().items()):
        if key != "_CHECKPOINTABLE_OBJECT_GRAPH":
            digest.update(repr(shape).encode() + weights.get_tensor(key).tobytes())
    return SavedEncoder(
        card["encoder"],
        digest.hexdigest(),
        size,
        encode.structured_outputs["embedding"].shape[-1],
        card["input"].get("max_pixels", MAX_PIXELS),
        embed,
    )


def begin(
    folder: str | os.PathLike,
    encoder: SavedEncoder,
    dataset: Dataset,
    source: dict | None = None,
    shard_images: int = SHARD_IMAGES,
) -> Collection:
    """Makes the folder for a dataset's embeddings, or finds what was begun in it.

    Args:
        folder: the output.
        encoder, dataset: what is to be embedded, and by what.
        source: what else is known of the images: how to open them again.
        shard_images: of a shard, a multiple of GROUP.

    Raises:
        ValueError: for a dataset without images, or another number of them in a shard.
        FileExistsError, OSError: as `Collection.begin`.
    """
    if not len(dataset):
        raise ValueError(f"There are no images in {dataset.name}.")
    if shard_images < 1 or shard_images % GROUP:
        raise ValueError(f"shard_images must be a multiple of {GROUP}. Received: {shard_images}.")
    images = {"name": dataset.name, "sha256": _digest(dataset)} | (source or {})
    about = {
        "images": images,
        "model": {
            "name": encoder.name,
            "sha256": encoder.sha256,
            "image_size": encoder.image_size,
        },
        "count": len(dataset),
        "dimension": encoder.dimension,
        "shard_images": shard_images,
    }
    return Collection.begin(folder, about)


def _digest(dataset):
    """Which images in which order, and their labels; of files, where they are."""
    digest = hashlib.sha256(datasets.fingerprint(dataset).encode())
    if isinstance(dataset, FileDataset):
        digest.update(b"\0".join(map(os.fsencode, _written_names(dataset, dataset.paths))))
    return digest.hexdigest()


def _written_names(dataset, names):
    # Whoever reads them may do so from another folder.
    return [os.path.abspath(n) for n in names] if isinstance(dataset, FileDataset) else names


def embed_shards(
    encoder: SavedEncoder,
    dataset: Dataset,
    collection: Collection,
    numbers: Sequence[int],
    progress: Callable[[int, int], None] = lambda images, skipped: None,
) -> None:
    """Embeds some shards of a collection, and writes each as soon as it is done.

    A batch is of the same images whichever shards are asked for, so that each comes out the same.

    Args:
        encoder, dataset, collection: as in `begin`.
        numbers: of the shards, in rising order.
        progress: is told how many images are done, and how many of them were skipped.

    Raises:
        ValueError: when embeddings are not finite.
        OSError: when a shard cannot be written.
    """
    if not numbers:
        return
    rows = np.concatenate([collection.rows_of(number) for number in numbers])
    unreadable = _Noted(len(dataset), encoder.max_pixels)
    part = dataset if len(rows) == len(dataset) else subsets.take(dataset, rows, "the rest")
    batch = batch_size(encoder.image_size, collection.about["shard_images"])
    batches = sized_batches(part, encoder.image_size, batch, unreadable)
    done, skipped = 0, 0
    # One shard is written while the next one is embedded.
    with (
        concurrent.futures.ThreadPoolExecutor(1) as writer,
        contextlib.closing(embedded(encoder, batches)) as found,
    ):
        writing = None
        for number in numbers:
            end, parts = done + len(collection.rows_of(number)), []
            while done < end:
                places, *values = next(found)
                begun, done = done, min(done + batch, end)
                skipped += done - begun - len(places)
                if len(places):
                    parts.append((places, *values))
                progress(done, skipped)
            if writing:
                writing.result()
            writing = writer.submit(_write, collection, number, dataset, rows, parts, unreadable)
        writing.result()


def embedded(encoder: SavedEncoder, batches: Iterable) -> Iterator[tuple]:
    """Embeds batches of `sized_batches`, in their order.

    Two are encoded at a time: while threads of one wait for its slowest, the other has work.

    Returns:
        Of each batch places [b], embeddings (of no images: None), sizes and labels.
    """
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        under_way = collections.deque()
        for places, views, labels, sizes in batches:
            embedding = pool.submit(encoder.embed, views) if len(places) else None
            under_way.append((places, embedding, sizes, labels))
            if len(under_way) > 1:
                yield _finished(*under_way.popleft())
        for batch in under_way:
            yield _finished(*batch)


def _finished(places, embedding, *values):
    return places, embedding and embedding.result(), *values


def batch_size(image_size: int, shard_images: int) -> int:
    """How many images of side S are encoded at a time: a power of two that fills a shard."""
    fitting = max(BATCH_PIXELS // image_size**2, GROUP)
    return math.gcd(shard_images, min(2 ** (fitting.bit_length() - 1), BATCH))


def embed_file(encoder: SavedEncoder, path: str) -> np.ndarray:
    """Returns the embedding of an image file, a unit row [1, D].

    Raises:
        ValueError: when it cannot be read.
    """
    unreadable = _Noted(1, encoder.max_pixels)
    dataset = FileDataset(shown(path), (path,))
    for places, views, *_ in sized_batches(dataset, encoder.image_size, GROUP, unreadable):
        if len(places):
            return encoder.embed(views).numpy()
    raise ValueError(f"Cannot read the image {shown(path)}: {unreadable.reasons[path]}.")


class _Noted(Unreadable):
    """Keeps the reasons for the list; there is no limit, and no line of the log for each."""

    def __init__(self, total, max_pixels):
        super().__init__(total, 1.0, max_pixels=max_pixels)
        self.reasons = {}

    def add(self, name, reason, place):
        self.reasons[name] = reason

    def check(self, place):
        pass


def _write(collection, number, dataset, rows, parts, unreadable):
    wanted = collection.rows_of(number)
    found, embeddings, sizes, labels = (
        np.concatenate([np.asarray(values) for values in column])
        for column in zip(*(parts or [_nothing(collection)]), strict=True)
    )
    found = rows[found]  # Places in the part that was asked for to rows of all.
    if not np.isfinite(embeddings).all():
        raise ValueError(
            f"The embeddings of {collection.about['model']['name']} must be finite. Received NaN "
            "or infinity: its weights or BatchNorm statistics have diverged."
        )
    names = datasets.names_of(dataset, wanted)
    read, written = set(found), dict(zip(wanted, _written_names(dataset, names), strict=True))
    skipped = [
        Skipped(row, written[row], unreadable.reasons[name])
        for row, name in zip(wanted, names, strict=True)
        if row not in read
    ]
    collection.write_shard(
        number,
        Shard(
            [written[row] for row in found],
            embeddings,
            sizes,
            [_class_name(dataset, label) for label in labels],
            skipped,
        ),
    )


def _nothing(collection):
    none = np.zeros(0, np.int64)
    return none, np.zeros([0, collection.about["dimension"]]), np.zeros([0, 2]), none


def _class_name(dataset, label):
    if label < 0:
        return None
    name = dataset.class_names[label] if dataset.class_names else str(label)
    return name.encode("utf-8", "backslashreplace").decode()
