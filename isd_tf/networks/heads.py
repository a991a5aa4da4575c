"""Heads: what stands between features and embeddings in each of the papers.

Source: UMBCvision/ISD train_isd.py:98-135, train_isd_plus.py:96-137.
"""

import functools

import keras
from keras import layers

from isd_tf.networks.batch_norm import batch_norm


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


def compress_head(feature_dim: int, teacher_dim: int) -> keras.Model:
    """CompRess: a linear layer with bias from the student's features to the teacher's.

    Source: UMBCvision/CompRess train_student_one_queue.py.
    """
    dtype = keras.config.dtype_policy().variable_dtype
    linear = _torch_dense(feature_dim, teacher_dim, True, "linear", dtype=dtype)
    return keras.Sequential([keras.Input((feature_dim,), dtype=dtype), linear], name="head")


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
