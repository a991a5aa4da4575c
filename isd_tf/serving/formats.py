"""The encoder for finetuning elsewhere: as a preset of KerasHub, and as PyTorch's weights."""

import os
import re

import keras

from isd_tf.networks import torch_weights
from isd_tf.networks.encoders import ARCHITECTURES, LARGEST_SMALL_IMAGE
from isd_tf.networks.weights import fill, keras_slots
from isd_tf.serving.export import next_version
from isd_tf.views.photometric import CHANNEL_MEAN, CHANNEL_STD

KERAS_HUB_ENCODERS = ("resnet18", "resnet34", "resnet50")
# KerasHub's ResNet has no other.
KERAS_HUB_WIDTH = 64


def export_torch(encoder: keras.Model, directory: str | os.PathLike) -> str:
    """Writes an encoder as torchvision's state dict: `directory`/<next free number>.safetensors.

    Args:
        encoder: one of our ResNets.
        directory: made if missing.

    Raises:
        ValueError: for a network whose layers are named otherwise.
        OSError: when the directory cannot be written.
    """
    with next_version(directory, ".safetensors") as (unfinished, version):
        torch_weights.save(encoder, unfinished)
    return str(version)


def export_keras_hub(encoder: keras.Model, image_size: int, directory: str | os.PathLike) -> str:
    """Writes an encoder as a preset of KerasHub, which needs no isd_tf to be finetuned:

        classifier = keras_hub.models.ImageClassifier.from_preset(PATH, num_classes=5)
        classifier.fit(images, labels)  # uint8 or 0..255, of any size

    The preset's converter resizes to `image_size`, cropping what is not square, and normalises as
    our views do. Features of images of this size are the encoder's.

    Args:
        encoder: resnet18, resnet34 or resnet50 of the usual width, for images above 64 pixels.
        image_size: side S in pixels.
        directory: made if missing.

    Returns:
        The path written, `directory`/<next free number>.

    Raises:
        ValueError: for another encoder.
        ImportError: without the optional extra `hub`.
        OSError: when the directory cannot be written.
    """
    width = _width(encoder)
    if (
        encoder.name not in KERAS_HUB_ENCODERS
        or width != KERAS_HUB_WIDTH
        or image_size <= LARGEST_SMALL_IMAGE
    ):
        raise ValueError(
            f"KerasHub's ResNet is {', '.join(KERAS_HUB_ENCODERS)} of width {KERAS_HUB_WIDTH} for "
            f"images above {LARGEST_SMALL_IMAGE} pixels. Received: {encoder.name}, width={width}, "
            f"image_size={image_size}."
        )
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError("KerasHub is missing: pip install 'keras-hub==0.32.*'.") from error
    bottleneck, blocks, _, _ = ARCHITECTURES[encoder.name]
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[width],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[width * 2**stage for stage in range(len(blocks))],
        stackwise_num_blocks=list(blocks),
        stackwise_num_strides=[1, *[2] * (len(blocks) - 1)],
        block_type="bottleneck_block" if bottleneck else "basic_block",
        dtype="float32",
    )
    arrays = {keras_hub_path(v.path): v.numpy() for v in encoder.weights}
    fill(keras_slots(backbone), arrays, encoder.name)
    converter = keras_hub.layers.ResNetImageConverter(
        image_size=(image_size, image_size),
        scale=[1 / (255 * std) for std in CHANNEL_STD],
        offset=[-mean / std for mean, std in zip(CHANNEL_MEAN, CHANNEL_STD, strict=True)],
        antialias=True,
        dtype="float32",
    )
    preprocessor = keras_hub.models.ResNetImageClassifierPreprocessor(converter, dtype="float32")
    with next_version(directory) as (unfinished, version):
        backbone.save_to_preset(str(unfinished))
        preprocessor.save_to_preset(str(unfinished))
    return str(version)


def keras_hub_path(path: str) -> str:
    """KerasHub's path of a ResNet's weight: layer2_0_bn1/gamma is stack1_block0_1_bn/gamma."""
    layer, _, name = path.partition("/")
    stem = re.fullmatch(r"(conv|bn)1", layer)
    if stem:
        return f"conv1_{stem[1]}/{name}"
    stage, block, part = re.fullmatch(r"layer(\d+)_(\d+)_(.*)", layer).groups()
    part = {"downsample_0": "0_conv", "downsample_1": "0_bn"}.get(part, f"{part[-1]}_{part[:-1]}")
    return f"stack{int(stage) - 1}_block{block}_{part}/{name}"


def _width(encoder):
    """Channels of the first stage; None of a network of other layers."""
    first = [layer for layer in encoder.layers if layer.name == "conv1"]
    return first[0].filters if first else None
