"""Run one signature of a SavedModel through TensorFlow's C API, without TensorFlow's Python.

    python tests/saved_model_c_api.py SAVED_MODEL_DIR SIGNATURE INPUT.npy OUTPUT.npy

``TF_LoadSessionFromSavedModel`` uses the same C++ loader as TF Serving. A SavedModel that runs
after ``tf.saved_model.load``, which rebuilds Python objects, can fail here with "Could not find
variable". One input (uint8 or float32) and one output (float32) are supported. A test starts it
as a process of its own: TensorFlow is already imported in the test's, and some invalid inputs
make the C++ kernels abort the process.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FLOAT32, UINT8 = 1, 4  # DataType of types.proto
DTYPES = {FLOAT32: np.dtype(np.float32), UINT8: np.dtype(np.uint8)}
TensorInfo = tuple[str, int]  # name in the graph ("operation:index") and DataType


class Handle(ctypes.c_void_p):
    """Opaque pointer. A plain c_void_p returns as an int, which ctypes would pass as 32 bits."""


class Buffer(ctypes.Structure):
    """TF_Buffer of tf_buffer.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("deallocator", ctypes.c_void_p),
    ]


class Output(ctypes.Structure):
    """TF_Output of c_api.h: one output of an operation."""

    _fields_ = [("operation", Handle), ("index", ctypes.c_int)]


# The other functions return nothing or an int, which is what ctypes assumes.
RESULT_TYPES = {
    "TF_NewStatus": Handle,
    "TF_Message": ctypes.c_char_p,
    "TF_NewBuffer": ctypes.POINTER(Buffer),
    "TF_NewGraph": Handle,
    "TF_NewSessionOptions": Handle,
    "TF_LoadSessionFromSavedModel": Handle,
    "TF_GraphOperationByName": Handle,
    "TF_AllocateTensor": Handle,
    "TF_TensorData": Handle,
    "TF_TensorByteSize": ctypes.c_size_t,
    "TF_Dim": ctypes.c_int64,
}


def load_library() -> ctypes.CDLL:
    """Load the C API from the installed TensorFlow wheel."""
    spec = importlib.util.find_spec("tensorflow")  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("tensorflow is not installed")
    folder = Path(spec.submodule_search_locations[0])
    # First and global, so that the main library finds it whatever search path it was built with.
    ctypes.CDLL(str(folder / "libtensorflow_framework.so.2"), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libtensorflow_cc.so.2"))
    for name, result_type in RESULT_TYPES.items():
        getattr(library, name).restype = result_type
    return library


def proto_fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a serialized protobuf message."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        length = varint() if wire_type == 2 else {1: 8, 5: 4}[wire_type]
        yield number, message[position : position + length]
        position += length


def proto_map(message: memoryview, number: int) -> dict[str, memoryview]:
    """Return a field of type map<string, message>: repeated entries of key = 1 and value = 2."""
    entries = [dict(proto_fields(entry)) for key, entry in proto_fields(message) if key == number]
    return {str(entry[1], "utf-8"): entry[2] for entry in entries}


def read_signature(meta_graph: bytes, signature: str) -> tuple[TensorInfo, TensorInfo]:
    """Return the input and the output of a signature in a serialized MetaGraphDef."""
    signatures = proto_map(memoryview(meta_graph), 5)  # MetaGraphDef.signature_def
    if signature not in signatures:
        raise RuntimeError(f"no signature {signature!r} among {sorted(signatures)}")

    def only(kind: str, number: int, dtypes: set[int]) -> TensorInfo:
        tensors = proto_map(signatures[signature], number)
        if len(tensors) != 1:
            raise RuntimeError(f"signature {signature!r} needs one {kind}, has {sorted(tensors)}")
        info = dict(proto_fields(*tensors.values()))  # TensorInfo: name = 1, dtype = 2
        if info[2] not in dtypes:
            raise RuntimeError(f"{kind} of signature {signature!r} has DataType {info[2]}")
        return str(info[1], "utf-8"), info[2]

    return only("input", 1, {FLOAT32, UINT8}), only("output", 2, {FLOAT32})


def run_signature(saved_model: str, signature: str, array: np.ndarray) -> np.ndarray:
    """Load a SavedModel, feed the array to the signature and return the signature's output."""
    tf = load_library()
    status, graph, meta_graph = tf.TF_NewStatus(), tf.TF_NewGraph(), tf.TF_NewBuffer()

    def check(action: str) -> None:
        if code := tf.TF_GetCode(status):
            message = tf.TF_Message(status).decode(errors="replace")
            raise RuntimeError(f"cannot {action}, TF_Code {code}: {message}")

    def one_output(name: str) -> ctypes.Array[Output]:
        operation, index = name.rsplit(":", 1)
        handle = tf.TF_GraphOperationByName(graph, operation.encode())
        if not handle:  # TF_SessionRun would crash on it
            raise RuntimeError(f"signature {signature!r} names {name!r}, which is not in the graph")
        return (Output * 1)(Output(handle, int(index)))

    options, tags = tf.TF_NewSessionOptions(), (ctypes.c_char_p * 1)(b"serve")
    session = tf.TF_LoadSessionFromSavedModel(
        options, None, saved_model.encode(), tags, 1, graph, meta_graph, status
    )
    check(f"load {saved_model}")
    buffer = meta_graph.contents
    source, target = read_signature(ctypes.string_at(buffer.data, buffer.length), signature)
    if array.dtype != DTYPES[source[1]]:  # no silent cast: the test must feed what a client sends
        raise TypeError(f"signature {signature!r} takes {DTYPES[source[1]]}, not {array.dtype}")

    array = np.require(array, requirements="C")
    shape, size = (ctypes.c_int64 * array.ndim)(*array.shape), ctypes.c_size_t(array.nbytes)
    feeds = (Handle * 1)(tf.TF_AllocateTensor(source[1], shape, array.ndim, size))
    fetches = (Handle * 1)()
    ctypes.memmove(tf.TF_TensorData(feeds[0]), array.ctypes.data, array.nbytes)
    inputs, outputs = one_output(source[0]), one_output(target[0])
    tf.TF_SessionRun(session, None, inputs, feeds, 1, outputs, fetches, 1, None, 0, None, status)
    check(f"run signature {signature!r}")

    fetch = fetches[0]
    result = np.empty([tf.TF_Dim(fetch, axis) for axis in range(tf.TF_NumDims(fetch))], np.float32)
    if tf.TF_TensorByteSize(fetch) != result.nbytes:
        raise RuntimeError(f"the output of signature {signature!r} is not float32 as declared")
    ctypes.memmove(result.ctypes.data, tf.TF_TensorData(fetch), result.nbytes)
    tf.TF_DeleteSession(session, status)  # stops its threads; the process frees all the rest
    return result


def main(arguments: list[str]) -> None:
    """Read the input array, run the signature and write the output array."""
    if len(arguments) != 4:
        raise SystemExit(__doc__)
    saved_model, signature, source, target = arguments
    np.save(target, run_signature(saved_model, signature, np.load(source)))
    if "tensorflow" in sys.modules:
        raise RuntimeError("tensorflow's Python was imported, so this run proves nothing")


if __name__ == "__main__":
    main(sys.argv[1:])
