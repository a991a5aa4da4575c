"""Runs signatures of a SavedModel through TensorFlow's C API, without TensorFlow's Python.

    python tests/saved_model_c_api.py SAVED_MODEL_DIR SIGNATURE INPUT OUTPUT.npz

``TF_LoadSessionFromSavedModel`` uses the same C++ loader as TF Serving. A SavedModel that runs
after ``tf.saved_model.load``, which rebuilds Python objects, can fail here with "Could not find
variable". INPUT is an array, .npy, or a folder, whose files in the order of their names are
strings. A test starts it as a process of its own: TensorFlow is already imported in the test's,
and some invalid inputs make the C++ kernels abort the process.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

STRING = 7  # DataType of types.proto, as the others
DTYPES = {
    1: np.dtype(np.float32),
    2: np.dtype(np.float64),
    3: np.dtype(np.int32),
    4: np.dtype(np.uint8),
    9: np.dtype(np.int64),
    10: np.dtype(bool),
}
STRING_BYTES = 24  # of a TF_TString
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
    "TF_StringGetDataPointer": Handle,
    "TF_StringGetSize": ctypes.c_size_t,
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


def read_signatures(meta_graph: bytes) -> dict[str, tuple[dict, dict]]:
    """Return the inputs and the outputs, by name, of each signature of a MetaGraphDef."""

    def tensors(signature: memoryview, number: int) -> dict[str, TensorInfo]:
        infos = {
            name: dict(proto_fields(info)) for name, info in proto_map(signature, number).items()
        }
        return {name: (str(info[1], "utf-8"), info.get(2, 0)) for name, info in infos.items()}

    signatures = proto_map(memoryview(meta_graph), 5)  # MetaGraphDef.signature_def
    return {name: (tensors(proto, 1), tensors(proto, 2)) for name, proto in signatures.items()}


class SessionError(RuntimeError):
    """What TensorFlow refuses, with its code, which is gRPC's."""

    def __init__(self, action: str, code: int, message: str):
        super().__init__(f"cannot {action}, TF_Code {code}: {message}")
        self.code, self.message = code, message


class SavedModel:
    """A session of a SavedModel, which several threads may run."""

    def __init__(self, folder: str):
        self.tf = load_library()
        self.graph, meta_graph = self.tf.TF_NewGraph(), self.tf.TF_NewBuffer()
        options, tags = self.tf.TF_NewSessionOptions(), (ctypes.c_char_p * 1)(b"serve")
        status = self.tf.TF_NewStatus()
        self.session = self.tf.TF_LoadSessionFromSavedModel(
            options, None, folder.encode(), tags, 1, self.graph, meta_graph, status
        )
        self._check(status, f"load {folder}")
        buffer = meta_graph.contents
        self.meta_graph = ctypes.string_at(buffer.data, buffer.length)
        self.signatures = read_signatures(self.meta_graph)

    def run(self, signature: str, value: np.ndarray | Sequence[bytes]) -> dict[str, np.ndarray]:
        """Feed the one input of a signature, and return its outputs by name.

        An array of objects is one of bytes. Types and shapes are TensorFlow's to refuse.
        """
        if signature not in self.signatures:
            raise RuntimeError(f"no signature {signature!r} among {sorted(self.signatures)}")
        inputs, outputs = self.signatures[signature]
        ((source, _),) = inputs.values()
        if not isinstance(value, np.ndarray):
            value = np.array(value, object)
        feeds, fetches = (Handle * 1)(self._tensor(value)), (Handle * len(outputs))()
        targets = (Output * len(outputs))(*(self._output(name) for name, _ in outputs.values()))
        status = self.tf.TF_NewStatus()
        self.tf.TF_SessionRun(
            self.session, None,
            (Output * 1)(self._output(source)), feeds, 1,
            targets, fetches, len(outputs),
            None, 0, None, status,
        )  # fmt: skip
        self._delete(feeds[0], value)
        self._check(status, f"run signature {signature!r}")
        results = {name: self._array(x) for name, x in zip(outputs, fetches, strict=True)}
        for fetch in fetches:
            self.tf.TF_DeleteTensor(fetch)
        return results

    def _check(self, status: Handle, action: str) -> None:
        code, message = self.tf.TF_GetCode(status), self.tf.TF_Message(status)
        message = message.decode(errors="replace")
        self.tf.TF_DeleteStatus(status)
        if code:
            raise SessionError(action, code, message)

    def _output(self, name: str) -> Output:
        operation, index = name.rsplit(":", 1)
        handle = self.tf.TF_GraphOperationByName(self.graph, operation.encode())
        if not handle:  # TF_SessionRun would crash on it
            raise RuntimeError(f"a signature names {name!r}, which is not in the graph")
        return Output(handle, int(index))

    def _tensor(self, value: np.ndarray) -> Handle:
        is_text = value.dtype == object
        (dtype,) = [STRING] if is_text else [key for key, d in DTYPES.items() if d == value.dtype]
        size = STRING_BYTES * value.size if is_text else value.nbytes
        shape = (ctypes.c_int64 * value.ndim)(*value.shape)
        tensor = self.tf.TF_AllocateTensor(dtype, shape, value.ndim, ctypes.c_size_t(size))
        data = self.tf.TF_TensorData(tensor)
        if not is_text:
            ctypes.memmove(data, np.require(value, requirements="C").ctypes.data, size)
            return tensor
        for place, text in zip(self._places(tensor, value.size), value.ravel(), strict=True):
            self.tf.TF_StringInit(place)
            self.tf.TF_StringCopy(place, text, ctypes.c_size_t(len(text)))
        return tensor

    def _places(self, tensor: Handle, count: int) -> list[Handle]:
        data = self.tf.TF_TensorData(tensor)
        return [Handle(data.value + STRING_BYTES * i) for i in range(count)]

    def _delete(self, tensor: Handle, value: np.ndarray) -> None:
        if value.dtype == object:  # The strings themselves lie elsewhere.
            for place in self._places(tensor, value.size):
                self.tf.TF_StringDealloc(place)
        self.tf.TF_DeleteTensor(tensor)

    def _array(self, fetch: Handle) -> np.ndarray:
        shape = [self.tf.TF_Dim(fetch, axis) for axis in range(self.tf.TF_NumDims(fetch))]
        dtype, data = self.tf.TF_TensorType(fetch), self.tf.TF_TensorData(fetch)
        if dtype == STRING:
            strings = [
                ctypes.string_at(
                    self.tf.TF_StringGetDataPointer(place), self.tf.TF_StringGetSize(place)
                )
                for place in self._places(fetch, int(np.prod(shape)))
            ]
            return np.array(strings, "S").reshape(shape)
        result = np.empty(shape, DTYPES[dtype])
        ctypes.memmove(result.ctypes.data, data, result.nbytes)
        return result


def main(arguments: list[str]) -> None:
    """Read the input, run the signature and write its outputs."""
    if len(arguments) != 4:
        raise SystemExit(__doc__)
    saved_model, signature, source, target = arguments
    if Path(source).is_dir():
        value = [path.read_bytes() for path in sorted(Path(source).iterdir())]
    else:
        value = np.load(source)
    np.savez(target, **SavedModel(saved_model).run(signature, value))
    if "tensorflow" in sys.modules:
        raise RuntimeError("tensorflow's Python was imported, so this run proves nothing")


if __name__ == "__main__":
    main(sys.argv[1:])
