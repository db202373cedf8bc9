"""MNIST and a command line for the loops that ours is measured against; needs NumPy alone."""

import argparse
import gzip
import sys
import zlib
from pathlib import Path

import numpy as np


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser(text):
    """A command line that begins with the folder of the data; `text` is the file's docstring."""
    parser = Parser(description=text.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("data_dir", type=folder, help="the four MNIST files, packed (.gz)")
    return parser


def folder(name):
    """A folder that holds the four files, as an absolute path, for argparse."""
    for part in ("train", "t10k"):
        for file in (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"):
            try:
                path = Path(name).resolve()
                held = (path / file).is_file()
            except (OSError, RuntimeError):  # too long a name, no permission, a circle of links
                held = False
            if not held:
                raise argparse.ArgumentTypeError(f"{name}: must be a folder with {file}")
    return path


def read(folder, part):
    """Images [N, 28, 28, 1] float32 in [0, 1] and labels [N] int32 of "train" or "t10k"."""
    try:
        image = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
        label = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
        image = np.frombuffer(image, np.uint8).reshape(-1, 28, 28, 1).astype(np.float32) / 255
    except (OSError, EOFError, ValueError, zlib.error) as error:
        sys.exit(f"{folder}: the MNIST files of {part} cannot be read ({error})")
    return image, np.frombuffer(label, np.uint8).astype(np.int32)
