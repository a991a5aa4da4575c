"""tf.data service in processes of its own, as experiments/data_service.py starts them."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from numbered_images import ARRAYS, SIZE, N, numbered_files
from small_runs import STEPS, command, small_run

from isd_tf.data import batches as batching
from isd_tf.data import datasets
from isd_tf.data import service as service_module
from isd_tf.data.decoding import Unreadable, explaining

# What machines and processes do to each other takes its time: make slow.
pytestmark = pytest.mark.slow

SCRIPT = pathlib.Path(__file__).parent.parent / "experiments" / "data_service.py"
BATCH = 4


def files(folder, broken=None):
    dataset = numbered_files(folder)
    if broken is not None:
        pathlib.Path(dataset.paths[broken]).write_bytes(b"broken")
    return dataset


def records(folder, broken=None):
    """The files in two shards of TFRecords, as TFDS writes them."""
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=N)}
    )
    shards = (str(folder / "shard0"), str(folder / "shard1"))
    with contextlib.ExitStack() as until_written:
        writers = [until_written.enter_context(tf.io.TFRecordWriter(shard)) for shard in shards]
        for i, path in enumerate(files(folder, broken).paths):
            writers[i % 2].write(features.serialize_example({"image": path, "label": i}))
    return datasets.RecordDataset("records", shards, (0, 0), (12, 11), features, "image", "label")


def batches_of(dataset, service=None, first_step=0, views=("weak", "weak"), **arguments):
    return batching.pretraining_batches(
        dataset, views, SIZE, BATCH, 1, first_step, data_service=service, **arguments
    )


def take(dataset, steps, service=None, *arguments, **more):
    return list(batches_of(dataset, service, *arguments, **more).take(steps).as_numpy_iterator())


@pytest.fixture
def service(address, tmp_path):
    return service_module.DataService(address, job=str(tmp_path))


def service_command(*arguments):
    return [sys.executable, str(SCRIPT), *arguments]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def address():
    """host:port of a dispatcher that has two workers."""
    port = free_port()
    roles = [("dispatcher", f"--port={port}"), *[("worker", f"--dispatcher=127.0.0.1:{port}")] * 2]
    with contextlib.ExitStack() as at_the_end:
        processes = []
        for role, flag in roles:
            process = subprocess.Popen(
                service_command(f"--role={role}", flag), stdout=subprocess.PIPE, text=True
            )
            at_the_end.callback(process.wait)
            at_the_end.callback(process.kill)
            processes.append(process)
        for process, (role, _) in zip(processes, roles, strict=True):
            assert f"{role} is ready: " in process.stdout.readline()
        yield f"127.0.0.1:{port}"
        for process in processes:
            process.terminate()
        assert [process.wait(timeout=10) for process in processes] == [0, 0, 0]


def fingerprint(batch):
    return tuple(np.asarray(part).tobytes() for part in tf.nest.flatten(batch))


@pytest.mark.parametrize("kind", ["arrays", "files", "records"])
def test_two_workers_make_each_batch_of_the_local_pipeline_once(service, tmp_path, kind, resizer):
    dataset = {"arrays": lambda _: ARRAYS, "files": files, "records": records}[kind](tmp_path)
    settings = dict(first_step=3, views=("weak", "strong"))
    batches = take(dataset, 150, service, **settings)
    for view, recipe in (("teacher_view", "weak"), ("student_view", "strong")):
        crops, seeds = batches[0][view][recipe]
        assert crops.shape == (BATCH, SIZE, SIZE, 3) and seeds.shape == (BATCH, 2)
    # Bit for bit. Here and there the service is ahead of the local pipeline.
    local = {fingerprint(batch): i for i, batch in enumerate(take(dataset, 400, **settings))}
    steps = [local[fingerprint(batch)] for batch in batches]
    assert len(set(steps)) == 150
    # 5 steps an epoch. What one worker began with, it has handed over when 150 are there.
    assert set(range(20)) <= set(steps)


def test_two_trainers_share_the_batches_of_one_job(service):
    trainers = [
        iter(batches_of(ARRAYS, service, input_context=tf.distribute.InputContext(2, trainer, 2)))
        for trainer in range(2)
    ]
    # With a replica in each, an element is half of a global batch.
    local = {
        fingerprint(tf.nest.map_structure(lambda x, at=first: x[at : at + 2], batch)): (i, first)
        for i, batch in enumerate(take(ARRAYS, 120))
        for first in (0, 2)
    }
    seen = [local[fingerprint(next(trainer))] for _ in range(30) for trainer in trainers]
    assert len(set(seen)) == 60


@pytest.mark.parametrize("kind", [files, records])
def test_an_unreadable_image_is_replaced_and_counted(service, tmp_path, kind, resizer):
    unreadable = Unreadable(N, 0.1)
    batches = take(kind(tmp_path, broken=5), 60, service, unreadable=unreadable)
    # As the local pipeline replaces it: bit for bit.
    local = take(kind(tmp_path, broken=5), 400, unreadable=Unreadable(N, 0.1))
    assert {fingerprint(batch) for batch in batches} <= {fingerprint(batch) for batch in local}
    assert 5 not in np.concatenate([batch["label"] for batch in batches])
    (name,) = unreadable.names
    assert name.endswith("/05.png" if kind is files else "/shard1, record 2")
    assert unreadable.met_before(1) == [name]  # From the first step on.


@pytest.mark.parametrize(
    ("kind", "name"), [(files, r"\S+/05.png"), (records, r"\S+/shard1, record 2")]
)
@pytest.mark.parametrize("limit", [0.0, 0.04])
def test_more_unreadable_images_than_allowed_end_the_training(service, tmp_path, kind, name, limit):
    dataset, unreadable = kind(tmp_path, broken=5), Unreadable(N, limit)
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    batches = strategy.distribute_datasets_from_function(
        lambda _: batches_of(dataset, service, unreadable=unreadable)
    )
    message = f"At most {limit:.1%} .*: 1 of 23, for example {name}. Repair"
    with pytest.raises(ValueError, match=message):
        with explaining([unreadable]):
            for _, _ in zip(range(60), batches, strict=False):
                pass


def test_of_several_trainers_none_ends_alone(service, tmp_path):
    """They count together: `CountUnreadable` asks each for what it has met up to a step."""
    unreadable, context = Unreadable(N, 0.0), tf.distribute.InputContext(2, 0, 2)
    dataset = files(tmp_path, broken=5)
    take(dataset, 60, service, unreadable=unreadable, input_context=context)
    assert unreadable.met_before(1) == [dataset.paths[5]]


def test_workers_that_do_not_find_the_images_say_so(service, tmp_path):
    paths = tuple(str(tmp_path / "elsewhere" / f"{i}.png") for i in range(N))
    dataset = datasets.FileDataset("files", paths)
    message = "workers must find the images .*Received: on .* no folder .*/elsewhere. Start them"
    with pytest.raises(OSError, match=message), explaining([]):
        take(dataset, 1, service, unreadable=Unreadable(N, 0.5))


def test_paths_mean_the_trainers_folder(service, tmp_path, monkeypatch):
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    dataset = datasets.FileDataset("files", tuple(f"{i:02d}.png" for i in range(N)))
    assert take(dataset, 1, service, unreadable=Unreadable(N, 0.0))


def test_files_of_records_mean_the_trainers_folder_or_stay_in_their_cloud(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = dataclasses.replace(records(tmp_path), files=("shard0", "gs://bucket/shard1"))
    whole = service_module.with_whole_paths(dataset).files
    assert whole == (str(tmp_path / "shard0"), "gs://bucket/shard1")


def test_a_worker_of_another_version_is_refused(service, tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "ARGUMENTS", ("sources", "names"))
    with pytest.raises(OSError, match="must have the trainer's version of isd_tf. Received"):
        with explaining([]):
            take(files(tmp_path), 1, service)


BARE_WORKER = """
import sys, tensorflow as tf
service = tf.data.experimental.service
worker = service.WorkerServer(service.WorkerConfig(sys.argv[1], worker_address="127.0.0.1:%port%"))
print("ready", flush=True)
worker.join()
"""
WITHOUT_RESIZER = """
import sys
sys.modules["cykooz_resizer"] = None
sys.argv[1:] = ["--role=worker", "--dispatcher", sys.argv[1], "--address=127.0.0.1"]
sys.path.insert(0, "experiments")
import data_service
data_service.main()
"""


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (BARE_WORKER, "be those of experiments/data_service.py. Received: .*Start others"),
        (WITHOUT_RESIZER, "have cykooz_resizer.*Received: one without. .*ARM: start others"),
    ],
)
def test_workers_that_cannot_crop_end_in_a_sentence(program, expected, tmp_path):
    pytest.importorskip("cykooz_resizer")
    dispatcher = tf.data.experimental.service.DispatchServer()
    address = dispatcher.target.partition("://")[2]
    worker = subprocess.Popen(
        [sys.executable, "-c", program, address],
        stdout=subprocess.PIPE,
        text=True,
        cwd=SCRIPT.parent.parent,
    )
    try:
        assert "ready" in worker.stdout.readline()
        service = service_module.DataService(address, job="job")
        with pytest.raises(OSError, match=f"^A data service's workers must {expected}"):
            with explaining([]):
                take(files(tmp_path), 1, service)
    finally:
        worker.kill()
        worker.communicate()


def test_a_worker_offers_its_crops_before_all_other_functions():
    other = tf.data.Dataset.range(1).map(lambda i: tf.numpy_function(abs, [i], tf.int64))
    assert list(other) == [0]
    with pytest.raises(RuntimeError, match="must be pyfunc_0. Received: pyfunc_"):
        service_module.offer_crops()


def test_a_run_is_trained_and_evaluated(address, photos, tmp_path):
    images, workdir = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photos, images)
    (images / "train" / "dark" / "3.png").write_bytes(b"broken")
    arguments = small_run(images, workdir, f"--data_service={address}", "--epochs=2")
    arguments += ["--stages=pretrain,evaluate", "--knn_every_epochs=0", "--max_unreadable=0.1"]
    result = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search("replaced by the next one: .*/train/dark/3.png", result.stderr)
    results = json.loads((workdir / "results.json").read_text())
    assert results["step"] == STEPS // 2 and np.isfinite(results["loss"])
    assert results["unreadable_images"] == 1 and 0 <= results["student_1nn"] <= 1


def test_a_run_without_a_dispatcher_says_what_to_start(photos, tmp_path):
    arguments = small_run(photos, tmp_path, "--data_service=127.0.0.1:9")
    result = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    message = "run.py: .*must answer at --data_service=127.0.0.1:9. Received: .*refused.*Start one"
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("bad", ["somewhere", "somewhere:", ":5000", "grpc://somewhere"])
def test_an_address_without_host_or_port_is_refused(bad):
    with pytest.raises(ValueError, match=f"dispatcher's, host:port.*Received: .*{bad}"):
        batches_of(ARRAYS, service_module.DataService(bad, "job"))


def test_an_unknown_host_is_refused():
    with pytest.raises(OSError, match="must answer at --data_service=nowhere.invalid:5000"):
        batches_of(ARRAYS, service_module.DataService("nowhere.invalid:5000", "job"))


def test_a_service_without_workers_is_not_waited_for_forever(monkeypatch):
    monkeypatch.setattr(service_module, "SECONDS", 0.5)
    dispatcher = tf.data.experimental.service.DispatchServer()
    address = dispatcher.target.partition("://")[2]
    with pytest.raises(OSError, match="must have workers. Received: none.*--role=worker"):
        batches_of(ARRAYS, service_module.DataService(address, "job"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "required: --role"),
        (["--role=trainer"], 2, "'trainer' .choose from"),
        (["--role=dispatcher", "--port=65536"], 2, "below 65536. Received: 65536"),
        (["--role=dispatcher", "--dispatcher=a:1"], 2, "a dispatcher has none. Received.*a:1"),
        (["--role=worker"], 2, "A worker needs --dispatcher=HOST:PORT"),
        (["--role=worker", "--dispatcher=a"], 1, "must be HOST:PORT. Received: a"),
        (["--role=worker", "--dispatcher=127.0.0.1:9", "--timeout=0"], 1,
         "should answer at 127.0.0.1:9.*refused.*--role=dispatcher --port=9"),
        (["--role=worker", "--dispatcher=127.0.0.1:99999", "--timeout=0"], 1, "should answer at"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_start_says_why(arguments, code, message):
    result = subprocess.run(service_command(*arguments), capture_output=True, text=True, timeout=20)
    assert result.returncode == code
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr and not result.stdout


def test_a_port_that_is_taken_is_not_shared():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        result = subprocess.run(
            service_command("--role=dispatcher", f"--port={port}"), capture_output=True, text=True
        )
    assert result.returncode == 1
    assert re.search(f"must be free. Received: {port} ", result.stderr)
