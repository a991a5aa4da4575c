import concurrent.futures
import io
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import joblib
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


def where():
    """A process, and whether TensorFlow is in it."""
    group = group_of([png(IMAGES[0])], process_looks.where, shapes=[(2,)], types=[np.int64])
    ((process, has_tensorflow),) = crop_processes.look_at_in_process(group)[0][0]
    return int(process), bool(has_tensorflow)


@pytest.fixture
def alone():
    """Without the processes that other tests have left."""
    others, crop_processes._free[:] = list(crop_processes._free), []
    yield
    for process in crop_processes._free:
        process.socket.close()
        process.process.wait()
    crop_processes._free[:] = others


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


def test_a_process_stays_and_has_no_tensorflow(alone):
    process, has_tensorflow = where()
    assert process != os.getpid() and not has_tensorflow
    assert psutil.Process(process).num_threads() == 1
    for number in (signal.SIGINT, signal.SIGTERM):  # The training answers these, and ends it.
        os.kill(process, number)
    assert where() == where() == (process, False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nor_does_it_answer_when_it_has_just_begun(number):
    process = crop_processes._Process()
    process.process.send_signal(number)
    assert process.look_at(group_of([png(IMAGES[0])]))[1] == {}
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_there_are_no_more_than_cores(alone, monkeypatch):
    def slowly():
        time.sleep(0.1)
        return 3

    monkeypatch.setattr(joblib, "cpu_count", slowly)
    monkeypatch.setattr(crop_processes, "_only_turns", {})
    group = group_of([png(IMAGES[0])], process_looks.wait, shapes=[(1,)], types=[np.int64])
    group = group._replace(draws=np.array([[0.1]]))

    def look(_):
        return int(crop_processes.look_at_in_process(group)[0][0][0, 0])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(look, range(16)))) == len(crop_processes._free) == 3


@pytest.mark.parametrize(
    ("look", "how", "cure"),
    [
        (process_looks.die, r"signal 9 \(Killed\)", "--max_pixels. The same command continues."),
        (
            process_looks.leave,
            "exit code 3",
            "What it said stands in the output of the program that had started it.",
        ),
    ],
)
def test_a_process_that_ends_is_an_error_in_a_sentence_and_another_goes_on(look, how, cure):
    def call(i):
        crop_processes.look_at_in_process(group_of([png(IMAGES[0])] * 2, look))
        return i

    with pytest.raises(OSError, match=f"end of one, by {how}. It had to decode image 0, image 1"):
        call(None)
    numbers = tf.data.Dataset.range(1).map(lambda i: call_python(call, [i], tf.int64))
    with pytest.raises(OSError) as raised, explaining([]):
        list(numbers)
    beginning = "The processes that decode images must live as long as the training. Received: the"
    assert str(raised.value).startswith(beginning) and str(raised.value).endswith(cure)
    where()


def test_what_ended_without_work_is_not_missed(alone):
    process, _ = where()
    os.kill(process, signal.SIGKILL)
    crop_processes._free[0].process.wait()
    assert where()[0] != process


@pytest.mark.parametrize("are_paths", [False, True])
def test_what_fails_there_fails_here_and_the_process_goes_on(are_paths, alone, tmp_path):
    process, _ = where()
    (tmp_path / "image").write_bytes(png(IMAGES[0]))
    source = os.fsencode(tmp_path / "image") if are_paths else png(IMAGES[0])
    with pytest.raises(RuntimeError, match="image 0 cannot be cropped: ValueError: what is wrong"):
        crop_processes.look_at_in_process(group_of([source] * 5, process_looks.fail, are_paths))
    assert where()[0] == process


def test_what_does_not_fit_into_the_memory_is_unreadable():
    group = group_of([png(image) for image in IMAGES[:4]], process_looks.fail_with_the_third)
    (images, draws), reasons = crop_processes.look_at_in_process(group)
    assert reasons == {2: "more than fits into the memory"}
    np.testing.assert_array_equal(images, [IMAGES[0], IMAGES[1], 0 * IMAGES[2], IMAGES[3]])
    assert not draws[2].any() and draws[3].any()


def test_what_cannot_be_sent_leaves_no_process_behind(alone):
    process, _ = where()
    with pytest.raises(AttributeError):  # Of what has no name nothing can be sent.
        crop_processes.look_at_in_process(group_of([png(IMAGES[0])], lambda *_: None))
    psutil.Process(process).wait(10)
    assert where()[0] != process


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Linux")
def test_a_record_that_does_not_fit_ends_the_process_and_is_taken_for_nothing_else(alone):
    process, _ = where()
    now = psutil.Process(process).memory_info().vms
    resource.prlimit(process, resource.RLIMIT_AS, (now + 2**26, resource.RLIM_INFINITY))
    records = [b"." * 2**27, *[png(IMAGES[0])] * 3]
    with pytest.raises(OSError, match="end of one, by exit code 1. It had to decode image 0, ima"):
        crop_processes.look_at_in_process(group_of(records))
    assert where()[0] != process


def test_one_that_cannot_be_started_is_an_error(alone, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(OSError, match="/no/python"):
        where()


def test_paths_are_those_of_where_this_process_is_now(alone, tmp_path, monkeypatch):
    where()
    (tmp_path / "here.png").write_bytes(png(IMAGES[1]))
    monkeypatch.chdir(tmp_path)
    (images, _), reasons = crop_processes.look_at_in_process(
        group_of([b"here.png"], are_paths=True)
    )
    np.testing.assert_array_equal(images, IMAGES[1:2])
    assert not reasons


def test_odd_places_to_import_from_do_no_harm(alone, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", ["", tmp_path, *sys.path, None])
    where()


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
def where(look=process_looks.where, encoded={png(IMAGES[0])!r}):
    group = crop_processes.Group(
        [encoded], False, ["an image"], np.zeros([1, 0]), look, [(2,)], [int], 99)
    return int(crop_processes.look_at_in_process(group)[0][0][0, 0])
print(where(), flush=True)
"""


def test_a_process_ends_with_the_one_that_started_it():
    with run(BEGIN + "time.sleep(60)") as program:
        process = psutil.Process(int(program.stdout.readline()))
        program.kill()
        process.wait(10)


def test_a_fork_starts_its_own():
    with run(BEGIN + "os.fork()\nprint(where(), flush=True)") as program:
        first, *later = program.communicate(timeout=30)[0].split()
    assert first in later and len(later) == len(set(later)) == 2


def test_a_fork_keeps_no_process_that_is_at_work():
    fork = """
process = crop_processes._free.pop()  # As one has it that is at work.
if not os.fork():
    time.sleep(60)
"""
    with run(BEGIN + fork + "print(os.getpid(), flush=True)\ntime.sleep(60)") as program:
        process = psutil.Process(int(program.stdout.readline()))
        program.stdout.readline()
        (forked,) = set(psutil.Process(program.pid).children()) - {process}
        program.kill()
        try:
            process.wait(10)
        finally:
            forked.kill()


def test_what_the_processes_warn_of_is_said_here():
    """The one warning of `pixels` once, whatever others, of Pillow's, came before it."""
    dark, odd = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((5, 7), 4000, np.uint16)).save(dark, "PNG")
    Image.fromarray(IMAGES[0]).save(odd, "TIFF")
    damaged = odd.getvalue().replace(
        b"\x15\x01\x03\0\x01\0\0\0\x03", b"\x15\x01\x03\0\x01\0\0\0\x09"
    )
    assert damaged != odd.getvalue()
    said = f"""
import logging
logging.basicConfig(format="%(name)s %(message)s", stream=sys.stdout)
for encoded in ({damaged!r}, {dark.getvalue()!r}, {dark.getvalue()!r}):
    where(encoded=encoded)
crop_processes._free.clear()
where(encoded={dark.getvalue()!r})
"""
    with run(BEGIN + said) as program:
        text = program.communicate(timeout=30)[0]
    assert text.count("an image has 16 bits") == 1
    assert "PIL.TiffImagePlugin More samples per pixel" in text
