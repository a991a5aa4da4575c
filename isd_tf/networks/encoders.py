"""Encoders: images to features.

ResNets in torchvision's layout: strided convolutions pad symmetrically (TensorFlow's "same" does
not, which costs weights carried over from PyTorch several points), the bottleneck strides its 3x3
convolution, and layers bear torchvision's names with underscores for dots.

Sources: He et al. 2016; torchvision.models.resnet.
"""

import keras
from keras import layers

from isd_tf.networks import backbones
from isd_tf.networks.batch_norm import batch_norm

# Inputs up to this side have a stem of one 3x3 convolution, without pooling.
LARGEST_SMALL_IMAGE = 64

# name: (bottleneck blocks?, blocks of each stage, width of the first stage, stride of the stem for
# small images)
ARCHITECTURES = {
    "resnet18": (False, (2, 2, 2, 2), 64, 1),
    "resnet34": (False, (3, 4, 6, 3), 64, 1),
    "resnet50": (True, (3, 4, 6, 3), 64, 1),
    "tiny_resnet": (False, (1, 1, 1), 32, 2),  # for CPUs and tests
}


def build_encoder(
    name: str,
    image_size: int,
    width: int | None = None,
    synchronized_batch_norm: bool = False,
    batch_norm_groups: int = 1,
    published_weights: bool = False,
) -> keras.Model:
    """Builds an encoder: images to pooled features.

    Untrained, unless the weights of a file or published ones are asked for.

    Args:
        name: one of ARCHITECTURES; "keras:NAME" for a network of keras.applications, headless;
            "keras_hub:PRESET" for a backbone of KerasHub, by its name or by the folder that it was
            saved in; or "FILE.keras", with the weights that are in the file.
        image_size: side S of the images in pixels. Up to 64, the stem is a 3x3 convolution, which
            in the large ResNets keeps the resolution.
        width: channels of the first stage; 64 for the ResNets, 32 for tiny_resnet. Foreign
            networks have none.
        synchronized_batch_norm: whether BatchNorm's statistics are those of all replicas.
        batch_norm_groups: parts of a replica's batch that have BatchNorm statistics of their own.
        published_weights: whether to load the weights that the library publishes, for networks of
            keras.applications (ImageNet's) and KerasHub.

    Returns:
        A functional model from normalised images [B, S, S, 3] to features [B, C]; C is 8 * width
        for resnet18 and resnet34, 32 * width for resnet50, 4 * width for tiny_resnet.

    Raises:
        ValueError: for an unknown name, a size or width that is not positive or that a foreign
            network cannot take, or a file that holds no encoder.
        OSError: for a file that does not exist, or what must be downloaded and cannot be.
    """
    if backbones.is_foreign(name):
        if width is not None:
            raise ValueError(
                f"Only the encoders {', '.join(ARCHITECTURES)} have a width. Received: "
                f"width={width} with {name}."
            )
        return backbones.build_foreign(
            name, image_size, synchronized_batch_norm, batch_norm_groups, published_weights
        )
    if name not in ARCHITECTURES:
        known = [*ARCHITECTURES, *(f"{backbones.KERAS}{x}" for x in backbones.APPLICATIONS)]
        raise ValueError(
            f"Unknown encoder.{backbones.nearest(name, known)} Expected one of: "
            f"{', '.join(ARCHITECTURES)}; keras:NAME, keras_hub:PRESET or FILE.keras. Received: "
            f"{name!r}."
        )
    if published_weights:
        raise ValueError(
            f"Of {name} no weights are published. Expected keras:NAME or keras_hub:PRESET with "
            "published_weights."
        )
    bottleneck, stages, default_width, small_stride = ARCHITECTURES[name]
    width = default_width if width is None else width
    if image_size < 8 or width < 1:
        raise ValueError(
            "An encoder needs images of at least 8 pixels and a positive width. "
            f"Received: image_size={image_size}, width={width}."
        )
    net = _ResNetLayers(synchronized_batch_norm, batch_norm_groups)
    block = net.bottleneck_block if bottleneck else net.basic_block

    images = keras.Input((image_size, image_size, 3), name="images")
    if image_size <= LARGEST_SMALL_IMAGE:
        x = net.convolution(images, width, 3, small_stride, "conv1")
        x = net.relu(net.batch_norm(x, "bn1"), "relu1")
    else:
        x = net.convolution(images, width, 7, 2, "conv1")
        x = net.relu(net.batch_norm(x, "bn1"), "relu1")
        # Zeros are as good as minus infinity around values that a ReLU left.
        x = layers.ZeroPadding2D(1, name="maxpool_pad")(x)
        x = layers.MaxPooling2D(3, 2, name="maxpool")(x)
    for stage, blocks in enumerate(stages):
        for index in range(blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            x = block(x, width * 2**stage, stride, f"layer{stage + 1}_{index}")
    # In the weights' precision, for the embeddings that some heads make of it directly.
    pool = layers.GlobalAveragePooling2D(
        dtype=keras.config.dtype_policy().variable_dtype, name="features"
    )
    features = pool(x)
    return keras.Model(images, features, name=name)


class _ResNetLayers:
    """The layers of a ResNet, with what they all share."""

    def __init__(self, synchronized: bool, groups: int):
        self.synchronized = synchronized
        self.groups = groups

    def convolution(self, x, channels, kernel, stride, name):
        if kernel > 1 and stride > 1:
            x = layers.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x)
        return layers.Conv2D(
            channels,
            kernel,
            stride,
            # Symmetric where the stride is 1, and without the copy that explicit padding makes.
            padding="same" if stride == 1 else "valid",
            use_bias=False,
            # N(0, sqrt(2 / (kernel * kernel * channels)))
            kernel_initializer=keras.initializers.VarianceScaling(
                2.0, "fan_out", "untruncated_normal"
            ),
            name=name,
        )(x)

    def batch_norm(self, x, name):
        return batch_norm(self.synchronized, self.groups, name)(x)

    def relu(self, x, name):
        return layers.ReLU(name=name)(x)

    def basic_block(self, x, channels, stride, name):
        y = self.convolution(x, channels, 3, stride, f"{name}_conv1")
        y = self.relu(self.batch_norm(y, f"{name}_bn1"), f"{name}_relu1")
        y = self.convolution(y, channels, 3, 1, f"{name}_conv2")
        y = self.batch_norm(y, f"{name}_bn2")
        return self.join(x, y, channels, stride, name)

    def bottleneck_block(self, x, channels, stride, name):
        y = self.convolution(x, channels, 1, 1, f"{name}_conv1")
        y = self.relu(self.batch_norm(y, f"{name}_bn1"), f"{name}_relu1")
        y = self.convolution(y, channels, 3, stride, f"{name}_conv2")
        y = self.relu(self.batch_norm(y, f"{name}_bn2"), f"{name}_relu2")
        y = self.convolution(y, 4 * channels, 1, 1, f"{name}_conv3")
        y = self.batch_norm(y, f"{name}_bn3")
        return self.join(x, y, 4 * channels, stride, name)

    def join(self, x, y, channels, stride, name):
        if stride > 1 or x.shape[-1] != channels:
            x = self.convolution(x, channels, 1, stride, f"{name}_downsample_0")
            x = self.batch_norm(x, f"{name}_downsample_1")
        return self.relu(layers.Add(name=f"{name}_add")([x, y]), f"{name}_relu")
