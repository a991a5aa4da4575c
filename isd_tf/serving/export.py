"""The encoder as a SavedModel for TF Serving: its signatures, warm-up requests and model card."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from isd_tf.data.graph_decoder import GRAPH_FORMATS, LARGE_PIXELS, decode
from isd_tf.data.pixels import MAX_PIXELS
from isd_tf.networks.weights import sha256
from isd_tf.views import augment, crops, photometric

MODEL_CARD = "model_card.json"
# Where TF Serving looks for requests to send itself before it takes others.
WARM_UP_REQUESTS = pathlib.Path("assets.extra", "tf_serving_warmup_requests")


def export_encoder(
    encoder: keras.Model,
    image_size: int,
    directory: str | os.PathLike,
    classifier: keras.Model | None = None,
    class_names: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
    about: Mapping | None = None,
) -> str:
    """Writes an encoder under the next free version number.

    The signatures, with N images in a request:

        serving_default       images: uint8 [N, H, W, 3], of any size, upright
        serving_bytes         image_bytes: string [N], JPEG, PNG, WebP, GIF or BMP files. One that
                              cannot be read gives rows of zeros, and False in "valid", bool [N]
        serving_bytes_strict  the same, and one that cannot be read fails the request
        encode                views: float32 [N, S, S, 3], normalised; for converters
        classify              with a classifier, image_bytes as above: scores, float32 [N, K], and
                              "classes", string [N, K], their names; and "valid"

    All but the last return "features", float32 [N, C], and "embedding", the same at unit length.
    Images are resized, cropped and normalised as the evaluation does it, files read as it reads
    them, turned upright by their EXIF orientation. The file holds the encoder's weights, and the
    classifier's, once and nothing else.

    Keras' own routes do not serve: `tf.saved_model.save` of a Keras 3 model fails on TF Serving's
    loader, and `model.export` stores every weight twice.

    Args:
        encoder: normalised images [B, S, S, 3] to features [B, C].
        image_size: side S in pixels.
        directory: where TF Serving looks for versions; made if missing.
        classifier: features [B, C] to logits [B, K]; or None.
        class_names: of the classifier's K classes.
        max_pixels: width times height beyond which an encoded image counts as unreadable where a
            collection is embedded. Whoever sends a file to a server decides how much it unfolds
            to: there LARGE_PIXELS is the limit, unless this one is lower.
        about: what else is known of the encoder, for the model card: recipe, data, scores.

    Returns:
        The path written, `directory`/<version>.

    Raises:
        ValueError: when the class names are not as many as the classifier's classes.
        OSError: when the directory cannot be written.
    """
    if classifier and len(class_names) != classifier.output_shape[-1]:
        raise ValueError(
            f"A classifier of {classifier.output_shape[-1]} classes needs as many class_names. "
            f"Received: {len(class_names)}."
        )
    # A class may be called as a folder that is no UTF-8, which no answer can hold.
    class_names = [str(x).encode("utf-8", "backslashreplace").decode() for x in class_names]
    directory = pathlib.Path(directory)
    archive = keras.export.ExportArchive()
    served_pixels = min(max_pixels, LARGE_PIXELS)
    signatures = _signatures(encoder, image_size, classifier, class_names, served_pixels)
    for name, (function, spec) in signatures.items():
        # Not tracked: the endpoints' own captures are stored, once each.
        archive.add_endpoint(name, function, [spec])
    with next_version(directory) as (unfinished, version):
        archive.write_out(str(unfinished), verbose=False)
        _write_warm_up_requests(unfinished / WARM_UP_REQUESTS, directory.name, signatures)
        card = model_card(encoder, image_size, classifier, class_names, max_pixels, signatures)
        text = json.dumps(card | dict(about or {}), indent=2) + "\n"
        (unfinished / MODEL_CARD).write_text(text)
    return str(version)


@contextlib.contextmanager
def next_version(
    directory: str | os.PathLike, suffix: str = ""
) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Makes what is written at the first path appear, complete, at the second one.

    TF Serving takes up a numeric folder as soon as it appears. The second path is `directory`/<the
    next free number><suffix>.

    Raises:
        OSError: when the directory cannot be made.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    names = [path.name.removesuffix(suffix) for path in directory.iterdir()]
    number = max((int(name) for name in names if name.isdigit()), default=0) + 1
    unfinished = directory / f"unfinished-{number}-{os.getpid()}{suffix}"
    version = directory / f"{number}{suffix}"
    try:
        yield unfinished, version
        unfinished.rename(version)
    except BaseException:
        # What is there fills the disk.
        shutil.rmtree(unfinished, ignore_errors=True)
        if unfinished.is_file():
            unfinished.unlink()
        raise


def _signatures(encoder, image_size, classifier, class_names, max_pixels):
    """Each signature's function and what it takes, by name."""
    batch = [None, image_size, image_size, 3]

    @tf.function(input_signature=[tf.TensorSpec(batch, tf.float32)], autograph=False)
    def represent(views):
        views = tf.ensure_shape(views, batch)  # A server does not hold requests to it.
        some = tf.debugging.Assert(tf.size(views) > 0, ["A request needs images. Received none."])
        with tf.control_dependencies([some]):
            features = tf.cast(encoder(tf.identity(views), training=False), tf.float32)
        return {"features": features, "embedding": tf.math.l2_normalize(features, axis=1)}

    def encode(views):
        # Where NaN comes in, features come out that look like any: a rectifier makes it 0.
        finite = tf.debugging.Assert(
            tf.reduce_all(tf.math.is_finite(views)), ["Views must be finite. Received NaN or inf."]
        )
        with tf.control_dependencies([finite]):
            return represent(tf.identity(views))

    def serve_images(images):
        # An image without its batch axis would otherwise crash the serving process.
        images = tf.ensure_shape(images, [None, None, None, 3])
        sides = tf.shape(images)[1:3]
        empty = ["Images must have pixels. Received height and width:", sides]
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(sides > 0), empty)]):
            # One by one, as the evaluation does it: as floats all at once would take 4 GB of 1.
            cut = tf.map_fn(
                centre_crop, images, fn_output_signature=tf.TensorSpec(batch[1:], tf.uint8)
            )
        return represent(finished(cut))

    def centre_crop(image):
        return crops.centre_crops(image[tf.newaxis], image_size)[0]

    # Looked up: a server's graph is optimised, and divisions then come out different in last bits.
    levels = tf.tile(tf.range(256)[:, tf.newaxis], [1, 3])[tf.newaxis]
    normalised = augment.normalize(augment.to_unit_range(tf.cast(levels, tf.uint8))).numpy().ravel()

    def finished(cut):
        return tf.gather(normalised, 3 * tf.cast(cut, tf.int32) + tf.range(3))

    def look_at(encoded):
        return centre_crop(decode(encoded, max_pixels, tuple(GRAPH_FORMATS)))

    def views_of(files):
        """Views [N, S, S, 3] of files [N], and which of them could be read, bool [N]."""
        # A graph has no exceptions to catch; a dataset whose errors are ignored has. The row that
        # comes last is no image's, so that there is one.
        files = tf.ensure_shape(files, [None])  # Else rows would be lost as if unreadable.
        count = tf.size(files, tf.int64)
        rows = tf.data.Dataset.range(count).map(
            tf.autograph.experimental.do_not_convert(lambda i: (i, look_at(files[i]))),
            tf.data.AUTOTUNE,
        )
        none = tf.data.Dataset.from_tensors((count, tf.zeros(batch[1:], tf.uint8)))
        rows = rows.ignore_errors(log_warning=False).concatenate(none)
        places, cut = rows.batch(count + 1).get_single_element()
        cut = tf.scatter_nd(places[:, tf.newaxis], cut, [count + 1, *batch[1:]])[:-1]
        valid = tf.reduce_any(places == tf.range(count)[:, tf.newaxis], axis=1)
        return finished(cut), valid

    def with_zeros(outputs, valid):
        """Rows of zeros for the images that could not be read."""
        return {
            name: tf.where(valid[:, tf.newaxis], rows, tf.zeros_like(rows))
            for name, rows in outputs.items()
        } | {"valid": valid}

    def serve_bytes(image_bytes):
        views, valid = views_of(image_bytes)
        return with_zeros(represent(views), valid)

    def serve_bytes_strictly(image_bytes):
        views, valid = views_of(image_bytes)
        message = [
            f"Images must be {', '.join(GRAPH_FORMATS)} of at most {max_pixels} pixels. Cannot be "
            "read, counted from 0:",
            tf.where(~valid)[:, 0],
        ]
        all_valid = tf.debugging.Assert(tf.reduce_all(valid), message, summarize=1000)
        with tf.control_dependencies([all_valid]):
            return represent(views)

    def classify(image_bytes):
        views, valid = views_of(image_bytes)
        logits = classifier(represent(views)["features"], training=False)
        scores = tf.nn.softmax(tf.cast(logits, tf.float32))
        names = tf.repeat(tf.constant([class_names]), tf.size(valid), axis=0)
        return with_zeros({"scores": scores}, valid) | {"classes": names}

    files = tf.TensorSpec([None], tf.string, name="image_bytes")
    images = tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")
    signatures = {
        "serving_default": (serve_images, images),
        "serving_bytes": (serve_bytes, files),
        "serving_bytes_strict": (serve_bytes_strictly, files),
        "encode": (encode, tf.TensorSpec(batch, tf.float32, name="views")),
    }
    return signatures | ({"classify": (classify, files)} if classifier else {})


def _write_warm_up_requests(path, model, signatures):
    """One request of one image for each signature: the first real one then finds all built."""
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for name, (_, spec) in signatures.items():
            grey = np.full((1, *(side or 256 for side in spec.shape[1:])), 128, np.uint8)
            if spec.dtype == tf.string:
                grey = [tf.io.encode_jpeg(np.full((256, 256, 3), 128, np.uint8)).numpy()]
            request = predict_pb2.PredictRequest()
            request.model_spec.name, request.model_spec.signature_name = model, name
            request.inputs[spec.name].CopyFrom(tf.make_tensor_proto(grey, spec.dtype))
            log = prediction_log_pb2.PredictLog(request=request)
            writer.write(prediction_log_pb2.PredictionLog(predict_log=log).SerializeToString())


def model_card(encoder, image_size, classifier, class_names, max_pixels, signatures) -> dict:
    """What a SavedModel takes and gives, and the digest of its weights."""
    weights = [*encoder.weights, *(classifier.weights if classifier else ())]
    card = {
        "encoder": encoder.name,
        "weights": sum(int(np.prod(weight.shape)) for weight in weights),
        "weights_sha256": sha256(weights),
        "features": encoder.output_shape[-1],
        "signatures": {
            name: {spec.name: f"{spec.dtype.name} {spec.shape}"}
            for name, (_, spec) in signatures.items()
        },
        "input": {
            "image_size": image_size,
            "preprocessing": f"shorter side to {round(image_size * 256 / 224)}, antialiased "
            f"bilinear; centre of {image_size} x {image_size}; images of just this size pass",
            "normalisation": {
                "mean": list(photometric.CHANNEL_MEAN),
                "std": list(photometric.CHANNEL_STD),
            },
            "formats": list(GRAPH_FORMATS),
            "orientation": "by EXIF where images come as files",
            "transparency": "laid on white",
            "max_pixels": max_pixels,
            "served_pixels": min(max_pixels, LARGE_PIXELS),
        },
    }
    return card | ({"classes": class_names} if classifier else {})
