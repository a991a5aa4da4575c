import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import INPUTS, B, D, K, image_batches, linear_encoder, softmax, unit

import isd_tf
from isd_tf.methods import losses
from isd_tf.training import monitoring


def test_steps_equal_a_numpy_implementation_of_the_paper(float64):
    """Linear student, six steps: loss, student, teacher and queue, with a queue that wraps."""
    model = isd_tf.ISD(linear_encoder("float64"), None, None, K, 0.05, 0.1, 0.9)
    model.compile(isd_tf.TorchSGD(0.5, sgd_momentum=0.0, coupled_weight_decay=0.0))
    student = model.student_encoder.get_weights()[0]
    teacher, queue, pointer = student.copy(), model.queue.read_anchors().numpy(), 0
    step = tf.function(model.train_step)

    random = np.random.default_rng(0)
    for _ in range(6):
        x_teacher, x_student = random.normal(size=(2, B, INPUTS))
        logs = step(
            {"teacher_view": tf.constant(x_teacher), "student_view": tf.constant(x_student)}
        )

        z = x_student @ student
        u, k = unit(z), unit(x_teacher @ teacher)
        p, q = softmax(k @ queue.T / 0.05), softmax(u @ queue.T / 0.1)
        loss = (p * np.log(p / q)).sum(axis=1).mean()
        g = (q - p) @ queue / 0.1 / B
        g = (g - u * (u * g).sum(1, keepdims=True)) / np.linalg.norm(z, axis=1, keepdims=True)
        student = student - 0.5 * x_student.T @ g
        teacher = 0.9 * teacher + 0.1 * student
        for row in k:
            queue[pointer] = row
            pointer = (pointer + 1) % K

        np.testing.assert_allclose(logs["loss"], loss, rtol=1e-10)
        np.testing.assert_allclose(model.student_encoder.get_weights()[0], student, rtol=1e-10)
        np.testing.assert_allclose(model.teacher_encoder.get_weights()[0], teacher, rtol=1e-10)
        np.testing.assert_allclose(model.queue.read_anchors(), queue, rtol=1e-10)
        assert int(model.queue.pointer) == pointer
        np.testing.assert_allclose(logs["teacher_entropy"], -(p * np.log(p)).sum(1).mean())
        np.testing.assert_allclose(logs["student_entropy"], -(q * np.log(q)).sum(1).mean())
        np.testing.assert_allclose(logs["embedding_std"], k.std(0).mean() * np.sqrt(D))
        np.testing.assert_allclose(logs["learning_rate"], 0.5)


def test_purity_is_the_share_of_the_nearest_labels_before_the_batch_enters():
    model = isd_tf.ISD(linear_encoder(), None, None, K, 0.05, 0.1)
    model.compile(isd_tf.TorchSGD(0.0))
    random = np.random.default_rng(0)
    anchors, anchor_labels = model.queue.read_anchors().numpy(), np.full(K, -1)
    for _ in range(4):
        views = random.normal(size=(B, INPUTS)).astype(np.float32)
        labels = random.integers(-1, 2, size=B)
        keys = unit(views @ model.teacher_encoder.get_weights()[0])
        nearest = np.argsort(-(keys @ anchors.T), axis=1)[:, :5]
        matches = (anchor_labels[nearest] == labels[:, None]) & (labels[:, None] >= 0)
        logs = model.train_step(
            {
                "teacher_view": tf.constant(views),
                "student_view": tf.constant(views),
                "label": tf.constant(labels),
            }
        )
        assert float(logs["purity"]) == pytest.approx(matches.mean())
        anchors, anchor_labels = model.queue.read_anchors().numpy(), model.queue.labels.numpy()


def test_collapsed_embeddings_have_no_deviation():
    model = isd_tf.ISD(linear_encoder(), None, None, K)
    model.compile(isd_tf.TorchSGD(0.1))
    same = tf.ones([B, INPUTS])
    logs = model.train_step({"teacher_view": same, "student_view": same})
    assert float(logs["embedding_std"]) == pytest.approx(0, abs=1e-6)


def mlp_isd(strategy, **settings):
    """Compiles faster than a ResNet; for batches of `vectors`."""
    keras.utils.set_random_seed(3)
    with strategy.scope():
        layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.ReLU()]
        head = keras.layers.Dense(D, dtype=keras.config.dtype_policy().variable_dtype)
        encoder = keras.Sequential([keras.Input((INPUTS,)), *layers, head])
        model = isd_tf.ISD(encoder, None, None, K, 0.1, 0.2, 0.9)
        model.compile(isd_tf.TorchSGD(0.05), **settings)
    return model


def vectors(steps):
    values = np.random.default_rng(0).normal(size=(2, steps * 8, INPUTS)).astype(np.float32)
    data = {"teacher_view": values[0], "student_view": values[1]}
    return tf.data.Dataset.from_tensor_slices(data).batch(8, drop_remainder=True)


def resnet_isd(strategy, synchronized, shuffled=False, heads=isd_tf.isd_plus_heads):
    keras.utils.set_random_seed(3)
    with strategy.scope():
        encoder = isd_tf.build_encoder("tiny_resnet", 16, 4, synchronized)
        model = isd_tf.ISD(
            encoder, *heads(16, synchronized), 37, 0.05, 0.1, 0.9, shuffle_batch_norm=shuffled
        )
        rate = isd_tf.CosineByEpoch(0.05, 2, 10)
        model.compile(isd_tf.TorchSGD(rate))
    return model


def test_two_replicas_with_synchronised_batch_norm_equal_one(float64, two_replicas):
    """With ISD's heads; ISD+'s, several processes and views: multi_worker_test.py."""
    settings = dict(synchronized=True, heads=isd_tf.isd_heads)
    one = resnet_isd(tf.distribute.get_strategy(), **settings)
    two = resnet_isd(two_replicas, **settings)
    for ours, theirs in zip(one.variables, two.variables, strict=True):
        theirs.assign(ours)

    batches = image_batches(20)
    histories = [
        model.fit(batches.repeat(), epochs=20, steps_per_epoch=1, verbose=0).history["loss"]
        for model in (one, two)
    ]

    np.testing.assert_allclose(*histories, rtol=1e-10)
    for ours, theirs in zip(one.variables, two.variables, strict=True):
        np.testing.assert_allclose(theirs.numpy(), ours.numpy(), atol=1e-10, err_msg=ours.path)
    assert int(two.queue.pointer.numpy()) == 20 * 8 % 37


@pytest.mark.parametrize("shuffled", [False, True])
def test_replicas_hold_the_same_student_teacher_and_queue(two_replicas, shuffled):
    model = resnet_isd(two_replicas, synchronized=False, shuffled=shuffled)
    model.fit(image_batches(4), verbose=0)
    for variable in model.variables:
        if "moving_" in variable.path or "seed" in variable.path:
            continue  # Statistics are each replica's own.
        first, second = two_replicas.experimental_local_results(variable.value)
        np.testing.assert_array_equal(first, second, err_msg=variable.path)


@pytest.mark.parametrize("synchronized", [False, True])
def test_shuffling_changes_the_teachers_statistics_and_nothing_else(
    float64, two_replicas, synchronized
):
    loss = {}
    for shuffled in (False, True):
        model = resnet_isd(two_replicas, synchronized, shuffled=shuffled)
        loss[shuffled] = model.fit(image_batches(2), verbose=0, shuffle=False).history["loss"]
    if synchronized:  # Statistics of the whole batch are the same in any order.
        np.testing.assert_allclose(loss[True], loss[False], rtol=1e-10)
    else:
        assert abs(loss[True][0] - loss[False][0]) > 1e-6


def test_a_replica_that_parts_from_the_others_is_noticed(two_replicas):
    model = mlp_isd(two_replicas)
    check = monitoring.CheckReplicas(synchronized_batch_norm=False)
    model.fit(vectors(2), verbose=0, callbacks=[check])
    copies = two_replicas.experimental_local_results(model.queue.rows.value)
    copies[1].assign(copies[1] + 1e-7)
    with pytest.raises(RuntimeError, match="All 2 replicas.*after step 3.*queue/rows first"):
        model.fit(vectors(1), verbose=0, callbacks=[check])


def test_training_lowers_the_loss_and_needs_no_labels():
    model = resnet_isd(tf.distribute.get_strategy(), synchronized=False)
    batches = image_batches(4, labels=False).cache().repeat()
    history = model.fit(batches, epochs=10, steps_per_epoch=4, verbose=0).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert "purity" not in history


def test_a_model_is_saved_and_loaded_whole(tmp_path):
    model = resnet_isd(tf.distribute.get_strategy(), synchronized=False)
    model.compile(model.optimizer, steps_per_execution=3)
    saver = keras.callbacks.ModelCheckpoint(tmp_path / "isd.keras")
    model.fit(image_batches(3), verbose=0, shuffle=False, callbacks=[saver])
    loaded = keras.models.load_model(tmp_path / "isd.keras")
    assert isinstance(loaded, isd_tf.ISD)
    assert loaded.teacher_temperature == model.teacher_temperature
    assert loaded.steps_per_execution == 3
    for ours, theirs in zip(model.variables, loaded.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=ours.path)
    batch = next(iter(image_batches(1)))
    assert float(model.train_step(batch)["loss"]) == float(loaded.train_step(batch)["loss"])


@pytest.fixture
def policy():
    """Sets Keras' dtype policy for a test."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_learns_like_float32(precision, policy):
    history = {}
    for name in ("float32", precision):
        policy(name)
        model = mlp_isd(tf.distribute.get_strategy())
        fit = dict(epochs=30, verbose=0, shuffle=False)
        history[name] = model.fit(vectors(4), **fit).history["loss"]
    assert history["float32"][-1] < 0.7 * history["float32"][0]
    np.testing.assert_allclose(history[precision], history["float32"], rtol=0.05)
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (precision == "mixed_float16")


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_similarities_divergence_and_queue_are_float32_in_half_precision(
    precision, policy, monkeypatch
):
    seen = []
    compare = losses.similarity_distillation

    def watch(student, teacher, anchors, *arguments, **keywords):
        result = compare(student, teacher, anchors, *arguments, **keywords)
        seen.extend(tensor.dtype for tensor in (student, teacher, anchors, *result[:3]))
        return result

    monkeypatch.setattr(losses, "similarity_distillation", watch)
    policy(precision)
    model = mlp_isd(tf.distribute.get_strategy())
    model.fit(vectors(2), verbose=0)
    assert set(seen) == {tf.float32} and model.queue.rows.dtype == "float32"
    # Unit rows to float32's precision: half of it would be off by 1e-3.
    norms = np.linalg.norm(model.queue.read_anchors(), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-6)


def test_loss_scaling_gives_the_gradients_of_float32(policy):
    """Weights after one step, with a scale so large that every loss and gradient carries it."""
    policy("float32")
    plain = resnet_isd(tf.distribute.get_strategy(), synchronized=False)
    before = [variable.numpy() for variable in plain.trainable_variables]
    policy("mixed_float16")
    scaled = resnet_isd(tf.distribute.get_strategy(), synchronized=False)
    scaled.optimizer.dynamic_scale.assign(2.0**12)
    for ours, theirs in zip(plain.variables, scaled.variables, strict=True):
        theirs.assign(ours)
    for model in (plain, scaled):
        model.fit(image_batches(1), verbose=0, shuffle=False)
    moved = [
        np.concatenate(
            [(v.numpy() - b).ravel() for v, b in zip(m.trainable_variables, before, strict=True)]
        )
        for m in (plain, scaled)
    ]
    cosine = np.dot(*moved) / np.prod([np.linalg.norm(m) for m in moved])
    assert cosine > 0.99 and np.linalg.norm(moved[1]) / np.linalg.norm(moved[0]) < 1.1


def test_a_step_that_overflows_is_left_out_by_all_replicas_and_counted(policy, two_replicas):
    policy("mixed_float16")
    model = mlp_isd(two_replicas)
    model.optimizer.dynamic_scale.assign(2.0**60)
    before = [variable.numpy() for variable in model.trainable_variables]
    model.fit(vectors(1), verbose=0)
    for variable, value in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    for variable, value in ((model.optimizer.dynamic_scale, 2.0**59), (model.step, 1)):
        for copy in two_replicas.experimental_local_results(variable.value):
            assert float(copy) == value


def test_the_learning_rate_follows_the_epochs_through_steps_that_overflow(policy, two_replicas):
    """Two steps of four overflow: the rate of the third epoch is due after the fourth."""
    policy("mixed_float16")
    model = mlp_isd(two_replicas)
    rate = isd_tf.DropsByEpoch(0.5, [3], 0.1, steps_per_epoch=2)
    with two_replicas.scope():
        model.compile(isd_tf.TorchSGD(rate))
    # Halved at each overflow: the third step's gradients, of about 1, stay below 65504.
    model.optimizer.dynamic_scale.assign(2.0**60)
    model.fit(vectors(2), verbose=0)
    assert float(model.optimizer.dynamic_scale.numpy()) == 2.0**58
    model.optimizer.dynamic_scale.assign(2.0)
    model.fit(vectors(2), verbose=0)
    assert float(model.optimizer.dynamic_scale.numpy()) == 2.0
    assert int(model.step.numpy()) == 4
    np.testing.assert_allclose(model.optimizer.learning_rate.numpy(), 0.05, rtol=1e-6)


@pytest.mark.parametrize("replicas", [1, 2])
def test_xla_computes_the_same_steps(replicas, float64, two_replicas):
    strategy = two_replicas if replicas == 2 else tf.distribute.get_strategy()
    models = []
    for jit_compile in (False, True):
        model = mlp_isd(strategy, jit_compile=jit_compile)
        histories = model.fit(vectors(6), verbose=0, shuffle=False).history
        models.append((model, histories["loss"]))
    (plain, loss), (compiled, compiled_loss) = models
    np.testing.assert_allclose(compiled_loss, loss, rtol=1e-11)
    for ours, theirs in zip(plain.variables, compiled.variables, strict=True):
        np.testing.assert_allclose(theirs.numpy(), ours.numpy(), atol=1e-9, err_msg=ours.path)
    graph = str(compiled.train_function.get_concrete_function(
        iter(strategy.experimental_distribute_dataset(vectors(1)))
    ).graph.as_graph_def())  # fmt: skip
    assert "_XlaMustCompile" in graph


def test_xla_is_refused_with_synchronised_batch_norm():
    model = resnet_isd(tf.distribute.get_strategy(), synchronized=True)
    with pytest.raises(ValueError, match="cannot compile .*synchronised.*leave --compile out"):
        model.compile(isd_tf.TorchSGD(0.1), jit_compile=True)


def test_features_are_those_of_the_student():
    model = resnet_isd(tf.distribute.get_strategy(), synchronized=False)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    np.testing.assert_array_equal(model(images), model.student_encoder(images, training=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(teacher_temperature=0.0),
            "teacher_temperature must be greater than 0.*Received: 0.0",
        ),
        (
            dict(student_temperature=-1.0),
            "student_temperature must be greater than 0.*Received: -1.0",
        ),
        (dict(teacher_momentum=1.5), r"teacher_momentum must be in \[0, 1\].*1.5"),
    ],
)
def test_settings_outside_their_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        isd_tf.ISD(linear_encoder(), None, None, K, **arguments)
