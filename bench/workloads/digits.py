"""scikit-learn's 1,797 handwritten digits, 8 x 8: comes with the library, nothing is downloaded."""

import numpy as np
from sklearn.datasets import load_digits

from bench.workloads.images import Workload, make_workload, stratified_split


def load(*, train_size: int | None = None) -> Workload:
    """Return a fixed stratified split: 60 % training, 20 % validation, 20 % test."""
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.astype(np.float32).reshape(-1, 1, 8, 8)
    rest, test = stratified_split(images, labels, fraction=0.2)
    return make_workload(
        "digits",
        rest,
        test,
        classes=10,
        validation_fraction=0.25,
        train_size=train_size,
        crop_padding=0,
        target=0.97,
    )
