"""Engines that run a prepared sub-network: one small contract, whatever the library behind it.

What an engine needs (folded BatchNorm, an exported or compiled graph) it computes once, never per
frame, and it runs an example before it hands the callable out: memory is allocated and kernels are
chosen before the first real frame.
"""

import io
import platform
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from dynlib.errors import ModelError

PRIMING_RUNS = 3  # TorchScript profiles twice before it settles
OPSET = 18

Answer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class NetEngine:
    """Name (`backend`) and precisions as in an operating-point table, and the package it needs."""

    name: str
    precisions: tuple[str, ...]
    package: str
    build: Callable[[nn.Module, torch.Tensor, str], Answer]  # unchecked; use `prepare`

    def prepare(self, net: nn.Module, example: torch.Tensor, precision: str = "fp32") -> Answer:
        """A callable ``(N, 3, H, W) float32 images -> (N, classes) float32 logits``, primed.

        Args:
            net: a static network in eval mode; it is not changed.
            example: images of the size that will be served; one primes, int8 is calibrated on all.
            precision: one of `precisions`.

        Raises `ModelError` if it has no such precision, or its package is not installed.
        """
        if precision not in self.precisions:
            raise ModelError(
                f"engine {self.name} has no precision {precision!r}; it has "
                f"{', '.join(self.precisions)}"
            )
        if not self.installed:
            raise ModelError(
                f"engine {self.name} needs the package {self.package}, which is not installed "
                f"(requirements-peers.txt pins it)"
            )
        with torch.no_grad():  # tensors made in inference mode cannot be traced
            run = self.build(net, example, precision)
            for _ in range(PRIMING_RUNS):
                run(example[:1])
        return run

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return find_spec(self.package) is not None


def find_engine(name: str) -> NetEngine:
    """The engine called `name`; raises `ModelError` naming the ones there are."""
    try:
        return ENGINES[name]
    except KeyError:
        raise ModelError(f"no engine {name!r}; there are {', '.join(ENGINES)}") from None


def _views(net: nn.Module, example: torch.Tensor, precision: str) -> Answer:
    """The network as it is: its parameters stay views of the super-network."""
    run = torch.autocast("cpu", torch.bfloat16)(net)
    return net if precision == "fp32" else lambda images: run(images).float()


def _folded(net: nn.Module, example: torch.Tensor, precision: str) -> Answer:
    """A frozen TorchScript graph: BatchNorm is folded into copies of the weights before it."""
    half = precision == "bf16"
    with _quiet(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        traced = torch.jit.trace(net, example[:1], check_trace=False)
        frozen = torch.jit.freeze(traced)
    return lambda images: frozen(images).float()


def _onnxruntime(net: nn.Module, example: torch.Tensor, precision: str) -> Answer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    threads = torch.get_num_threads()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = threads
    options.log_severity_level = 3  # warnings are about its own optimisations
    options.enable_cpu_mem_arena = False  # one per sub-network; a sixth of the memory, no faster
    # Every prepared sub-network has threads of its own. Those of the last one, waiting in a loop,
    # made the next frame take more than three times as long.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    graph = _exported(net, example, precision)
    session = onnxruntime.InferenceSession(graph, options)

    def run(images: torch.Tensor) -> torch.Tensor:
        feed = {"images": images.contiguous().numpy()}
        (logits,) = session.run(None, feed)
        return torch.from_numpy(logits)

    return run


def _openvino(net: nn.Module, example: torch.Tensor, precision: str) -> Answer:
    """Compiled for one image, which is fastest; those of a batch follow one another."""
    import openvino

    core = openvino.Core()
    graph = _exported(net, example, precision)
    model = core.read_model(graph)
    model.reshape([1, *example.shape[1:]])
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    lock = threading.Lock()

    def run(images: torch.Tensor) -> torch.Tensor:
        # A request holds the tensors of one frame: it reads the image where it lies, and its answer
        # lasts until the next one.
        answers = []
        with lock:
            for image in images[:, None].contiguous().numpy():
                found = request.infer({0: image}, share_inputs=True, share_outputs=True)
                answer = torch.from_numpy(found[0])
                answers.append(answer.clone())
        return torch.cat(answers)

    return run


def _exported(net: nn.Module, example: torch.Tensor, precision: str) -> bytes:
    model = onnx_model(net, example)
    if precision == "int8":
        model = _quantised(model, example)
    return model.SerializeToString()


def onnx_model(net: nn.Module, example: torch.Tensor, *, folded: bool = True):
    """The network as an ONNX model, ``images (n, 3, H, W) -> logits (n, classes)`` for any n.

    Exported by tracing: that takes 0.3 s, the exporter on torch.export ten times as long. Unless
    BatchNorm is `folded`, the weights are those of the network itself.
    """
    import onnx

    mode = torch.onnx.TrainingMode
    file = io.BytesIO()
    with _quiet():
        torch.onnx.export(
            net,
            (example[:1].contiguous(),),
            file,
            dynamo=False,
            training=mode.EVAL if folded else mode.PRESERVE,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "n"}, "logits": {0: "n"}},
        )
    model = onnx.load_from_string(file.getvalue())
    _pool_globally(model.graph)
    return model


def _pool_globally(graph) -> None:
    """Say "global average pool" where the graph says "mean over the last two axes".

    ONNX Runtime has a blocked kernel for the first only, and would convert the layout around the
    second in every squeeze-and-excitation.
    """
    from onnx import helper, numpy_helper

    tensors = {}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    tensors[node.output[0]] = attribute.t
    tensors |= {tensor.name: tensor for tensor in graph.initializer}

    def is_pooling(node) -> bool:
        axes = tensors.get(node.input[1]) if node.op_type == "ReduceMean" else None
        return axes is not None and sorted(numpy_helper.to_array(axes)) in ([2, 3], [-2, -1])

    nodes = []
    for node in graph.node:
        if not is_pooling(node):
            nodes.append(node)
            continue
        keeps = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
        name = node.output[0]
        pooled = name if keeps else f"{name}_pooled"
        nodes.append(helper.make_node("GlobalAveragePool", node.input[:1], [pooled]))
        if not keeps:
            nodes.append(helper.make_node("Flatten", [pooled], node.output))
    used = {name for node in nodes for name in node.input}
    del graph.node[:]
    for node in nodes:  # without the axes that nobody asks for any more
        if node.op_type != "Constant" or node.output[0] in used:
            graph.node.append(node)


def _quantised(model, example: torch.Tensor):
    """Weights and activations in 8 bits, ranges from the example images (static quantisation)."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    feeds = [{"images": image[None].contiguous().numpy()} for image in example]
    left = iter(feeds)

    class Images(CalibrationDataReader):
        def get_next(self):
            return next(left, None)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            path,
            Images(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=_saturates(),
        )
        return onnx.load(path)


def _saturates() -> bool:
    """Whether this processor adds products of 8 bits in 16, where two large ones do not fit: x86
    without VNNI. With weights of 7 bits they do."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and not torch.cpu._is_vnni_supported()


def _quiet():
    """Both tracers warn that a newer, far slower one exists, and of every constant they meet."""
    return warnings.catch_warnings(action="ignore")


ENGINES = {
    engine.name: engine
    for engine in (
        NetEngine("torch", ("fp32", "bf16"), "torch", _views),
        NetEngine("torch-folded", ("fp32", "bf16"), "torch", _folded),
        NetEngine("onnxruntime", ("fp32", "int8"), "onnxruntime", _onnxruntime),
        NetEngine("openvino", ("fp32", "bf16", "int8"), "openvino", _openvino),
    )
}
