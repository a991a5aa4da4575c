"""Fills all weights of a network from a file, or none, and tells what does not fit.

A weight has a name and a shape in the file, and axes that bring it into Keras' order.
"""

import hashlib
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import keras
import numpy as np

# Names of each kind that an error lists.
LISTED = 3


class Slot(NamedTuple):
    """A network's weight, and how a file stores it."""

    variable: keras.Variable
    axes: tuple[int, ...] = ()  # of the file's array, in the variable's order; (): as they are

    @property
    def file_shape(self) -> tuple[int, ...]:
        order = np.argsort(self.axes) if self.axes else range(len(self.variable.shape))
        return tuple(self.variable.shape[axis] for axis in order)


class Loaded(NamedTuple):
    """What came of a file."""

    weights: int  # arrays that were loaded
    values: int  # numbers in them
    from_encoder: str | None = None  # of a file with two: student or teacher
    ignored: tuple[str, ...] = ()  # names in the file that are of other networks


def names_of(paths: Iterable[str]) -> list[str]:
    """What tells a network's weights apart, of their Keras paths: each one's layer and own name.

    Whole paths where networks inside of it share names of layers. A copy of a network may lack the
    names of those inside; and unnamed weights Keras numbers by what a process has made before.
    """
    paths = [re.sub(r"/variable_\d+$", "/variable", path) for path in paths]
    short = ["/".join(path.split("/")[-2:]) for path in paths]
    return short if len(set(short)) == len(short) else paths


def sha256(variables: Iterable[keras.Variable]) -> str:
    """Returns the digest of all values of some weights, in their order."""
    digest = hashlib.sha256()
    for variable in variables:
        digest.update(variable.numpy().tobytes())
    return digest.hexdigest()


def keras_slots(network: keras.Model) -> dict[str, Slot]:
    """The weights of a network by their Keras paths, such as layer1_0_conv1/kernel.

    Raises:
        ValueError: when two weights have the same path.
    """
    names = names_of(variable.path for variable in network.weights)
    slots = dict(zip(names, map(Slot, network.weights), strict=True))
    if len(slots) < len(network.weights):
        raise ValueError(
            f"Weights are told apart by their layers' names. Received: {network.name}, with "
            f"{len(network.weights)} weights under {len(slots)} names. Give every layer its own."
        )
    return slots


def fill(slots: dict[str, Slot], arrays: dict[str, np.ndarray], source: str) -> Loaded:
    """Assigns an array to every slot. Where any does not fit, nothing is assigned.

    Args:
        slots: by their names in the file.
        arrays: of the file, by name; all of them must be used.
        source: the file, for errors.

    Raises:
        ValueError: listing the missing, unused and mis-shaped names, or for values that are not
            finite.
    """
    missing = [f"{name} {slots[name].file_shape}" for name in slots if name not in arrays]
    unused = [f"{name} {arrays[name].shape}" for name in arrays if name not in slots]
    both = [name for name in slots if name in arrays]
    misshaped = [
        f"{name} {arrays[name].shape} instead of {slots[name].file_shape}"
        for name in both
        if slots[name].file_shape != arrays[name].shape
    ]
    kinds = {"missing": missing, "unused": unused, "mis-shaped": misshaped}
    problems = [_listed(kind, names) for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(
            f"The weights of {source} are another network's: of {len(slots)} expected, "
            f"{'; '.join(problems)}.{_stem_advice(slots, arrays)}"
        )
    bad = [name for name in both if not np.isfinite(arrays[name]).all()]
    if bad:
        raise ValueError(f"The weights of {source} are not finite: {_listed('in', bad)}.")
    for name, (variable, axes) in slots.items():
        variable.assign(arrays[name].transpose(axes) if axes else arrays[name])
    return Loaded(len(slots), sum(math.prod(array.shape) for array in arrays.values()))


def _listed(kind, names):
    more = ", ..." * (len(names) > LISTED)
    return f"{len(names)} {kind} ({', '.join(names[:LISTED])}{more})"


def _stem_advice(slots, arrays):
    """The one cure that nobody would find in the names: our stem depends on the images' size."""
    for name, axis in (("conv1.weight", 3), ("conv1/kernel", 0)):
        if name in slots and name in arrays and arrays[name].ndim == 4:
            sides = slots[name].file_shape[axis], arrays[name].shape[axis]
            if sides == (3, 7):
                return " A 7x7 stem is for images above 64 pixels: raise --image_size."
            if sides == (7, 3):
                return " A 3x3 stem is for images of up to 64 pixels: lower --image_size."
    return ""
