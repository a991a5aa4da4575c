"""What a training begins from: the weights of another run, of a Keras model or of PyTorch's."""

import hashlib
import os
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import h5py
import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import trackable_object_graph_pb2

from isd_tf.networks import torch_weights
from isd_tf.networks.weights import Loaded, fill, keras_slots, names_of, sha256

SUFFIXES = (".keras", ".weights.h5", *torch_weights.SUFFIXES)
ENCODERS = ("student", "teacher")
# Random generators' state, as of Dropout, is no weight.
GENERATOR = "seed_generator"


class InitialWeights(NamedTuple):
    """What was loaded, and from where."""

    path: str
    step: int | None  # of a run
    sha256: str  # of the file; of a run, of its checkpoint's files
    loaded: Loaded

    def sentence(self) -> str:
        """What was loaded, in a line."""
        weights, values, from_encoder, ignored = self.loaded
        whose = f", its {from_encoder}" if from_encoder else ""
        step = f", step {self.step}" if self.step is not None else ""
        more = ", ..." * (len(ignored) > 3)
        left_out = f"; left out: {', '.join(ignored[:3])}{more}" if ignored else ""
        return (
            f"all {weights} arrays ({values} values) of {self.path}{step}{whose} "
            f"(sha256 {self.sha256[:12]}...{left_out})."
        )


def load_weights(
    encoder: keras.Model,
    path: str | os.PathLike,
    from_encoder: str = "student",
    step: int | None = None,
) -> InitialWeights:
    """Loads all weights of an encoder, BatchNorm's moving statistics included, or raises.

    Call it before the encoder is handed to isd_tf.ISD, whose teacher starts as its copy; under a
    strategy, inside its scope and on every worker.

    Args:
        encoder: any encoder; for PyTorch's weights, one of our ResNets.
        path: of the workdir of a run; or of a .keras file, with an encoder or a whole model of
            isd_tf; or of a .weights.h5 file; or of PyTorch's weights, .safetensors, .pth or .pt, as
            in isd_tf.torch_weights.
        from_encoder: student or teacher, of a run, a checkpoint or a model that has both.
        step: of a run's checkpoints; None: the newest.

    Returns:
        What was loaded, its digest, and what in the file was of no use.

    Raises:
        ValueError: for a file that cannot be read or is another network's, listing what is missing,
            unused and mis-shaped; or a workdir without this checkpoint.
        ImportError: when PyTorch is needed and missing.
        OSError: when the file or folder cannot be opened.
    """
    path = pathlib.Path(path)
    if from_encoder not in ENCODERS:
        raise ValueError(
            f"from_encoder must be one of {', '.join(ENCODERS)}. Received: {from_encoder!r}."
        )
    if not path.exists():
        raise FileNotFoundError(f"No such weights. Received: {path}.")
    if path.is_dir():
        step = find_step(path, step)
        arrays = _read_run(path, step, from_encoder)
        loaded = fill(keras_slots(encoder), arrays, f"{path}, step {step}")
        return InitialWeights(
            str(path), step, digest(path, step), loaded._replace(from_encoder=from_encoder)
        )
    if step is not None:
        raise ValueError(f"Only runs have steps. Received: step={step} with the file {path}.")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(
            f"Weights are in a run's workdir, or in files ending in {', '.join(SUFFIXES)}. "
            f"Received: {path}."
        )
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: a download or a copy that failed, perhaps.")
    if path.name.endswith(torch_weights.SUFFIXES):
        loaded = torch_weights.load_encoder(encoder, path, from_encoder)
    elif path.suffix == ".keras":
        saved, has_two = load_keras_encoder(path, from_encoder)
        arrays = _named(((v.path, v.numpy()) for v in saved.weights), path)
        loaded = fill(keras_slots(encoder), arrays, str(path))
        loaded = loaded._replace(from_encoder=from_encoder if has_two else None)
    else:
        _require_student(from_encoder, path)
        loaded = fill(keras_slots(encoder), _read_h5(path, encoder), str(path))
    return InitialWeights(str(path), None, digest(path, None), loaded)


def published(encoder: keras.Model, name: str) -> InitialWeights:
    """What `load_weights` would tell of an encoder that was built with published weights."""
    loaded = Loaded(len(encoder.weights), encoder.count_params())
    what = f"what is published for {name}"
    return InitialWeights(what, None, sha256(encoder.weights), loaded)


def digest(path: str | os.PathLike, step: int | None) -> str | None:
    """Returns the sha256 of what `load_weights` reads; None where it is no longer there."""
    path = pathlib.Path(path)
    files = sorted(_checkpoint(path, step).glob("*")) if step is not None else [path]
    if not files or not all(file.is_file() for file in files):
        return None
    of_files = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            while part := content.read(2**20):
                of_files.update(part)
    return of_files.hexdigest()


# -------------------------------------------------------------------------------- a run's workdir


def find_step(workdir: pathlib.Path, step: int | None) -> int:
    """Returns the step to load of a run: the newest, or the one asked for.

    Raises:
        ValueError: when there is none, or not this one.
    """
    names = [place.name.removeprefix("step-") for place in workdir.glob("checkpoints/step-*")]
    steps = sorted(int(name) for name in names if name.isdigit())
    if not steps:
        raise ValueError(
            f"The weights of a run are in its checkpoints. Received: {workdir}, without any."
        )
    if step is not None and step not in steps:
        raise ValueError(
            f"{workdir} has checkpoints of the steps {', '.join(map(str, steps))}. Received: "
            f"{step}."
        )
    return steps[-1] if step is None else step


def _checkpoint(workdir, step):
    return workdir / "checkpoints" / f"step-{step:08d}"


def _read_run(workdir, step, encoder):
    """An encoder's weights in a checkpoint, by their Keras paths."""
    place = _checkpoint(workdir, step)
    try:
        reader = tf.train.load_checkpoint(str(place / "state"))
        graph = trackable_object_graph_pb2.TrackableObjectGraph()
        graph.ParseFromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
        keys = _keys_beneath(graph.nodes, ("model", f"{encoder}_encoder"))
        if any(child.local_name == "unseen" for child in graph.nodes[0].children):
            keys += _keys_beneath(graph.nodes, ("unseen", f"{encoder}_encoder"))
        return _named(((name, reader.get_tensor(key)) for name, key in keys), place)
    except (tf.errors.OpError, RuntimeError, IndexError) as error:
        first_line = str(error).splitlines()[0][:200]
        raise ValueError(f"The checkpoint {place} cannot be read ({first_line}).") from error


def _keys_beneath(nodes, way):
    """Pairs (path of a weight, key of its value) of all that hangs at an object of a checkpoint."""
    node = 0
    for name in way:
        children = {child.local_name: child.node_id for child in nodes[node].children}
        if name not in children:
            raise ValueError(f"The checkpoint is of a model without {name}.")
        node = children[name]
    waiting, seen, found = [node], {node}, []
    while waiting:
        node = nodes[waiting.pop()]
        found += [(a.full_name, a.checkpoint_key) for a in node.attributes if a.full_name]
        fresh = {child.node_id for child in node.children} - seen
        seen |= fresh
        waiting += sorted(fresh)
    return found


# ------------------------------------------------------------------------------------ Keras' files


def load_keras_encoder(path: str | os.PathLike, from_encoder: str) -> tuple[keras.Model, bool]:
    """Loads a .keras file: an encoder, or the one asked for of a whole model of isd_tf.

    Returns:
        The encoder, and whether the file holds two.

    Raises:
        ValueError: when Keras cannot load it, or it holds one encoder and the teacher is asked for.
    """
    try:
        model = keras.saving.load_model(path, compile=False)
    except Exception as error:  # Of many kinds: the file's, the configuration's, the layers'.
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        raise ValueError(
            f"{path} cannot be loaded as a Keras model ({lines[0].strip()[:200]})."
        ) from error
    if hasattr(model, f"{from_encoder}_encoder"):
        return getattr(model, f"{from_encoder}_encoder"), True
    _require_student(from_encoder, path)
    return model, False


def _require_student(from_encoder, path):
    if from_encoder != "student":
        raise ValueError(f"{path} holds one encoder, and no {from_encoder} beside another.")


def _read_h5(path, encoder):
    """The arrays of a .weights.h5 file by the Keras paths that the encoder's layers give them."""
    paths = {}
    for layer in encoder._flatten_layers(include_self=False):
        stored = {}
        layer.save_own_variables(stored)
        own = layer._trainable_variables + layer._non_trainable_variables
        paths |= {f"{layer.name}/{i}": v.path for i, v in zip(stored, own, strict=True)}
    found = []

    def note(name, item):
        if isinstance(item, h5py.Dataset):
            # Keras groups the arrays of a layer as .../vars, beside which it notes the name.
            layer = item.parent.attrs.get("name", name.rpartition("/vars/")[0])
            stored = f"{layer}/{name.rpartition('/')[2]}"
            found.append((paths.get(stored, stored), item[()]))

    try:
        with h5py.File(path) as file:
            file.visititems(note)
    except OSError as error:
        raise ValueError(f"{path} is no .weights.h5 file, or not a whole one.") from error
    return _named(found, path)


def _named(pairs: Iterable[tuple[str, np.ndarray]], source):
    """The weights that are not a random generator's, whose names must tell them apart."""
    pairs = [(path, array) for path, array in pairs if GENERATOR not in path]
    names = names_of(path for path, _ in pairs)
    arrays = dict(zip(names, (array for _, array in pairs), strict=True))
    if len(arrays) < len(pairs):
        raise ValueError(
            f"Weights are told apart by their layers' names. Received: {source}, with {len(pairs)} "
            f"weights under {len(arrays)} names."
        )
    return arrays
