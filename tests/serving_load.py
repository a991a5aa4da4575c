"""Two thousand requests, eight at a time and one in ten malformed, by both protocols.

    make load

Not among the other tests, as it takes longer than they do.
"""

import io
import json
import pathlib
import subprocess
import sys
import time
from concurrent import futures

import keras
import numpy as np
import skimage.data
import tensorflow as tf
from PIL import ExifTags, Image

import isd_tf
from isd_tf.data.pixels import open_image
from isd_tf.views import augment

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments" / "serving"))

import client  # noqa: E402

SIZE = 32
REQUESTS, AT_ONCE, WARM_UP = 2000, 8, 500
# What the server may hold more at the end than after the first 500 requests, in bytes.
GROWTH = 10_000_000


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def good_requests(encoder):
    """Requests, and the features that they must get: (signature, inputs, features)."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    photos = [Image.fromarray(getattr(skimage.data, name)()) for name in names]
    for size in ((60, 45), (50, 70), (90, 90)):
        files = [
            encoded(photo.resize(size), form)
            for photo, form in zip(photos, ("PNG", "JPEG", "GIF", "WebP"), strict=True)
        ]
        pixels = np.stack([open_image(file) for file in files])
        views = augment.evaluation_view(tf.constant(pixels), SIZE)
        features = encoder(views, training=False).numpy()
        yield "serving_bytes", {"image_bytes": files}, features
        yield "serving_bytes", {"image_bytes": [files[3], b"", files[1]]}, features[[3, 3, 1]] * [
            [1], [0], [1]
        ]  # fmt: skip
        yield "serving_bytes_strict", {"image_bytes": files[:1]}, features[:1]
        yield "serving_default", {"images": pixels[1:3]}, features[1:3]
        yield "encode", {"views": views.numpy()[:2]}, features[:2]


def malformed_requests():
    """Requests, and what the reason must say."""
    strict, photo = "serving_bytes_strict", Image.fromarray(skimage.data.coffee())
    cannot, turned = "Cannot be read", Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    yield strict, {"image_bytes": [b""]}, cannot
    forms = [(form, {}) for form in ("JPEG", "PNG", "WebP", "GIF", "BMP")]
    forms += [(form, {"exif": turned}) for form in ("JPEG", "PNG", "WebP")]
    for form, exif in forms:
        file = encoded(photo, form, **exif)
        yield strict, {"image_bytes": [file[:5000]]}, cannot  # Cut in its data.
        yield strict, {"image_bytes": [file[:25]]}, cannot  # In its head.
    yield strict, {"image_bytes": [encoded(Image.new("L", (4000, 4000)), "PNG")]}, cannot
    yield strict, {"image_bytes": np.zeros(3, np.uint8)}, ""
    yield strict, {"image_bytes": [[encoded(photo, "PNG")]]}, "shape"
    yield "serving_bytes", {"image_bytes": []}, "needs images"
    yield "serving_default", {"images": np.zeros((1, 40, 40, 3), np.float32)}, ""
    yield "serving_default", {"images": np.zeros((40, 40, 3), np.uint8)}, "shape"
    yield "encode", {"views": np.zeros((0, SIZE, SIZE, 3), np.float32)}, ""


def test_2000_requests(tmp_path):
    keras.utils.set_random_seed(0)
    encoder = isd_tf.build_encoder("tiny_resnet", SIZE, 8)
    isd_tf.export_encoder(encoder, SIZE, tmp_path, max_pixels=10_000_000)
    good, malformed = list(good_requests(encoder)), list(malformed_requests())
    command = [sys.executable, str(ROOT / "tests" / "serving_double.py"), str(tmp_path), "encoder"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        ports = json.loads(run.stdout.readline())
        servers = [
            client.connect(f"{scheme}://localhost:{ports[name]}")
            for scheme, name in (("http", "rest"), ("grpc", "grpc"))
        ]

        def memory():
            print(file=run.stdin, flush=True)
            return int(run.stdout.readline())

        def ask(number):
            """Whether the request was answered; fails where it was otherwise than it must be."""
            server = servers[number // 10 % 2]
            if number % 10:
                signature, inputs, features = good[number % len(good)]
                answer = server.predict(signature, inputs)
                np.testing.assert_allclose(answer["features"], features, rtol=1e-3, atol=1e-4)
                np.testing.assert_array_equal(answer.get("valid", True), features.any(axis=1))
                return True
            signature, inputs, reason = malformed[number // 20 % len(malformed)]
            try:
                server.predict(signature, inputs)
            except client.ServingError as error:
                assert error.status == "INVALID_ARGUMENT" and reason in str(error), (number, error)
                return False
            raise AssertionError(f"Request {number} was answered: {signature}, {reason}.")

        begin = time.monotonic()
        with futures.ThreadPoolExecutor(AT_ONCE) as pool:
            answered = list(pool.map(ask, range(WARM_UP)))
            before = memory()
            answered += pool.map(ask, range(WARM_UP, REQUESTS))
        assert len(answered) == REQUESTS and sum(answered) == REQUESTS * 9 // 10
        seconds, after = time.monotonic() - begin, memory()
        print(f"\n{REQUESTS} requests in {seconds:.0f} s; the server's memory, in MB:")
        print(f"{before / 1e6:.1f} after {WARM_UP} requests, {after / 1e6:.1f} at the end")
        assert after - before < GROWTH
        run.stdin.close()
    assert run.returncode == 0
