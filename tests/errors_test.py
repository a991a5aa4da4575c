"""What people are told of an error: TensorFlow's and Keras' own, raised by what raises them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from isd_tf.training.errors import sentence


def raised_by(function, *arguments):
    with pytest.raises(Exception) as caught:  # noqa: B017 - of whatever kind
        function(*arguments)
    return sentence(caught.value)


def assert_one_line(text, *parts):
    assert "\n" not in text and all(part in text for part in parts), text
    for wrapping in ("{{", "[Op:", "\x1b", "user code", "Traceback", "Graph execution", "[["):
        assert wrapping not in text


# As TensorFlow 2.21 words it, eagerly and in a graph, once it has tried for ten seconds.
OUT_OF_MEMORY = (
    "{{function_node __wrapped__RandomNormal_device_/job:localhost/replica:0/task:0/device:CPU:0}} "
    "OOM when allocating tensor with shape[9,128] and type float on /job:localhost/replica:0/task:0"
    "/device:CPU:0 by allocator mklcpu [Op:RandomNormal]",
    "Graph execution error:\n\nDetected at node AddN_5 defined at (most recent call last):\n"
    '  File "run.py", line 3, in main\n\n  File "trainer.py", line 9, in fit\n\n'
    "OOM when allocating tensor with shape[9,128] and type float\n\t [[{{node AddN_5}}]]\n"
    "Hint: If you want to see a list of allocated tensors when OOM happens, add "
    "report_tensor_allocations_upon_oom.\n [Op:__inference_train_function_5279]",
)


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_memory_that_does_not_suffice(message):
    text = sentence(tf.errors.ResourceExhaustedError(None, None, message))
    assert_one_line(text, "The memory does not suffice (OOM when allocating tensor with shape[9")
    assert "Lower --batch_size, --queue_size, --image_size or --width" in text


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            tf.errors.ResourceExhaustedError,
            "{{function_node __wrapped__Conv2D_device_/job:localhost/device:GPU:0}} OOM when "
            "allocating tensor with shape[9,128] and type float on /job:localhost/replica:0/task:0/"
            "device:GPU:0 by allocator GPU_0_bfc [Op:Conv2D]",
        ),
        (
            tf.errors.ResourceExhaustedError,
            "Out of memory while trying to allocate 9663676416 bytes. [Op:__inference_f_9]",
        ),
        (
            tf.errors.InternalError,
            "Failed copying input tensor from /job:localhost/replica:0/task:0/device:CPU:0 to /job:"
            "localhost/replica:0/task:0/device:GPU:0 in order to run _EagerConst: Dst tensor is "
            "not initialized.",
        ),
        (tf.errors.InternalError, "CUDA runtime failed: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    ],
)
def test_memory_of_a_gpu(kind, message):
    """As TensorFlow is known to word it; there was no GPU here."""
    assert_one_line(sentence(kind(None, None, message)), "The memory does not suffice (", "Lower")
    assert not sentence(kind(None, None, "Something else.")).startswith("The memory")


def test_a_path_that_is_no_utf8(tmp_path):
    writing = raised_by(tf.summary.create_file_writer, f"{tmp_path}/caf\udce9")
    assert_one_line(writing, "paths in UTF-8 only", "LC_ALL")


def test_memory_of_numpys():
    assert_one_line(raised_by(np.ones, 2**50), "The memory does not suffice (Unable to allocate")
    assert sentence(MemoryError()).startswith("The memory does not suffice (MemoryError)")


def test_a_full_disk_is_not_memory():
    full = tf.errors.ResourceExhaustedError(None, None, "/x/shard; No space left on device")
    assert sentence(full) == "ResourceExhaustedError: /x/shard; No space left on device"


def test_an_operation_inside_a_graph():
    @tf.function
    def function():
        return tf.io.decode_png(tf.io.read_file("/nowhere/a.png"))

    assert_one_line(raised_by(function), "NotFoundError: ", "/nowhere/a.png", "No such file")


def refuse(x):
    if x.shape[0] == 3:
        raise ValueError("Expected another shape. Received: 3.")
    return x


@pytest.mark.parametrize(
    "function",
    [
        tf.function(refuse),
        lambda x: list(tf.data.Dataset.from_tensors(x).map(refuse)),
        # No tf.map_fn: what is raised inside leaves its caching device in the whole process.
        lambda x: list(
            tf.data.Dataset.from_tensors(x).map(
                lambda y: tf.while_loop(lambda _: True, refuse, [y])
            )
        ),
    ],
)
def test_what_user_code_refuses_is_its_own_sentence(function):
    assert raised_by(function, tf.zeros([3])) == "Expected another shape. Received: 3."


def test_what_a_layer_refuses_is_said_without_its_arguments():
    layer = keras.layers.Dense(2)
    layer.build([None, 3])
    assert_one_line(raised_by(layer, tf.zeros([2, 4])), "expected axis -1 of input shape")

    class Refusing(keras.layers.Layer):
        def call(self, inputs):
            raise ValueError("Expected more.")

    assert raised_by(Refusing(), tf.zeros([2, 4])) == "Expected more."


def test_own_sentences_stay_as_they_are_and_other_kinds_are_named():
    assert sentence(ValueError("One line.\n\nAnd another.")) == "One line.\n\nAnd another."
    assert sentence(FileNotFoundError(2, "No such file", "x")) == "[Errno 2] No such file: 'x'"
    assert sentence(KeyError("x")) == "KeyError: 'x'"
    assert sentence(RuntimeError()) == "RuntimeError"
