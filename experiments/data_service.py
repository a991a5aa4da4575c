"""Runs a dispatcher or a worker of tf.data service, whose workers prepare views for a training.

    python experiments/data_service.py --role=dispatcher --port=5000
    python experiments/data_service.py --role=worker --dispatcher=HOST:5000
    python experiments/run.py --data_service=HOST:5000 ...

One dispatcher, and as many workers on as many machines as the training needs. They open the images
themselves: every file must have the same path there as it has for the trainer. Nobody has to log
in: let only trusted machines reach these ports. Ctrl-C or SIGTERM ends each with exit code 0.
"""

import argparse
import os
import signal
import socket
import sys
import time

import program  # With oneDNN as in run.py: without it the same views differ in last bits.


def main() -> None:
    program.prepare()
    # argparse, not absl: what is wrong ends with exit code 2.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--role", required=True, choices=["dispatcher", "worker"])
    parser.add_argument("--port", type=int, default=0, help="to listen at; default 0: any")
    parser.add_argument("--dispatcher", metavar="HOST:PORT", help="of a worker")
    parser.add_argument(
        "--address",
        metavar="HOST",
        help="where trainers reach this worker; default: from where it reaches its dispatcher",
    )
    parser.add_argument(
        "--timeout", type=int, default=60, help="seconds to wait for the dispatcher; default 60"
    )
    settings = parser.parse_args()
    if not 0 <= settings.port < 2**16:
        parser.error(f"--port must be at least 0 and below 65536. Received: {settings.port}.")
    if (settings.role == "worker") != bool(settings.dispatcher):
        parser.error(
            "A worker needs --dispatcher=HOST:PORT, and a dispatcher has none. Received: "
            f"--role={settings.role}, --dispatcher={settings.dispatcher or ''}."
        )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    try:
        running, line = serve(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"data_service.py: {error}")
    print(line, flush=True)
    while running:
        signal.pause()  # server.join() would let no signal through.


def end(*_) -> None:
    os._exit(0)  # TensorFlow's own end waits for the dispatcher, which may be gone.


def serve(settings: argparse.Namespace):
    """Starts the server; returns what must be referred to for as long as it runs, and a line."""
    # Else two servers would share a port, and each connection reach one of them at random.
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind(("", settings.port))
        except OSError as error:
            raise OSError(
                f"--port must be free. Received: {settings.port} ({error}). Choose another."
            ) from None
    if settings.role == "worker":
        seen_from = own_address(settings.dispatcher, settings.timeout)
        address = settings.address or seen_from

    program.import_tensorflow()  # Here, as it takes seconds.
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # They are the trainer's.
    service = tf.data.experimental.service
    try:
        if settings.role == "dispatcher":
            server = service.DispatchServer(service.DispatcherConfig(port=settings.port))
            port = server.target.rpartition(":")[2]
            return server, f"The dispatcher is ready: {socket.gethostname()}:{port}"
        import isd_tf

        offered = isd_tf.data.service.offer_crops()
        server = service.WorkerServer(
            service.WorkerConfig(
                settings.dispatcher,
                worker_address=f"{address}:%port%",
                port=settings.port,
                dispatcher_timeout_ms=max(settings.timeout, 1) * 1000,
            )
        )
        line = f"A worker is ready: {address}, of the dispatcher {settings.dispatcher}"
        return (offered, server), line
    except tf.errors.OpError as error:
        raise OSError(f"TensorFlow cannot start the {settings.role}: {error.message}") from None


def own_address(dispatcher: str, timeout: float) -> str:
    """Waits for the dispatcher and returns the address from which this machine reaches it."""
    host, _, port = dispatcher.rpartition(":")
    if not (host and port.isdigit()):
        raise ValueError(f"--dispatcher must be HOST:PORT. Received: {dispatcher}.")
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
                address = connection.getsockname()[0]
                return f"[{address}]" if ":" in address else address
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise OSError(
                    f"A dispatcher should answer at {dispatcher}. Received for {timeout} seconds: "
                    f"{error}. Start one: data_service.py --role=dispatcher --port={port}"
                ) from None
        time.sleep(0.5)


if __name__ == "__main__":
    main()
