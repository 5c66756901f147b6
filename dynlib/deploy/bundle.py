"""Write a bundle: all that a program needs to serve and switch sub-networks without torch."""

import copy
import json
import logging
import platform
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import torch

from dynlib.boards.file import BOARD_DIR, list_boards
from dynlib.deploy.runner import BOARD, COPYING, FORMAT, MANIFEST, MODES, POINTS, STORE, Runner
from dynlib.errors import BundleError
from dynlib.files import sha256
from dynlib.images import Dataset
from dynlib.nets.chain import resized
from dynlib.nets.engines import onnx_model
from dynlib.nets.supernet import Supernet
from dynlib.points import check_table, write_table
from dynlib.source import Source
from dynlib.space import SubnetConfig

LARGE = 2**10  # bytes of a tensor that goes into the store; smaller ones stay in the graph
# Bytes of a convolution's weights from which on BatchNorm, which belongs to one point, stays beside
# them. Into fewer it is folded: they are depth-wise, or of the early, large feature maps.
WORTH_SHARING = 2**14
_LOG = logging.getLogger(__name__)


def export_bundle(
    supernet: Supernet,
    points: pd.DataFrame,
    folder: str | Path,
    *,
    board: str | Path | None = None,
    images: Dataset | None = None,
    modes: Sequence[str] = MODES,
    blocked: bool = True,
) -> Path:
    """Write a bundle of the sub-networks in an operating-point table; `Runner` serves it.

    The folder is whole or not there: it is written under another name, every point in it is run
    against torch, and then it is renamed.

    Args:
        supernet: has the statistics of these sub-networks.
        points: operating points; each sub-network in it becomes one graph per mode. The log warns
            of rows that are measured, with a `backend` other than `onnxruntime` or with none.
        folder: must not exist yet.
        board: name of a built-in board, or path of the file of another, to put beside them.
        images: whose `normalise` the networks were trained with; the board then knows its mean and
            deviation (`Runner.normalise`) and what the classes are called (`Runner.classes`).
        modes: `packed` and `shared`, see `Runner`.
        blocked: optimise the shared graphs for the CPU of this machine and this version of ONNX
            Runtime: on x86 two to four times as fast, and refused elsewhere.

    Raises:
        BundleError: `folder` exists, a point answers otherwise than torch does, or `images` has
            a deviation of zero or other classes than the networks.
        TableError, ConfigError, ModelError: the table is malformed, or a sub-network cannot be
            prepared.
    """
    folder = Path(folder)
    if folder.exists():
        raise BundleError(
            f"{folder}: exists; a bundle is written anew: give another name, or remove it"
        )
    points = check_table(points)
    _warn_of_other_engines(points)
    configs = [SubnetConfig.parse(subnet) for subnet in dict.fromkeys(points["subnet"])]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        part = Path(scratch) / folder.name
        part.mkdir()
        manifest = _write_points(part, supernet, configs, modes, blocked)
        write_table(points, part / POINTS)
        if board is not None:
            file = BOARD_DIR / f"{board}.toml" if board in list_boards() else board
            shutil.copyfile(file, part / BOARD)
        if images is not None:
            manifest["images"] = {
                "mean": images.mean.tolist(),
                "std": images.std.tolist(),
                "classes": list(images.classes),
            }
        manifest["files"] = {file.name: sha256(file) for file in sorted(part.iterdir())}
        (part / MANIFEST).write_text(json.dumps(manifest))
        for mode in modes:
            Runner(part, mode=mode)
        part.rename(folder)
    return folder


def _warn_of_other_engines(points: pd.DataFrame) -> None:
    """What another engine took says little of what the bundle will take."""
    measured = points[points["source"] == Source.MEASURED]
    others = {backend or "none" for backend in measured["backend"]} - {"onnxruntime"}
    if others:
        _LOG.warning(
            "points measured with backend %s, but a bundle is served by onnxruntime: "
            "`profile_points` over the Runner measures what will be served",
            ", ".join(sorted(others)),
        )


def _write_points(
    folder: Path,
    supernet: Supernet,
    configs: Sequence[SubnetConfig],
    modes: Sequence[str],
    blocked: bool,
) -> dict[str, Any]:
    """Write the graphs and their weights; the manifest, still without the files."""
    store = _Store()
    size = max(config.resolution for config in configs)
    probe = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    points: list[dict[str, Any]] = []
    models = []
    for config in configs:
        net = supernet.prepare(config)
        images = resized(probe, config.resolution)
        with torch.no_grad():
            logits = net(images).numpy()
            model = onnx_model(net, images, folded=False)
        if config.resolution != size:
            _resize_images(model.graph, size, config.resolution)
        _name_weights_once(model.graph)
        models.append(model)
        points.append({"subnet": str(config), "logits": store.add("logits", logits)})
    for mode in modes:  # the weights of a mode side by side: fewer pages of the file are mapped
        for i, original in enumerate(models):
            model = copy.deepcopy(original)
            if mode == "shared":
                _fold_small(model.graph)
                model = _blocked(model) if blocked else model
            points[i][mode] = _take_weights(model.graph, store)
            (folder / f"{i}.{mode}.onnx").write_bytes(model.SerializeToString())
    manifest = {
        "format": FORMAT,
        "made_for": f"{platform.machine()}, ONNX Runtime {onnxruntime.__version__}",
        "blocked": blocked,
        "probe": store.add("probe", probe.numpy()),
        "points": points,
    }
    (folder / STORE).write_bytes(store.content())
    return manifest


class _Store:
    """Arrays kept once: what begins with the same bytes as another is a view of it."""

    def __init__(self):
        self.arrays: dict[str, np.ndarray] = {}
        self._alike: dict[bytes, list[str]] = {}

    def add(self, name: str, values: np.ndarray) -> list:
        """Where `values` are, as in the manifest."""
        flat = np.ravel(values)
        alike = self._alike.setdefault(flat[:16].tobytes(), [])
        for key in alike:
            kept = self.arrays[key]
            shorter = min(len(kept), len(flat))
            if np.array_equal(kept[:shorter], flat[:shorter]):
                if len(flat) > len(kept):
                    self.arrays[key] = flat
                break
        else:
            key = f"{len(self.arrays)}.{name}"
            self.arrays[key] = flat
            alike.append(key)
        return [key, list(values.shape)]

    def content(self) -> bytes:
        """A safetensors file in which every array begins at a multiple of 64 bytes."""
        places: dict[str, dict] = {}
        parts = []
        begin = 0
        for key, flat in self.arrays.items():
            padded = np.pad(flat, (0, -len(flat) % 16))
            end = begin + padded.nbytes
            places[key] = {"dtype": "F32", "shape": [len(padded)], "data_offsets": [begin, end]}
            parts.append(padded.tobytes())
            begin = end
        header = json.dumps(places).encode()
        header += b" " * (-(8 + len(header)) % 64)
        return b"".join([len(header).to_bytes(8, "little"), header, *parts])


def _resize_images(graph, size: int, resolution: int) -> None:
    """Images of one size for all points: a network resizes them itself, as `resized` does."""
    from onnx import helper, numpy_helper

    for node in graph.node:
        node.input[:] = ["resized" if name == "images" else name for name in node.input]
    node = helper.make_node(
        "Resize",
        ["images", "", "", "resolution"],
        ["resized"],
        mode="linear",
        antialias=1,
        exclude_outside=1,
        axes=[2, 3],
    )
    graph.node.insert(0, node)
    pixels = numpy_helper.from_array(np.array([resolution, resolution]), "resolution")
    graph.initializer.append(pixels)
    for dimension in graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_value = size


def _take_weights(graph, store: _Store) -> dict[str, list]:
    """Move the large weights of a graph into the store; name -> where they are."""
    from onnx import numpy_helper

    used = {name for node in graph.node for name in node.input}
    small, places = [], {}
    for tensor in graph.initializer:
        if tensor.name not in used:
            continue
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.nbytes >= LARGE:
            places[tensor.name] = store.add(tensor.name, values)
        else:
            small.append(tensor)
    del graph.initializer[:]
    graph.initializer.extend(small)
    return places


def _name_weights_once(graph) -> None:
    """The exporter keeps one of several equal weights, and copies it at run time for the others."""
    weights = {tensor.name for tensor in graph.initializer}
    same = {}
    nodes = []
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in weights:
            same[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
    del graph.node[:]
    graph.node.extend(nodes)


def _fold_small(graph) -> None:
    """Fold BatchNorm into the convolutions whose weights are not worth sharing."""
    from onnx import helper, numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    norms = {node.input[0]: node for node in graph.node if node.op_type == "BatchNormalization"}
    for node in list(graph.node):
        norm = norms.get(node.output[0])
        if node.op_type != "Conv" or norm is None:
            continue
        kernel = numpy_helper.to_array(weights[node.input[1]])
        if kernel.nbytes >= WORTH_SHARING:
            continue
        gamma, beta, mean, var = (numpy_helper.to_array(weights[name]) for name in norm.input[1:])
        (epsilon,) = (helper.get_attribute_value(a) for a in norm.attribute if a.name == "epsilon")
        scale = gamma / np.sqrt(var + epsilon)
        bias = numpy_helper.to_array(weights[node.input[2]]) if len(node.input) > 2 else 0.0
        folded = {
            f"{node.output[0]}.weight": kernel * scale.reshape(-1, 1, 1, 1),
            f"{node.output[0]}.bias": beta + (bias - mean) * scale,
        }
        for name, values in folded.items():
            graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
        node.input[1:] = list(folded)
        node.output[0] = norm.output[0]
        graph.node.remove(norm)


def _blocked(model):
    """The graph as ONNX Runtime optimises it for this CPU, with BatchNorm where it is."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blocked.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, disabled_optimizers=COPYING[:2]
        )
        return onnx.load(path)
