"""The encoder as a SavedModel for TF Serving."""

import os
import pathlib
import shutil

import keras
import tensorflow as tf

from isd_tf.views import augment


def export_encoder(encoder: keras.Model, image_size: int, directory: str | os.PathLike) -> str:
    """Writes an encoder under the next free version number.

    The signature `serving_default` takes "images", uint8 [B, H, W, 3] of any size, resizes, crops
    and normalises them as the evaluation does, and returns "features", float32 [B, C]. The file
    holds the encoder's weights once and nothing else.

    Keras' own routes do not serve: `tf.saved_model.save` of a Keras 3 model fails on TF Serving's
    loader, and `model.export` stores every weight twice.

    Args:
        encoder: normalised images [B, S, S, 3] to features [B, C].
        image_size: side S in pixels.
        directory: where TF Serving looks for versions; made if missing.

    Returns:
        The path written, `directory`/<version>.

    Raises:
        OSError: when the directory cannot be written.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in directory.iterdir() if path.name.isdigit()]
    version = directory / str(max(taken, default=0) + 1)

    def serve(images):
        # An image without its batch axis would otherwise crash the serving process.
        images = tf.ensure_shape(images, [None, None, None, 3])
        features = encoder(augment.evaluation_view(images, image_size), training=False)
        return {"features": tf.cast(features, tf.float32)}

    archive = keras.export.ExportArchive()
    # Not tracked: the endpoint's own captures are stored, once each.
    archive.add_endpoint(
        "serving_default", serve, [tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")]
    )
    # TF Serving takes up a numeric folder as soon as it appears, so it appears complete.
    unfinished = directory / f"unfinished-{version.name}-{os.getpid()}"
    try:
        archive.write_out(str(unfinished), verbose=False)
        unfinished.rename(version)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)  # What is there fills the disk.
        raise
    return str(version)
