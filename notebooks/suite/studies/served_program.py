"""A program that the manager service serves: a network of several widths in numpy, run as a script.

::

    python served_program.py network.npz measure 100
    python served_program.py network.npz serve camera manager.sock table.json frames.csv 40 30

The network is a layer of random features and one trained readout for each width; the first n
features are a network of their own, so that all widths share the weights of the largest.
"""

import csv
import json
import sys
import time
from pathlib import Path

import numpy as np

from dynlib.deploy.client import Client

COLUMNS = ("t_s", "ask_us", "subnet", "unit", "managed", "latency_ms", "deadline_ms", "right")


class PrefixNet:
    """`answer(width, images)` of a file with `features`, `images`, `labels`, and `readout_<n>`."""

    def __init__(self, path):
        with np.load(path) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.features = self.arrays["features"]
        self.widths = [name.removeprefix("readout_") for name in self.arrays if "readout" in name]

    def answer(self, width, images):
        """The classes of images, one a row."""
        hidden = np.maximum(self.features[: int(width)] @ images.T, 0)
        return (self.arrays[f"readout_{width}"] @ hidden).argmax(axis=0)

    def frame(self, k):
        """The images and labels of one frame."""
        images, labels = self.arrays["images"], self.arrays["labels"]
        return images[k % len(images)], labels[k % len(images)]


def measure(net, repeats):
    """Width -> milliseconds, in turn, after a pause, as between two frames."""
    times_ms = {width: [] for width in net.widths}
    for k in range(int(repeats)):
        for width, taken in times_ms.items():
            time.sleep(0.002)
            images, _ = net.frame(k)
            begin_s = time.perf_counter()
            net.answer(width, images)
            taken.append(1000 * (time.perf_counter() - begin_s))
    sys.stdout.write(json.dumps(times_ms) + "\n")


def serve(net, name, path, table, frames, deadline_ms, period_ms):
    """A frame every period, for ever; each is a line of `frames`."""
    rows = json.loads(Path(table).read_text())
    period_s = float(period_ms) / 1000
    with Path(frames).open("a", buffering=1) as file:
        write = csv.writer(file).writerow
        client = Client(
            name, rows, deadline_ms=float(deadline_ms), period_ms=float(period_ms), path=path
        )
        start_s, k = time.monotonic(), 0
        while True:
            time.sleep(max(start_s + k * period_s - time.monotonic(), 0.0))
            write(one_frame(net, client, k, start_s + k * period_s))
            # A frame that came while the one before was answered is gone.
            k = max(k + 1, int((time.monotonic() - start_s) / period_s))


def one_frame(net, client, k, due_s):
    """What came of it: a value for each of `COLUMNS`."""
    begin_s = time.perf_counter()
    order = client.ask()
    ask_us = 1e6 * (time.perf_counter() - begin_s)
    if order is None:
        return due_s, ask_us, "", "", 1, "", client.last.deadline_ms, 0
    images, labels = net.frame(k)
    right = (net.answer(order.subnet, images) == labels).mean()
    client.done()
    latency_ms = 1000 * (time.monotonic() - due_s)
    where = order.subnet, order.unit, int(order.managed)
    return due_s, ask_us, *where, latency_ms, order.deadline_ms, right


if __name__ == "__main__":
    _, file, what, *arguments = sys.argv
    {"measure": measure, "serve": serve}[what](PrefixNet(file), *arguments)
