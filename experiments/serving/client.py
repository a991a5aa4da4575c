"""Asks a TensorFlow Serving server for the features, embeddings or classes of image files.

    python experiments/serving/client.py --server=grpc://localhost:8500 --out=all.npz photos/*.jpg
    python experiments/serving/client.py --server=http://HOST:8501 --signature=classify cat.jpg

Prints a line of JSON for each file, or writes arrays to --out. A file that the server cannot read
has "valid": false. REST needs Python and numpy alone: this file works wherever it is copied. gRPC
needs tensorflow-serving-api, and the seconds that TensorFlow takes to be imported. In Python:

    server = client.connect("http://localhost:8501")
    embeddings = client.ask(server, ["cat.jpg", "dog.jpg"])["embedding"]
"""

import argparse
import base64
import contextlib
import http.client
import json
import os
import signal
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

SIGNATURE = "serving_bytes"
BATCH = 32
TIMEOUT = 60.0
# What TensorFlow Serving makes of a status where it answers by HTTP, and the way back.
STATUS_BY_HTTP = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
Value = np.ndarray | Sequence[bytes]


class ServingError(RuntimeError):
    """A request that was not answered; its text says why, and what to do.

    Attributes:
        status: by gRPC's name, such as "INVALID_ARGUMENT", whatever the protocol.
    """

    def __init__(self, status: str, text: str):
        super().__init__(text)
        self.status = status


class Server(Protocol):
    """One model of a server, by either protocol."""

    def signatures(self) -> dict[str, list[str]]:
        """The names of the inputs of each signature. Raises ServingError."""

    def predict(self, signature: str, inputs: Mapping[str, Value]) -> dict[str, np.ndarray]:
        """Outputs by name, of arrays or lists of bytes by name. Raises ServingError."""


def connect(server: str, model: str = "encoder", timeout: float = TIMEOUT) -> Server:
    """Returns a server's model. Nothing is sent yet.

    Args:
        server: http://HOST:PORT or https://HOST:PORT for REST, grpc://HOST:PORT for gRPC.
        model: the server's name for it.
        timeout: seconds that a request may take.

    Raises:
        ValueError: for another form of address.
    """
    scheme, _, address = server.rstrip("/").partition("://")
    if scheme not in ("http", "https", "grpc") or not address:
        raise ValueError(f"Expected http://HOST:PORT or grpc://HOST:PORT. Received: {server}.")
    if scheme == "grpc":
        return Grpc(address, model, timeout)
    return Rest(f"{scheme}://{address}", model, timeout)


def ask(
    server: Server, paths: Sequence[str], signature: str = SIGNATURE, batch: int = BATCH
) -> dict[str, np.ndarray]:
    """Returns a signature's outputs, by name, for image files in their order.

    Args:
        server: of `connect`.
        paths: JPEG, PNG, WebP, GIF or BMP files.
        signature: one that takes files: serving_bytes, serving_bytes_strict or classify.
        batch: files in a request.

    Returns:
        As the signature has them: "features" and "embedding", float32 [N, C]; of classify "scores",
        float32 [N, K], and "classes", [N, K]; and but for the strict one "valid", bool [N].

    Raises:
        ValueError: without files, or for a signature that the model has not.
        OSError: for a file that cannot be opened.
        ServingError: when the server does not answer, or refuses.
    """
    answers = list(answers_of(server, paths, signature, batch))
    return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}


def answers_of(
    server: Server, paths: Sequence[str], signature: str, batch: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields what `ask` returns batch by batch."""
    if not paths:
        raise ValueError("Expected image files. Received none.")
    known = server.signatures()
    if known.get(signature) != ["image_bytes"]:
        takes_files = [name for name, inputs in known.items() if inputs == ["image_bytes"]]
        raise ValueError(
            f"Expected a signature that takes files, one of {', '.join(sorted(takes_files))}. "
            f"Received: {signature}."
        )
    for begin in range(0, len(paths), batch):
        files = [_read(path) for path in paths[begin : begin + batch]]
        try:
            yield server.predict(signature, {"image_bytes": files})
        except ServingError as error:
            text = f"{error} Asked for {len(files)} files from {paths[begin]} on."
            raise ServingError(error.status, text) from None


def _read(path):
    with open(path, "rb") as file:
        return file.read()


def _error(status, reason, address, model, timeout):
    """What went wrong, in sentences."""
    reason = str(reason).partition("\n\t [[")[0].strip()  # Behind it names of the graph's nodes.
    if status == "UNAVAILABLE" and "queue" in reason:  # That of --enable_batching is full.
        status = "RESOURCE_EXHAUSTED"
    text = {
        "UNAVAILABLE": f"No server of this protocol answers at {address}: {reason}. Is "
        "tensorflow_model_server running, and this its port (usually 8501 for REST, 8500 for "
        "gRPC)?",
        "NOT_FOUND": f"The server at {address} has no model {model!r}: {reason}. Is this its "
        "--model_name, and has a version been loaded?",
        "DEADLINE_EXCEEDED": f"The server at {address} has not answered within {timeout:g} "
        "seconds. Raise --timeout, or lower --batch.",
        "RESOURCE_EXHAUSTED": f"The server at {address} has no room for this request: {reason}. "
        "Lower --batch, or try again later.",
    }.get(status, f"The server at {address} refuses the request: {reason} ({status}).")
    return ServingError(status, text)


class Rest:
    """TensorFlow Serving's REST API, in its column format, with base64 for bytes."""

    def __init__(self, address: str, model: str, timeout: float):
        self.address, self.model, self.timeout = address, model, timeout

    def signatures(self) -> dict[str, list[str]]:
        answer = self._request("/metadata")
        try:
            signatures = answer["metadata"]["signature_def"]["signature_def"]
        except (KeyError, TypeError):
            raise self._error("UNAVAILABLE", "its answer is not TensorFlow Serving's") from None
        # One of TensorFlow's own, __saved_model_init_op, takes nothing.
        return {
            name: sorted(definition.get("inputs", ())) for name, definition in signatures.items()
        }

    def predict(self, signature: str, inputs: Mapping[str, Value]) -> dict[str, np.ndarray]:
        columns = {name: _to_json(value) for name, value in inputs.items()}
        body = json.dumps({"signature_name": signature, "inputs": columns}).encode()
        outputs = self._request(":predict", body)["outputs"]
        return {name: _from_json(value) for name, value in outputs.items()}

    def _request(self, what, body=None):
        url = f"{self.address}/v1/models/{urllib.parse.quote(self.model, safe='')}{what}"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            status = STATUS_BY_HTTP.get(error.code, f"HTTP {error.code}")
            raise self._error(status, _reason(error.read())) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise self._error("DEADLINE_EXCEEDED", "") from None
            raise self._error("UNAVAILABLE", reason) from None
        except ValueError:
            raise self._error("UNAVAILABLE", "its answer is no JSON") from None

    def _error(self, status, reason):
        return _error(status, reason, self.address, self.model, self.timeout)


def _to_json(value):
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    return [_to_json(part) for part in value]


def _from_json(value):
    array = np.asarray(value)
    # Nine digits stand in JSON, which give each float32 back exactly.
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _reason(body):
    try:
        return json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()[:200] or "no reason given"


class Grpc:
    """TensorFlow Serving's PredictionService."""

    def __init__(self, address: str, model: str, timeout: float):
        # Here, as it takes seconds: the messages of TensorFlow Serving import all of TensorFlow.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import grpc
        import tensorflow as tf
        from tensorflow_serving.apis import (
            get_model_metadata_pb2,
            predict_pb2,
            prediction_service_pb2_grpc,
        )

        self.address, self.model, self.timeout = f"grpc://{address}", model, timeout
        self._grpc, self._tf = grpc, tf
        self._metadata, self._predict = get_model_metadata_pb2, predict_pb2
        # A thousand images' features are more than the 4 MB that gRPC takes otherwise.
        channel = grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)])
        self._service = prediction_service_pb2_grpc.PredictionServiceStub(channel)

    def signatures(self) -> dict[str, list[str]]:
        request = self._metadata.GetModelMetadataRequest(metadata_field=["signature_def"])
        answer = self._request(self._service.GetModelMetadata, request)
        signatures = self._metadata.SignatureDefMap()
        answer.metadata["signature_def"].Unpack(signatures)
        definitions = signatures.signature_def
        return {name: sorted(definition.inputs) for name, definition in definitions.items()}

    def predict(self, signature: str, inputs: Mapping[str, Value]) -> dict[str, np.ndarray]:
        request = self._predict.PredictRequest()
        request.model_spec.signature_name = signature
        for name, value in inputs.items():
            dtype = None if isinstance(value, np.ndarray) else self._tf.string
            request.inputs[name].CopyFrom(self._tf.make_tensor_proto(value, dtype))
        outputs = self._request(self._service.Predict, request).outputs
        return {name: _from_tensor(self._tf.make_ndarray(outputs[name])) for name in outputs}

    def _request(self, method, request):
        request.model_spec.name = self.model
        try:
            return method(request, self.timeout)
        except self._grpc.RpcError as error:
            status, reason = error.code().name, error.details()
            raise _error(status, reason, self.address, self.model, self.timeout) from None


def _from_tensor(array):
    """Strings as text, as REST has them."""
    return np.char.decode(array.astype(bytes), "utf-8") if array.dtype == object else array


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python experiments/serving/client.py --server=http://localhost:8501 photos/*.jpg",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", help="JPEG, PNG, WebP, GIF or BMP files")
    parser.add_argument(
        "--server", required=True, metavar="ADDRESS", help="http://HOST:PORT or grpc://HOST:PORT"
    )
    parser.add_argument("--model", default="encoder", help="the server's --model_name for it")
    parser.add_argument(
        "--signature",
        default=SIGNATURE,
        help=f"serving_bytes_strict, classify or, by default, {SIGNATURE}",
    )
    parser.add_argument("--batch", type=int, default=BATCH, help=f"files a request; {BATCH}")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds a request; 60")
    parser.add_argument(
        "--out", metavar="FILE.npz", help="where the outputs go as arrays, and the paths"
    )
    settings = parser.parse_args()
    for name in ("batch", "timeout"):
        if not getattr(settings, name) > 0:
            parser.error(f"--{name} must be above 0. Received: {getattr(settings, name)}.")
    if hasattr(signal, "SIGPIPE"):  # Of `| head`; Windows has none.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        write_answers(settings)
    except (ServingError, ValueError, OSError) as error:
        sys.exit(f"client.py: {error}")


def write_answers(settings: argparse.Namespace) -> None:
    """Asks for the files and prints or keeps the answers; names what could not be read."""
    server = connect(settings.server, settings.model, settings.timeout)
    found = answers_of(server, settings.images, settings.signature, settings.batch)
    if settings.out:
        unreadable = _write(found, settings)
    else:
        unreadable = []
        for number, answer in enumerate(found):
            paths = settings.images[number * settings.batch :]
            _print_lines(paths, answer)
            unreadable += _unreadable(paths, answer)
    for path in unreadable:
        print(f"client.py: the server cannot read {path}", file=sys.stderr)


def _write(found, settings):
    unfinished = f"{settings.out}.unfinished"
    # Opened first: hours of answers are not lost for a folder that is not there.
    try:
        with open(unfinished, "wb") as file:
            answers = list(found)
            outputs = {key: np.concatenate([each[key] for each in answers]) for key in answers[0]}
            np.savez(file, paths=np.array(settings.images), **outputs)
        os.replace(unfinished, settings.out)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(unfinished)
    return _unreadable(settings.images, outputs)


def _unreadable(paths, answer):
    return [path for path, valid in zip(paths, answer.get("valid", ()), strict=False) if not valid]


def _print_lines(paths, answer):
    for i in range(len(next(iter(answer.values())))):
        row = {name: values[i].tolist() for name, values in sorted(answer.items())}
        if "classes" in row:
            ranked = sorted(zip(row.pop("scores"), row.pop("classes"), strict=True), reverse=True)
            row["scores"] = {name: score for score, name in ranked}
        print(json.dumps({"path": paths[i]} | row), flush=True)


if __name__ == "__main__":
    main()
