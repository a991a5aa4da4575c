"""What `export_encoder` wrote, back: a SavedModel by its signature `encode`, and as Keras model."""

import os
import pathlib

import keras
import tensorflow as tf

from isd_tf.data.folders import shown

SIGNATURE = "encode"


def open_saved_model(directory: str | os.PathLike) -> tuple[pathlib.Path, object]:
    """Loads a SavedModel whose signature `encode` takes views [B, S, S, 3].

    Args:
        directory: what `export_encoder` has written: a version, or the folder of several, of which
            the newest is taken.

    Returns:
        The version's path, and what `tf.saved_model.load` makes of it.

    Raises:
        FileNotFoundError: where there is no SavedModel.
        ValueError: for one that cannot be read, or whose `encode` is missing or another.
    """
    path = _newest_version(pathlib.Path(directory))
    try:
        loaded = tf.saved_model.load(str(path))
    except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        raise ValueError(
            f"The SavedModel {shown(str(path))} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    if SIGNATURE not in loaded.signatures:
        raise ValueError(
            f"A SavedModel is taken as an encoder by its signature `{SIGNATURE}`, float32 "
            f"[B, S, S, 3], normalised, to features [B, C]. Received: {shown(str(path))} with "
            f"{', '.join(loaded.signatures) or 'none'}. Export the encoder anew, by "
            "--stages=export."
        )
    encode = loaded.signatures[SIGNATURE]
    shapes = [tuple(view.shape) for view in encode.structured_input_signature[1].values()]
    outputs = encode.structured_outputs
    if [len(shape) for shape in shapes] != [4] or shapes[0][3] != 3 or "features" not in outputs:
        raise ValueError(
            f"The signature {SIGNATURE} must take images [B, S, S, 3] and return `features`. "
            f"Received: {', '.join(map(str, shapes))} to {', '.join(outputs)} in "
            f"{shown(str(path))}."
        )
    return path, loaded


def _newest_version(path):
    if (path / "saved_model.pb").exists():
        return path
    versions = [p for p in path.glob("*/saved_model.pb") if p.parent.name.isdigit()]
    if not versions:
        raise FileNotFoundError(
            "Expected a SavedModel, or a folder of its versions as run.py --stages=export writes "
            f"it. Received: {shown(str(path))}, "
            + ("which holds none." if path.is_dir() else "which does not exist.")
        )
    return max((p.parent for p in versions), key=lambda version: int(version.name))


def load_encoder(directory: str | os.PathLike) -> keras.Model:
    """Loads a SavedModel as a frozen encoder, by its signature `encode`.

    Args:
        directory: as in `open_saved_model`.

    Returns:
        A model from normalised images [B, S, S, 3] to features [B, C].

    Raises:
        FileNotFoundError, ValueError: as `open_saved_model`.
    """
    path, loaded = open_saved_model(directory)
    (view,) = loaded.signatures[SIGNATURE].structured_input_signature[1].values()
    layer = keras.layers.TFSMLayer(str(path), SIGNATURE, trainable=False, dtype="float32")
    images = keras.Input(tuple(view.shape)[1:], dtype="float32", name="images")
    return keras.Model(images, layer(images)["features"], name="saved_model")
