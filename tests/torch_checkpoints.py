"""Checkpoints as PyTorch programs leave them, with their names, made of random numbers.

The names are written out here once more, from the programs' own definitions.
"""

import numpy as np


def resnet_shapes(bottleneck, blocks, width, stem=7):
    """torchvision's state dict of a ResNet without its classifier: shapes by names, in order."""
    shapes = {"conv1.weight": (width, 3, stem, stem)} | batch_norm("bn1", width)
    channels = width
    for stage, count in enumerate(blocks, 1):
        inner = width * 2 ** (stage - 1)
        outputs = inner * (4 if bottleneck else 1)
        for block in range(count):
            prefix = f"layer{stage}.{block}"
            kernels = [(inner, channels, 1), (inner, inner, 3), (outputs, inner, 1)]
            if not bottleneck:
                kernels = [(inner, channels, 3), (inner, inner, 3)]
            for i, (out, into, side) in enumerate(kernels, 1):
                shapes[f"{prefix}.conv{i}.weight"] = (out, into, side, side)
                shapes |= batch_norm(f"{prefix}.bn{i}", out)
            if channels != outputs or (stage > 1 and block == 0):
                shapes[f"{prefix}.downsample.0.weight"] = (outputs, channels, 1, 1)
                shapes |= batch_norm(f"{prefix}.downsample.1", outputs)
            channels = outputs
    return shapes


def batch_norm(name, channels):
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def linear(name, inputs, outputs, bias=True):
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def perceptron(name, inputs, hidden, outputs, first_bias=True):
    """nn.Sequential(Linear, BatchNorm1d, ReLU, Linear)."""
    return {
        **linear(f"{name}.0", inputs, hidden, first_bias),
        **batch_norm(f"{name}.1", hidden),
        **linear(f"{name}.3", hidden, outputs),
    }


def prefixed(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()}


def fill(shapes, seed=0):
    """Random arrays of these shapes; variances positive."""
    random = np.random.default_rng(seed)
    arrays = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            arrays[name] = np.array(7, np.int64)
        elif name.endswith("queue_ptr"):
            arrays[name] = np.array([3], np.int64)
        elif name.endswith("labels"):
            arrays[name] = random.integers(0, 9, shape)
        else:
            arrays[name] = random.uniform(0.1, 1, shape).astype(np.float32)
    return arrays


# Small ones: tiny_resnet of width 4 for small images, whose features are 16.
TINY = resnet_shapes(False, (1, 1, 1), 4, stem=3)
FEATURES, QUEUE = 16, 10


def isd(plus=False, teacher="encoder_k", labels=False):
    """train_isd.py's and train_isd_plus.py's state dict; with `encoder_t`, train_msf.py's."""
    wide, embedding = 2 * FEATURES, FEATURES // 4 if plus else FEATURES
    head = perceptron("fc", FEATURES, wide, embedding) if plus else {}
    predictor = perceptron(
        "predict_q.module", embedding, wide if plus else FEATURES, embedding, plus
    )
    return {
        "queue": (QUEUE, embedding),
        **({"labels": (QUEUE,)} if labels else {}),
        "queue_ptr": (1,),
        **prefixed("encoder_q.module.", TINY | head),
        **prefixed(f"{teacher}.module.", TINY | head),
        **predictor,
    }


def moco_v2():
    """main_moco.py's with --mlp: all behind DistributedDataParallel, the queue transposed."""
    head = linear("fc.0", FEATURES, FEATURES) | linear("fc.2", FEATURES, 128)
    return prefixed(
        "module.",
        {
            "queue": (128, QUEUE),
            "queue_ptr": (1,),
            **prefixed("encoder_q.", TINY | head),
            **prefixed("encoder_k.", TINY | head),
        },
    )


def compress():
    """train_student_one_queue.py's student, with the linear layer to the teacher's features."""
    return prefixed("module.", TINY | linear("fc", FEATURES, 2048))
