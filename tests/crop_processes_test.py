import concurrent.futures
import io
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import process_looks
import psutil
import pytest
import tensorflow as tf
from PIL import Image

from isd_tf.data import crop_processes
from isd_tf.data.decoding import explaining
from isd_tf.data.python_calls import call_python

SHAPE = 5, 7, 3
IMAGES = np.random.default_rng(0).integers(0, 256, (6, *SHAPE), np.uint8)


def png(pixels):
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def group_of(sources, look=process_looks.as_it_is, are_paths=False, **settings):
    names = [f"image {i}" for i in range(len(sources))]
    draws = np.arange(2 * len(sources), dtype=np.float32).reshape(-1, 2)
    settings = dict(shapes=[SHAPE, (2,)], types=[np.uint8, np.float32], max_pixels=100) | settings
    return crop_processes.Group(sources, are_paths, names, draws, look, **settings)


def place_of_process():
    group = group_of([png(IMAGES[0])], process_looks.where, shapes=[(2,)], types=[np.int64])
    ((process, has_tensorflow),) = crop_processes.look_at_in_process(group)[0][0]
    return process, has_tensorflow


@pytest.mark.parametrize("are_paths", [False, True])
def test_a_group_comes_back_as_it_was_sent_but_for_what_cannot_be_read(are_paths, tmp_path):
    large = np.zeros((11, 10, 3), np.uint8)
    sources = [png(IMAGES[0]), b"", png(IMAGES[2]), png(large), b"text"]
    if are_paths:
        for i, encoded in enumerate(sources):
            (tmp_path / f"{i}.png").write_bytes(encoded)
        sources = [os.fsencode(tmp_path / f"{i}.png") for i in range(5)]
    (images, draws), reasons = crop_processes.look_at_in_process(
        group_of(sources, are_paths=are_paths)
    )
    np.testing.assert_array_equal(
        images, [IMAGES[0], 0 * IMAGES[0], IMAGES[2], *[0 * IMAGES[0]] * 2]
    )
    np.testing.assert_array_equal(draws, [[0, 1], [0, 0], [4, 5], [0, 0], [0, 0]])
    assert images.dtype == np.uint8 and draws.dtype == np.float32
    assert reasons == {
        1: "empty",
        3: "10 x 11 pixels, more than --max_pixels=100",
        4: "not an image: begins with 'text'",
    }


def test_groups_of_many_threads_come_back_to_each():
    """More than a socket holds, of sizes of their own."""
    random = np.random.default_rng(1)

    def look(seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (300, 200 + seed, 3), np.uint8)
        group = group_of([png(pixels)] * 3, shapes=[pixels.shape, (2,)], max_pixels=10**6)
        (images, _), reasons = crop_processes.look_at_in_process(group)
        return not reasons and (images == pixels).all()

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        assert all(pool.map(look, random.permutation(40)))


def test_a_process_stays_and_has_no_tensorflow():
    process, has_tensorflow = place_of_process()
    assert process != os.getpid() and not has_tensorflow
    for number in (signal.SIGINT, signal.SIGTERM):  # The training answers these, and ends it.
        os.kill(process, number)
    others = {place_of_process()[0] for _ in range(20)}
    assert process in others and len(others) <= len(psutil.Process().children())


@pytest.mark.parametrize(
    ("look", "how"), [(process_looks.die, "SIGKILL"), (process_looks.leave, "exit code 3")]
)
def test_a_process_that_ends_is_an_error_in_a_sentence_and_another_goes_on(look, how):
    def call(i):
        crop_processes.look_at_in_process(group_of([png(IMAGES[0])], look))
        return i

    with pytest.raises(OSError, match=f"Received: the end of one, by {how}"):
        call(None)
    numbers = tf.data.Dataset.range(1).map(lambda i: call_python(call, [i], tf.int64))
    with pytest.raises(OSError) as raised, explaining([]):
        list(numbers)
    beginning = "The processes that decode images must live as long as the training. Received: the"
    assert str(raised.value).startswith(beginning)
    assert str(raised.value).endswith("The same command continues.")
    place_of_process()


def test_one_that_cannot_be_started_is_an_error(monkeypatch):
    monkeypatch.setattr(crop_processes, "_free", crop_processes.queue.SimpleQueue())
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(OSError, match="/no/python"):
        place_of_process()


def test_what_the_processes_warn_of_is_said_once_here(caplog, tmp_path):
    dark = io.BytesIO()
    Image.fromarray(np.full((5, 7), 4000, np.uint16)).save(dark, "PNG")
    for _ in range(3):
        crop_processes.look_at_in_process(group_of([dark.getvalue()] * 2))
    assert caplog.text.count("is read as nearly black") <= 1  # Others of this process may have.
    group = group_of([dark.getvalue()])
    ours = crop_processes._Process()
    caplog.clear()
    crop_processes._send(ours.socket, group)
    assert ["image 0 has 16 bits" in text for text in crop_processes._receive(ours.socket)[1]] == [
        True
    ]


def run(program):
    """Runs a program that has the module, but no TensorFlow; returns it."""
    program = crop_processes.PROGRAM.rpartition("crop_processes.serve")[0] + textwrap.dedent(
        program
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", program, str(crop_processes.PACKAGE)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


BEGIN = f"""
import os, time, numpy as np, process_looks
def where():
    group = crop_processes.Group(
        [{png(IMAGES[0])!r}], False, [""], np.zeros([1, 0]), process_looks.where, [(2,)], [int], 99)
    return int(crop_processes.look_at_in_process(group)[0][0][0, 0])
print(where(), flush=True)
"""


def test_a_process_ends_with_the_one_that_started_it():
    program = run(BEGIN + "time.sleep(60)")
    process = psutil.Process(int(program.stdout.readline()))
    program.kill()
    process.wait(10)


def test_a_fork_starts_its_own():
    program = run(BEGIN + "os.fork()\nprint(where(), flush=True)")
    first, *later = program.communicate(timeout=30)[0].split()
    assert first in later and len(later) == len(set(later)) == 2
