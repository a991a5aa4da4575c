"""The formulas of benchmarks/scaling.py, which docs/scaling.md prints, against real models."""

import collections
import importlib.util
import pathlib
import sys

import pytest
import tensorflow as tf

import isd_tf
from isd_tf.networks.heads import HEADS
from isd_tf.training import distribution

ROOT = pathlib.Path(__file__).parent.parent
SIDE, BATCH, QUEUE = 32, 8, 40


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module, path = importlib.util.module_from_spec(spec), list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def make_networks(heads="isd_plus", synchronized=False):
    encoder = isd_tf.build_encoder("tiny_resnet", SIDE, 8, synchronized)
    return encoder, *HEADS[heads](encoder.output_shape[-1], synchronized)


def make_model(networks, synchronized=False):
    model = isd_tf.ISD(*networks, queue_size=QUEUE, shuffle_batch_norm=not synchronized)
    model.compile(isd_tf.TorchSGD(0.1))
    return model


@pytest.mark.parametrize("heads", HEADS)
def test_bytes_of_variables(scaling, heads):
    networks = make_networks(heads)
    model = make_model(networks)

    def size(*lists):
        return sum(variable.value.numpy().nbytes for each in lists for variable in each)

    teacher = [x for x in (model.teacher_encoder, model.teacher_projector) if x]
    expected = {
        "student": size(*(network.variables for network in networks if network)),
        "teacher": size(*(network.variables for network in teacher)),
        "optimizer": size(model.optimizer.variables),
        "queue": size(model.queue.variables),
        "step": size([model.step]),
    }
    net = scaling.sizes(*networks)
    assert scaling.variable_bytes(net, QUEUE, model.embedding_dim) == expected
    assert sum(expected.values()) == size(model.variables, model.optimizer.variables)
    assert 4 * net.trainable == size(model.trainable_variables)


def test_resnet50_has_the_size_that_torchvision_documents(scaling):
    net = scaling.sizes(isd_tf.build_encoder("resnet50", 224), None, None)
    # torchvision's has a classifier of 1000 classes on top: 25 557 032 weights, 4.09 "GFLOPS".
    assert net.trainable == 25_557_032 - 1000 * (2048 + 1)
    assert (net.multiply_adds[0] + 1000 * 2048) / 1e9 == pytest.approx(4.09, abs=0.005)


@pytest.mark.parametrize("batch_norm", ["shuffled", "synchronized"])
def test_messages_are_those_of_the_traced_step(scaling, two_replicas, batch_norm, monkeypatch):
    gathered = collections.Counter()
    gather = distribution.gather_across_replicas

    def noting_gather(values):
        row = values.shape[1:]
        if not row.is_fully_defined():  # The shuffled embeddings, while tracing.
            row = tf.TensorShape([model.embedding_dim])
        row_bytes = row.num_elements() * values.dtype.size
        gathered[row_bytes] += BATCH * row_bytes
        return gather(values)

    monkeypatch.setattr(distribution, "gather_across_replicas", noting_gather)
    monkeypatch.setattr(isd_tf.methods.isd, "gather_across_replicas", noting_gather)
    synchronized = batch_norm == "synchronized"
    with two_replicas.scope():
        networks = make_networks("isd_plus", synchronized)
        model = make_model(networks, synchronized)
    crops = tf.zeros([BATCH // 2, SIDE, SIDE, 3], tf.uint8)
    seeds = tf.zeros([BATCH // 2, 2], tf.int64)
    batch = {
        "teacher_view": {"weak": (crops, seeds)},
        "student_view": {"strong": (crops, seeds)},
        "label": tf.zeros([BATCH // 2], tf.int64),
    }
    batches = two_replicas.distribute_datasets_from_function(
        lambda _: tf.data.Dataset.from_tensors(batch).repeat()
    )
    traced = model.make_train_function().get_concrete_function(iter(batches)).graph
    operations = collections.defaultdict(list)
    for operation in traced.get_operations():
        if operation.type.startswith("Collective"):
            operations[operation.type].append(operation.outputs[0])

    net = scaling.sizes(*networks)
    told = scaling.messages(net, model.embedding_dim, BATCH, SIDE, batch_norm)
    reduces = [(n, size) for operation, n, size in told.values() if operation == "reduce"]
    gathers = [(n, size) for operation, n, size in told.values() if operation == "gather"]
    sums = operations["CollectiveReduceV2"]  # of both replicas
    assert len(sums) == 2 * sum(n for n, _ in reduces)
    assert sum(4 * x.shape.num_elements() for x in sums) == 2 * sum(size for _, size in reduces)
    # Before each, a gather of the shapes.
    assert len(operations["CollectiveGatherV2"]) == 2 * 2 * sum(n for n, _ in gathers)
    assert sum(gathered.values()) == 2 * sum(
        size for _, size in gathers
    )  # both replicas note theirs
    if batch_norm == "shuffled":
        assert gathered[3 * SIDE**2] == 2 * told["images"][2]
        assert gathered[2 * 8] == 2 * told["seeds"][2]


def test_the_document_holds_the_tables_as_they_are_computed(scaling):
    document = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for table in scaling.tables():
        assert table in document
