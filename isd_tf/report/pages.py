"""Pages that a browser opens from the disk: everything is in the file, and nothing is fetched."""

import base64
import io
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jinja2
import markupsafe
import matplotlib.colors
import numpy as np
from PIL import Image

# Longer side of a picture, in pixels.
SIDE = 112
# Of the dots on a map.
MAP_COLORS = tuple(map(matplotlib.colors.to_hex, matplotlib.colormaps["tab20"].colors))


class Picture(NamedTuple):
    """An image with what is said of it."""

    data: str  # a data: URI; empty where there is no picture
    width: int
    height: int
    alt: str
    note: str = ""
    kind: str = ""  # "right" or "wrong": how it is framed


class Row(NamedTuple):
    """Pictures beside each other."""

    pictures: Sequence[Picture]
    heading: str = ""


class Dot(NamedTuple):
    """An image's place on a map, and in its sprite."""

    x: float  # in [0, 1], from the left
    y: float  # from the top
    color: int
    column: int
    row: int
    name: str


class Map(NamedTuple):
    """Dots on a plane, each of which shows its image."""

    sprite: str  # a data: URI
    columns: int
    rows: int
    dots: Sequence[Dot]
    legend: Sequence[tuple[int, str]]  # color, class


class Table(NamedTuple):
    """A table; numbers sort as numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence]


class Confusion(NamedTuple):
    """How many images of each class (a row) are taken for which (a column)."""

    names: Sequence[str]
    counts: Sequence[Sequence[int]]
    shares: Sequence[Sequence[float]]  # of the row


class Section(NamedTuple):
    """A part of a page: what it shows, or why it shows nothing."""

    title: str
    text: str = ""
    charts: Sequence[markupsafe.Markup] = ()
    rows: Sequence[Row] = ()
    map: Map | None = None
    confusion: Confusion | None = None
    tables: Sequence[Table] = ()
    commands: Sequence[tuple[str, str]] = ()


def picture(
    image: Image.Image | np.ndarray, alt: str, note: str = "", kind: str = "", side: int = SIDE
) -> Picture:
    """Makes a picture of an image, PIL's or uint8 [H, W, 3]; small ones keep their pixels."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    return Picture(data_uri(image), image.width, image.height, alt, note, kind)


def sprite(images: np.ndarray) -> tuple[Image.Image, int, int]:
    """Lays images uint8 [N, S, S, 3] on a square grid, row by row.

    Returns:
        The grid, and its numbers of columns and rows.
    """
    side, columns = images.shape[1], int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * side, rows * side))
    for place, image in enumerate(images):
        grid.paste(Image.fromarray(image), (place % columns * side, place // columns * side))
    return grid, columns, rows


def data_uri(image: Image.Image) -> str:
    """Returns an image as a JPEG inside of a data: URI."""
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def render(template: str, **content) -> str:
    """Fills a template of this folder. Names are text in it, whatever they hold."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(colors=MAP_COLORS, **content)


def write(page: str, path: str | os.PathLike) -> None:
    """Writes a page beside its place and renames it: whoever reloads it finds it whole."""
    path = pathlib.Path(path)
    unfinished = path.with_name(f"unfinished-{path.name}")
    # Of names that are no UTF-8 something is shown.
    unfinished.write_text(page, encoding="utf-8", errors="backslashreplace")
    os.replace(unfinished, path)
