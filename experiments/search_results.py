"""What search.py has found, as a table and as one HTML page that holds its pictures."""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import program
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import tensorflow as tf
from PIL import Image

from isd_tf.data import datasets, pixels
from isd_tf.data.folders import shown
from isd_tf.report import pages
from isd_tf.serving.collection import Collection, appearing_whole

# Longer side of a picture. One takes about 6 KB of the page, so that the largest is of 3 MB.
THUMBNAIL = 160
MAX_PICTURES = 500
# Of a group, so that one that is large leaves room for others.
MAX_OF_GROUP = 24


class Picture(NamedTuple):
    """An image to show: a row of a collection, or a file."""

    collection: Collection | None
    source: int | str
    note: str

    @property
    def name(self) -> str:
        if self.collection is None:
            return self.source
        return _names(self.collection.folder)[self.source]


class Group(NamedTuple):
    """Pictures under one heading."""

    heading: str
    pictures: Sequence[Picture]


class Found(NamedTuple):
    """A result."""

    name: str  # of the files
    title: str
    summary: str
    table: pa.Table  # all of it
    groups: Sequence[Group]  # of which the page shows the first


def table_of(collection: Collection, rows: np.ndarray, **more) -> pa.Table:
    """What is known of some rows, and columns with more about them."""
    known = collection.known().take(rows)
    columns = {"row": pa.array(rows, pa.int64()), "path": known["path"]} | more
    return pa.table(columns | {name: known[name] for name in ("label", "width", "height")})


def write(found: Found, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the table in two forms and the page; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{found.name}.{suffix}" for suffix in ("csv", "parquet", "html")]
    writers = (
        lambda path: pyarrow.csv.write_csv(found.table, path),
        lambda path: pyarrow.parquet.write_table(found.table, path),
        lambda path: path.write_text(page(found), encoding="utf-8"),
    )
    for path, write_to in zip(paths, writers, strict=True):
        with appearing_whole(path) as unfinished:
            write_to(unfinished)
    return paths


def page(found: Found) -> str:
    """The page. Names are text in it, whatever they hold."""
    total = sum(len(group.pictures) for group in found.groups)
    left, groups = MAX_PICTURES, []
    for group in found.groups:
        some = group.pictures[: min(left, MAX_OF_GROUP if len(found.groups) > 2 else left)]
        left -= len(some)
        if some:
            cards = [_card(picture) for picture in some]
            groups.append((group.heading, cards, len(group.pictures) - len(some)))
    shown_pictures = MAX_PICTURES - left
    return pages.render(
        "search.html.jinja",
        title=found.title,
        summary=found.summary,
        table=f"{found.name}.csv",
        limit="" if shown_pictures == total else f"{shown_pictures} of {total} pictures are shown.",
        groups=groups,
    )


def _card(picture):
    """What the template takes: the short name, the picture, and why there is none, if so."""
    name, short = shown(picture.name), shown(os.path.basename(picture.name))
    try:
        image = _open(picture)
    except Exception as error:  # Whatever has become of the images, the table is right.
        return short, pages.Picture("", 0, 0, name, picture.note), program.sentence(error)
    return short, pages.picture(image, name, picture.note, side=THUMBNAIL), ""


def _open(picture):
    source = picture.collection and picture.collection.about["images"].get("images", "")
    if not (source and source.startswith("tfds:")):
        return pixels.open_image(pixels.read_file(os.fsencode(picture.name)))
    about = picture.collection.about["images"]
    dataset = _dataset(source, about["split"], about["data_dir"])
    if isinstance(dataset, datasets.ArrayDataset):
        return Image.fromarray(dataset.images[picture.source])
    file, index = picture.name.rsplit(", record ", 1)
    record = tf.data.TFRecordDataset(file).skip(int(index)).take(1).get_single_element()
    return pixels.open_image(dataset.parse(record)[0].numpy())


_dataset = functools.cache(datasets.load_collection)


@functools.cache
def _names(folder):
    return Collection.open(folder).names()
