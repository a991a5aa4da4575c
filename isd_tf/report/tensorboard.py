"""What TensorBoard shows besides curves: pictures, and features in its Projector.

Written without the tensorboard package, in the formats that it reads.
"""

import base64
import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from PIL import Image

from isd_tf.report.pages import SIDE, Row

PROJECTOR = "projector_config.pbtxt"


def write_rows(
    directory: str | os.PathLike, tag: str, rows: Sequence[Row], step: int, description: str = ""
) -> None:
    """Adds rows of pictures to the log of a directory, as one image."""
    grid = Image.new("RGB", (SIDE * max(len(row.pictures) for row in rows), SIDE * len(rows)))
    for number, row in enumerate(rows):
        for place, picture in enumerate(row.pictures):
            encoded = base64.b64decode(picture.data.partition(",")[2])
            if encoded:
                image = Image.open(io.BytesIO(encoded))
                scale = SIDE / max(image.size)
                size = [max(1, round(side * scale)) for side in image.size]
                grid.paste(image.resize(size), (place * SIDE, number * SIDE))
    encoded = io.BytesIO()
    grid.save(encoded, "PNG")
    metadata = tf.compat.v1.SummaryMetadata(
        summary_description=description,
        plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="images"),
    )
    writer = tf.summary.create_file_writer(str(directory), filename_suffix=".pictures")
    with writer.as_default(step):
        value = [str(grid.width), str(grid.height), encoded.getvalue()]
        tf.summary.write(tag, tf.constant(value), metadata=metadata)
    writer.close()


def write_projector(
    directory: str | os.PathLike,
    values: np.ndarray,
    names: Sequence[str],
    sprite: Image.Image,
    side: int,
) -> None:
    """Writes features and their images for the Projector of a log.

    Args:
        directory: of the log.
        values: features [N, C].
        names: of the images, N.
        sprite: their pictures on a grid, row by row.
        side: of a picture.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    np.savetxt(directory / "features.tsv", values, fmt="%.6g", delimiter="\t")
    # A name is a line.
    lines = (" ".join(name.split()) or "-" for name in names)
    text = "".join(f"{line}\n" for line in lines)
    (directory / "names.tsv").write_text(text, encoding="utf-8", errors="backslashreplace")
    sprite.save(directory / "sprite.png")
    (directory / PROJECTOR).write_text(
        "embeddings {\n"
        '  tensor_name: "features of the student"\n'
        '  tensor_path: "features.tsv"\n'
        '  metadata_path: "names.tsv"\n'
        '  sprite { image_path: "sprite.png"'
        f" single_image_dim: {side} single_image_dim: {side} }}\n"
        "}\n"
    )
