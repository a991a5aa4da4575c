"""A short training for tests that compare strategies, each in processes of its own.

    python tests/train_for_comparison.py STRATEGY OUTPUT.npz [SETTING=VALUE ...]

Writes the losses of all steps and every variable's value. Workers of a cluster write
OUTPUT.npz.1 and so on.
"""

import json
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import keras
import numpy as np
import tensorflow as tf

import isd_tf
from isd_tf.data import datasets
from isd_tf.training import cluster, distribution, monitoring

STEPS, BATCH = 24, 8
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 20, 20, 3), np.uint8)
DATA = datasets.ArrayDataset("arrays", IMAGES, np.arange(40) % 3, ("a", "b", "c"))


class Losses(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(logs["loss"])


def train(strategy, dtype="float64", batch_norm="synchronized", steps_per_execution=1, **compile):
    """Trains on the images above; returns the model and the losses."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(dtype)
    kind = dict(synchronized={"synchronized_batch_norm": True}, shuffled={}, grouped={
        "batch_norm_groups": 2
    })[batch_norm]  # fmt: skip
    with strategy.scope():
        encoder = isd_tf.build_encoder("tiny_resnet", 16, 4, **kind)
        heads = isd_tf.isd_plus_heads(16, **kind)
        model = isd_tf.ISD(encoder, *heads, 37, 0.2, 0.2, 0.9)
        optimizer = isd_tf.TorchSGD(isd_tf.CosineByEpoch(0.003, 4, STEPS // 4))
        model.compile(optimizer, steps_per_execution=steps_per_execution, **compile)
    batches = strategy.distribute_datasets_from_function(
        lambda context: isd_tf.pretraining_batches(
            DATA, ("weak", "strong"), 16, BATCH, 5, input_context=context
        )
    )
    losses = Losses()
    same = monitoring.CheckReplicas(batch_norm == "synchronized")
    model.fit(batches, steps_per_epoch=STEPS, verbose=0, shuffle=False, callbacks=[losses, same])
    return model, losses.values


def main(name, output, *settings):
    if name == "mirrored":
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
        )
    strategy = distribution.choose_strategy(name, os.environ.get("TF_CONFIG", ""), 120)
    settings = dict(setting.split("=") for setting in settings)
    settings = {k: json.loads(v) if v[0].isdigit() else v for k, v in settings.items()}
    model, losses = train(strategy, **settings)
    variables = (*model.variables, *model.optimizer.variables)
    values = {f"{i}:{v.path}": v.numpy() for i, v in enumerate(variables)}
    index = cluster.worker_index(strategy)
    with open(output + (f".{index}" if index else ""), "wb") as file:
        np.savez(file, losses=losses, **values)


if __name__ == "__main__":
    main(*sys.argv[1:])
