"""What one worker process must know of the others: who they are, and what they agree on.

Every function here that takes a strategy is called by all workers in the same order; with a single
process it costs nothing. Inside a training step replicas speak through `distribution` instead.
"""

import contextlib
import hashlib
import json
import re
import signal
import socket
import time
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

# Between two lines of a worker that waits for its peers.
REPORT_SECONDS = 60
# What TensorFlow may take to connect workers that are all there; about one is usual.
JOIN_SECONDS = 30
# Before a worker exits on purpose: what it said last may still be on its way to the others, for
# seconds where a machine has too much to do.
LINGER_SECONDS = 5
# Longest message that workers tell each other, in bytes.
MESSAGE_BYTES = 2048

# What TensorFlow raises where a collective operation or the coordination of workers fails.
PEER_ERRORS = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
)
# Their text, where it is not an operation's own failure, on a GPU for example.
SIGNS_OF_LOST_PEERS = re.compile("(?i)collective|/task:|coordination|peer|socket|heartbeat")


class WorkerError(RuntimeError):
    """Another worker has failed, for the reason that the message gives."""


class PeersError(OSError):
    """The workers have not found, or have lost, each other: starting all of them again may help."""

    exit_code = 75  # BSD's EX_TEMPFAIL.


def parse_tf_config(text: str) -> tuple[list[str], int] | None:
    """Reads TF_CONFIG.

    Args:
        text: JSON, such as {"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task":
            {"type": "worker", "index": 0}}. A "chief" job comes before the workers.

    Returns:
        The workers' addresses, the chief's first, and which of them this process is; None where
        the text names no cluster.

    Raises:
        ValueError: when it does not parse, or names no such task.
    """
    example = '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
    try:
        config = json.loads(text or "{}")
        jobs = config.get("cluster", {})
        tasks = [(job, i) for job in ("chief", "worker") for i in range(len(jobs.get(job, [])))]
        addresses = [jobs[job][i] for job, i in tasks]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"TF_CONFIG must be JSON of the form {example}. Received: {text} ({error})."
        ) from None
    if not jobs:
        return None
    if set(jobs) - {"chief", "worker"}:
        raise ValueError(
            "A cluster may have the jobs chief and worker: no parameter servers, and the chief "
            f"evaluates. Received in TF_CONFIG: {', '.join(jobs)}."
        )
    task = config.get("task")
    here = (task.get("type"), task.get("index")) if isinstance(task, dict) else None
    if here not in tasks:
        known = ", ".join(f"{job} {i}" for job, i in tasks)
        raise ValueError(
            f"TF_CONFIG must say which task this process is, one of {known}, as in {example}. "
            f"Received: task={json.dumps(task)}."
        )
    ports = [a.rpartition(":")[2] if isinstance(a, str) else "" for a in addresses]
    if not all(port.isdigit() and 0 < int(port) < 2**16 for port in ports):
        raise ValueError(f"Addresses in TF_CONFIG must be host:port. Received: {addresses}.")
    if len(set(addresses)) < len(addresses):
        raise ValueError(f"TF_CONFIG must name each worker once. Received: {addresses}.")
    return addresses, tasks.index(here)


def join(tf_config: str, timeout: float) -> tf.distribute.MultiWorkerMirroredStrategy:
    """Waits for all workers of TF_CONFIG and makes their strategy.

    Must come before anything else of TensorFlow's. Says every minute which peers are missing.

    Args:
        tf_config: as in `parse_tf_config`.
        timeout: seconds to wait.

    Raises:
        ValueError: for a TF_CONFIG that names no cluster, or cannot be read.
        PeersError: when peers are still missing, or this worker's own port is taken.
    """
    parsed = parse_tf_config(tf_config)
    if parsed is None:
        raise ValueError(
            "Several workers need TF_CONFIG, which names them all and which of them this is. "
            f"Received: TF_CONFIG={tf_config!r}. experiments/launch.py sets it for workers on one "
            "machine."
        )
    _wait_for_peers(*parsed, timeout)
    config = json.loads(tf_config)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(config["cluster"]),
        task_type=config["task"]["type"],
        task_id=config["task"]["index"],
        rpc_layer="grpc",
    )
    # TensorFlow waits without end, and lets no Python run meanwhile: where a peer that was there
    # has gone again, only the system's alarm ends this process.
    print(
        f"Worker {parsed[1]} has found all {len(parsed[0])} workers, and connects. If one is lost "
        f"meanwhile, this process ends by SIGALRM after {JOIN_SECONDS} s.",
        flush=True,
    )
    signal.alarm(JOIN_SECONDS)
    options = tf.distribute.experimental.CommunicationOptions(implementation=_implementation())
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver, options)
        gather_from_workers(strategy, 0)  # The strategy itself may be made before all are there.
    except PEER_ERRORS as error:
        reason = error.message.splitlines()[0]
        raise PeersError(
            f"Worker {parsed[1]} cannot connect to the others ({reason}). Start all of them again."
        ) from error
    signal.alarm(0)
    return strategy


def number_of_workers(strategy: tf.distribute.Strategy) -> int:
    """Processes that share the training."""
    return max(1, len(_tasks(strategy)))


def worker_index(strategy: tf.distribute.Strategy) -> int:
    """Which of them this process is; the chief is 0."""
    tasks = _tasks(strategy)
    resolver = strategy.cluster_resolver
    return tasks.index((resolver.task_type, resolver.task_id)) if tasks else 0


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes."""
    return worker_index(strategy) == 0


def gather_from_workers(strategy: tf.distribute.Strategy, values) -> np.ndarray:
    """Returns every worker's integers, of the same shape everywhere: [workers, ...]."""
    values = np.asarray(values, np.int64)
    if number_of_workers(strategy) == 1:
        return values[np.newaxis]
    mine = np.append(worker_index(strategy), values.ravel())[np.newaxis]
    rows = _all_gather(strategy, tf.constant(mine)).numpy()  # [replicas, 1 + values]
    # In TensorFlow's order, which is another from the eleventh worker on; one row each.
    _, first = np.unique(rows[:, 0], return_index=True)
    return rows[first, 1:].reshape(-1, *values.shape)


def gather_messages(strategy: tf.distribute.Strategy, message: str) -> list[str]:
    """Returns every worker's message, cut off at MESSAGE_BYTES."""
    encoded = message.encode(errors="surrogateescape")[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    rows = gather_from_workers(strategy, np.frombuffer(encoded, np.uint8))
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="surrogateescape") for row in rows]


@contextlib.contextmanager
def noticing_lost_peers(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Turns what TensorFlow raises when another worker is gone into PeersError.

    TensorFlow notices after about 10 seconds that a worker's process has ended or is stopped, or
    that its machine is gone; not that its Python hangs. A worker hears of it where it speaks with
    the others next: the chief, which evaluates alone, when it is done.
    """
    try:
        yield
    except PEER_ERRORS as error:
        if number_of_workers(strategy) == 1 or not SIGNS_OF_LOST_PEERS.search(error.message):
            raise
        raise PeersError(
            f"Worker {worker_index(strategy)} has lost another worker, whose own output says more "
            f"({error.message.splitlines()[-1][:300]}). Start all of them again: the same command "
            "continues from the last checkpoint."
        ) from error


@contextlib.contextmanager
def failing_together(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Makes an error of the body on one worker an error on every worker.

    The body must not itself communicate.

    Raises:
        WorkerError: where the body has succeeded here and failed elsewhere.
    """
    error = None
    try:
        yield
    except Exception as own:  # Whatever it is, the others must hear of it before this one ends.
        error = own
    message = "" if error is None else f"{error}" or type(error).__name__
    failures = {i: text for i, text in enumerate(gather_messages(strategy, message)) if text}
    if failures:
        linger(strategy)
    if error is not None:
        raise error
    if failures:
        raise WorkerError("; ".join(f"Worker {i} failed: {text}" for i, text in failures.items()))


def linger(strategy: tf.distribute.Strategy) -> None:
    """Waits a little, where the others may still be receiving what this worker has said last."""
    if number_of_workers(strategy) > 1:
        time.sleep(LINGER_SECONDS)


def require_same(strategy: tf.distribute.Strategy, settings: dict[str, str]) -> None:
    """Compares settings with those of the other workers.

    Args:
        strategy: of all workers.
        settings: texts by name; the same names everywhere, or the names count as different.

    Raises:
        ValueError: on every worker, naming the settings that differ and everyone's values.
    """
    digests = np.array(
        [[digest(t.encode()) for t in pair] for pair in sorted(settings.items())], np.int64
    )
    count = gather_from_workers(strategy, len(digests))
    if (count != len(digests)).any():
        raise ValueError(
            "All workers must run the same version of this program. Received: "
            f"{count.tolist()} settings. Install the same on each."
        )
    differ = (gather_from_workers(strategy, digests) != digests).any(axis=(0, 2))
    if differ.any():
        names = [name for name, other in zip(sorted(settings), differ, strict=True) if other]
        mine = " ".join(f"{name}={settings[name]}" for name in names)
        everyone = gather_messages(strategy, mine)
        linger(strategy)
        raise ValueError(
            "All workers must be started with the same recipe on the same data. Received: "
            + "; ".join(f"worker {i} has {text}" for i, text in enumerate(everyone))
            + "."
        )


def digest(data: bytes) -> int:
    """Returns 64 bits of a hash of `data`, as a number that `gather_from_workers` takes."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little", signed=True)


def _implementation():
    # By itself TensorFlow would take its own ring over gRPC for GPUs as well.
    kinds = tf.distribute.experimental.CommunicationImplementation
    return kinds.NCCL if tf.config.list_physical_devices("GPU") else kinds.RING


def _tasks(strategy):
    resolver = strategy.cluster_resolver
    jobs = resolver.cluster_spec().as_dict() if resolver else {}
    return [(job, i) for job in ("chief", "worker") for i in range(len(jobs.get(job, [])))]


@tf.function(reduce_retracing=True)
def _all_gather(strategy, values):
    def gather(values):
        # Made here, or TensorFlow would not find the device that it lies on.
        return tf.distribute.get_replica_context().all_gather(tf.identity(values), axis=0)

    return strategy.experimental_local_results(strategy.run(gather, args=(values,)))[0]


def _wait_for_peers(addresses, index, timeout):
    """Listens at this worker's port until every peer has been seen to listen at its own.

    A peer that has seen everybody already listens there as a server of TensorFlow's.
    """
    start = last_report = time.monotonic()
    port = int(addresses[index].rpartition(":")[2])
    missing = {i: address for i, address in enumerate(addresses) if i != index}
    try:
        listener = socket.create_server(("", port))
    except OSError as error:
        raise PeersError(
            f"This worker's port in TF_CONFIG, {port}, must be free. Received: {error}. End the "
            "process that holds it, perhaps a worker of an earlier run, or name another port."
        ) from None
    with listener:
        while True:
            missing = {i: address for i, address in missing.items() if not _listens(address)}
            if not missing:
                return
            waited = time.monotonic() - start
            message = f"Worker {index} has waited {waited:.0f} s for " + ", ".join(
                f"worker {i} at {address}" for i, address in missing.items()
            )
            if waited >= timeout:
                raise PeersError(
                    f"{message}, and gives up. Start all workers with the same cluster in "
                    "TF_CONFIG, or raise --cluster_timeout."
                )
            if time.monotonic() - last_report >= REPORT_SECONDS:
                last_report = time.monotonic()
                print(f"{message}.", flush=True)
            time.sleep(0.2)


def _listens(address):
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True
