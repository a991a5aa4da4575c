import graphlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import skimage.data
import small_collections
import tensorflow as tf
from PIL import ExifTags, Image
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2

import isd_tf
from isd_tf.data.pixels import MAX_PIXELS, open_image
from isd_tf.views import augment

RUNNER = pathlib.Path(__file__).parent / "saved_model_c_api.py"
SIZE = 32


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    encoder = isd_tf.build_encoder("tiny_resnet", SIZE, 8)
    model = isd_tf.ISD(encoder, *isd_tf.isd_plus_heads(32), queue_size=64)
    # At larger rates features grow to 1e4, and the rounding of their sums buries small features.
    model.compile(isd_tf.TorchSGD(0.001))
    random = np.random.default_rng(0)
    views = tf.constant(random.normal(size=(16, SIZE, SIZE, 3)), tf.float32)
    for _ in range(3):  # So that BatchNorm's statistics are not their initial ones.
        model.train_step({"teacher_view": views, "student_view": views + 0.1})
    return model


@pytest.fixture(scope="module")
def saved_model(model, tmp_path_factory):
    return isd_tf.export_encoder(
        model.student_encoder,
        SIZE,
        tmp_path_factory.mktemp("models"),
        max_pixels=1_000_000,
        about={"scores": {"student_1nn": 0.5}},
    )


def run_c_api(saved_model, signature, source, tmp_path):
    """The outputs of a signature for an array, or for the files of a folder; or what failed."""
    if isinstance(source, np.ndarray):
        np.save(tmp_path / "input.npy", source)
        source = tmp_path / "input.npy"
    command = [sys.executable, str(RUNNER), saved_model, signature, str(source)]
    result = subprocess.run(
        [*command, str(tmp_path / "outputs.npz")],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
    )
    return dict(np.load(tmp_path / "outputs.npz")) if result.returncode == 0 else result


def assert_represents(outputs, model, views):
    expected = model.student_encoder(views, training=False).numpy()
    np.testing.assert_allclose(outputs["features"], expected, rtol=1e-4, atol=1e-5)
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(outputs["embedding"], unit, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Real photographs in every format, upright or not, and what is none: "bad" in its name."""
    folder = tmp_path_factory.mktemp("files")
    coffee = Image.fromarray(skimage.data.coffee()).resize((90, 60))
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    coffee.save(folder / "a.jpg", exif=turned)
    (folder / "b_bad_cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:900])
    transparent = coffee.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(coffee.size))
    transparent.save(folder / "c.png")
    (folder / "d_bad_empty.png").write_bytes(b"")
    coffee.save(folder / "e.webp", quality=90)
    coffee.save(folder / "f.gif")
    coffee.save(folder / "g.bmp")
    (folder / "h_bad_text.jpg").write_bytes(b"no image, but long enough to look into")
    coffee.resize((SIZE, SIZE)).convert("L").save(folder / "i.png")
    coffee.resize((1200, 1000)).save(folder / "j_bad_large.jpg")
    return folder


def test_files_are_served_as_the_evaluation_sees_them(model, saved_model, files, tmp_path):
    outputs = run_c_api(saved_model, "serving_bytes", files, tmp_path)
    good = np.array(["bad" not in path.name for path in sorted(files.iterdir())])
    np.testing.assert_array_equal(outputs["valid"], good)
    assert not outputs["features"][~good].any() and not outputs["embedding"][~good].any()
    for path in files.iterdir():
        if "bad" not in path.name:
            os.link(path, tmp_path / path.name)
    train, _ = isd_tf.datasets.load("folder", "train", None, tmp_path)
    ((views, _),) = isd_tf.evaluation_batches(train, SIZE, len(train))
    assert_represents({name: rows[good] for name, rows in outputs.items()}, model, views)


def test_a_strict_request_fails_by_one_file_and_names_it(model, saved_model, files, tmp_path):
    result = run_c_api(saved_model, "serving_bytes_strict", files, tmp_path)
    assert result.returncode == 1
    assert "TF_Code 3" in result.stderr and "at most 1000000 pixels" in result.stderr
    assert "counted from 0:] [1 3 7" in result.stderr
    (tmp_path / "good").mkdir()
    os.link(files / "g.bmp", tmp_path / "good" / "g.bmp")
    outputs = run_c_api(saved_model, "serving_bytes_strict", tmp_path / "good", tmp_path)
    views = augment.evaluation_view(np.asarray(Image.open(files / "g.bmp"))[np.newaxis], SIZE)
    assert_represents(outputs, model, views)


def test_views_are_the_evaluations_to_the_bit_in_every_orientation(tmp_path):
    """An encoder that returns its input shows what the real ones see."""
    identity = keras.Sequential([keras.Input((SIZE, SIZE, 3)), keras.layers.Flatten()])
    path = isd_tf.export_encoder(identity, SIZE, tmp_path / "models")
    photos = [Image.fromarray(getattr(skimage.data, n)()) for n in ("coffee", "chelsea", "rocket")]
    (tmp_path / "files").mkdir()
    for tag in range(1, 9):
        turned = Image.Exif()
        turned[ExifTags.Base.Orientation] = tag
        for form in ("jpeg", "png", "webp"):
            photo = photos[tag % 3].resize((100 + 7 * tag, 60))
            photo.save(tmp_path / "files" / f"{form}{tag}.{form}", exif=turned, lossless=True)
    outputs = run_c_api(path, "serving_bytes", tmp_path / "files", tmp_path)
    assert outputs["valid"].all() and len(outputs["valid"]) == 24
    train, _ = isd_tf.datasets.load("folder", "train", None, tmp_path / "files")
    ((views, _),) = isd_tf.evaluation_batches(train, SIZE, len(train))
    np.testing.assert_array_equal(outputs["features"], views.numpy().reshape(24, -1))
    upright = np.stack([np.asarray(open_image((tmp_path / "files" / "png6.png").read_bytes()))] * 2)
    outputs = run_c_api(path, "serving_default", upright, tmp_path)
    place = sorted(file.name for file in (tmp_path / "files").iterdir()).index("png6.png")
    for row in outputs["features"]:
        np.testing.assert_array_equal(row, views[place].numpy().ravel())


def test_a_mixed_precision_encoder_serves_float32(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        encoder = isd_tf.build_encoder("tiny_resnet", SIZE, 8)
    finally:
        keras.config.set_dtype_policy("float32")
    path = isd_tf.export_encoder(encoder, SIZE, tmp_path)
    views = np.random.default_rng(1).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    outputs = run_c_api(path, "encode", views, tmp_path)
    assert outputs["features"].dtype == outputs["embedding"].dtype == np.float32
    expected = tf.cast(encoder(views, training=False), tf.float32).numpy()
    np.testing.assert_allclose(outputs["features"], expected, rtol=0.05, atol=0.05)
    np.testing.assert_allclose(np.linalg.norm(outputs["embedding"], axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 70, 45), (1, 20, 33)])
def test_tf_servings_loader_gives_the_encoders_features(model, saved_model, shape, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    outputs = run_c_api(saved_model, "serving_default", images, tmp_path)
    assert_represents(outputs, model, augment.evaluation_view(tf.constant(images), SIZE))


def test_encode_takes_finished_views(model, saved_model, tmp_path):
    views = np.random.default_rng(1).normal(size=(3, SIZE, SIZE, 3)).astype(np.float32)
    assert_represents(run_c_api(saved_model, "encode", views, tmp_path), model, views)


def test_encode_converts_to_tflite_as_documented(saved_model, tmp_path, monkeypatch):
    text = (pathlib.Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    (block,) = re.findall(r"```python\n(.*?TFLiteConverter.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(block.replace("runs/quickstart/saved_model/1", saved_model))
    views = np.random.default_rng(1).normal(size=(3, SIZE, SIZE, 3)).astype(np.float32)
    run = tf.lite.Interpreter("encoder.tflite").get_signature_runner("encode")
    converted = run(views=views)
    expected = tf.saved_model.load(saved_model).signatures["encode"](views=views)
    for name in ("features", "embedding"):
        np.testing.assert_allclose(converted[name], expected[name], rtol=1e-4, atol=1e-5)


def test_encode_converts_to_onnx_as_documented(saved_model, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="make parity has it")
    text = (pathlib.Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    (command,) = re.findall("^python (-m tf2onnx.*)$", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    arguments = command.replace("runs/quickstart/saved_model/1", saved_model).split()
    converted = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert converted.returncode == 0, converted.stderr[-3000:]
    views = np.random.default_rng(1).normal(size=(3, SIZE, SIZE, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession("encoder.onnx")
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {session.get_inputs()[0].name: views}), strict=True))
    expected = tf.saved_model.load(saved_model).signatures["encode"](views=views)
    assert set(found) == {"features", "embedding"}
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "signature, value, reason",
    [
        ("serving_default", np.zeros((32, 32, 3), np.uint8), "shape"),
        ("serving_default", np.zeros((1, 0, 5, 3), np.uint8), "must have pixels.*0 5"),
        ("serving_default", np.zeros((1, 32, 32, 4), np.uint8), "shape"),
        ("serving_default", np.zeros((0, 40, 40, 3), np.uint8), "needs images. Received none"),
        ("encode", np.zeros((1, 16, 16, 3), np.float32), "shape"),
        ("encode", np.zeros((0, SIZE, SIZE, 3), np.float32), "needs images. Received none"),
        ("encode", np.full((1, SIZE, SIZE, 3), np.nan, np.float32), "must be finite"),
    ],
)
def test_what_is_no_image_is_refused_without_a_crash(
    saved_model, signature, value, reason, tmp_path
):
    result = run_c_api(saved_model, signature, value, tmp_path)
    assert result.returncode == 1  # Not a signal: the server lives on.
    assert re.search(f"TF_Code 3: .*({reason})", result.stderr)


def test_a_classifier_is_served_with_its_classes(model, files, tmp_path):
    classifier = keras.Sequential([keras.Input((32,)), keras.layers.Dense(3)])
    names = ["cat", "Käse", "caf\udce9"]  # The last one's folder is no UTF-8.
    path = isd_tf.export_encoder(model.student_encoder, SIZE, tmp_path, classifier, names)
    outputs = run_c_api(path, "classify", files, tmp_path)
    features = run_c_api(path, "serving_bytes", files, tmp_path)["features"]
    kernel, bias = (weight.numpy() for weight in classifier.weights)
    logits = features @ kernel + bias
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected *= outputs["valid"][:, np.newaxis] / expected.sum(1, keepdims=True)
    np.testing.assert_allclose(outputs["scores"], expected, atol=1e-5)
    assert [name.decode() for name in outputs["classes"][0]] == ["cat", "Käse", "caf\\udce9"]
    assert outputs["classes"].shape == outputs["scores"].shape
    with pytest.raises(ValueError, match="3 classes needs as many class_names. Received: 2"):
        isd_tf.export_encoder(model.student_encoder, SIZE, tmp_path, classifier, names[:2])


def test_warm_up_requests_are_answered_and_name_every_signature(model, saved_model, tmp_path):
    records = tf.data.TFRecordDataset(f"{saved_model}/assets.extra/tf_serving_warmup_requests")
    signatures, loaded = [], tf.saved_model.load(saved_model)
    for record in records.as_numpy_iterator():
        log = prediction_log_pb2.PredictionLog.FromString(record)
        request = log.predict_log.request
        ((name, proto),) = request.inputs.items()
        serve = loaded.signatures[request.model_spec.signature_name]
        outputs = serve(**{name: tf.constant(tf.make_ndarray(proto))})
        assert len(outputs["features"]) == 1 and np.all(outputs.get("valid", True))
        signatures.append(request.model_spec.signature_name)
    assert signatures == ["serving_default", "serving_bytes", "serving_bytes_strict", "encode"]


def test_what_runs_functions_runs_one_after_another(saved_model):
    """Else a broken image may end as CANCELLED, by which a request or an evaluation fails."""
    content = (pathlib.Path(saved_model) / "saved_model.pb").read_bytes()
    (graph,) = saved_model_pb2.SavedModel.FromString(content).meta_graphs
    looked_at = 0
    for function in graph.graph_def.library.function:
        inputs = {
            node.name: {name.lstrip("^").split(":")[0] for name in node.input}
            for node in function.node_def
        }
        runners = {
            node.name
            for node in function.node_def
            if any(value.HasField("func") or value.list.func for value in node.attr.values())
        }
        before, in_turn = {}, []
        for name in graphlib.TopologicalSorter(inputs).static_order():
            parents = inputs.get(name, ())
            before[name] = set(parents).union(*(before[parent] for parent in parents))
            if name in runners:
                in_turn.append(name)
        for first, second in itertools.pairwise(in_turn):
            assert first in before[second], (function.signature.name, first, second)
            looked_at += 1
    assert looked_at


def test_the_card_tells_what_is_served(model, saved_model):
    card = json.loads((pathlib.Path(saved_model) / "model_card.json").read_text())
    assert card["features"] == 32 and card["input"]["image_size"] == SIZE
    assert card["weights"] == model.student_encoder.count_params()
    stored = b"".join(weight.numpy().tobytes() for weight in model.student_encoder.weights)
    assert card["weights_sha256"] == hashlib.sha256(stored).hexdigest()
    assert card["input"]["served_pixels"] == card["input"]["max_pixels"] == 1_000_000
    assert card["scores"] == {"student_1nn": 0.5}


def test_a_server_unfolds_no_more_than_a_graph_can_turn(tmp_path):
    path, _ = small_collections.export(tmp_path)
    limits = json.loads((pathlib.Path(path) / "model_card.json").read_text())["input"]
    assert limits["served_pixels"] == 2**26 and limits["max_pixels"] == MAX_PIXELS
    serve = tf.saved_model.load(path).signatures["serving_bytes"]
    beyond = io.BytesIO()
    Image.new("L", (2**13 + 1, 2**13)).save(beyond, "PNG")
    ordinary = io.BytesIO()
    Image.new("L", (300, 200)).save(ordinary, "PNG")
    files = tf.constant([beyond.getvalue(), ordinary.getvalue()])
    assert serve(image_bytes=files)["valid"].numpy().tolist() == [False, True]


def test_the_file_holds_the_encoders_weights_once_and_nothing_else(model, saved_model):
    reader = tf.train.load_checkpoint(os.path.join(saved_model, "variables", "variables"))
    stored = sorted(
        reader.get_tensor(key).tobytes()
        for key in reader.get_variable_to_shape_map()
        if key != "_CHECKPOINTABLE_OBJECT_GRAPH"
    )
    assert stored == sorted(weight.numpy().tobytes() for weight in model.student_encoder.weights)


def test_teacher_and_student_export_differently(model, saved_model, tmp_path):
    teacher = isd_tf.export_encoder(model.teacher_encoder, SIZE, tmp_path)
    images = np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    features = [
        tf.saved_model.load(path).signatures["serving_default"](images=tf.constant(images))
        for path in (teacher, saved_model)
    ]
    assert not np.allclose(*(f["features"] for f in features), rtol=1e-4)


def test_versions_count_up_and_nothing_unfinished_stays(model, tmp_path):
    paths = [isd_tf.export_encoder(model.student_encoder, SIZE, tmp_path / "m") for _ in range(2)]
    assert [pathlib.Path(path).name for path in paths] == ["1", "2"]
    assert sorted(os.listdir(tmp_path / "m")) == ["1", "2"]


def test_a_directory_that_cannot_be_made_is_an_error(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        isd_tf.export_encoder(model.student_encoder, SIZE, tmp_path / "file" / "models")
