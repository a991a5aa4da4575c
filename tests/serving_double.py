"""Stands in for tensorflow_model_server: its wire protocols before a real SavedModel.

    python tests/serving_double.py MODEL_BASE_PATH MODEL_NAME

Serves the folder's newest version on two free ports of this machine, prints them as JSON, and ends
when its standard input does. Every line of that is answered by the bytes that the process holds in
memory. The SavedModel runs in TensorFlow's C API, which uses TF Serving's loader; none of
TensorFlow's Python is imported. Statuses, messages and JSON are those of tensorflow/serving: its
json_tensor.cc, http_rest_api_handler.cc, http_server.cc and predict_util.cc.
"""

import base64
import binascii
import ctypes
import http.server
import importlib.util
import json
import os
import re
import sys
import threading
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
from google.protobuf import json_format

sys.path.insert(0, str(Path(__file__).parent))
from saved_model_c_api import DTYPES, STRING, SavedModel, SessionError  # noqa: E402

# The messages lie below the package `tensorflow`, whose own __init__.py would import all the rest.
sys.modules["tensorflow"] = importlib.util.module_from_spec(importlib.util.find_spec("tensorflow"))
from tensorflow.core.protobuf import meta_graph_pb2  # noqa: E402
from tensorflow_serving.apis import (  # noqa: E402
    get_model_metadata_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
)

# How TF Serving answers by HTTP.
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
}
GRPC_STATUS = {code.value[0]: code for code in grpc.StatusCode}


class Refused(Exception):  # noqa: N818 It is an answer.
    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def invalid(message):
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, message)


class Model:
    """A model by its name, whatever the protocol."""

    def __init__(self, base_path, name):
        self.name = name
        self.version = max(int(path.name) for path in Path(base_path).iterdir())
        self.saved_model = SavedModel(str(Path(base_path, str(self.version))))
        graph = meta_graph_pb2.MetaGraphDef.FromString(self.saved_model.meta_graph)
        self.signatures = dict(graph.signature_def)

    def require(self, name):
        if name != self.name:
            message = f"Servable not found for request: Latest({name})"
            raise Refused(grpc.StatusCode.NOT_FOUND, message)

    def predict(self, signature, inputs):
        """Runs arrays by the names of a signature's inputs."""
        required = self.signatures[signature].inputs
        if set(inputs) != set(required):
            raise invalid(
                f"input size does not match signature: {len(inputs)}!={len(required)} "
                f"len({{{','.join(inputs)}}}) != len({{{','.join(required)}}})."
            )
        try:
            (value,) = inputs.values()
            return self.saved_model.run(signature, value)
        except SessionError as error:
            raise Refused(GRPC_STATUS[error.code], error.message) from None


# ------------------------------------------------------------------------------------------ gRPC


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, model):
        self.model = model

    def Predict(self, request, context):  # noqa: N802 gRPC's name.
        try:
            self.model.require(request.model_spec.name)
            signature = request.model_spec.signature_name or "serving_default"
            if signature not in self.model.signatures:
                message = f'Serving signature key "{signature}" not found.'
                raise Refused(grpc.StatusCode.FAILED_PRECONDITION, message)
            inputs = {name: from_proto(tensor) for name, tensor in request.inputs.items()}
            outputs = self.model.predict(signature, inputs)
        except Refused as refused:
            context.abort(refused.code, str(refused))
        response = predict_pb2.PredictResponse()
        for name, array in outputs.items():
            fill_proto(response.outputs[name], array)
        return response

    def GetModelMetadata(self, request, context):  # noqa: N802 gRPC's name.
        try:
            self.model.require(request.model_spec.name)
        except Refused as refused:
            context.abort(refused.code, str(refused))
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.metadata["signature_def"].Pack(signature_map(self.model))
        return response


def signature_map(model):
    signatures = get_model_metadata_pb2.SignatureDefMap()
    for name, signature in model.signatures.items():
        signatures.signature_def[name].CopyFrom(signature)
    return signatures


def from_proto(tensor):
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.dtype == STRING:
        values = np.empty(len(tensor.string_val), object)
        values[:] = tensor.string_val
    elif tensor.dtype not in DTYPES:
        raise invalid(f"tensor parsing error: DataType {tensor.dtype}")
    elif tensor.tensor_content:
        values = np.frombuffer(tensor.tensor_content, DTYPES[tensor.dtype])
    else:
        field = {1: "float_val", 2: "double_val", 9: "int64_val", 10: "bool_val"}
        values = getattr(tensor, field.get(tensor.dtype, "int_val"))
        values = np.array(values, DTYPES[tensor.dtype])
    if 0 < values.size < np.prod(shape):  # The last value stands for those that are left out.
        values = np.append(values, np.repeat(values[-1:], np.prod(shape) - values.size))
    if values.size != np.prod(shape):
        raise invalid(f"tensor parsing error: {values.size} values for the shape {shape}")
    return values.reshape(shape)


def fill_proto(tensor, array):
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    if array.dtype.kind == "S":
        tensor.dtype = STRING
        tensor.string_val.extend(array.ravel().tolist())
        return
    (tensor.dtype,) = (number for number, dtype in DTYPES.items() if dtype == array.dtype)
    field = {np.dtype(np.float32): tensor.float_val, np.dtype(bool): tensor.bool_val}
    field[array.dtype].extend(array.ravel().tolist())


# ------------------------------------------------------------------------------------------ REST


class Rest(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model: Model

    def do_POST(self):  # noqa: N802 http.server's name.
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(lambda: self.predict(body))

    def do_GET(self):  # noqa: N802 http.server's name.
        self.answer(self.tell)

    def answer(self, work):
        try:
            status, answer = 200, work()
        except Refused as refused:
            status, answer = HTTP_STATUS.get(refused.code, 500), {"error": str(refused)}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Says nothing."""

    def model_of(self, form):
        match = re.fullmatch(rf"/v1/models/([^/:]+)(?:/versions/(\d+))?{form}", self.path)
        if not match:
            raise invalid(f"Malformed request: {self.command} {self.path}")
        self.model.require(match[1])
        if match[2] not in (None, str(self.model.version)):
            message = f"Servable not found for request: Specific({match[1]}, {match[2]})"
            raise Refused(grpc.StatusCode.NOT_FOUND, message)
        return self.model

    def tell(self):
        version = str(self.model.version)
        if self.path.endswith("/metadata"):
            signatures = signature_map(self.model_of("/metadata"))
            spec = {"name": self.model.name, "signature_name": "", "version": version}
            options = {"preserving_proto_field_name": True}
            return {
                "model_spec": spec,
                "metadata": {"signature_def": json_format.MessageToDict(signatures, **options)},
            }
        self.model_of("")
        status = {"error_code": "OK", "error_message": ""}
        state = {"version": version, "state": "AVAILABLE", "status": status}
        return {"model_version_status": [state]}

    def predict(self, body):
        model = self.model_of(":predict")
        try:
            request = json.loads(body)
        except ValueError as error:
            raise invalid(f"JSON Parse error: {error}") from None
        if not isinstance(request, dict):
            raise invalid("JSON Value: Is not object")
        signature = request.get("signature_name", "serving_default")
        if signature not in model.signatures:
            raise invalid(f'Serving signature name: "{signature}" not found in signature def')
        required = {name: info.dtype for name, info in model.signatures[signature].inputs.items()}
        if "instances" in request:
            outputs = model.predict(signature, from_rows(request["instances"], required))
            rows = [to_json(name, values) for name, values in outputs.items()]
            rows = [dict(zip(outputs, row, strict=True)) for row in zip(*rows, strict=True)]
            return {"predictions": rows}
        if "inputs" not in request:
            raise invalid("Missing 'inputs' or 'instances' key")
        outputs = model.predict(signature, from_columns(request["inputs"], required))
        return {"outputs": {name: to_json(name, values) for name, values in outputs.items()}}


def is_base64(value):
    return isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str)


def from_rows(rows, required):
    if not isinstance(rows, list) or not rows:
        raise invalid("No values in 'instances' array")
    if all(isinstance(row, dict) and not is_base64(row) for row in rows):
        for number, row in enumerate(rows):
            if set(row) != set(required):
                names = ",".join(required)
                raise invalid(
                    f"Failed to process element: {number} of 'instances' list. keys must be equal "
                    f"to: {names}"
                )
        return {name: from_json([row[name] for row in rows], t) for name, t in required.items()}
    ((name, dtype),) = required.items()
    return {name: from_json(rows, dtype)}


def from_columns(columns, required):
    if not isinstance(columns, dict) or is_base64(columns):
        ((name, dtype),) = required.items()
        return {name: from_json(columns, dtype)}
    for name in required:
        if name not in columns:
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
    return {name: from_json(columns[name], dtype) for name, dtype in required.items()}


def from_json(value, dtype):
    """Lists of lists become an array; all their leaves must lie at one level and be of one type."""
    shape, first = [], value
    while isinstance(first, list):
        shape.append(len(first))
        first = first[0] if first else None
    leaves = [value]
    for _ in shape:
        if not all(isinstance(leaf, list) for leaf in leaves):
            raise invalid("JSON Value found at incorrect level")
        leaves = [inner for leaf in leaves for inner in leaf]
    if any(isinstance(leaf, list) for leaf in leaves):
        raise invalid("Encountered list at unexpected level")
    if len(leaves) != np.prod(shape):
        raise invalid(f"tensor parsing error: {len(leaves)} values for the shape {shape}")
    array = np.empty(len(leaves), object if dtype == STRING else DTYPES[dtype])
    array[:] = [leaf_from_json(leaf, dtype) for leaf in leaves]
    return array.reshape(shape)


def leaf_from_json(leaf, dtype):
    if dtype == STRING and is_base64(leaf):
        try:
            return base64.b64decode(leaf["b64"], validate=True)
        except binascii.Error:
            raise invalid("Unable to base64 decode") from None
    if dtype == STRING and isinstance(leaf, str):
        return leaf.encode()
    number = isinstance(leaf, int | float) and not isinstance(leaf, bool)
    if dtype == STRING or not number or (DTYPES[dtype].kind in "iu" and isinstance(leaf, float)):
        raise invalid(f"JSON Value: {json.dumps(leaf)[:50]} Type: is not of expected type")
    return leaf


def to_json(name, array):
    if array.dtype.kind == "S":
        if name.endswith("_bytes"):
            texts = [{"b64": base64.b64encode(text).decode()} for text in array.ravel()]
        else:
            texts = [text.decode() for text in array.ravel()]
        return np.array(texts, object).reshape(array.shape).tolist()
    if array.dtype.kind == "f":  # As few digits as give the same float32 again, at most nine.
        return np.array([float(f"{x:.9g}") for x in array.ravel()]).reshape(array.shape).tolist()
    return array.tolist()


def main(base_path, name):
    model = Model(base_path, name)
    grpc_server = grpc.server(
        futures.ThreadPoolExecutor(8),
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
    )
    service = PredictionService(model)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(service, grpc_server)
    grpc_port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    Rest.model = model
    rest_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rest)
    threading.Thread(target=rest_server.serve_forever, daemon=True).start()
    print(json.dumps({"grpc": grpc_port, "rest": rest_server.server_port}), flush=True)
    for _ in sys.stdin:
        ctypes.CDLL(None).malloc_trim(0)  # What is free is no leak.
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        print(pages * os.sysconf("SC_PAGE_SIZE"), flush=True)
    if "tensorflow.python" in sys.modules:
        sys.exit("TensorFlow's Python was imported, so that this proves nothing.")
    os._exit(0)  # Nothing to wait for.


if __name__ == "__main__":
    main(*sys.argv[1:])
