"""isd_tf against PyTorch: whole training steps, in double precision, and weights in files.

`make parity` runs these where PyTorch is; elsewhere they are skipped. The PyTorch side knows
nothing of isd_tf: networks from benchmarks/torch_networks.py, torch's SGD, BatchNorm and KL, and
the teacher moved at the start of the next step, as in the reference (train_isd.py:183).
"""

import argparse
import copy
import importlib.util
import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf
import torch_checkpoints
from torch_checkpoints import FEATURES, QUEUE, TINY, fill

import isd_tf
from isd_tf import torch_weights
from isd_tf.networks.heads import HEADS

ROOT = pathlib.Path(__file__).parent.parent
# A power of two: Keras keeps the learning rate in float32, whatever the weights are.
LEARNING_RATE, MOMENTUM, DECAY = 0.0625, 0.9, 1e-4
TEACHER_MOMENTUM, STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.9, 0.1, 0.02
TEMPERATURE, NEIGHBORS = 0.04, 5  # CompRess', MSF's


@pytest.fixture(scope="module")
def torch():
    # After TensorFlow, on as many threads as the tests' machine has cores.
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def torch_networks(torch):
    spec = importlib.util.spec_from_file_location(
        "torch_networks", ROOT / "benchmarks" / "torch_networks.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TorchISD:
    """The reference's loop on PyTorch: student, predictor, teacher, queue, optimizer."""

    def __init__(self, torch, student, predictor, queue):
        self.torch = torch
        self.student, self.predictor = student, predictor
        self.teacher = copy.deepcopy(student)
        self.queue, self.pointer = queue, 0
        parameters = [*student.parameters(), *predictor.parameters()]
        self.optimizer = torch.optim.SGD(parameters, LEARNING_RATE, MOMENTUM, weight_decay=DECAY)

    def move_teacher(self):
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        with self.torch.no_grad():
            for theirs, ours in pairs:
                theirs.mul_(TEACHER_MOMENTUM).add_(ours, alpha=1 - TEACHER_MOMENTUM)

    def learn(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def enqueue(self, keys):
        rows = (self.pointer + self.torch.arange(len(keys))) % len(self.queue)
        self.queue[rows] = keys
        self.pointer = (self.pointer + len(keys)) % len(self.queue)

    def step(self, teacher_view, student_view):
        functional = self.torch.nn.functional
        queries = functional.normalize(self.predictor(self.student(student_view)))
        self.move_teacher()
        with self.torch.no_grad():
            keys = functional.normalize(self.teacher(teacher_view))
            teacher_log = functional.log_softmax(keys @ self.queue.T / TEACHER_TEMPERATURE, 1)
        student_log = functional.log_softmax(queries @ self.queue.T / STUDENT_TEMPERATURE, 1)
        loss = functional.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
        loss = self.learn(loss)
        self.enqueue(keys)
        return loss


class TorchMSF(TorchISD):
    """MSF's: the keys enter the queue first, and the nearest rows are what the student is near."""

    def step(self, teacher_view, student_view):
        functional = self.torch.nn.functional
        queries = functional.normalize(self.predictor(self.student(student_view)))
        self.move_teacher()
        with self.torch.no_grad():
            keys = functional.normalize(self.teacher(teacher_view))
            self.enqueue(keys)
            nearest = self.torch.cdist(keys, self.queue).topk(NEIGHBORS, largest=False).indices
            rows = self.queue[nearest]
        return self.learn((queries[:, None] - rows).square().sum(2).mean())


class TorchCompRess(TorchISD):
    """CompRess': the teacher is another network, in evaluation mode; one view, one temperature."""

    def __init__(self, torch, student, head, queue, teacher):
        super().__init__(torch, student, head, queue)
        self.teacher = teacher.eval()

    def step(self, view):
        functional = self.torch.nn.functional
        embeddings = functional.normalize(self.predictor(self.student(view)))
        with self.torch.no_grad():
            keys = functional.normalize(self.teacher(view))
            teacher = functional.softmax(keys @ self.queue.T / TEMPERATURE, 1)
        student_log = functional.log_softmax(embeddings @ self.queue.T / TEMPERATURE, 1)
        loss = functional.kl_div(student_log, teacher, reduction="batchmean")
        loss = self.learn(loss)
        self.enqueue(keys)
        return loss


def tensors(keras_network, torch_network):
    """Pairs of every tensor of both networks, by name: (name, variable, tensor, axes of a copy).

    isd_tf's layers bear torchvision's names with underscores for dots.
    """
    names = {
        "kernel": "weight",
        "gamma": "weight",
        "beta": "bias",
        "bias": "bias",
        "moving_mean": "running_mean",
        "moving_variance": "running_var",
    }
    theirs = {
        name.replace(".", "_"): tensor
        for name, tensor in torch_network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    for layer in keras_network.layers:
        for variable in layer.weights:
            # Keras: kernels [k, k, in, out] and [in, out]; torch: [out, in, k, k] and [out, in].
            axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(variable.shape), (0,))
            name = f"{layer.name}_{names[variable.name]}"
            yield name, variable, theirs.pop(name), axes
    assert not theirs, f"isd_tf lacks {list(theirs)}."


def copy_to_torch(torch, keras_network, torch_network):
    for _, variable, tensor, axes in tensors(keras_network, torch_network):
        # The state dict's tensors share the parameters' memory.
        tensor.copy_(torch.from_numpy(variable.numpy().transpose(axes)))


def assert_equal_networks(keras_network, torch_network, tolerance):
    for name, variable, tensor, axes in tensors(keras_network, torch_network):
        np.testing.assert_allclose(
            variable.numpy().transpose(axes), tensor, tolerance, tolerance, err_msg=name
        )


@pytest.mark.parametrize(
    "method, architecture, heads, size, batch, steps, tolerance",
    [
        ("isd", "resnet18", "isd", 32, 8, 3, 5e-13),
        ("isd", "resnet18", "isd_plus", 32, 8, 3, 5e-13),
        ("isd", "resnet50", "isd_plus", 96, 4, 1, 1e-10),
        ("msf", "resnet18", "isd_plus", 32, 8, 3, 5e-13),
    ],
)
def test_steps_equal_pytorch(
    method, architecture, heads, size, batch, steps, tolerance, float64, torch, torch_networks
):
    """Losses, all weights, the teacher's, the queue and the running statistics, views unequal."""
    encoder = isd_tf.build_encoder(architecture, size)
    features = encoder.output_shape[-1]
    own, settings, torch_method = {
        "isd": (isd_tf.ISD, (TEACHER_TEMPERATURE, STUDENT_TEMPERATURE), TorchISD),
        "msf": (isd_tf.MSF, (NEIGHBORS,), TorchMSF),
    }[method]
    queue_size = 3 * batch - 2  # wraps off a multiple of the batch
    model = own(
        encoder, *HEADS[heads](features), queue_size, *settings, teacher_momentum=TEACHER_MOMENTUM
    )
    model.compile(isd_tf.TorchSGD(LEARNING_RATE, MOMENTUM, DECAY))
    step = tf.function(model.train_step)

    student = torch_networks.encoder(architecture, size).double()
    projector, predictor = (network.double() for network in torch_networks.heads(heads, features))
    copy_to_torch(torch, encoder, student)
    if model.student_projector:
        copy_to_torch(torch, model.student_projector, projector)
    copy_to_torch(torch, model.predictor, predictor)
    queue = torch.from_numpy(model.queue.read_anchors().numpy().copy())
    reference = torch_method(torch, torch.nn.Sequential(student, projector), predictor, queue)

    random = np.random.default_rng(0)
    for _ in range(steps):
        # Views are float32, and the encoder's input rounds to it.
        views = random.normal(size=(2, batch, size, size, 3)).astype(np.float32).astype(np.float64)
        logs = step({"teacher_view": tf.constant(views[0]), "student_view": tf.constant(views[1])})
        theirs = reference.step(*torch.from_numpy(views).permute(0, 1, 4, 2, 3))
        np.testing.assert_allclose(logs["loss"], theirs, tolerance)
    # isd_tf has already moved the teacher for the next step.
    reference.move_teacher()

    sides = [
        (model.student_encoder, student),
        (model.predictor, predictor),
        (model.teacher_encoder, reference.teacher[0]),
    ]
    if model.student_projector:
        sides.append((model.student_projector, projector))
        sides.append((model.teacher_projector, reference.teacher[1]))
    for ours, theirs in sides:
        assert_equal_networks(ours, theirs, tolerance)
    np.testing.assert_allclose(model.queue.read_anchors(), queue, tolerance, tolerance)


def test_steps_of_a_given_teacher_equal_pytorch(float64, torch, torch_networks):
    """Losses, all weights, the student's statistics, the queue; the teacher's statistics rest."""
    size, batch, networks = 32, 8, {}
    for side, architecture in (("student", "resnet18"), ("teacher", "resnet50")):
        ours = isd_tf.build_encoder(architecture, size)
        ours(np.random.default_rng(1).normal(size=(batch, size, size, 3)), training=True)
        theirs = torch_networks.encoder(architecture, size).double()
        copy_to_torch(torch, ours, theirs)
        networks[side] = ours, theirs
    (student, torch_student), (teacher, torch_teacher) = networks.values()
    model = isd_tf.CompRess(student, teacher, 3 * batch - 2, TEMPERATURE)
    model.compile(isd_tf.TorchSGD(LEARNING_RATE, MOMENTUM, DECAY))
    step = tf.function(model.train_step)
    head = torch.nn.Sequential()
    head.add_module("linear", torch.nn.Linear(512, 2048).double())
    with torch.no_grad():
        copy_to_torch(torch, model.head, head)
    queue = torch.from_numpy(model.queue.read_anchors().numpy().copy())
    reference = TorchCompRess(torch, torch_student, head, queue, torch_teacher)

    random = np.random.default_rng(0)
    for _ in range(3):
        view = random.normal(size=(batch, size, size, 3)).astype(np.float32).astype(np.float64)
        logs = step({"view": tf.constant(view)})
        theirs = reference.step(torch.from_numpy(view).permute(0, 3, 1, 2))
        np.testing.assert_allclose(logs["loss"], theirs, 1e-12)

    assert_equal_networks(student, torch_student, 1e-12)
    assert_equal_networks(model.head, head, 1e-12)
    assert_equal_networks(teacher, torch_teacher, 0)
    np.testing.assert_allclose(model.queue.read_anchors(), queue, 1e-12, 1e-12)


# --------------------------------------------------------------------------------- weights in files


def shake(torch, network):
    """Gives BatchNorm values that are not its initial ones."""
    torch.manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1:
            centre = 0 if name.endswith(("bias", "running_mean")) else 1
            tensor.copy_(torch.rand_like(tensor) * 0.5 - 0.25 + centre)


def features_of_both(torch, encoder, network, size):
    """Features of two images by isd_tf and by PyTorch."""
    dtype = encoder.weights[0].numpy().dtype
    images = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = network.eval()(torch.from_numpy(images.astype(dtype)).permute(0, 3, 1, 2))
    assert theirs.std() > 0.01
    return encoder(images, training=False).numpy(), theirs.numpy()


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_pytorchs_features_from_its_file(architecture, float64, torch, torch_networks, tmp_path):
    network = torch_networks.encoder(architecture, 224).double()
    shake(torch, network)
    # DataParallel's names, and a classifier, as torchvision's models have it.
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    state["module.fc.weight"] = torch.zeros(1000, 512)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "a.pth.tar")
    encoder = isd_tf.build_encoder(architecture, 224)
    loaded = torch_weights.load_encoder(encoder, tmp_path / "a.pth.tar")
    assert loaded.ignored == ("fc.weight",)
    ours, theirs = features_of_both(torch, encoder, network, 224)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize(
    ("architecture", "suffix"),
    [("resnet18", ".pt"), ("resnet18", ".safetensors"), ("resnet50", ".pth")],
)
def test_our_features_in_pytorch(architecture, suffix, torch, torch_networks, tmp_path):
    """Strict loading passes: the network has no classifier."""
    network = torch_networks.encoder(architecture, 224)
    shake(torch, network)
    encoder = isd_tf.build_encoder(architecture, 224)
    with torch.no_grad():
        for _, variable, tensor, axes in tensors(encoder, network):
            variable.assign(tensor.numpy().transpose(np.argsort(axes)))
    torch_weights.save(encoder, tmp_path / f"a{suffix}")
    if suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(tmp_path / "a.safetensors")
    else:
        state = torch.load(tmp_path / f"a{suffix}", weights_only=True)
    again = torch_networks.encoder(architecture, 224)
    again.load_state_dict(state, strict=True)
    ours, theirs = features_of_both(torch, encoder, again, 224)
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def as_tensors(torch, arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def tiny():
    return isd_tf.build_encoder("tiny_resnet", 16, 4)


def test_checkpoints_with_all_that_their_programs_save(torch, tmp_path):
    """ISD's, MSF's and CompRess' hold their command line; half precision is widened."""
    path = tmp_path / "ckpt_epoch_3.pth"
    arrays = fill(torch_checkpoints.isd(True, labels=True))
    options = argparse.Namespace(arch="resnet18", queue_size=QUEUE)
    rest = {"opt": options, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}
    torch.save({"state_dict": as_tensors(torch, arrays), **rest}, path)
    model = isd_tf.ISD(tiny(), *isd_tf.isd_plus_heads(FEATURES), queue_size=QUEUE)
    torch_weights.load_model(model, path)
    np.testing.assert_array_equal(model.queue.read_anchors(), arrays["queue"])
    kernel = arrays["encoder_k.module.conv1.weight"]
    ours = model.teacher_encoder.get_layer("conv1").kernel.numpy()
    np.testing.assert_array_equal(ours, np.einsum("oiyx->yxio", kernel))

    arrays = fill(torch_checkpoints.compress())
    halves = {k: v.bfloat16() for k, v in as_tensors(torch, arrays).items()}
    torch.save({"model": halves, **rest}, path)
    encoder = tiny()
    isd_tf.load_weights(encoder, path)
    ours = encoder.get_layer("bn1").moving_variance.numpy()
    np.testing.assert_allclose(ours, arrays["module.bn1.running_var"], rtol=1e-2)


class RunsCode:
    """What a pickle may do to whoever reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(torch, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": as_tensors(torch, fill(TINY)), "x": RunsCode(tmp_path / "x")}, path)
    with pytest.raises(ValueError, match=r"needs code to be read \(posix.mkdir\).*is refused"):
        torch_weights.load_encoder(tiny(), path)
    assert not (tmp_path / "x").exists()
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match=r"needs code to be read \(torch.nn"):
        torch_weights.load_encoder(tiny(), path)


def test_files_that_hold_no_weights_are_refused_in_a_sentence(torch, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(as_tensors(torch, fill(TINY)), path)
    whole = path.read_bytes()
    damaged = (whole[:-500], whole[:100], whole[: len(whole) // 2], b"text\n" * 9, b"\x80\x02}q.")
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no file of PyTorch's, or not a whole one|no state"):
            torch_weights.load_encoder(tiny(), path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        torch_weights.load_encoder(tiny(), path)
    for content in ([1, 2], {"epoch": 3, "net": {}}, {}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="state dict.*Received"):
            torch_weights.load_encoder(tiny(), path)
