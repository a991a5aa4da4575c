"""Backbones of others as encoders: keras.applications, KerasHub, and Keras models in files.

All take the images that our own encoders take, normalised by ImageNet's statistics: what a library
expects of its pixels instead is folded in. In all of them, as in ours:

    features are [B, C], in the weights' precision
    BatchNorm is ours, with the momentum and epsilon of theirs, so that --batch_norm has its meaning
    random layers (dropout, stochastic depth) are off: their generators' state is in no checkpoint,
    and a run that is continued would draw other numbers

Sources: keras.applications; keras_hub.models.Backbone.
"""

import collections
import difflib
import inspect
import os
import re
from typing import NamedTuple

import keras
import numpy as np
from keras import layers

from isd_tf.networks.batch_norm import BatchNormalization, GroupedBatchNormalization
from isd_tf.views.photometric import CHANNEL_MEAN, CHANNEL_STD


class Pixels(NamedTuple):
    """What a network expects: levels 0..255 times `scale` plus `offset`, numbers or a channel's."""

    scale: float | tuple[float, ...] = 1.0
    offset: float | tuple[float, ...] = 0.0
    bgr: bool = False


_CAFFE = Pixels(1.0, (-103.939, -116.779, -123.68), bgr=True)
_SIGNED = Pixels(1 / 127.5, -1.0)
_IMAGENET = Pixels(
    tuple(1 / (255 * std) for std in CHANNEL_STD),
    tuple(-mean / std for mean, std in zip(CHANNEL_MEAN, CHANNEL_STD, strict=True)),
)
# The image classifiers of keras.applications, and what their `preprocess_input` or their own first
# layers make of levels.
APPLICATIONS = {
    **dict.fromkeys("ResNet50 ResNet101 ResNet152 VGG16 VGG19".split(), _CAFFE),
    **dict.fromkeys("ResNet50V2 ResNet101V2 ResNet152V2 Xception".split(), _SIGNED),
    **dict.fromkeys("InceptionV3 InceptionResNetV2 NASNetMobile NASNetLarge".split(), _SIGNED),
    **dict.fromkeys("MobileNet MobileNetV2 MobileNetV3Small MobileNetV3Large".split(), _SIGNED),
    **dict.fromkeys("DenseNet121 DenseNet169 DenseNet201".split(), _IMAGENET),
    # With the published weights. Keras leaves the division by the deviations out without them.
    **{f"EfficientNetB{i}": _IMAGENET for i in range(8)},
    **{f"EfficientNetV2B{i}": _IMAGENET for i in range(4)},
    **{f"EfficientNetV2{size}": Pixels(1 / 128, -1.0) for size in "SML"},
    **{f"ConvNeXt{size}": _IMAGENET for size in ("Tiny", "Small", "Base", "Large", "XLarge")},
}
KERAS, HUB, FILE = "keras:", "keras_hub:", ".keras"
# KerasHub's transformers whose first token is the class token. (ViTs say so themselves.)
_CLASS_TOKEN_FIRST = ("DeiTBackbone", "DINOV2Backbone", "DINOV3Backbone")
# What ends a network of keras.applications.
_LAST = (layers.GlobalAveragePooling2D, layers.LayerNormalization)


def is_foreign(name: str) -> bool:
    """Whether an encoder's name means a network that is not ours."""
    return name.startswith((KERAS, HUB)) or name.endswith(FILE)


def describe(name: str) -> str:
    """What the start of a run should say of a foreign encoder."""
    weights = " It begins with the weights in the file." if name.endswith(FILE) else ""
    return f"Encoder {name}: its random layers (dropout, stochastic depth) are off.{weights}"


def build_foreign(
    name: str,
    image_size: int,
    synchronized_batch_norm: bool = False,
    batch_norm_groups: int = 1,
    published_weights: bool = False,
) -> keras.Model:
    """Builds an encoder from another library or a file; `build_encoder` explains the arguments.

    Returns:
        A functional model from normalised images [B, S, S, 3] to features [B, C].

    Raises:
        ValueError: for an unknown name, a size that the network cannot take, a file that holds no
            such model, or one whose random layers cannot be switched off.
        FileNotFoundError: for a file that does not exist.
        OSError: when something must be downloaded and cannot be.
        ImportError: for a KerasHub preset without KerasHub.
    """
    images = keras.Input(
        (image_size, image_size, 3), dtype=keras.config.dtype_policy().variable_dtype, name="images"
    )
    replaced = ()
    if name.startswith(KERAS):
        network = _application(name.removeprefix(KERAS), images, published_weights)
        if name.startswith(f"{KERAS}EfficientNetB"):
            replaced = (layers.Rescaling, layers.Normalization)
    elif name.startswith(HUB):
        network = _hub_backbone(name.removeprefix(HUB), images, published_weights)
    else:
        if published_weights:
            raise ValueError(
                f"The weights of a file are its own, not published ones. Received: {name}."
            )
        network = _from_file(name, images)
    return _like_ours(network, name, replaced, synchronized_batch_norm, batch_norm_groups)


@keras.saving.register_keras_serializable("isd_tf")
class PixelsFromNormalized(layers.Layer):
    """Makes of images that are normalised by ImageNet's statistics the pixels a network expects.

    Args:
        scale, offset, bgr: as in `Pixels`; per channel in the order that the network expects.
    """

    def __init__(self, scale=1.0, offset=0.0, bgr=False, **kwargs):
        super().__init__(**kwargs)
        self.pixels = Pixels(scale, offset, bgr)
        order = slice(None, None, -1 if bgr else 1)
        std, mean = np.array(CHANNEL_STD)[order], np.array(CHANNEL_MEAN)[order]
        self._scale = np.asarray(scale) * 255 * std
        self._offset = np.asarray(scale) * 255 * mean + np.asarray(offset)

    def call(self, images):
        if self.pixels.bgr:
            images = images[..., ::-1]
        scale, offset = (
            keras.ops.convert_to_tensor(x, self.compute_dtype) for x in (self._scale, self._offset)
        )
        return images * scale + offset

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), **self.pixels._asdict()}


def _pixels(images, pixels):
    # Not in bfloat16, which has no more than 256 levels between 128 and 256 and fewer between 0..1.
    return PixelsFromNormalized(*pixels, dtype=images.dtype, name="pixels")(images)


def _application(name, images, published):
    if name not in APPLICATIONS:
        raise ValueError(
            f"Unknown network of keras.applications.{nearest(name, APPLICATIONS)} Expected one of: "
            f"{', '.join(APPLICATIONS)}. Received: {KERAS}{name}."
        )
    application = getattr(keras.applications, name)
    has_own_pixels = "include_preprocessing" in inspect.signature(application).parameters

    def build(weights):
        return application(
            include_top=False,
            weights=weights,
            input_tensor=_pixels(images, APPLICATIONS[name]),
            input_shape=images.shape[1:],
            pooling="avg",
            **({"include_preprocessing": False} if has_own_pixels else {}),
        )

    try:
        network = build(None)
    except Exception as error:
        raise _cannot_take(f"{KERAS}{name}", images, error) from error
    if not published:
        return network
    try:
        return build("imagenet")
    except Exception as error:
        raise OSError(
            f"The published weights of {KERAS}{name} could not be had ({_first_line(error)}). "
            "Build it once where there is a network, and copy ~/.keras/models from there."
        ) from error


def _hub_backbone(preset, images, published):
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(
            f"{HUB}{preset} needs KerasHub. Install it by: pip install 'keras-hub==0.32.*'"
        ) from error
    known = keras_hub.models.Backbone.presets
    if not os.path.isdir(preset) and "://" not in preset and preset not in known:
        raise ValueError(
            f"Unknown preset of KerasHub.{nearest(preset, known)} Expected a folder of a saved "
            "preset, or one of the names in keras_hub.models.Backbone.presets. Received: "
            f"{HUB}{preset}."
        )

    def load(load_weights, **settings):
        return keras_hub.models.Backbone.from_preset(preset, load_weights, **settings)

    with_weights = "with its weights" if published else "without its weights"
    try:
        backbone = load(False)
        converter = keras_hub.layers.ImageConverter.from_preset(preset)
    except Exception as error:
        raise _no_preset(preset, error) from error
    is_sized = "image_shape" in inspect.signature(type(backbone)).parameters
    try:
        if is_sized or published:
            size = {"image_shape": tuple(images.shape[1:])} if is_sized else {}
            backbone = load(published, **size)
        scale, offset = (
            default if value is None else np.asarray(value, float).tolist()
            for value, default in ((converter.scale, 1.0), (converter.offset, 0.0))
        )
        x = backbone(_pixels(images, Pixels(scale, offset)))
    except OSError as error:
        raise _no_preset(preset, error) from error
    except Exception as error:
        raise _cannot_take(f"{HUB}{preset} {with_weights}", images, error) from error
    precision = keras.config.dtype_policy().variable_dtype
    if keras.backend.is_keras_tensor(x) and len(x.shape) == 4:
        x = layers.GlobalAveragePooling2D(dtype=precision, name="pool")(x)
    elif keras.backend.is_keras_tensor(x) and len(x.shape) == 3:
        is_first = type(backbone).__name__ in _CLASS_TOKEN_FIRST
        if getattr(backbone, "use_class_token", is_first):
            # What their published heads read.
            x = x[:, 0]
        else:
            x = layers.GlobalAveragePooling1D(dtype=precision, name="pool")(x)
    return _model(images, x, f"{HUB}{preset}", backbone.name)


def _no_preset(preset, error):
    if os.path.isdir(preset):
        return ValueError(
            f"The folder must hold a saved preset of an image backbone and its image converter. "
            f"Received: {HUB}{preset} ({_first_line(error)}). Save both into one folder by "
            "save_to_preset."
        )
    return OSError(
        f"The preset {HUB}{preset} could not be downloaded ({_first_line(error)}). Where there is "
        "a network, save backbone and image converter by save_to_preset, and name the folder here."
    )


def _from_file(path, images):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"No such file. Received: an encoder of {path}.")
    try:
        model = keras.saving.load_model(path, compile=False)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a Keras model ({_first_line(error)}). Layers that are not "
            "Keras' own must be registered by keras.saving.register_keras_serializable, and "
            "imported before; experiments/run.py imports none."
        ) from error
    policy = keras.config.dtype_policy().name
    policies = {layer.dtype_policy.name for layer in flat_layers(model) if layer.weights}
    if policies and policy not in policies:
        raise ValueError(
            f"A network in a file keeps its precision. Received: {path}, of {min(policies)}, with "
            f"--precision={policy}."
        )
    inputs = keras.tree.flatten(getattr(model, "inputs", None) or [images])
    shape = tuple(inputs[0].shape)
    fits = len(shape) == 4 and all(a in (None, b) for a, b in zip(shape, images.shape, strict=True))
    if len(inputs) > 1 or not fits:
        raise ValueError(
            f"An encoder takes images of shape {images.shape} and nothing else. Received: {path}, "
            f"which takes {', '.join(str(tuple(x.shape)) for x in inputs)}."
        )
    try:
        features = model(images)
    except Exception as error:
        raise _cannot_take(path, images, error) from error
    return _model(images, features, path, model.name)


def _model(images, features, what, name):
    is_vector = keras.backend.is_keras_tensor(features) and len(features.shape) == 2
    if not is_vector or features.shape[1] is None:
        shapes = keras.tree.map_structure(lambda x: tuple(x.shape), features)
        raise ValueError(
            f"An encoder makes one feature vector of each image, [B, C]. Received: {what}, which "
            f"makes {shapes}."
        )
    # In the weights' precision, as features are compared.
    precision = keras.config.dtype_policy().variable_dtype
    features = layers.Activation("linear", dtype=precision, name="features")(features)
    return keras.Model(images, features, name=name)


def _like_ours(network, name, replaced, synchronized, groups):
    """The same network and weights, with our BatchNorm, and with no random layers.

    Layers of the classes `replaced`, which preprocess the pixels, are left out.
    """
    precision = keras.config.dtype_policy().variable_dtype
    # The pooling and what normalises its result.
    last = [x for x in network.layers[-2:] if isinstance(x, _LAST)]
    pairs, unnamed = [], collections.Counter()

    def own_name(layer):
        """Unnamed layers are counted by the network, where Keras counts all of a process."""
        kind = _snake_case(type(layer).__name__)
        if not re.fullmatch(rf"{kind}(_\d+)?", layer.name):
            return layer.name
        unnamed[kind] += 1
        return f"{kind}_{unnamed[kind]}"

    def copy(layer):
        if _is_taken_apart(layer, (type(network), keras.Sequential)):
            return keras.models.clone_model(layer, clone_function=copy)
        if isinstance(layer, replaced):
            return layers.Identity(name=layer.name)
        config = layer.get_config()
        if not isinstance(layer, layers.Layer):  # An operation, without weights.
            return type(layer).from_config(config)
        made, config = type(layer), _without_randomness(layer, config)
        config["name"] = own_name(layer)
        if layer in last:
            config["dtype"] = precision
        if _can_be_ours(layer):
            config["synchronized"] = synchronized
            made = BatchNormalization if groups == 1 else GroupedBatchNormalization
            config |= {} if groups == 1 else {"groups": groups}
        pairs.append((layer, made.from_config(config)))
        return pairs[-1][1]

    encoder = keras.models.clone_model(network, clone_function=copy)
    for theirs, ours in pairs:
        ours.set_weights(theirs.get_weights())
    finalize_normalization(encoder)
    _require_batch_norm(encoder, name, synchronized, groups)
    _require_no_randomness(encoder, name)
    return encoder


def _snake_case(name):
    """A class' name as Keras makes layers' names of it."""
    words = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()


def _is_taken_apart(layer, plain):
    """Whether a layer is a network whose layers are copied one by one.

    Not a backbone that has a constructor of its own and no BatchNorm that could be ours: some of
    KerasHub's layers cannot be built from their configurations, only from their network's.
    """
    if not isinstance(layer, keras.Model):
        return False
    return type(layer) in plain or any(map(_can_be_ours, getattr(layer, "layers", ())))


def _without_randomness(layer, config):
    """The configuration with all rates of dropout and stochastic depth at zero."""
    is_dropout = "Drop" in type(layer).__name__
    return {
        key: 0.0 if isinstance(value, float) and ("drop" in key or is_dropout) else value
        for key, value in config.items()
    }


def _can_be_ours(layer):
    """Whether our BatchNorm can stand in a layer's place: over the last axis of maps or vectors."""
    if type(layer) is not layers.BatchNormalization:
        return False
    rank = layer.input_spec.ndim
    return rank in (2, 4) and layer.axis in (-1, rank - 1) and not getattr(layer, "renorm", False)


def _require_batch_norm(encoder, name, synchronized, groups):
    if not synchronized and groups == 1:
        return
    norms = [x for x in flat_layers(encoder) if isinstance(x, layers.BatchNormalization)]
    theirs = [x.name for x in norms if not isinstance(x, BatchNormalization)]
    if theirs:
        raise ValueError(
            f"The BatchNorm of {name} can be neither synchronised nor split into groups, as it is "
            f"inside of other layers, {theirs[0]} first. Use --batch_norm=shuffled."
        )


def _require_no_randomness(encoder, name):
    """Raises ValueError if a training step would draw random numbers."""

    def states():
        weights = {id(weight) for weight in encoder.weights}
        return [x.numpy().tolist() for x in encoder.variables if id(x) not in weights]

    before = states()
    if not before:
        return
    weights = encoder.get_weights()
    encoder(np.zeros((2, *encoder.input_shape[1:]), "float32"), training=True)
    encoder.set_weights(weights)
    if states() != before:
        raise ValueError(
            f"{name} has layers that draw random numbers and cannot be switched off here: a run "
            "could not be continued exactly. Save it without them."
        )


def finalize_normalization(network: keras.Model) -> None:
    """Lets Normalization layers use the statistics that are in their weights now."""
    for layer in flat_layers(network):
        if isinstance(layer, layers.Normalization) and layer.input_mean is None:
            layer.finalize_state()


def flat_layers(network: keras.Model) -> list[layers.Layer]:
    """All layers of a network, those inside of others too. (By Keras' private method.)"""
    return list(network._flatten_layers(include_self=False))


def nearest(name: str, known) -> str:
    """A question that suggests the known name nearest to an unknown one, or nothing."""
    by_lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[found[0]]}?" if found else ""


def _cannot_take(what, images, error):
    return ValueError(
        f"{what} cannot take images of {images.shape[1]} pixels. {_first_line(error)} Use another "
        "--image_size."
    )


def _first_line(error):
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
