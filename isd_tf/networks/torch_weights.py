"""PyTorch's weights in, and ours out: names, axes, and the files that hold them.

Our encoders are torchvision's ResNets, name for name:

    layer1.0.downsample.1.running_var  <->  layer1_0_downsample_1/moving_variance

Kernels are [out, in, k, k] and [out, in] there, [k, k, in, out] and [in, out] here. Checkpoints of
ISD, MSF, CompRess and MoCo hold the same networks under prefixes, with heads as `fc` and
`predict_q`, and a queue.

Sources: torchvision.models.resnet; UMBCvision/ISD train_isd.py:100-165, train_isd_plus.py:105-160;
UMBCvision/MSF train_msf.py:92-146; UMBCvision/CompRess train_student.py:215-226 and
train_student_one_queue.py:171-211; facebookresearch/moco moco/builder.py:14-56.
"""

import argparse
import os
import pathlib
import pickle
import re
from typing import NamedTuple

import keras
import numpy as np
import safetensors
import safetensors.numpy

from isd_tf.networks.weights import Loaded, Slot, fill

PICKLES = (".pth", ".pt", ".pth.tar")
SUFFIXES = (".safetensors", *PICKLES)

# torch's [out, in, k, k] as Keras' [k, k, in, out], and [out, in] as [in, out].
AXES = {4: (2, 3, 1, 0), 2: (1, 0)}
PARAMETERS = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "bias": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# Whose names our encoders' layers are: conv1, bn1, layer1_0_conv1, layer1_0_downsample_0.
ENCODER_LAYER = re.compile(r"(conv1|bn1)|layer\d+_\d+_(conv\d|bn\d|downsample_[01])")
# ISD's, MSF's and MoCo's names of the two encoders.
STUDENT = ("encoder_q.", "model_q.")
TEACHER = ("encoder_k.", "encoder_t.", "model_k.", "model_t.")
PREDICTOR = "predict_q."
# A classifier, or a projector: fc.weight, fc.0.weight.
HEAD = "fc."


class Checkpoint(NamedTuple):
    """What a file holds, by PyTorch's names without prefixes."""

    student: dict[str, np.ndarray]  # or the only encoder; its head is `fc.`
    teacher: dict[str, np.ndarray]
    predictor: dict[str, np.ndarray]
    others: dict[str, np.ndarray]  # queue, queue_ptr, labels


# -------------------------------------------------------------------------------------- names


def encoder_slots(encoder: keras.Model) -> dict[str, Slot]:
    """The weights of one of our ResNets by torchvision's names.

    Raises:
        ValueError: for a network whose layers are named otherwise.
    """
    strange = [
        layer.name
        for layer in encoder.layers
        if layer.weights and not ENCODER_LAYER.fullmatch(layer.name)
    ]
    if strange or not encoder.weights:
        raise ValueError(
            "PyTorch's names are known of the encoders resnet18, resnet34, resnet50 and "
            f"tiny_resnet. Received: {encoder.name}, with the layer {(strange or ['none'])[0]}. "
            "Use a .keras or .weights.h5 file for this one."
        )
    slots = {}
    for layer in encoder.layers:
        torch_layer = re.sub(r"^(layer\d+)_(\d+)_", r"\1.\2.", layer.name)
        torch_layer = torch_layer.replace("downsample_", "downsample.")
        slots |= _layer_slots(layer, torch_layer)
    return slots


def head_slots(head: keras.Model, prefix: str) -> dict[str, Slot]:
    """The weights of a head, whose layers torch.nn.Sequential counts from 0: fc.0.weight."""
    slots = {}
    for place, layer in enumerate(head.layers):
        slots |= _layer_slots(layer, f"{prefix}{place}")
    return slots


def _layer_slots(layer, torch_layer):
    return {
        f"{torch_layer}.{PARAMETERS[v.name]}": Slot(v, AXES.get(len(v.shape), ()))
        for v in layer.weights
    }


def to_torch(encoder: keras.Model) -> dict[str, np.ndarray]:
    """Returns one of our ResNets as torchvision's state dict, without a classifier.

    `num_batches_tracked` is there, as 0, so that PyTorch's strict `load_state_dict` takes it:

        model = torchvision.models.resnet50()
        model.fc = torch.nn.Identity()
        model.load_state_dict(state)

    Raises:
        ValueError: for a network whose layers are named otherwise.
    """
    state = {}
    for name, (variable, axes) in encoder_slots(encoder).items():
        array = variable.numpy()
        state[name] = np.ascontiguousarray(array.transpose(np.argsort(axes)) if axes else array)
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return state


# -------------------------------------------------------------------------------------- loading


def load_encoder(
    encoder: keras.Model, path: str | os.PathLike, from_encoder: str = "student"
) -> Loaded:
    """Loads an encoder from a file of PyTorch's weights: all of its weights, or none.

    Heads, classifier and queue are left out, and named in what is returned.

    Args:
        encoder: one of our ResNets.
        path: a state dict of torchvision's, or a checkpoint of ISD, MSF, CompRess or MoCo; with one
            of SUFFIXES. All but .safetensors need the optional extra `torch`.
        from_encoder: of a checkpoint with two: student or teacher.

    Raises:
        ValueError: for a file that cannot be read, needs code to be read, or holds another network.
        ImportError: when PyTorch is needed and missing.
        OSError: when the file cannot be opened.
    """
    slots = encoder_slots(encoder)
    checkpoint = read(path)
    arrays = _of(checkpoint, from_encoder, path)
    loaded = fill(slots, {k: v for k, v in arrays.items() if not k.startswith(HEAD)}, str(path))
    heads = [name for name in arrays if name.startswith(HEAD)]
    ignored = (*heads, *checkpoint.predictor, *checkpoint.others)
    return loaded._replace(
        from_encoder=from_encoder if checkpoint.teacher else None, ignored=ignored
    )


def load_model(model: keras.Model, path: str | os.PathLike) -> Loaded:
    """Loads a whole model, as isd_tf.ISD or isd_tf.MoCoV2, from a checkpoint of PyTorch's.

    Student, teacher, projectors, predictor, queue, its pointer and labels: all, or none of them.

    Args:
        model: with the heads and queue_size that the checkpoint was trained with: isd_heads or
            isd_plus_heads for ISD's, isd_plus_heads for MSF's, moco_v2_heads for MoCo v2's.
        path: as in `load_encoder`.

    Raises:
        ValueError, ImportError, OSError: as in `load_encoder`.
    """
    checkpoint = read(path)
    slots, arrays = {}, {}
    for side, prefix in (("student", "encoder_q."), ("teacher", "encoder_k.")):
        own = encoder_slots(getattr(model, f"{side}_encoder"))
        projector = getattr(model, f"{side}_projector")
        own |= head_slots(projector, HEAD) if projector else {}
        slots |= {prefix + name: slot for name, slot in own.items()}
        arrays |= {prefix + name: v for name, v in _of(checkpoint, side, path).items()}
    slots |= head_slots(model.predictor, PREDICTOR) if model.predictor else {}
    arrays |= checkpoint.predictor
    if hasattr(model, "queue"):
        queue, others = model.queue, dict(checkpoint.others)
        # Of MoCo's queue a column is an embedding; of the others', a row, as here.
        rows, columns = (queue.size, queue.dimension), (queue.dimension, queue.size)
        is_mocos = others.get("queue", np.empty(0)).shape == columns != rows
        slots["queue"] = Slot(queue.rows, (1, 0) if is_mocos else ())
        slots["queue_ptr"] = Slot(queue.pointer)
        if "queue_ptr" in others:
            others["queue_ptr"] = others["queue_ptr"].reshape(())
        if "labels" in others:
            slots["labels"] = Slot(queue.labels)
        arrays |= others
    return fill(slots, arrays, str(path))


def _of(checkpoint, side, path):
    arrays = getattr(checkpoint, side)
    if not arrays:
        raise ValueError(f"{path} holds one encoder, and no {side} beside another.")
    return arrays


# -------------------------------------------------------------------------------------- files


def read(path: str | os.PathLike) -> Checkpoint:
    """Reads a file of PyTorch's weights, and takes its prefixes apart.

    Raises:
        ValueError, ImportError, OSError: as in `load_encoder`.
    """
    path = pathlib.Path(path)
    if not path.name.endswith(SUFFIXES):
        raise ValueError(
            f"PyTorch's weights are in files ending in {', '.join(SUFFIXES)}. Received: {path}."
        )
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: a download or a copy that failed, perhaps.")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    # `module.` is DataParallel's, around the whole or around a part: encoder_q.module.conv1.weight.
    state = {re.sub(r"(^|\.)module\.", r"\1", name): array for name, array in state.items()}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    student, teacher = _under(state, STUDENT), _under(state, TEACHER)
    if not student and not teacher:
        return Checkpoint(state, {}, {}, {})
    pair = (*STUDENT, *TEACHER)
    predictor = {k: v for k, v in state.items() if k.startswith(PREDICTOR)}
    others = {k: v for k, v in state.items() if not k.startswith((*pair, PREDICTOR))}
    return Checkpoint(student, teacher, predictor, others)


def _under(state, prefixes):
    return {k.partition(".")[2]: v for k, v in state.items() if k.startswith(prefixes)}


def _read_safetensors(path):
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is no .safetensors file, or not a whole one ({error})."
        ) from error


def _read_pickle(path):
    torch = _import_torch(path)
    # The checkpoints of ISD, MSF and CompRess hold their command line, which is plain data.
    allowed = torch.serialization.safe_globals([argparse.Namespace])
    try:
        with open(path, "rb") as file, allowed:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise ValueError(
                f"{path} needs code to be read ({code.group(1)}), which could do anything, and is "
                "refused. Load it where you trust it, and save its state dict alone: "
                "torch.save(model.state_dict(), PATH)."
            ) from error
        raise ValueError(f"{path} is no file of PyTorch's, or not a whole one.") from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise ValueError(f"{path} is no file of PyTorch's, or not a whole one.") from error
    return _state_dict(content, path, torch)


def _state_dict(content, path, torch):
    """The tensors of a checkpoint, as arrays."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no state dict. Received: {type(content).__name__}.")
    others = [str(name) for name, value in content.items() if not torch.is_tensor(value)]
    if others:
        raise ValueError(
            f"{path} must hold a state dict, alone or as `state_dict` or `model`. Received: "
            f"{', '.join(others[:3])} besides {len(content) - len(others)} tensors."
        )
    return {name: _array(tensor, torch) for name, tensor in content.items()}


def _array(tensor, torch):
    # numpy has no bfloat16.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def save(encoder: keras.Model, path: str | os.PathLike) -> None:
    """Writes one of our ResNets as torchvision's state dict: see `to_torch`.

    Args:
        encoder: one of our ResNets.
        path: to a .safetensors file; or to a .pth or .pt file, by the optional extra `torch`.

    Raises:
        ValueError: for a network whose layers are named otherwise, or another suffix.
        ImportError: when PyTorch is needed and missing.
    """
    path, state = pathlib.Path(path), to_torch(encoder)
    if path.suffix == ".safetensors":
        # The metadata that transformers and others ask for.
        safetensors.numpy.save_file(state, path, {"format": "pt"})
    elif path.suffix in PICKLES:
        torch = _import_torch(path)
        torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path)
    else:
        raise ValueError(
            f"PyTorch's weights are written to .safetensors, .pth or .pt. Received: {path}."
        )


def _import_torch(path):
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"PyTorch reads and writes {path.suffix} files, and is not installed: "
            f"pip install 'torch>=2.6'. Received: {path}. A .safetensors file needs none."
        ) from error
    return torch
