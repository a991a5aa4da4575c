"""PyTorch's side of `make benchmark`: the same rows as race_isd_tf.py, as PyTorch does them best.

Needs the environment of benchmarks/requirements.txt, and nothing of isd_tf.
"""

import copy
import random

import numpy as np
import race
import torch
import torch_networks
from PIL import Image, ImageFilter
from torch.nn import functional
from torchvision import io, transforms
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AREA = (0.2, 1)
# More than the loader's workers keep ready: two batches each.
PREPARED_BATCHES = 10


def step(variant, sizes, folder):
    """Training steps on two ready views."""
    isd = ISD(sizes, compiled="compile" in variant)
    side = sizes["image_size"]
    views = torch.randn(2, sizes["batch"], 3, side, side)
    work = lambda: isd.step(views[0], views[1])  # noqa: E731
    return lambda: race.timed(work, sizes["batch"], sizes["calls"])


def views(variant, sizes, folder):
    """Batches of finished pairs of views."""
    batches = iter(loader(variant, pair_of_views(variant, sizes["image_size"]), sizes, folder))
    work = lambda: next(batches)  # noqa: E731
    return lambda: race.timed(work, sizes["batch"], sizes["calls"], PREPARED_BATCHES)


def host(variant, sizes, folder):
    """Batches of pairs of crops, uint8, as a pipeline that jitters on a GPU would want them."""
    size = sizes["image_size"]
    if variant == "PIL":
        crop = transforms.Compose(
            [transforms.RandomResizedCrop(size, AREA), transforms.PILToTensor()]
        )
    else:
        crop = v2.RandomResizedCrop(size, AREA, antialias=True)
    batches = iter(loader(variant, (crop, crop), sizes, folder))
    work = lambda: next(batches)  # noqa: E731
    return lambda: race.timed(work, sizes["batch"], sizes["calls"], PREPARED_BATCHES)


def training(variant, sizes, folder):
    """Everything of a training: images, views, steps, and the loss read at each."""
    isd = ISD(sizes, compiled="compile" in variant)
    batches = iter(loader("PIL", pair_of_views("PIL", sizes["image_size"]), sizes, folder))
    work = lambda: isd.step(*next(batches))  # noqa: E731
    return lambda: race.timed(work, sizes["batch"], sizes["calls"], PREPARED_BATCHES)


def neighbors(variant, sizes, folder):
    """faiss, whose index holds the bank already."""
    import faiss

    faiss.omp_set_num_threads(race.CORES)
    bank, queries = np.load(f"{folder}/bank.npy"), np.load(f"{folder}/queries.npy")
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank)
    work = lambda: index.search(queries, sizes["k"])  # noqa: E731
    np.save(f"{folder}/rows_faiss.npy", work()[1])
    return lambda: race.timed(work, len(queries), sizes["calls"], discarded=0)


# ------------------------------------------------------------------------------------- training


class ISD:
    """ISD's training step: networks, teacher, queue and torch's SGD.

    Args:
        sizes: of the row.
        compiled: whether in channels_last memory and by torch.compile, networks and loss in one.
    """

    def __init__(self, sizes, compiled):
        encoder = torch_networks.encoder(sizes["encoder"], sizes["image_size"])
        features = sizes["features"]
        projector, predictor = torch_networks.heads(sizes["heads"], features)
        self.student = torch.nn.Sequential(encoder, projector)
        self.predictor = predictor
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.layout = torch.channels_last if compiled else torch.contiguous_format
        for network in (self.student, self.teacher):
            network.to(memory_format=self.layout)
        self.compare = torch.compile(self._compare) if compiled else self._compare
        self.teacher_temperature, self.student_temperature = sizes["temperatures"]

        dimension = features if sizes["heads"] == "isd" else features // 4
        self.queue = functional.normalize(torch.randn(sizes["queue_size"], dimension))
        self.pointer = 0
        parameters = [*self.student.parameters(), *predictor.parameters()]
        self.optimizer = torch.optim.SGD(
            parameters, sizes["learning_rate"], momentum=0.9, weight_decay=1e-4, foreach=True
        )

    def _compare(self, teacher_view, student_view, queue):
        with torch.no_grad():
            keys = functional.normalize(self.teacher(teacher_view))
            teacher_log = functional.log_softmax(keys @ queue.T / self.teacher_temperature, 1)
        queries = functional.normalize(self.predictor(self.student(student_view)))
        student_log = functional.log_softmax(queries @ queue.T / self.student_temperature, 1)
        loss = functional.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
        return loss, keys

    def step(self, teacher_view, student_view):
        teacher_view = teacher_view.contiguous(memory_format=self.layout)
        student_view = student_view.contiguous(memory_format=self.layout)
        loss, keys = self.compare(teacher_view, student_view, self.queue)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            theirs, ours = list(self.teacher.parameters()), list(self.student.parameters())
            torch._foreach_lerp_(theirs, ours, 0.01)
            rows = (self.pointer + torch.arange(len(keys))) % len(self.queue)
            self.queue[rows] = keys
        self.pointer = (self.pointer + len(keys)) % len(self.queue)
        return loss.item()


# ---------------------------------------------------------------------------------------- views


class PillowBlur:
    """The reference's blur (UMBCvision/ISD): Pillow's, sigma uniform in 0.1 to 2."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def pair_of_views(variant, size):
    """The weak and the strong recipe, on PIL images or on tensors."""
    t = transforms if variant == "PIL" else v2
    jitter = t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    if variant == "PIL":
        blur = t.RandomApply([PillowBlur()], 0.5)
        end = [t.ToTensor(), t.Normalize(MEAN, STD)]
    else:
        blur = t.RandomApply([t.GaussianBlur(13, (0.1, 2.0))], 0.5)
        end = [t.ToDtype(torch.float32, scale=True), t.Normalize(MEAN, STD)]
    crop = t.RandomResizedCrop(size, AREA, antialias=True)
    flip = t.RandomHorizontalFlip()
    weak = t.Compose([crop, flip, *end])
    strong = t.Compose([crop, jitter, t.RandomGrayscale(0.2), blur, flip, *end])
    return weak, strong


class Pairs(torch.utils.data.Dataset):
    """Two transformed versions of each image, which is decoded once."""

    def __init__(self, variant, pair, sizes, folder):
        self.on_pillow, self.pair, self.folder = variant == "PIL", pair, folder
        self.arrays = None
        if sizes["images"] != "files":
            self.arrays = np.load(f"{folder}/{sizes['images']}.npy")
        self.count = sizes["files"] if self.arrays is None else len(self.arrays)

    def __getitem__(self, i):
        if self.arrays is not None:
            image = self.arrays[i]
            image = Image.fromarray(image) if self.on_pillow else torch.from_numpy(image)
            image = image if self.on_pillow else image.permute(2, 0, 1)
        elif self.on_pillow:
            with Image.open(f"{self.folder}/{i}.jpg") as file:
                image = file.convert("RGB")
        else:
            image = io.decode_image(f"{self.folder}/{i}.jpg", io.ImageReadMode.RGB)
        return tuple(transform(image) for transform in self.pair)


def endless_permutations(count):
    while True:
        yield from torch.randperm(count).tolist()


def loader(variant, pair, sizes, folder):
    dataset = Pairs(variant, pair, sizes, folder)
    return torch.utils.data.DataLoader(
        dataset,
        sizes["batch"],
        sampler=endless_permutations(dataset.count),
        num_workers=race.CORES,
        persistent_workers=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(race.CORES)
    makers = (step, views, host, training, neighbors)
    race.serve({maker.__name__: maker for maker in makers})
