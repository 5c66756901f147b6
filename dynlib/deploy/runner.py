"""Serve and switch the sub-networks of a bundle with numpy and ONNX Runtime alone.

A bundle is a folder of plain files, which `export_bundle` writes:

    manifest.json         the SHA-256 of every other file, which weights each point has, and if it
                          was told, how images are normalised and what the classes are called
    weights.safetensors   every array of weights once
    0.packed.onnx, ...    the graph of each point for each mode, without its large weights
    points.csv            the operating-point table
    board.toml            the board it is for, if there is one

``"conv.weight": ["3.conv.weight", [16, 8, 3, 3]]`` in the manifest means that `conv.weight` of a
graph is the first 1152 numbers of the array `3.conv.weight`, in that shape.
"""

import json
import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import onnxruntime

from dynlib.errors import BundleError, ConfigError, DataError
from dynlib.files import digest, open_plain, shown
from dynlib.toml import is_a, is_number, list_of

FORMAT = "dynlib-bundle-1"
MODES = ("packed", "shared")
MANIFEST, STORE, POINTS, BOARD = "manifest.json", "weights.safetensors", "points.csv", "board.toml"
LARGEST_TEXT = 2**24  # bytes of a manifest or header, enough for a thousand points
LARGEST = 1e6  # of a mean or deviation of pixels, so that nothing overflows; they are below 1
PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"  # leads to no other folder
TOLERANCE = 1e-3  # of the largest logit; other kernels differ by 1e-6, a wrong layout by 1
# What ONNX Runtime would do to weights at loading, each time in a copy.
COPYING = ["ConvBNFusion", "ConvMulFusion", "NchwcTransformer"]

Weights = dict[str, np.ndarray]


class _Ready(NamedTuple):
    """A point that can be served; one value, so that a frame sees all of it or nothing."""

    subnet: str
    session: onnxruntime.InferenceSession
    views: Sequence[onnxruntime.OrtValue]  # of the store


class _Images(NamedTuple):
    """``photos * scale - shift`` is what the networks take, `classes` what they tell apart."""

    scale: np.ndarray  # (1, 3, 1, 1) float32, as is `shift`
    shift: np.ndarray
    classes: tuple[str, ...]


class Runner:
    """A callable that serves the sub-network last switched to, as `SubnetServer` does with torch.

    Args:
        folder: of the bundle.
        mode: `packed`: each point has weights of its own, folded, in the layout of this CPU and
            packed; `shared`: its weights are views of the one store, which stays a mapped file.
        threads: of each session.

    All files are checked before any is used; then each point answers a stored frame, and has to say
    what torch said: so graphs in the layout of another kind of CPU are found out.

    Raises:
        BundleError: a file is missing, no plain file of this folder, or not what the manifest says;
            a point has no graph for this mode, or does not answer as torch did.

    >>> images = load_dataset("generated", generated=(400, 100))
    >>> supernet, _ = pretrained(images)
    >>> point = {"model": "digits", "board": "host", "unit": "cpu", "batch": 1, "latency_ms": 1.0}
    >>> point["source"] = "estimated"
    >>> table = make_table(point | {"subnet": str(config)} for config in supernet.statistics)
    >>> runner = Runner(export_bundle(supernet, table, "bundle", images=images))
    >>> runner.switch(runner.subnets[-1])  # microseconds, between two frames
    >>> photos = images.test.images[:4].numpy()  # uint8, as from a camera
    >>> logits = runner(runner.normalise(photos))
    >>> logits.shape
    (4, 10)
    >>> names = [runner.classes[i] for i in logits.argmax(1)]
    """

    def __init__(self, folder: str | Path, *, mode: str = "packed", threads: int = 1):
        if mode not in MODES:
            raise BundleError(f"no mode {mode!r}; there are {', '.join(MODES)}")
        self.folder, self.mode = Path(folder), mode
        self._ready: dict[str, _Ready] = {}
        with ExitStack() as opened:
            manifest = _manifest(opened.enter_context(_open(self.folder, MANIFEST)))
            self._images = _images(manifest, self.folder / MANIFEST)
            files = {}
            for name in manifest["files"]:
                files[name] = opened.enter_context(_open(self.folder, name))
            for name, file in files.items():
                if digest(file) != manifest["files"][name]:
                    raise BundleError(f"{file.name}: its SHA-256 is not that in {MANIFEST}")
                file.seek(0)
            try:
                self._load(manifest, files, threads)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise BundleError(f"{self.folder}: malformed: {error!r:.200}") from error
        self._current = next(iter(self._ready.values()))

    def _load(self, manifest: dict[str, Any], files: dict[str, BinaryIO], threads: int) -> None:
        store = _Store(files[STORE])
        probe = store.view(*manifest["probe"])
        self._frame = probe.shape[1:]
        for i, point in enumerate(manifest["points"]):
            name = f"{i}.{self.mode}.onnx"
            if name not in files:
                raise BundleError(f"{self.folder / name}: missing; expected the mode {self.mode!r}")
            weights = {key: store.view(*place) for key, place in point[self.mode].items()}
            graph = files[name].read()
            if b"location" in graph:  # a tensor that is in a file: any file
                raise BundleError(f"{files[name].name}: has a tensor outside; expected none")
            try:
                session, views = _session(
                    graph, weights, store, threads, self.mode == "shared", manifest["blocked"]
                )
                (logits,) = session.run(["logits"], {"images": probe})
            except Exception as error:  # ONNX Runtime's have no common root
                raise BundleError(
                    f"{files[name].name}: cannot be run (made for {manifest['made_for']}): {error}"
                ) from error
            torch_said = store.view(*point["logits"])
            off = np.abs(logits - torch_said).max() / np.abs(torch_said).max()
            if not off <= TOLERANCE:
                raise BundleError(
                    f"{files[name].name}: is {off:.1g} off what torch says of the same frame; "
                    f"expected the CPU it was made for, {manifest['made_for']}"
                )
            if self._images and logits.shape[1:] != (len(self._images.classes),):
                raise BundleError(
                    f"{self.folder / MANIFEST}: images.classes: {len(self._images.classes)} names; "
                    f"expected one for each of the logits {logits.shape}"
                )
            self._ready[point["subnet"]] = _Ready(point["subnet"], session, views)

    @property
    def subnets(self) -> tuple[str, ...]:
        """Canonical names of the sub-networks, in the order of the operating-point table."""
        return tuple(self._ready)

    @property
    def subnet(self) -> str:
        """Canonical name of the sub-network that serves the next frame."""
        return self._current.subnet

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of the logits; None if `export_bundle` had none."""
        return self._images.classes if self._images else None

    @property
    def shared_pct(self) -> float:
        """Of the bytes of all points' large weights, the share that another point has already."""
        used, there = 0, {}
        for ready in self._ready.values():
            for weight in ready.views:
                start, size = weight.data_ptr(), weight.numpy().nbytes
                used += size
                there[start] = max(there.get(start, 0), size)
        return 100 * (1 - sum(there.values()) / used) if used else 0.0

    def switch(self, subnet: object) -> None:
        """Serve from the next frame on with `subnet`, a configuration or its name.

        Raises `ConfigError` if it is not in the bundle; the one before then still serves.
        """
        try:
            self._current = self._ready[str(subnet)]
        except KeyError:
            known = ", ".join(self._ready)
            raise ConfigError(f"{subnet} is not in this bundle, which holds {known}") from None

    def normalise(self, photos: np.ndarray) -> np.ndarray:
        """(N, 3, H, W) uint8 -> float32, what `Dataset.normalise` makes of them with torch.

        Raises `BundleError` if `export_bundle` was given no images, `DataError` for other photos.
        """
        if self._images is None:
            raise BundleError(
                f"{self.folder}: does not say how images are normalised; "
                "expected a bundle of export_bundle(..., images=the data set of the networks)"
            )
        if photos.dtype != np.uint8 or photos.shape[1:2] != (3,) or photos.ndim != 4:
            raise DataError(f"photos {photos.dtype} {photos.shape}; expected uint8 (N, 3, H, W)")
        normal = photos * self._images.scale
        normal -= self._images.shift
        return normal

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, 3, H, W) normalised float32 images -> (N, classes) logits.

        They have the size of the probe, whatever the resolution of the sub-network; raises
        `DataError` for others.
        """
        if images.dtype != np.float32 or images.shape[1:] != self._frame:
            size = ", ".join(map(str, self._frame))
            raise DataError(f"images {images.dtype} {images.shape}; expected float32 (N, {size})")
        (logits,) = self._current.session.run(None, {"images": images})
        return logits


class _Store:
    """The arrays of a safetensors file, mapped."""

    def __init__(self, file: BinaryIO):
        self.path = Path(file.name)
        raw = np.memmap(file, np.uint8, "r")
        size = int.from_bytes(raw[:8].tobytes(), "little")
        if size > min(LARGEST_TEXT, len(raw)):
            raise BundleError(f"{file.name}: a header of {size} bytes; expected a safetensors file")
        self.begin = 8 + size
        self.data = raw[self.begin :]
        self.places = json.loads(raw[8 : self.begin].tobytes())

    def view(self, key: str, shape: Sequence[int]) -> np.ndarray:
        """The first numbers of the array `key`, in this shape, without a copy."""
        begin, end = self.places[key]["data_offsets"]
        size = 4 * math.prod(shape)
        if not (0 <= begin < begin + size <= end <= len(self.data) and min(shape) > 0):
            raise ValueError(f"{key} has no {shape}")
        return self.data[begin : begin + size].view(np.float32).reshape(shape)

    def offset(self, values: np.ndarray) -> int:
        """Where in the file a view begins."""
        return self.begin + values.ctypes.data - self.data.ctypes.data


def _open(folder: Path, name: str) -> BinaryIO:
    """A plain file of this very folder, or `BundleError`."""
    if not re.fullmatch(PLAIN_NAME, name):
        raise BundleError(f"{folder}: {name!r:.80}; expected the name of a file in this folder")
    path = folder / name
    try:
        return open_plain(path, links=False)
    except OSError as error:
        raise BundleError(f"{path}: expected a plain file: {error.strerror}") from error


def _manifest(file: BinaryIO) -> dict[str, Any]:
    text = file.read(LARGEST_TEXT + 1)
    if len(text) > LARGEST_TEXT:
        raise BundleError(f"{file.name}: more than {LARGEST_TEXT} bytes; expected a manifest")
    try:
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            raise BundleError(f"{file.name}: format {manifest['format']!r}; expected {FORMAT}")
        if not manifest["points"] or not {STORE, POINTS} <= manifest["files"].keys():
            raise BundleError(f"{file.name}: expected points, {STORE} and {POINTS}")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BundleError(f"{file.name}: expected a {FORMAT} manifest: {error!r:.200}") from error
    return manifest


def _images(manifest: dict[str, Any], file: Path) -> _Images | None:
    """What the manifest says of images; None if nothing, as those of older bundles."""
    if "images" not in manifest:
        return None
    entry = manifest["images"]
    if not isinstance(entry, dict):
        raise BundleError(f"{file}: images: {shown(entry)}; expected mean, std and classes")

    def per_channel(key: str, least: float) -> np.ndarray:
        values = entry.get(key)
        three = list_of(is_number)(values) and len(values) == 3
        if not (three and least <= min(values) and max(values) <= LARGEST):
            expected = f"3 numbers from {least:g} to {LARGEST:g}"
            raise BundleError(f"{file}: images.{key}: {shown(values)}; expected {expected}")
        return np.array(values, np.float32).reshape(1, 3, 1, 1)

    mean = per_channel("mean", -LARGEST)
    std = per_channel("std", 1 / LARGEST)
    classes = entry.get("classes")
    if not list_of(is_a(str))(classes):
        raise BundleError(f"{file}: images.classes: {shown(classes)}; expected a list of names")
    # As `Dataset.normalise` reckons.
    return _Images(1 / (255 * std), mean / std, tuple(classes))


def _session(
    graph: bytes, weights: Weights, store: _Store, threads: int, shared: bool, blocked: bool
) -> tuple[onnxruntime.InferenceSession, list[onnxruntime.OrtValue]]:
    """A session, and the views of the store that it uses and does not keep alive."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = threads
    options.log_severity_level = 4  # what is wrong is raised
    options.enable_cpu_mem_arena = False  # one per point; a sixth of the memory, no faster
    # Threads of the point before, waiting in a loop, would slow the next one's frame.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    folder = str(store.path.parent)
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    views = []
    if shared:
        options.add_session_config_entry("session.disable_prepacking", "1")
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_EXTENDED
        if blocked:  # the graph is what the optimiser made of it
            options.graph_optimization_level = level.ORT_DISABLE_ALL
        for name, values in weights.items():
            views.append(onnxruntime.OrtValue.ortvalue_from_numpy(values))
            options.add_initializer(name, views[-1])
    model = graph + _initialisers(weights, store)
    left_out = COPYING if shared else []
    return onnxruntime.InferenceSession(model, options, disabled_optimizers=left_out), views


def _initialisers(weights: Weights, store: _Store) -> bytes:
    """What to append to an ONNX file, so that it has these weights and finds them in the store.

    It is a protocol buffer: a message is its fields one after the other, and two messages one after
    the other are their union. ModelProto.graph = 7, GraphProto.initializer = 5; TensorProto.dims =
    1, data_type = 2 (1: float), name = 8, external_data = 13 (key = 1, value = 2), data_location =
    14 (1: external).
    """
    tensors = []
    for name, values in weights.items():
        where = {"location": STORE, "offset": store.offset(values), "length": values.nbytes}
        tensor = [_number(1, size) for size in values.shape]
        tensor += [_number(2, 1), _field(8, name.encode())]
        for key, value in where.items():
            entry = _field(1, key.encode()) + _field(2, str(value).encode())
            tensor.append(_field(13, entry))
        tensor.append(_number(14, 1))
        tensors.append(_field(5, b"".join(tensor)))
    return _field(7, b"".join(tensors))


def _field(number: int, content: bytes) -> bytes:
    return _varint(8 * number + 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(8 * number) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the last ones first: 300 is ``ac 02``."""
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])
