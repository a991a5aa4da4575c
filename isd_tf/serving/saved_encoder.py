"""A SavedModel as a frozen encoder: what `export_encoder` wrote, back in Keras."""

import os
import pathlib

import keras
import tensorflow as tf


def load_encoder(directory: str | os.PathLike) -> keras.Model:
    """Loads a SavedModel as a frozen encoder, by its signature `encode`.

    Args:
        directory: what `export_encoder` has written: a version, or the folder of several, of which
            the newest is taken.

    Returns:
        A model from normalised images [B, S, S, 3] to features [B, C].

    Raises:
        FileNotFoundError: where there is no SavedModel.
        ValueError: for one that cannot be read, or whose `encode` is missing or another.
    """
    directory = pathlib.Path(directory)
    versions = sorted(
        (path for path in directory.glob("*/saved_model.pb") if path.parent.name.isdigit()),
        key=lambda path: int(path.parent.name),
    )
    if not (directory / "saved_model.pb").exists():
        if not versions:
            raise FileNotFoundError(f"There is no SavedModel. Received: {directory}.")
        directory = versions[-1].parent
    try:
        signatures = tf.saved_model.load(str(directory)).signatures
    except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        raise ValueError(
            f"The SavedModel {directory} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    if "encode" not in signatures:
        raise ValueError(
            "A SavedModel is taken as an encoder by its signature `encode`, float32 [B, S, S, 3], "
            f"normalised, to features [B, C]. Received: {directory} with "
            f"{', '.join(signatures) or 'none'}. Export the encoder anew, by --stages=export."
        )
    views = list(signatures["encode"].structured_input_signature[1].values())
    outputs = signatures["encode"].structured_outputs
    shapes = [tuple(view.shape) for view in views]
    if [len(shape) for shape in shapes] != [4] or shapes[0][3] != 3 or "features" not in outputs:
        raise ValueError(
            "The signature `encode` must take images [B, S, S, 3] and return `features`. Received: "
            f"{', '.join(map(str, shapes))} to {', '.join(outputs)} in {directory}."
        )
    layer = keras.layers.TFSMLayer(str(directory), "encode", trainable=False, dtype="float32")
    images = keras.Input(shapes[0][1:], dtype="float32", name="images")
    return keras.Model(images, layer(images)["features"], name="saved_model")
