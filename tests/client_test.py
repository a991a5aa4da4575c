"""The client against a real SavedModel behind TensorFlow Serving's protocols."""

import base64
import http.server
import inspect
import json
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import keras
import numpy as np
import pytest
import skimage.data
import tensorflow as tf
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from PIL import Image
from tensorflow_serving.config import model_server_config_pb2

import isd_tf
from isd_tf.views import augment

ROOT = pathlib.Path(__file__).parent.parent
CLIENT = ROOT / "experiments" / "serving" / "client.py"
sys.path.insert(0, str(CLIENT.parent))

import client  # noqa: E402

SIZE = 16
CLASSES = ["cat", "Käse", "dog"]


@pytest.fixture(scope="module")
def encoder():
    keras.utils.set_random_seed(0)
    return isd_tf.build_encoder("tiny_resnet", SIZE, 8)


@pytest.fixture(scope="module")
def ports(encoder, tmp_path_factory):
    """Of a running double, by protocol."""
    classifier = keras.Sequential([keras.Input((encoder.output_shape[-1],)), keras.layers.Dense(3)])
    models = tmp_path_factory.mktemp("models")
    isd_tf.export_encoder(encoder, SIZE, models, classifier, CLASSES, max_pixels=1_000_000)
    command = [sys.executable, str(ROOT / "tests" / "serving_double.py"), str(models), "encoder"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        yield json.loads(run.stdout.readline())
        run.stdin.close()
    assert run.returncode == 0  # It has not imported TensorFlow's Python.


@pytest.fixture(params=["rest", "grpc"])
def address(request, ports):
    return {"rest": "http", "grpc": "grpc"}[request.param] + f"://localhost:{ports[request.param]}"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).resize((90, 60)).save(folder / f"{name}.png")
    return sorted(map(str, folder.iterdir()))


def features_of(encoder, paths):
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    return encoder(augment.evaluation_view(images, SIZE), training=False).numpy()


def run(*arguments):
    command = [sys.executable, str(CLIENT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_files_get_the_encoders_features_in_their_order(address, encoder, photos):
    answer = client.ask(client.connect(address), photos, batch=2)
    expected = features_of(encoder, photos)
    np.testing.assert_allclose(answer["features"], expected, rtol=1e-4, atol=1e-5)
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(answer["embedding"], unit, rtol=1e-4, atol=1e-5)
    assert answer["valid"].tolist() == [True] * 3
    assert answer["features"].dtype == answer["embedding"].dtype == np.float32


def test_both_protocols_give_the_same_bits(ports, photos):
    for signature in ("serving_bytes", "serving_bytes_strict", "classify"):
        rest, grpc = (
            client.ask(client.connect(f"{scheme}://localhost:{port}"), photos, signature)
            for scheme, port in (("http", ports["rest"]), ("grpc", ports["grpc"]))
        )
        assert set(rest) == set(grpc)
        for name in rest:
            np.testing.assert_array_equal(rest[name], grpc[name], strict=True)


def test_arrays_are_sent_too(address, encoder):
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    views = augment.evaluation_view(tf.constant(images), SIZE)
    server = client.connect(address)
    expected = encoder(views, training=False).numpy()
    for signature, inputs in (
        ("serving_default", {"images": images}),
        ("encode", {"views": views.numpy()}),
    ):
        features = server.predict(signature, inputs)["features"]
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_the_command_prints_classes_and_names_what_cannot_be_read(ports, photos, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image, but long enough to look into")
    result = run(
        f"--server=http://localhost:{ports['rest']}", "--signature=classify", "--batch=2",
        *photos, tmp_path / "bad.jpg",
    )  # fmt: skip
    assert result.returncode == 0 and result.stderr.endswith(f"cannot read {tmp_path}/bad.jpg\n")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["path"] for row in rows] == [*photos, str(tmp_path / "bad.jpg")]
    assert [row["valid"] for row in rows] == [True] * 3 + [False]
    for row in rows[:3]:
        scores = list(row["scores"].values())
        assert set(row["scores"]) == set(CLASSES) and sum(scores) == pytest.approx(1, abs=1e-5)
        assert scores == sorted(scores, reverse=True)


def test_the_command_writes_arrays(ports, encoder, photos, tmp_path):
    result = run(
        f"--server=http://localhost:{ports['rest']}", f"--out={tmp_path}/photos.npz", *photos
    )
    assert result.returncode == 0 and not result.stdout, result.stderr
    kept = np.load(tmp_path / "photos.npz")
    assert kept["paths"].tolist() == photos and kept["valid"].all()
    expected = features_of(encoder, photos)
    np.testing.assert_allclose(kept["features"], expected, rtol=1e-4, atol=1e-5)


def test_where_the_answers_cannot_be_kept_nothing_is_asked(ports, photos, tmp_path):
    server = f"--server=http://localhost:{ports['rest']}"
    result = run(server, f"--out={tmp_path}/gone/photos.npz", *photos)
    assert result.returncode == 1 and "gone/photos.npz" in result.stderr
    result = run(server, f"--out={tmp_path}/photos.npz", "--signature=no", *photos)
    assert result.returncode == 1 and not list(tmp_path.iterdir())


REFUSED = [
    (
        "serving_bytes_strict",
        [b"", b"x" * 99],
        r"at most 1000000 pixels.*counted from 0:\] \[0 1\]",
    ),
    ("serving_bytes", [], "needs images. Received none"),
    ("serving_bytes", [[b"x"]], "shape"),
    ("serving_bytes", np.zeros(2, np.uint8), "string|expected type"),
    ("classify", [], "needs images. Received none"),
    ("serving_default", np.zeros((4, 4, 3), np.uint8), "shape"),
    ("serving_default", np.full((1, 4, 4, 3), 0.5, np.float32), "uint8|expected type"),
    ("encode", np.full((1, SIZE, SIZE, 3), np.nan, np.float32), "must be finite"),
    ("encode", np.zeros((1, 9, 9, 3), np.float32), "shape"),
]


@pytest.mark.parametrize("signature, value, reason", REFUSED)
def test_a_malformed_request_is_refused_with_its_reason(address, signature, value, reason):
    names = {"encode": "views", "serving_default": "images"}
    with pytest.raises(client.ServingError, match=f"refuses the request: .*({reason})") as caught:
        client.connect(address).predict(signature, {names.get(signature, "image_bytes"): value})
    assert caught.value.status == "INVALID_ARGUMENT" and "{{" not in str(caught.value)


def test_a_strict_refusal_tells_which_files_were_asked_for(address, photos, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(client.ServingError, match=r"\[0\].*1 files from .*bad.png on"):
        paths = [*photos[:2], str(tmp_path / "bad.png")]
        client.ask(client.connect(address), paths, "serving_bytes_strict", batch=2)


def test_what_the_server_has_not_is_named(address, photos):
    with pytest.raises(client.ServingError, match="no model 'other'.*--model_name") as caught:
        client.ask(client.connect(address, "other"), photos)
    assert caught.value.status == "NOT_FOUND"
    known = "one of classify, serving_bytes, serving_bytes_strict. Received: serving_default"
    with pytest.raises(ValueError, match=known):
        client.ask(client.connect(address), photos, "serving_default")
    with pytest.raises(client.ServingError, match='"bytes" not found'):
        client.connect(address).predict("bytes", {"image_bytes": [b""]})


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_is_down_or_speaks_otherwise_is_said_to_be(scheme, ports):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        down = free.getsockname()[1]
    other = ports["grpc" if scheme == "http" else "rest"]
    for port in (down, other):
        with pytest.raises(client.ServingError, match="No server.*usually 8501") as caught:
            client.connect(f"{scheme}://localhost:{port}", timeout=20).signatures()
        assert caught.value.status == "UNAVAILABLE"


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_says_nothing_is_given_up(scheme):
    with socket.create_server(("localhost", 0)) as silent:
        address = f"{scheme}://localhost:{silent.getsockname()[1]}"
        with pytest.raises(client.ServingError, match="within 0.3 seconds. Raise --timeout"):
            client.connect(address, timeout=0.3).signatures()


def test_a_server_that_is_busy_is_said_to_be():
    """TensorFlow Serving's words when more batches wait than batching.config lets."""

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802 http.server's name.
            self.send_response(503)
            self.end_headers()
            self.wfile.write(b'{"error": "The batch scheduling queue is full"}')

        def log_message(self, *_):
            """Says nothing."""

    with http.server.HTTPServer(("localhost", 0), Busy) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(client.ServingError, match="no room.*queue is full") as caught:
            client.connect(f"http://localhost:{server.server_port}").signatures()
    assert caught.value.status == "RESOURCE_EXHAUSTED"


def batching_parameters():
    """The message that batching.config holds, of session_bundle_config.proto, which no package has.

    Its wrapped numbers have a field `value` of their own.
    """
    file = descriptor_pb2.FileDescriptorProto(name="batching.proto", syntax="proto3")
    wrapped = file.message_type.add(name="Wrapped")
    wrapped.field.add(name="value", number=1, type=3, label=1)
    flag = file.message_type.add(name="Flag")
    flag.field.add(name="value", number=1, type=8, label=1)
    message = file.message_type.add(name="BatchingParameters")
    numbers = {
        "max_batch_size": 1,
        "batch_timeout_micros": 2,
        "max_enqueued_batches": 3,
        "num_batch_threads": 4,
        "max_execution_batch_size": 9,
    }
    for name, number in numbers.items():
        message.field.add(name=name, number=number, type=11, label=1, type_name=".Wrapped")
    message.field.add(
        name="enable_large_batch_splitting", number=8, type=11, label=1, type_name=".Flag"
    )
    message.field.add(name="pad_variable_length_inputs", number=7, type=8, label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("BatchingParameters"))()


def test_the_servers_configuration_is_what_it_takes():
    text = (CLIENT.parent / "batching.config").read_text()
    batching = text_format.Parse(text, batching_parameters())
    largest, batch = batching.max_batch_size.value, batching.max_execution_batch_size.value
    # What the server checks at its start, and that the largest request has room.
    assert batching.enable_large_batch_splitting.value and largest >= batch > 0
    assert batching.max_enqueued_batches.value >= largest / batch
    assert not batching.pad_variable_length_inputs
    text = (CLIENT.parent / "models.config").read_text()
    config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    (model,) = config.model_config_list.config
    assert model.name == inspect.signature(client.connect).parameters["model"].default
    deployment, service = yaml.safe_load_all((CLIENT.parent / "kubernetes.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    cores = int(container["resources"]["requests"]["cpu"])
    assert cores == batching.num_batch_threads.value
    probe = container["readinessProbe"]["httpGet"]["path"]
    assert probe == f"/v1/models/{model.name}/metadata"
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_mistakes_end_in_a_sentence(ports, tmp_path):
    rest = f"--server=http://localhost:{ports['rest']}"
    for arguments, sentence in (
        ([rest, tmp_path / "gone.jpg"], "No such file"),
        (["--server=localhost:8501", "a.jpg"], "Expected http://HOST:PORT or grpc://HOST:PORT"),
        ([rest, "--batch=0", "a.jpg"], "--batch must be above 0. Received: 0"),
        (["--server=http://localhost:1", "a.jpg"], "No server of this protocol answers"),
    ):
        result = run(*arguments)
        assert result.returncode in (1, 2) and sentence in result.stderr
        assert "Traceback" not in result.stderr


def test_help_starts_with_an_example_and_needs_no_tensorflow():
    begin = time.monotonic()
    result = run("--help")
    assert time.monotonic() - begin < 5  # One second where nothing else runs.
    assert "client.py --server=http://localhost:8501 photos/*.jpg" in result.stdout[:200]
    source = (
        f"import sys; sys.path.insert(0, {str(CLIENT.parent)!r}); import client; print(sys.modules)"
    )
    modules = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True).stdout
    assert "urllib.request" in modules and "tensorflow" not in modules and "grpc" not in modules


# ------------------------------------------------------------------- the double, without the client


def post(ports, body, path="/v1/models/encoder:predict"):
    """The HTTP status and the JSON that come back."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://localhost:{ports['rest']}{path}", data)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_rows_and_columns_of_json_say_the_same(ports, photos):
    """As the documentation's curl commands have them."""
    encoded = [base64.b64encode(pathlib.Path(path).read_bytes()).decode() for path in photos]
    name = {"signature_name": "serving_bytes"}
    rows = [{"b64": text} for text in encoded]
    named = [{"image_bytes": row} for row in rows]
    status, columns = post(ports, name | {"inputs": {"image_bytes": rows}})
    assert status == 200 and columns["outputs"]["valid"] == [True] * 3
    assert post(ports, name | {"inputs": rows}) == (200, columns)
    for instances in (rows, named):
        status, answer = post(ports, name | {"instances": instances})
        assert status == 200
        for key, values in columns["outputs"].items():
            assert [row[key] for row in answer["predictions"]] == values


@pytest.mark.parametrize(
    "body, status, reason",
    [
        ({"instances": []}, 400, "No values in 'instances'"),
        ({}, 400, "'inputs' or 'instances'"),
        ([], 400, "not object"),
        ({"signature_name": "none", "instances": [0]}, 400, "not found in signature def"),
        ({"instances": [[[[1, 2, 3], [1, 2]]]]}, 400, "tensor parsing error"),
        ({"signature_name": "serving_bytes", "instances": [{"b64": "?"}]}, 400, "base64 decode"),
        ({"signature_name": "serving_bytes", "inputs": {"images": []}}, 400, "Missing named input"),
    ],
)
def test_json_that_is_no_request_is_refused(ports, body, status, reason):
    answer = post(ports, body)
    assert answer[0] == status and reason in answer[1]["error"]


def test_status_and_metadata_are_told(ports):
    status, answer = post(ports, None, "/v1/models/encoder")
    assert status == 200 and answer["model_version_status"][0]["state"] == "AVAILABLE"
    status, answer = post(ports, None, "/v1/models/encoder/versions/1/metadata")
    signatures = answer["metadata"]["signature_def"]["signature_def"]
    assert signatures["classify"]["inputs"]["image_bytes"]["dtype"] == "DT_STRING"
    assert signatures["classify"]["method_name"] == "tensorflow/serving/predict"
    for path in ("/v1/models/encoder/versions/2", "/v1/models/other/metadata"):
        status, answer = post(ports, None, path)
        assert status == 404 and "Servable not found" in answer["error"]
