import keras
import numpy as np
import pytest
import safetensors.numpy
import torch_checkpoints
from torch_checkpoints import FEATURES, QUEUE, TINY, fill

import isd_tf
from isd_tf import torch_weights


def tiny(size=16, width=4):
    return isd_tf.build_encoder("tiny_resnet", size, width)


def write(path, shapes, seed=0):
    arrays = fill(shapes, seed)
    safetensors.numpy.save_file(arrays, path)
    return arrays


def assert_holds(encoder, arrays):
    """Compares an encoder with torchvision's names and axes, element for element."""
    weights = {variable.path: variable.numpy() for variable in encoder.weights}
    arrays = {k: v for k, v in arrays.items() if "num_batches" not in k}
    assert len(weights) == len(arrays)
    parts = {"running_mean": "moving_mean", "running_var": "moving_variance", "bias": "beta"}
    for name, array in arrays.items():
        layer, _, part = name.rpartition(".")
        layer = layer.replace(".", "_")
        if array.ndim == 4:
            expected = np.einsum("oiyx->yxio", array)
            np.testing.assert_array_equal(weights[f"{layer}/kernel"], expected, err_msg=name)
        else:
            found = weights[f"{layer}/{parts.get(part, 'gamma')}"]
            np.testing.assert_array_equal(found, array, err_msg=name)


@pytest.mark.parametrize(
    ("name", "bottleneck", "blocks"),
    [("resnet18", False, (2, 2, 2, 2)), ("resnet50", True, (3, 4, 6, 3))],
)
def test_the_state_dict_has_torchvisions_names_and_shapes(name, bottleneck, blocks):
    state = torch_weights.to_torch(isd_tf.build_encoder(name, 96, width=4))
    shapes = torch_checkpoints.resnet_shapes(bottleneck, blocks, 4)
    assert {name: array.shape for name, array in state.items()} == shapes


def test_a_file_is_loaded_and_written_again(tmp_path):
    """Of torchvision's names with a classifier, which is left out, and said."""
    arrays = write(tmp_path / "a.safetensors", TINY | torch_checkpoints.linear("fc", FEATURES, 7))
    encoder = tiny()
    loaded = torch_weights.load_encoder(encoder, tmp_path / "a.safetensors")
    assert set(loaded.ignored) == {"fc.weight", "fc.bias"} and loaded.from_encoder is None
    assert loaded.weights == len(encoder.weights) and loaded.values == encoder.count_params()
    del arrays["fc.weight"], arrays["fc.bias"]
    assert_holds(encoder, arrays)
    torch_weights.save(encoder, tmp_path / "b.safetensors")
    written = safetensors.numpy.load_file(tmp_path / "b.safetensors")
    assert written.keys() == arrays.keys()
    for name, array in arrays.items():
        expected = 0 if name.endswith("num_batches_tracked") else array
        np.testing.assert_array_equal(written[name], expected)


@pytest.mark.parametrize(
    ("shapes", "student", "teacher", "ignored"),
    [
        (torch_checkpoints.isd(), "encoder_q.module.", "encoder_k.module.", "queue"),
        (torch_checkpoints.isd(True, "encoder_t", True), "encoder_q.module.", "encoder_t.module.",
         "fc.0.weight"),
        (torch_checkpoints.moco_v2(), "module.encoder_q.", "module.encoder_k.", "fc.2.bias"),
        (torch_checkpoints.compress(), "module.", None, "fc.weight"),
    ],
    ids=["isd", "msf", "moco_v2", "compress"],
)  # fmt: skip
def test_backbones_of_checkpoints(shapes, student, teacher, ignored, tmp_path):
    arrays = write(tmp_path / "a.safetensors", shapes)
    for side, prefix in (("student", student), ("teacher", teacher)):
        if prefix is None:
            with pytest.raises(ValueError, match="one encoder, and no teacher"):
                torch_weights.load_encoder(tiny(), tmp_path / "a.safetensors", side)
            continue
        encoder = tiny()
        loaded = torch_weights.load_encoder(encoder, tmp_path / "a.safetensors", side)
        assert loaded.from_encoder == (side if teacher else None) and ignored in loaded.ignored
        own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        assert_holds(encoder, {k: v for k, v in own.items() if not k.startswith("fc.")})


def isd_model(plus=False):
    heads = isd_tf.isd_plus_heads if plus else isd_tf.isd_heads
    return isd_tf.ISD(tiny(), *heads(FEATURES), queue_size=QUEUE)


def assert_head_holds(head, arrays, prefix):
    for place, layer in enumerate(head.layers):
        for variable in layer.weights:
            part = {"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"}
            part |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
            array = arrays[f"{prefix}{place}.{part[variable.name]}"]
            np.testing.assert_array_equal(variable.numpy(), array.T)


def test_a_whole_isd_plus_checkpoint(tmp_path):
    """And MSF's, which has another name for the teacher, and labels of the queue."""
    shapes = torch_checkpoints.isd(True, "encoder_t", labels=True)
    arrays = write(tmp_path / "a.safetensors", shapes)
    model = isd_model(plus=True)
    loaded = torch_weights.load_model(model, tmp_path / "a.safetensors")
    assert loaded.weights == len([name for name in shapes if "num_batches" not in name])
    for side, prefix in (("student", "encoder_q.module."), ("teacher", "encoder_t.module.")):
        own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        encoder = getattr(model, f"{side}_encoder")
        assert_holds(encoder, {k: v for k, v in own.items() if not k.startswith("fc.")})
        assert_head_holds(getattr(model, f"{side}_projector"), own, "fc.")
    assert_head_holds(model.predictor, arrays, "predict_q.module.")
    np.testing.assert_array_equal(model.queue.read_anchors(), arrays["queue"])
    np.testing.assert_array_equal(model.queue.labels, arrays["labels"])
    assert int(model.queue.pointer.numpy()) == 3


def test_whole_checkpoints_of_isd_and_moco(tmp_path):
    arrays = write(tmp_path / "isd.safetensors", torch_checkpoints.isd())
    model = isd_model()
    torch_weights.load_model(model, tmp_path / "isd.safetensors")
    assert_head_holds(model.predictor, arrays, "predict_q.module.")
    np.testing.assert_array_equal(model.queue.read_anchors(), arrays["queue"])

    arrays = write(tmp_path / "moco.safetensors", torch_checkpoints.moco_v2())
    model = isd_tf.MoCoV2(tiny(), *isd_tf.moco_v2_heads(FEATURES), queue_size=QUEUE)
    torch_weights.load_model(model, tmp_path / "moco.safetensors")
    assert_head_holds(model.teacher_projector, arrays, "module.encoder_k.fc.")
    np.testing.assert_array_equal(model.queue.read_anchors(), arrays["module.queue"].T)


@pytest.mark.parametrize(
    ("model", "shapes", "message"),
    [
        (isd_model, torch_checkpoints.isd(True), r"mis-shaped \(predict_q.0.weight"),
        (lambda: isd_model(True), torch_checkpoints.isd(), r"missing \(encoder_q.fc.0.weight"),
        (isd_model, torch_checkpoints.isd() | {"queue": (99, FEATURES)},
         r"1 mis-shaped \(queue \(99, 16\) instead of \(10, 16\)"),
        (isd_model, torch_checkpoints.compress(), "one encoder, and no teacher"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused_whole(model, shapes, message, tmp_path):
    write(tmp_path / "a.safetensors", shapes)
    model = model()
    before = [variable.numpy().copy() for variable in model.weights]
    with pytest.raises(ValueError, match=message):
        torch_weights.load_model(model, tmp_path / "a.safetensors")
    for variable, array in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), array)


def without(shapes, *names):
    return {name: shape for name, shape in shapes.items() if name not in names}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (without(TINY, "bn1.running_var"), r"45 expected, 1 missing \(bn1.running_var \(4,\)\)\.$"),
        (TINY | {"layer4.0.conv1.weight": (1,)}, r"1 unused \(layer4.0.conv1.weight \(1,\)\)\.$"),
        (TINY | {"bn1.bias": (5,)}, r"1 mis-shaped \(bn1.bias \(5,\) instead of \(4,\)\)"),
        (torch_checkpoints.resnet_shapes(False, (1, 1, 1), 8, 3), "45 mis-shaped .*, .*, .*, ..."),
        (TINY | {"conv1.weight": (4, 3, 7, 7)}, "7x7 stem.*above 64 pixels: raise --image_size"),
        ({"step": (1,)}, "45 missing .*1 unused"),
    ],
)
def test_weights_of_another_architecture(shapes, message, tmp_path):
    write(tmp_path / "a.safetensors", shapes)
    encoder = tiny()
    before = encoder.get_weights()
    with pytest.raises(ValueError, match=message):
        torch_weights.load_encoder(encoder, tmp_path / "a.safetensors")
    for ours, theirs in zip(encoder.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    arrays = fill(TINY)
    arrays["bn1.bias"][2] = np.nan
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"not finite: 1 in \(bn1.bias\)"):
        torch_weights.load_encoder(tiny(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("damage", ["empty", "truncated", "no header", "text"])
def test_a_file_that_is_none(damage, tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, TINY)
    whole = path.read_bytes()
    damaged = {"empty": b"", "truncated": whole[:-100], "no header": whole[:5], "text": b"hi" * 99}
    path.write_bytes(damaged[damage])
    message = "is empty" if damage == "empty" else "no .safetensors file, or not a whole one"
    with pytest.raises(ValueError, match=message):
        torch_weights.load_encoder(tiny(), path)


def test_what_has_no_torch_names_and_other_suffixes(tmp_path):
    dense = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="head")])
    with pytest.raises(ValueError, match="resnet18.*Received: .*the layer head"):
        torch_weights.to_torch(dense)
    with pytest.raises(ValueError, match=".safetensors, .pth or .pt. Received: .*a.onnx"):
        torch_weights.save(tiny(), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="ending in .safetensors.*Received: .*a.onnx"):
        torch_weights.load_encoder(tiny(), tmp_path / "a.onnx")


def test_pickles_need_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "a.pth").write_bytes(b"x")
    for function in (torch_weights.load_encoder, torch_weights.save):
        with pytest.raises(ImportError, match=r"pip install 'torch>=2.6'.*a.pth"):
            function(tiny(), tmp_path / "a.pth")
