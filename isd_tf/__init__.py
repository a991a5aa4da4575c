"""ISD for TensorFlow and Keras 3: pretraining of image encoders without labels.

images -> two views -> student and teacher embeddings -> similarities to the queue -> KL
-> gradient step -> teacher moves -> keys enter the queue -> features -> scores -> export

train, test = isd_tf.datasets.load("photo_patches")
batches = isd_tf.pretraining_batches(train, ("weak", "strong"), 32, 64, seed=0)
encoder = isd_tf.build_encoder("tiny_resnet", image_size=32)
model = isd_tf.ISD(encoder, *isd_tf.isd_plus_heads(encoder.output_shape[-1]), queue_size=2048)
model.compile(isd_tf.TorchSGD(0.06))
model.fit(batches, epochs=10, steps_per_epoch=len(train) // 64)
scores = isd_tf.knn_accuracy({"student": encoder}, bank, queries)
isd_tf.export_encoder(encoder, image_size=32, directory="saved_model")
"""

from isd_tf.data import datasets, subsets
from isd_tf.data.batches import evaluation_batches, finetuning_batches, pretraining_batches
from isd_tf.data.service import DataService
from isd_tf.evaluation.knn import knn_accuracy
from isd_tf.methods import losses
from isd_tf.methods.byol import BYOL
from isd_tf.methods.compress import CompRess
from isd_tf.methods.feature_queue import FeatureQueue
from isd_tf.methods.isd import ISD
from isd_tf.methods.moco_v2 import MoCoV2
from isd_tf.methods.msf import MSF
from isd_tf.methods.student_teacher import StudentTeacher
from isd_tf.networks import torch_weights
from isd_tf.networks.encoders import build_encoder
from isd_tf.networks.heads import isd_heads, isd_plus_heads, moco_v2_heads
from isd_tf.serving.export import export_encoder
from isd_tf.serving.formats import export_keras_hub, export_torch
from isd_tf.training.initial_weights import load_weights
from isd_tf.training.optimizers import TorchSGD
from isd_tf.training.schedules import CosineByEpoch, DropsByEpoch
from isd_tf.views import augment, layers

__version__ = "0.1.0"

__all__ = [
    "BYOL",
    "ISD",
    "MSF",
    "CompRess",
    "CosineByEpoch",
    "DataService",
    "DropsByEpoch",
    "FeatureQueue",
    "MoCoV2",
    "StudentTeacher",
    "TorchSGD",
    "augment",
    "build_encoder",
    "datasets",
    "evaluation_batches",
    "export_encoder",
    "export_keras_hub",
    "export_torch",
    "finetuning_batches",
    "isd_heads",
    "isd_plus_heads",
    "knn_accuracy",
    "layers",
    "load_weights",
    "losses",
    "moco_v2_heads",
    "pretraining_batches",
    "subsets",
    "torch_weights",
]
