"""`python -m dynlib.training --out net.safetensors` trains a super-network and ships it.

A run that was killed resumes from its state file.
"""

import argparse
import hashlib
import logging
import os
from dataclasses import asdict
from pathlib import Path

import torch

from dynlib.data import load_dataset
from dynlib.errors import DynlibError
from dynlib.files import atomic_write, sha256, work_dir
from dynlib.nets.supernet import Supernet
from dynlib.training.parallel import HOOKS
from dynlib.training.recipes import Recipe
from dynlib.training.shipping import CIFAR_SPACE, SMALL_SPACE, guide_of, ship
from dynlib.training.trainer import train

_FIELDS = {  # of a Recipe
    "lr": "peak learning rate of the convolutions",
    "pad": "pixels of the padded crop",
    "cutout": "side in pixels of the blanked square, 0 for none",
    "cutmix": "share of the batches with patches of other images",
    "students": "sub-networks per step beside the largest",
    "distill": "weight of each distillation loss",
    "label_smoothing": "of the losses on labels",
}
_EARLIER = ("recipe", "epochs_run", "finish_in", "start", "guide")  # kept of a start's provenance


def main(argv: list[str] | None = None) -> None:
    """Train a super-network and ship its checkpoint."""
    parser = _parser()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _run(args)
    except (DynlibError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


def _run(args: argparse.Namespace) -> None:
    fit = {"size": args.size, "resize": True} if args.size is not None else {}
    dataset = load_dataset(args.dataset, args.data_dir, seed=args.seed, **fit)
    fields = {name: getattr(args, name) for name in _FIELDS}
    recipe = Recipe(epochs=args.epochs, **fields)
    torch.manual_seed(args.seed)
    space = SMALL_SPACE if args.small else CIFAR_SPACE
    earlier = None
    if args.start:
        supernet, provenance = Supernet.from_checkpoint(args.start)
        earlier = {key: provenance.get(key) for key in _EARLIER}
        supernet = supernet.grown(space)
    else:
        supernet = Supernet(space, len(dataset.classes))
    guides = [sha256(path)[:16] for path in args.guide or ()]
    state = args.state or _state_of(args.out)
    history = train(
        supernet,
        dataset,
        recipe,
        seed=args.seed,
        state_file=state,
        finish_in=args.finish_in,
        guide=guide_of(args.guide) if args.guide else None,
        hook=args.hook,
        about={"start": args.start and sha256(args.start), "guide": guides},
    )
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process ships
        return
    table = ship(
        supernet,
        dataset,
        args.out,
        recipe=asdict(recipe),
        seed=args.seed,
        train_images=len(dataset.train),
        seconds=float(history["seconds"].sum()),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        epochs_run=len(history),
        finish_in=args.finish_in,
        start=earlier,
        guide=guides,
    )
    text = history.to_csv(index=False, float_format="%.5g")
    atomic_write(args.out.with_suffix(".history.csv"), text)
    logging.getLogger(__name__).info("%s", table.to_string())


def _state_of(out: Path) -> Path:
    """A file of its own for each checkpoint: others may have the same name in other folders."""
    path = os.fsencode(out.resolve())
    mark = hashlib.sha256(path).hexdigest()[:8]
    return work_dir() / "training" / f"{out.stem}-{mark}.pt"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dynlib.training", description=main.__doc__)
    add = parser.add_argument
    add("--dataset", default="cifar10", help="name, folder or tar of class folders (%(default)s)")
    add("--data-dir", default="", help="folder to look for the data set in first")
    add("--size", type=int, help="pixels to crop and resize images to; networks see 32 at most")
    add("--epochs", type=int, default=36, help="passes over the training images (%(default)s)")
    for name, text in _FIELDS.items():
        option = f"--{name.replace('_', '-')}"
        default = getattr(Recipe, name)
        add(option, type=type(default), default=default, help=f"{text} (%(default)s)")
    add("--seed", type=int, default=0, help="of split, weights and training (%(default)s)")
    add("--small", action="store_true", help="the small space")
    add("--out", type=Path, required=True, help="checkpoint to write")
    add("--state", type=Path, help="training state, resumed if it exists")
    add("--start", type=Path, help="checkpoint to start from, grown if need be")
    add("--guide", type=Path, nargs="+", help="checkpoints that teach together")
    add("--finish-in", type=int, help="cut the rest short to so many epochs")
    add("--hook", default="exact", choices=HOOKS, help="gradients between torchrun's processes")
    return parser


if __name__ == "__main__":
    main()
