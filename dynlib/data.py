"""Image classification sets as uint8 arrays: CIFAR-10, image folders and tars, and a generated set.

Images are decoded once and cached. Augmentation works on whole batches. A part of the training
images is always set aside for validation, so that no choice is ever made on the test images.
"""

import hashlib
import io
import logging
import os
import pickle
import socket
import tarfile
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from tqdm.auto import tqdm

from dynlib.errors import DataError
from dynlib.files import atomic_write, data_places, work_dir
from dynlib.images import Dataset, Images
from dynlib.shapes import SHAPES, generate
from dynlib.toml import is_whole

_LOG = logging.getLogger(__name__)
LARGEST_IMAGE = 2**26  # pixels; decoded it takes four times as many bytes
LARGEST_FILE = 2**26  # bytes of an image; a hole of a terabyte takes none on the disk
VAL_SHARE = 0.1
NAMES = ("auto", "cifar10", "generated")
UNREAD = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".tif", ".tiff", ".webp")
CIFAR10_FOLDER = "cifar10_lossless"  # copies that were compressed once more cost 1.5 points
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def load_dataset(
    name: str = "auto",
    data_dir: str | Path = "",
    *,
    seed: int = 0,
    size: int = 32,
    resize: bool = False,
    generated: tuple[int, int] = (20_000, 4_000),
    cache_dir: str | Path | None = None,
) -> Dataset:
    """Load a data set by name or path.

    Args:
        name: ``cifar10``, ``generated``, a folder or tar of class folders, or ``auto``: CIFAR-10 if
            it is found or can be downloaded, else the generated set, saying so in the log.
        data_dir: where to look first; then ``$DYNLIB_DATA`` and the repository's ``data/``. A path
            is looked for in the current directory before all of them.
        seed: of the validation split and of the generated images.
        size: height and width of the images in pixels.
        resize: crop the middle of images of another size and bring it to `size`; without it
                they are an error.
        generated: numbers of training (with validation) and test images to generate.
        cache_dir: for decoded images; default ``cache`` of `files.work_dir`.

    Raises:
        DataError: nothing found, a place that is no folder, one tar without the other, an
            unreadable archive, an image of the wrong size, or a `size` below 1.

    >>> images = load_dataset("generated", generated=(400, 100))  # "auto", or a folder of folders
    >>> len(images.train), len(images.val), len(images.test), tuple(images.test.images.shape)
    (360, 40, 100, (100, 3, 32, 32))
    """
    if not (is_whole(size) and size > 0):
        raise DataError(f"size is {size!r}; expected a whole number of pixels, at least 1")
    places = data_places(data_dir)
    if name == "generated":
        parts = []
        for part, count in enumerate(generated):
            rng = np.random.default_rng([seed, part])
            parts.append(generate(count, rng, size))
        train, test = parts
        return _assemble(name, tuple(SHAPES), train, test, seed)
    if not name:
        raise DataError(
            "the data set has no name; expected 'auto', 'cifar10', 'generated' or a path"
        )
    if name not in NAMES:
        return _from_path(_find(name, places), seed, size, resize, cache_dir)
    for place in places:
        folder = place / CIFAR10_FOLDER
        tars = [folder / "train.tar", folder / "test.tar"]
        missing = [tar.name for tar in tars if not tar.is_file()]
        if not missing:
            return _from_path(folder, seed, size, resize, cache_dir, "cifar10")
        if len(missing) == 1:
            raise DataError(f"{folder}: {missing[0]} is missing; expected both tars or neither")
    try:
        return _cifar10_from_torchvision(places, seed, size, resize)
    except (OSError, RuntimeError) as error:
        looked = ", ".join(map(str, places))
        if name == "cifar10":
            raise DataError(
                f"CIFAR-10 not found: no train.tar and test.tar in {CIFAR10_FOLDER}/ of {looked}, "
                f"and its download failed ({error}); set DYNLIB_DATA, or use dataset 'generated'"
            ) from error
        _LOG.warning(
            "CIFAR-10 is not in %s, and its download failed (%s): using the generated set",
            looked,
            error,
        )
    return load_dataset("generated", seed=seed, size=size, generated=generated)


def _assemble(name, classes, train: Images, test: Images, seed: int) -> Dataset:
    """Split validation images off the training images, always the same ones for one seed.

    Files come sorted by class, so the test images are shuffled as well: any leading part of each of
    the three parts is a fair sample of it.
    """
    test = test.take(_shuffled(len(test), seed, 80))
    count = len(train)
    if count < 2 or not len(test):
        raise DataError(f"{name}: {count + len(test)} images; expected 3 or more")
    order = _shuffled(count, seed, 77)
    share = int(VAL_SHARE * count)
    held = max(1, share)
    val = train.take(order[:held])
    train = train.take(order[held:])
    sample = train.images[:10_000].double() / 255
    all_but_channels = (0, 2, 3)
    mean = sample.mean(all_but_channels)
    std = sample.std(all_but_channels)
    return Dataset(name, tuple(classes), train, val, test, mean.float(), std.float())


def _shuffled(count: int, seed: int, purpose: int) -> torch.Tensor:
    """The numbers below `count` in an order of their own for each seed and purpose."""
    rng = np.random.default_rng([seed, purpose])
    return torch.from_numpy(rng.permutation(count))


def _find(name: str | Path, places: list[Path]) -> Path:
    """The folder or tar of this name, in the current directory or one of the `places`."""
    path = Path(name)
    with suppress(RuntimeError):  # for ~ and no such user it is a name like others
        path = path.expanduser()
    candidates = [place / path for place in (Path(), *places)]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    folders = list(dict.fromkeys(candidate.parent.resolve() for candidate in candidates))
    known = {*NAMES}
    for folder in folders:
        if folder.is_dir():
            known.update(x.name for x in folder.iterdir() if x.is_dir() or x.suffix == ".tar")
    close = get_close_matches(path.name, known, n=2)
    guess = f"; did you mean {' or '.join(close)}?" if close else ""
    looked = ", ".join(map(str, folders))
    raise DataError(f"data set {str(path)!r}: no such name, folder or tar in {looked}{guess}")


def _from_path(path: Path, seed, size, resize, cache_dir, name=None) -> Dataset:
    """A folder or tar of class folders, with or without a train and a test part."""
    name = name or path.stem
    train_path = _part(path, "train")
    test_path = _part(path, "test", "val", "validation")
    if train_path and test_path:
        train, classes = _decode(train_path, size, resize, cache_dir)
        test, others = _decode(test_path, size, resize, cache_dir)
        if classes != others:
            raise DataError(f"{train_path} and {test_path} hold different class folders")
        return _assemble(name, classes, train, test, seed)
    whole, classes = _decode(path, size, resize, cache_dir)
    order = _shuffled(len(whole), seed, 78)
    held = max(1, len(whole) // 6)
    train = whole.take(order[held:])
    test = whole.take(order[:held])
    return _assemble(name, classes, train, test, seed)


def _part(path: Path, *names: str) -> Path | None:
    """The first folder or tar of one of the `names` in `path`, or None."""
    for name in names:
        for part in (path / name, path / f"{name}.tar"):
            if part.exists():
                return part
    return None


def _decode(path: Path, size: int, resize: bool, cache_dir) -> tuple[Images, tuple[str, ...]]:
    """Decode every image once; the result is cached under a key of all files' sizes and dates."""
    folder = Path(cache_dir) if cache_dir else work_dir() / "cache"
    key = _fingerprint(path, size, resize)
    cache = folder / f"{path.stem}-{key}.npz"
    if cache.is_file():
        try:
            with np.load(cache, allow_pickle=False) as file:
                whole = Images.of(file["images"], file["labels"])
                classes = file["classes"].tolist()
                return whole, tuple(classes)
        except Exception as error:  # whatever is wrong with it, the images are there
            _LOG.warning("%s cannot be read (%s): decoding again", cache, error)
    images, labels, classes = _read_images(path, size, resize)
    archive = io.BytesIO()
    np.savez(archive, images=images, labels=labels, classes=np.array(classes))
    try:
        atomic_write(cache, archive.getbuffer())
    except OSError as error:
        _LOG.warning("%s cannot be kept for the next time: %s", cache, error)
    return Images.of(images, labels), classes


def _fingerprint(path: Path, size: int, resize: bool) -> str:
    stats = []
    for file in _files(path):
        stat = file.stat()
        stats.append((str(file), stat.st_size, stat.st_mtime_ns))
    key = f"{path.resolve()}|{stats}|{size}|{resize}"
    digest = hashlib.sha256(key.encode())
    return digest.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    """A tar, or all files of a folder, those behind links too, sorted.

    Raises `DataError` for a folder that is reached twice, as in a loop of links: its images would
    be there twice, in several parts. And for a pipe, device or broken link, unwaited for.
    """
    if not path.is_dir():
        return [path]
    files, seen = [], set()
    for folder, _, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            raise DataError(f"{folder}: a link to {real}, which is there already; take it away")
        seen.add(real)
        for name in names:
            file = Path(folder, name)
            if not file.is_file():
                raise DataError(f"{file}: neither a file nor a folder; expected images")
            files.append(file)
    return sorted(files)


def _read_images(path: Path, size: int, resize: bool):
    """Images (N, 3, size, size) uint8, labels (N,) and the classes of a folder or tar."""
    from dynlib._vision import timm

    try:
        _warn_of_unread(path)
        reader = timm.data.create_reader("", root=str(path))
    except Exception as error:
        raise DataError(f"{path}: expected class folders with images: {error}") from error
    count = len(reader)
    # timm names the mapping differently for folders and for tars.
    index = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx
    classes = sorted(index, key=index.get)
    if not all(classes):
        raise DataError(f"{path}: images beside the class folders; expected class folders only")
    images = np.empty((count, 3, size, size), np.uint8)
    labels = np.empty(count, np.int64)
    for i in tqdm(range(count), desc=f"decode {path.name}", disable=None):
        try:  # the reader, not timm's dataset, which replaces an unreadable image by the next one
            stream, labels[i] = reader[i]
            _check_bytes(stream)
            with stream, Image.open(stream) as file:
                _check_size(file.size, size, resize)  # which its header says, before it is decoded
                image = file.convert("RGB")
        except DataError as error:
            raise DataError(f"{path}: image {reader.filename(i)} is {error}") from None
        except Exception as error:
            raise DataError(
                f"{path}: image {reader.filename(i)} cannot be decoded: {error}"
            ) from error
        images[i] = _fitted(image, size).transpose(2, 0, 1)
    return images, labels, tuple(classes)


def _warn_of_unread(path: Path) -> None:
    """Say in the log which images of a folder or tar are passed over for their format."""
    names = map(str, _files(path))
    if path.is_file() and path.suffix == ".tar":
        with tarfile.open(path, "r:") as file:  # not compressed: reads heads only
            names = file.getnames()
    found = Counter(Path(name).suffix.lower() for name in names)
    unread = [suffix for suffix in UNREAD if found[suffix]]
    if unread:
        _LOG.warning(
            "%s: %d images are passed over, which are %s; only .jpg, .jpeg and .png are read",
            path,
            sum(found[suffix] for suffix in unread),
            ", ".join(unread),
        )


def _fitted(image: Image.Image, size: int) -> np.ndarray:
    """The largest square in the middle, (size, size, 3): nothing is squeezed out of shape."""
    square = (size, size)
    return np.asarray(image if image.size == square else ImageOps.fit(image, square))


def _check_bytes(stream: BinaryIO) -> None:
    count = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if count > LARGEST_FILE:
        raise DataError(f"{count} bytes, expected at most {LARGEST_FILE}")


def _check_size(found: tuple[int, int], size: int, resize: bool) -> None:
    width, height = found
    if resize and width * height > LARGEST_IMAGE:
        raise DataError(f"{width} x {height} px, expected at most {LARGEST_IMAGE} pixels")
    if not resize and found != (size, size):
        raise DataError(
            f"{width} x {height} px, expected {size} x {size}; "
            f"pass resize=True, or --size {size} on the command line, to bring all to one size"
        )


@contextmanager
def _short_timeout(seconds: float):
    """No machine without a network should wait for minutes before it falls back."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _cifar10_from_torchvision(places: list[Path], seed, size=32, resize=False) -> Dataset:
    from dynlib._vision import timm, torchvision

    natural_key = timm.utils.natural_key  # by which timm sorts the files of a tar
    have = [p for p in places if (p / "cifar-10-batches-py").is_dir()]
    target = have[0] if have else work_dir() / "cache"
    parts = []
    for is_train in (True, False):
        with _short_timeout(10):
            part = torchvision.datasets.CIFAR10(str(target), train=is_train, download=True)
        # As the tars are: the validation split must hold out the same images, or the shipped
        # network would be chosen on some that it was trained on.
        labels, names = np.array(part.targets), _file_names(part)
        order = sorted(range(len(labels)), key=lambda i: (labels[i], natural_key(names[i])))
        pixels = part.data[order]
        if size != 32:
            try:
                _check_size((32, 32), size, resize)
            except DataError as error:
                raise DataError(f"cifar10: images are {error}") from None
            pixels = np.stack([_fitted(Image.fromarray(image), size) for image in pixels])
        channels_first = pixels.transpose(0, 3, 1, 2).copy()
        parts.append(Images.of(channels_first, labels[order]))
    return _assemble("cifar10", tuple(CIFAR10), *parts, seed)


def _file_names(part) -> list[str]:
    """The images' own file names, such as leptodactylus_pentadactylus_s_000004.png, in order."""
    names = []
    for file, _ in part.train_list if part.train else part.test_list:
        batch = Path(part.root, part.base_folder, file).read_bytes()
        names += pickle.loads(batch, encoding="latin1")["filenames"]  # torchvision knows its hash
    return names


def augment(
    images: torch.Tensor,
    generator: torch.Generator,
    *,
    flip: torch.Tensor | None = None,
    pad: int = 2,
    cutout: int = 0,
) -> torch.Tensor:
    """Flip, padded crop and cutout for a batch (N, C, H, W), each image by its own draw.

    Args:
        images: uint8 or float; the result has the same type and shape.
        generator: source of the draws.
        flip: (N,) bool, which images to mirror; drawn when absent. A trainer passes alternating
            ones, which see both views of an image in every two epochs (arXiv 2404.00498, 3.6).
        pad: pixels of reflected border that the crop may move into.
        cutout: side of the square that is blanked in each image; 0 for none.
    """
    count, _, height, width = images.shape

    def draw(high):
        return torch.randint(high, (count,), generator=generator)

    def hidden(length):
        """Which of so many rows or columns the square covers, (N, length)."""
        middle = draw(length).view(-1, 1)
        distance = (torch.arange(length) - middle).abs()
        return distance * 2 < cutout

    if flip is None:
        flip = draw(2).bool()
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    if pad:
        border = (pad,) * 4
        bordered = F.pad(images.float(), border, "reflect").to(images.dtype)
        # A view of every window of the images' size: (N, C, top, left, H, W).
        windows = bordered.unfold(2, height, 1).unfold(3, width, 1)
        places = 2 * pad + 1
        top = draw(places)
        left = draw(places)
        each = torch.arange(count)
        images = windows[each, :, top, left]
    if cutout:
        rows = hidden(height)
        columns = hidden(width)
        hole = rows[:, None, :, None] & columns[:, None, None, :]
        grey = 0 if images.is_floating_point() else 128
        images = images.masked_fill(hole, grey)
    return images


def with_train(dataset: Dataset, count: int, seed: int = 0) -> Dataset:
    """`dataset` with only `count` training images, drawn at random: for short runs."""
    order = _shuffled(len(dataset.train), seed, 79)
    fewer = dataset.train.take(order[:count])
    return replace(dataset, train=fewer)
