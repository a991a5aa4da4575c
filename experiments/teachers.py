"""The given teacher of --method=compress: from another run, a file, or an encoder's name."""

import pathlib

import keras
import program  # noqa: F401 - so that isd_tf is found
import workdirs
from settings import FLAGS, PUBLISHED, RANDOM, teacher_kind

import isd_tf
from isd_tf.evaluation import features
from isd_tf.serving.saved_encoder import load_encoder
from isd_tf.training import initial_weights


def load() -> keras.Model:
    """Loads the teacher that the flags name: normalised images [B, T, T, 3] to features [B, C].

    Raises:
        ValueError, OSError: naming what is wrong with its source.
    """
    teacher = {
        "workdir": _from_workdir,
        "saved_model": lambda: load_encoder(FLAGS.teacher),
        "keras_file": _from_file,
        "encoder": _from_name,
    }[teacher_kind()]()
    size = FLAGS.teacher_image_size
    shape = teacher.input_shape[1:]
    if size and (len(shape) != 3 or any(side not in (None, size) for side in shape[:2])):
        raise ValueError(
            f"--teacher={FLAGS.teacher} takes images of shape {shape}. Received: "
            f"--teacher_image_size={size}. Leave it out: the student's view is resized for it."
        )
    if size and None in shape:
        images = keras.Input((size, size, shape[2]), name="images")
        teacher = keras.Model(images, teacher(images), name=teacher.name)
    return teacher


def record(teacher: keras.Model) -> dict[str, str | int]:
    """What stands of the teacher in a workdir: the digest of its weights, and its shapes."""
    return {
        "digest": features.weights_digest(teacher),
        "image_size": teacher.input_shape[1],
        "features": teacher.output_shape[-1],
    }


def _from_workdir():
    workdir, which = pathlib.Path(FLAGS.teacher), FLAGS.teacher_encoder
    if which == "teacher" and workdirs.flag(workdir, "method") == "compress":
        raise ValueError(
            "A run by compress keeps its student only. Received: --teacher_encoder=teacher of "
            f"--teacher={workdir}. Name that run's own --teacher."
        )
    size = FLAGS.teacher_image_size or int(workdirs.flag(workdir, "image_size"))
    width = workdirs.flag(workdir, "width")
    encoder = isd_tf.build_encoder(
        workdirs.flag(workdir, "encoder"), size, int(width) if width else None
    )
    isd_tf.load_weights(encoder, workdir, which)
    return encoder


def _from_file():
    model, _ = initial_weights.load_keras_encoder(FLAGS.teacher, FLAGS.teacher_encoder)
    if not hasattr(model, "input_shape"):
        raise ValueError(
            "A teacher must be a functional or sequential Keras model, which knows the shape of "
            f"its images. Received: --teacher={FLAGS.teacher} with a {type(model).__name__}."
        )
    return model


def _from_name():
    size, weights = FLAGS.teacher_image_size or FLAGS.image_size, FLAGS.teacher_weights
    if weights == PUBLISHED:
        return isd_tf.build_encoder(FLAGS.teacher, size, published_weights=True)
    encoder = isd_tf.build_encoder(FLAGS.teacher, size)
    if weights != RANDOM:
        isd_tf.load_weights(encoder, weights, FLAGS.teacher_encoder)
    return encoder
