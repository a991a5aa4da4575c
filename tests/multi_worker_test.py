"""Several worker processes on this machine: equal to one, exact through kills, never hanging."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from small_runs import (
    ROOT,
    assert_same_end,
    command,
    newest_weights,
    small_run,
    wait_for_checkpoint,
)

sys.path.insert(0, str(ROOT / "experiments"))

import launch  # noqa: E402

# What machines and processes do to each other takes its time: make slow.
pytestmark = pytest.mark.slow

random = np.random.default_rng(0)


@pytest.fixture
def start_workers():
    """Starts a worker for each list of arguments to Python; ends those that a test leaves."""
    processes = []

    def start(*commands):
        addresses = launch.free_addresses(len(commands))
        for index, arguments in enumerate(commands):
            task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            processes.append(
                subprocess.Popen(
                    arguments,
                    cwd=ROOT,
                    env=os.environ | {"TF_CONFIG": json.dumps(task)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return processes[-len(commands) :]

    yield start
    for process in processes:
        process.kill()


def outputs(processes, timeout=120):
    return [process.communicate(timeout=timeout) for process in processes]


# ------------------------------------------------------------------------------------- equality


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Runs train_for_comparison.py; returns the arrays that each of its processes has left."""
    folder, finished = tmp_path_factory.mktemp("trained"), {}

    def train(strategy, *settings):
        if (strategy, *settings) not in finished:
            output = folder / f"{len(finished)}.npz"
            program = [sys.executable, str(ROOT / "tests" / "train_for_comparison.py")]
            program += [strategy, str(output), *settings]
            count = 2 if strategy == "multi_worker" else 1
            ended = launch.run_workers(program, count, [])
            assert sorted(ended) == [(worker, 0) for worker in range(count)]
            left = [np.load(f"{output}.{i}" if i else output) for i in range(count)]
            finished[strategy, *settings] = left
        return finished[strategy, *settings]

    return train


def assert_close(ours, theirs, tolerance):
    """Compares to `tolerance`, of the largest value where that is above 1."""
    assert ours.files == theirs.files
    for name in ours.files:
        atol = tolerance * max(1.0, np.abs(theirs[name]).max())
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol, err_msg=name)


def test_one_device_two_devices_and_two_processes_train_the_same(train):
    """24 steps with views, float64, synchronised BatchNorm."""
    (one,), (mirrored,), workers = train("one"), train("mirrored"), train("multi_worker")
    # Steps that differ from each other, so that their equality below says something.
    assert len(one["losses"]) == 24 and np.ptp(one["losses"]) > 1
    pointer = [name for name in one.files if name.endswith(":queue/pointer")]
    assert [int(one[name]) for name in pointer] == [24 * 8 % 37]
    assert_close(mirrored, one, tolerance=1e-12)
    for worker in workers:
        assert_close(worker, mirrored, tolerance=0)


def test_groups_on_one_device_have_the_statistics_of_several(train):
    """Two groups on one device against two devices, each with BatchNorm and Shuffle-BN."""
    (grouped,), (whole,) = train("one", "batch_norm=grouped"), train("one")
    (mirrored,) = train("mirrored", "batch_norm=shuffled")
    # Statistics of 4 examples magnify rounding, from step to step.
    np.testing.assert_allclose(grouped["losses"], mirrored["losses"], rtol=1e-8)
    assert abs(grouped["losses"][0] - whole["losses"][0]) > 1e-3
    for name in grouped.files:
        # A checkpoint of several devices has the first's moving statistics, groups have the mean.
        if "moving_" not in name:
            np.testing.assert_allclose(grouped[name], mirrored[name], atol=1e-8, err_msg=name)


def test_several_steps_an_execution_are_the_same_steps(train):
    workers, (mirrored,) = train("multi_worker", "steps_per_execution=4"), train("mirrored")
    means = mirrored["losses"].reshape(6, 4).mean(axis=1)
    for worker in workers:
        np.testing.assert_allclose(worker["losses"], means, rtol=1e-14)
        for name in worker.files[1:]:
            np.testing.assert_array_equal(worker[name], mirrored[name], err_msg=name)


# ------------------------------------------------------------------------- runs that are disturbed


STEPS = 24 // 4 * 8  # 24 images in batches of 4, 8 epochs: time to disturb them


def distributed_run(photos, workdir, *arguments):
    return small_run(
        photos, workdir, "--strategy=multi_worker", "--stages=pretrain", "--knn_every_epochs=0",
        "--epochs=8", *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """The workdir of two workers that nobody disturbed, started by the launcher."""
    workdir = tmp_path_factory.mktemp("whole")
    stages = "--stages=pretrain,evaluate,export"
    result = run_launcher(distributed_run(photos, workdir, stages, "--knn_every_epochs=4"))
    assert result.wait(timeout=120) == 0, result.stdout.read()
    (workdir / "output.txt").write_text(result.stdout.read())
    return workdir


def run_launcher(arguments, restarts=0):
    program = [sys.executable, "-u", str(ROOT / "experiments" / "launch.py"), "--workers=2"]
    return subprocess.Popen(
        [*program, f"--restarts={restarts}", "--", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_every_worker_says_what_it_is_and_the_chief_reports(whole):
    output = (whole / "output.txt").read_text()
    for index, who in enumerate(("Worker 0 of 2 (the chief)", "Worker 1 of 2")):
        start = f"[worker {index}] {who}: 1 CPU replica, 2 in all: global batch 4, replica batch 2."
        assert start in output
    assert "[worker 0] Epoch 8/8" in output and "[worker 1] Epoch" not in output
    results = json.loads((whole / "results.json").read_text())
    assert results["step"] == STEPS and 0 <= results["student_1nn"] <= 1
    # 1-NN and 20-NN of the teacher.
    assert re.search(r"^\[worker 0\] teacher( +\d+\.\d%){2}$", output, re.MULTILINE)
    assert "[worker 0] SavedModel of the student" in output
    assert len(list((whole / "logs").iterdir())) == 1


@pytest.mark.parametrize("killed", [0, 1])
def test_a_worker_killed_at_random_ends_the_others_and_all_restart_to_the_same_bits(
    killed, photos, whole, tmp_path
):
    launcher = run_launcher(distributed_run(photos, tmp_path), restarts=1)
    try:
        wait_for_checkpoint(tmp_path, random.integers(2, 14), launcher)
        children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
        os.kill(int(children.split()[killed]), signal.SIGKILL)
        output, _ = launcher.communicate(timeout=150)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, output
    assert f"Worker {killed} ended by SIGKILL" in output
    assert f"Worker {1 - killed} has lost another worker" in output
    assert f"Worker {1 - killed} ended with exit code 75 (" in output
    assert "restart 1 of 1" in output and "Continuing" in output
    assert_same_end(tmp_path, whole)


def test_sigterm_to_one_worker_saves_on_all_and_what_is_left_continues_to_the_same_bits(
    photos, whole, tmp_path, start_workers
):
    run = command(*distributed_run(photos, tmp_path, "--checkpoint_every_steps=3"))
    workers = start_workers(run, run)
    wait_for_checkpoint(tmp_path, 3, workers[0])
    workers[1].send_signal(signal.SIGTERM)
    (output, _), _ = outputs(workers)
    assert [worker.returncode for worker in workers] == [143, 143]
    saved = int(
        re.search(r"Told to stop \(SIGTERM\) after step \d+; saved step (\d+)", output).group(1)
    )
    assert newest_weights(tmp_path)[0] == f"step-{saved:08d}" and saved < STEPS
    workers = start_workers(run, run)
    (output, errors), _ = outputs(workers)
    assert workers[0].returncode == 0, errors
    assert f"Continuing {tmp_path} after step {saved}" in output
    assert_same_end(tmp_path, whole)


def stop_early(processes, workdir):
    wait_for_checkpoint(workdir, (newest_step(workdir) or 0) + 2, processes[0])
    processes[0].send_signal(signal.SIGTERM)
    said = outputs(processes)
    assert [process.returncode for process in processes] == [143] * len(processes), said


def newest_step(workdir):
    return max((int(p.name[5:]) for p in workdir.glob("checkpoints/step-*")), default=0)


def assert_exports_what_the_checkpoint_holds(workdir, processes):
    for process, (_, errors) in zip(processes, outputs(processes), strict=True):
        assert process.returncode == 0, errors
    version = max((workdir / "saved_model").iterdir())
    exported = tf.train.load_checkpoint(str(version / "variables" / "variables"))
    shapes = exported.get_variable_to_shape_map()
    kernels = [exported.get_tensor(key) for key, shape in shapes.items() if len(shape) == 4]
    # The student's; the teacher's copies, under names of their own, lag behind.
    _, stored = newest_weights(workdir)
    stored = [value for key, value in stored.items() if "_trainable_variables" in key]
    assert len(kernels) == 9
    for kernel in kernels:
        assert any(np.array_equal(kernel, value) for value in stored)


def test_checkpoints_pass_from_one_device_to_two_workers_and_back(
    photos, whole, tmp_path, start_workers
):
    one = command(*distributed_run(photos, tmp_path, "--strategy=one"))
    two = command(*distributed_run(photos, tmp_path))
    alone = subprocess.Popen(one, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stop_early([alone], tmp_path)
    first = newest_step(tmp_path)
    export = command(*distributed_run(photos, tmp_path, "--stages=export"))
    assert_exports_what_the_checkpoint_holds(tmp_path, start_workers(export, export))
    stop_early(start_workers(two, two), tmp_path)
    second = newest_step(tmp_path)
    assert 0 < first < second < STEPS
    result = subprocess.run(one, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"after step {second}" in result.stdout
    assert newest_step(tmp_path) == STEPS
    export = command(*distributed_run(photos, whole, "--stages=export", "--strategy=one"))
    alone = subprocess.Popen(export, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert_exports_what_the_checkpoint_holds(whole, [alone])


# -------------------------------------------------------------------------------------- bad input


def assert_all_refuse(workers, message):
    for worker, (_, errors) in zip(workers, outputs(workers), strict=True):
        assert re.search(message, errors), errors
        assert "Traceback" not in errors
        assert worker.returncode == 1


def test_workers_with_different_recipes_refuse(photos, tmp_path, start_workers):
    workers = start_workers(
        command(*distributed_run(photos, tmp_path)),
        command(*distributed_run(photos, tmp_path, "--seed=1", "--width=8", "--stages=export")),
    )
    message = (
        "same recipe.*worker 0 has --seed=0 --stages=\\['pretrain'\\] --width=4; worker 1 has "
    )
    assert_all_refuse(workers, message + "--seed=1 --stages=\\['export'\\] --width=8")
    assert not (tmp_path / "checkpoints").exists()


def test_workers_that_do_not_share_the_workdir_refuse(photos, tmp_path, start_workers):
    workers = start_workers(
        *(command(*distributed_run(photos, tmp_path / name)) for name in ("here", "there"))
    )
    assert_all_refuse(workers, "All workers must share the workdir.*there")


def test_data_that_one_worker_lacks_end_all(photos, tmp_path, start_workers):
    workers = start_workers(
        command(*distributed_run(photos, tmp_path)),
        command(*distributed_run(photos, tmp_path, "--data_dir=nowhere")),
    )
    assert_all_refuse(workers, "does not exist.*nowhere")


def test_unreadable_images_are_counted_over_all_workers(photos, tmp_path, start_workers):
    """One is allowed. Each worker meets another one, in the first epoch."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    paths = sorted((folder / "train").rglob("*.png"))
    order = tf.random.experimental.index_shuffle(np.arange(24), np.int64([0, 0]), 23).numpy()
    for place in (4, 11):  # A worker has the first two rows of each four, the other the rest.
        paths[order[place]].write_bytes(b"broken")
    run = command(
        *small_run(folder, tmp_path / "run", "--strategy=multi_worker", "--max_unreadable=0.06",
                   "--knn_every_epochs=0")
    )  # fmt: skip
    names = ", ".join(sorted(str(paths[order[place]]) for place in (4, 11)))
    assert_all_refuse(start_workers(run, run), f"At most 6.0%.*2 of 24, for example {names}. ")
    # The first three steps meet both, and the third is not saved.
    assert newest_step(tmp_path / "run") == 2


def test_a_worker_gives_up_waiting_for_the_others(photos, tmp_path):
    addresses = launch.free_addresses(2)
    task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 0}}
    result = subprocess.run(
        command(*distributed_run(photos, tmp_path, "--cluster_timeout=1")),
        cwd=ROOT,
        env=os.environ | {"TF_CONFIG": json.dumps(task)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 75
    assert f"for worker 1 at {addresses[1]}, and gives up" in result.stderr
    assert "Traceback" not in result.stderr
