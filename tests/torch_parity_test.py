"""isd_tf's whole training step against the paper's, written in PyTorch, in double precision.

`make parity` runs these where PyTorch is; elsewhere they are skipped. The PyTorch side knows
nothing of isd_tf: networks from benchmarks/torch_networks.py, torch's SGD, BatchNorm and KL, and
the teacher moved at the start of the next step, as in the reference (train_isd.py:183).
"""

import copy
import importlib.util
import pathlib

import numpy as np
import pytest
import tensorflow as tf

import isd_tf
from isd_tf.networks.heads import HEADS

ROOT = pathlib.Path(__file__).parent.parent
# A power of two: Keras keeps the learning rate in float32, whatever the weights are.
LEARNING_RATE, MOMENTUM, DECAY = 0.0625, 0.9, 1e-4
TEACHER_MOMENTUM, STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.9, 0.1, 0.02


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

    def step(self, teacher_view, student_view):
        functional = self.torch.nn.functional
        queries = functional.normalize(self.predictor(self.student(student_view)))
        self.move_teacher()
        with self.torch.no_grad():
            keys = functional.normalize(self.teacher(teacher_view))
            teacher_log = functional.log_softmax(keys @ self.queue.T / TEACHER_TEMPERATURE, 1)
        student_log = functional.log_softmax(queries @ self.queue.T / STUDENT_TEMPERATURE, 1)
        loss = functional.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        rows = (self.pointer + self.torch.arange(len(keys))) % len(self.queue)
        self.queue[rows] = keys
        self.pointer = (self.pointer + len(keys)) % len(self.queue)
        return loss.item()


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
    "architecture, heads, size, batch, steps, tolerance",
    [
        ("resnet18", "isd", 32, 8, 3, 1e-10),
        ("resnet18", "isd_plus", 32, 8, 3, 1e-10),
        ("resnet50", "isd_plus", 96, 4, 1, 1e-8),
    ],
)
def test_steps_equal_pytorch(
    architecture, heads, size, batch, steps, tolerance, float64, torch, torch_networks
):
    """Losses, all weights, the teacher's, the queue and the running statistics, views unequal."""
    encoder = isd_tf.build_encoder(architecture, size)
    features = encoder.output_shape[-1]
    model = isd_tf.ISD(
        encoder,
        *HEADS[heads](features),
        queue_size=3 * batch - 2,  # wraps off a multiple of the batch
        teacher_temperature=TEACHER_TEMPERATURE,
        student_temperature=STUDENT_TEMPERATURE,
        teacher_momentum=TEACHER_MOMENTUM,
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
    reference = TorchISD(torch, torch.nn.Sequential(student, projector), predictor, queue)

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
