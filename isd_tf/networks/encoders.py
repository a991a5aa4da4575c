"""Encoders and heads: images to features to embeddings.

ResNets in torchvision's layout: strided convolutions pad symmetrically (TensorFlow's "same" does
not, which costs weights carried over from PyTorch several points), the bottleneck strides its 3x3
convolution, and layers bear torchvision's names with underscores for dots.

Sources: He et al. 2016; torchvision.models.resnet; UMBCvision/ISD train_isd.py:98-135 and
train_isd_plus.py:96-137 for the heads.
"""

import functools

import keras
import tensorflow as tf
from keras import layers

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
) -> keras.Model:
    """Builds an untrained encoder: images to pooled features.

    Args:
        name: one of ARCHITECTURES.
        image_size: side S of the images in pixels. Up to 64, the stem is a 3x3 convolution, which
            in the large ResNets keeps the resolution.
        width: channels of the first stage; 64 for the ResNets, 32 for tiny_resnet.
        synchronized_batch_norm: whether BatchNorm's statistics are those of all replicas.
        batch_norm_groups: parts of a replica's batch that have BatchNorm statistics of their own.

    Returns:
        A functional model from normalised images [B, S, S, 3] to features [B, C]; C is 8 * width
        for resnet18 and resnet34, 32 * width for resnet50, 4 * width for tiny_resnet.

    Raises:
        ValueError: for an unknown name, or a size or width that is not positive.
    """
    if name not in ARCHITECTURES:
        raise ValueError(
            f"Unknown encoder. Expected one of: {', '.join(ARCHITECTURES)}. Received: {name!r}."
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
        if kernel > 1:
            x = layers.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x)
        return layers.Conv2D(
            channels,
            kernel,
            stride,
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


def batch_norm(synchronized: bool, groups: int, name: str) -> layers.BatchNormalization:
    """BatchNorm with PyTorch's constants (its momentum 0.1 is Keras' 0.9)."""
    settings = dict(momentum=0.9, epsilon=1e-5, name=name)
    if groups > 1:
        if synchronized:
            raise ValueError(
                "BatchNorm's statistics are either synchronised or those of groups. Received: "
                f"synchronized=True, groups={groups}."
            )
        return GroupedBatchNormalization(groups, **settings)
    return layers.BatchNormalization(synchronized=synchronized, **settings)


@keras.saving.register_keras_serializable("isd_tf")
class GroupedBatchNormalization(layers.BatchNormalization):
    """BatchNorm over each of several groups of a batch: one device with the statistics of many.

    A batch [B, ..., C] is normalised in `groups` parts of B / groups consecutive examples, as that
    many devices would. The moving statistics gather the mean of the groups' own.

    Args:
        groups: number of parts; must divide the batch.
        **kwargs: as in keras.layers.BatchNormalization.

    Raises:
        ValueError: if groups is not positive, or does not divide a batch.
    """

    def __init__(self, groups: int, **kwargs):
        super().__init__(**kwargs)
        if groups < 1:
            raise ValueError(f"BatchNorm needs at least one group. Received: groups={groups}.")
        self.groups = groups

    def call(self, inputs, training=None, mask=None):
        if not training:
            return super().call(inputs, training=False, mask=mask)
        if (inputs.shape[0] or 0) % self.groups:
            raise ValueError(
                f"BatchNorm's {self.groups} groups share a batch evenly. Received: a batch of "
                f"{inputs.shape[0]}. Use a multiple of {self.groups}."
            )
        shape = tf.shape(inputs)
        # In the weights' precision, also where the network computes in half of it.
        x = tf.cast(inputs, self.variable_dtype)
        x = tf.reshape(x, tf.concat([[self.groups, shape[0] // self.groups], shape[1:]], 0))
        axes = list(range(1, inputs.shape.rank))
        mean, variance = tf.nn.moments(x, axes, keepdims=True)  # [groups, 1, ..., C]
        for moving, statistic in ((self.moving_mean, mean), (self.moving_variance, variance)):
            new = tf.reshape(tf.reduce_mean(statistic, axis=0), [-1])
            moving.assign(moving * self.momentum + new * (1 - self.momentum))
        x = tf.nn.batch_normalization(x, mean, variance, self.beta, self.gamma, self.epsilon)
        return tf.cast(tf.ensure_shape(tf.reshape(x, shape), inputs.shape), self.compute_dtype)

    def get_config(self):
        return {**super().get_config(), "groups": self.groups}


# -------------------------------------------------------------------------------------- heads


def isd_heads(
    feature_dim: int, synchronized_batch_norm: bool = False, batch_norm_groups: int = 1
) -> tuple[None, keras.Model]:
    """ISD: embeddings are the features themselves; the student alone has a predictor.

    Returns:
        (None, predictor): predictor is Linear(d, d) without bias - BN - ReLU - Linear(d, d).
    """
    norm = functools.partial(batch_norm, synchronized_batch_norm, batch_norm_groups)
    predictor = _two_layer_perceptron(
        feature_dim, feature_dim, feature_dim, False, norm, "predictor"
    )
    return None, predictor


def isd_plus_heads(
    feature_dim: int, synchronized_batch_norm: bool = False, batch_norm_groups: int = 1
) -> tuple[keras.Model, keras.Model]:
    """ISD+ and BYOL-asym: a projector on both sides, and a predictor on the student's.

    Returns:
        (projector, predictor): Linear(d, 2d) - BN - ReLU - Linear(2d, d / 4), and
        Linear(d / 4, 2d) - BN - ReLU - Linear(2d, d / 4).

    Raises:
        ValueError: if feature_dim is not a multiple of 4.
    """
    if feature_dim % 4:
        raise ValueError(
            f"ISD+ projects features to a quarter of their size. Received: {feature_dim} features."
        )
    hidden, embedding = 2 * feature_dim, feature_dim // 4
    norm = functools.partial(batch_norm, synchronized_batch_norm, batch_norm_groups)
    projector = _two_layer_perceptron(feature_dim, hidden, embedding, True, norm, "projector")
    predictor = _two_layer_perceptron(embedding, hidden, embedding, True, norm, "predictor")
    return projector, predictor


def moco_v2_heads(
    feature_dim: int, synchronized_batch_norm: bool = False, batch_norm_groups: int = 1
) -> tuple[keras.Model, None]:
    """MoCo v2: a projector on both sides, without BatchNorm, and no predictor.

    Returns:
        (projector, None): Linear(d, d) - ReLU - Linear(d, 128).

    Source: Chen et al., arXiv:2003.04297; facebookresearch/moco main_moco.py, --mlp.
    """
    del synchronized_batch_norm, batch_norm_groups  # There is none.
    return _two_layer_perceptron(feature_dim, feature_dim, 128, True, None, "projector"), None


HEADS = {"isd": isd_heads, "isd_plus": isd_plus_heads, "moco_v2": moco_v2_heads}


def _two_layer_perceptron(inputs, hidden, outputs, first_bias, norm, name):
    policy = keras.config.dtype_policy()
    return keras.Sequential(
        [
            # Keras would round features to float32 where more precision is asked for.
            keras.Input((inputs,), dtype=policy.variable_dtype),
            _torch_dense(inputs, hidden, first_bias, "linear1"),
            *([norm("bn")] if norm else []),
            layers.ReLU(name="relu"),
            # In the weights' precision: embeddings are compared more finely than half of it.
            _torch_dense(hidden, outputs, True, "linear2", dtype=policy.variable_dtype),
        ],
        name=name,
    )


def _torch_dense(inputs, outputs, use_bias, name, dtype=None):
    """A dense layer with PyTorch's initial values, uniform in +-1/sqrt(inputs)."""
    limit = inputs**-0.5
    return layers.Dense(
        outputs,
        use_bias=use_bias,
        kernel_initializer=keras.initializers.RandomUniform(-limit, limit),
        bias_initializer=keras.initializers.RandomUniform(-limit, limit),
        dtype=dtype,
        name=name,
    )
