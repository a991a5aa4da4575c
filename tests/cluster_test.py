import json
import socket

import numpy as np
import pytest
import tensorflow as tf

from isd_tf.training import cluster

ONE = tf.distribute.get_strategy()


def tf_config(task=None, **jobs):
    return json.dumps({"cluster": jobs, **({"task": task} if task else {})})


def test_the_chief_comes_first():
    text = tf_config({"type": "worker", "index": 1}, worker=["b:1", "c:2"], chief=["a:3"])
    assert cluster.parse_tf_config(text) == (["a:3", "b:1", "c:2"], 2)


@pytest.mark.parametrize("text", ["", "{}", '{"cluster": {}}', '{"task": {"type": "worker"}}'])
def test_a_text_without_a_cluster_names_none(text):
    assert cluster.parse_tf_config(text) is None


WORKERS = ["a:1", "b:2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON of the form.*Received: {"),
        ("[]", "must be JSON of the form"),
        ('{"cluster": {"worker": 3}}', "must be JSON of the form"),
        (tf_config(worker=WORKERS), "which task.*one of worker 0, worker 1.*task=null"),
        (tf_config({"type": "worker", "index": 2}, worker=WORKERS), "one of worker 0, worker 1"),
        (tf_config({"type": "worker", "index": "0"}, worker=WORKERS), '"index": "0"'),
        (tf_config({"type": "ps", "index": 0}, worker=WORKERS, ps=["c:3"]), "worker, ps"),
        (tf_config({"type": "worker", "index": 0}, worker=["a"]), "host:port.*'a'"),
        (tf_config({"type": "worker", "index": 0}, worker=["a:99999"]), "host:port.*'a:99999'"),
        (tf_config({"type": "worker", "index": 0}, worker=["a:1", "a:1"]), "each worker once"),
    ],
)
def test_a_cluster_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        cluster.parse_tf_config(text)


def test_several_workers_need_a_cluster():
    with pytest.raises(ValueError, match="TF_CONFIG=''.*launch.py"):
        cluster.join("", 1)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_who_waits_says_for_whom_and_gives_up(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "REPORT_SECONDS", 0.5)
    here, there = free_port(), free_port()
    addresses = [f"127.0.0.1:{here}", f"127.0.0.1:{there}"]
    with pytest.raises(cluster.PeersError, match=f"Worker 0 .* worker 1 at 127.0.0.1:{there}.*up"):
        cluster._wait_for_peers(addresses, 0, timeout=1.5)
    assert (
        f"Worker 0 has waited 1 s for worker 1 at 127.0.0.1:{there}.\n" in capsys.readouterr().out
    )


def test_a_peer_that_listens_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as peer:
        there = peer.getsockname()[1]
        cluster._wait_for_peers([f"127.0.0.1:{there}", f"127.0.0.1:{free_port()}"], 1, timeout=5)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(cluster.PeersError, match=f"TF_CONFIG, {port}, must be free"):
            cluster._wait_for_peers([f"127.0.0.1:{port}"], 0, timeout=1)


def test_a_single_process_is_the_chief_of_nobody(two_replicas):
    for strategy in (ONE, two_replicas):
        assert cluster.number_of_workers(strategy) == 1 and cluster.is_chief(strategy)
        gathered = cluster.gather_from_workers(strategy, [1, 2])
        np.testing.assert_array_equal(gathered, [[1, 2]])
        cluster.require_same(strategy, {"--seed": "0"})
        assert cluster.gather_messages(strategy, "ä" * 3) == ["äää"]


def test_an_error_in_a_single_process_stays_what_it_is():
    with pytest.raises(KeyError, match="own"), cluster.failing_together(ONE):
        raise KeyError("own")
    with pytest.raises(tf.errors.UnavailableError), cluster.noticing_lost_peers(ONE):
        raise tf.errors.UnavailableError(None, None, "/job:worker/task:1 is gone")


def test_what_several_workers_bring_is_sorted_by_who_brought_it(monkeypatch):
    """TensorFlow's order of 11 workers of two replicas each, as it was seen with 11 processes."""
    order = [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
    rows = [[worker, 100 + worker, -worker] for worker in order for _ in range(2)]
    monkeypatch.setattr(cluster, "number_of_workers", lambda strategy: 11)
    monkeypatch.setattr(cluster, "_all_gather", lambda strategy, mine: tf.constant(rows, tf.int64))
    gathered = cluster.gather_from_workers(ONE, [100, 0])
    np.testing.assert_array_equal(gathered, [[100 + worker, -worker] for worker in range(11)])


def test_an_operations_own_failure_is_not_a_lost_peer(monkeypatch):
    monkeypatch.setattr(cluster, "number_of_workers", lambda strategy: 2)
    with pytest.raises(tf.errors.InternalError), cluster.noticing_lost_peers(ONE):
        raise tf.errors.InternalError(None, None, "CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(cluster.PeersError, match="task:1 is gone.*Start all"):
        with cluster.noticing_lost_peers(ONE):
            raise tf.errors.UnavailableError(None, None, "/job:worker/task:1 is gone")
