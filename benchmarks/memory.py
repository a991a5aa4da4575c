"""Resident memory of a training, at step 300 and at step 2000.

    PYTHONPATH=. python benchmarks/memory.py

photo_patches, the quickstart's pipeline and model, batch 16.
"""

import os
import sys

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras

import isd_tf


def resident_megabytes():
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


class Watch(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = {}

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 in (300, 1000, 2000):
            self.seen[batch + 1] = resident_megabytes()


def main():
    train, _ = isd_tf.datasets.load("photo_patches")
    encoder = isd_tf.build_encoder("tiny_resnet", 32)
    model = isd_tf.ISD(encoder, *isd_tf.isd_heads(encoder.output_shape[-1]), queue_size=1024)
    model.compile(isd_tf.TorchSGD(0.1))
    batches = isd_tf.pretraining_batches(train, ("weak", "strong"), 32, 16, seed=0)
    watch = Watch()
    model.fit(batches, steps_per_epoch=2000, callbacks=[watch], verbose=0, shuffle=False)
    for step, megabytes in watch.seen.items():
        print(f"step {step}: {megabytes:.0f} MB, {megabytes / watch.seen[300]:.3f} of step 300")


if __name__ == "__main__":
    sys.exit(main())
