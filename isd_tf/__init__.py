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

from isd_tf import augment, datasets, losses, subsets
from isd_tf.baselines import BYOL, MoCoV2
from isd_tf.encoders import build_encoder, isd_heads, isd_plus_heads, moco_v2_heads
from isd_tf.evaluation.knn import knn_accuracy
from isd_tf.export import export_encoder
from isd_tf.feature_queue import FeatureQueue
from isd_tf.input_pipeline import DataService, evaluation_batches, pretraining_batches
from isd_tf.isd import ISD
from isd_tf.optimizers import TorchSGD
from isd_tf.schedules import CosineByEpoch, DropsByEpoch
from isd_tf.student_teacher import StudentTeacher

__version__ = "0.1.0"

__all__ = [
    "BYOL",
    "ISD",
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
    "isd_heads",
    "isd_plus_heads",
    "knn_accuracy",
    "losses",
    "moco_v2_heads",
    "pretraining_batches",
    "subsets",
]
