"""Reads MNIST for the loops that ours is measured against; needs NumPy alone."""

import gzip
from pathlib import Path

import numpy as np


def read(folder, part):
    """Images [N, 28, 28, 1] float32 in [0, 1] and labels [N] int32 of "train" or "t10k"."""
    image = gzip.decompress((Path(folder) / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
    label = gzip.decompress((Path(folder) / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    image = np.frombuffer(image, np.uint8).reshape(-1, 28, 28, 1).astype(np.float32) / 255
    return image, np.frombuffer(label, np.uint8).astype(np.int32)
