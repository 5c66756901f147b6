"""Data sets: decoding, splits, augmentation, and the generated set."""

import io
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dynlib import _vision, data
from dynlib.data import augment, load_dataset, with_train
from dynlib.errors import DataError
from dynlib.files import data_places
from dynlib.shapes import generate


def picture(value: int, size=(32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 30)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for label in ("cat", "dog"):
        for i in range(12):
            path = tmp_path / "set" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(10 * i))
    return tmp_path / "set"


def test_a_folder_of_classes_is_split_three_ways(folder, tmp_path):
    dataset = load_dataset(str(folder), cache_dir=tmp_path / "cache")
    assert dataset.classes == ("cat", "dog")
    assert len(dataset.train) + len(dataset.val) + len(dataset.test) == 24
    assert min(len(dataset.train), len(dataset.val), len(dataset.test)) > 0
    assert dataset.train.images.shape[1:] == (3, 32, 32)


def test_leading_images_are_a_fair_sample_though_files_lie_by_class(folder, tmp_path):
    (tmp_path / "both").mkdir()
    for part in ("train", "test"):
        with tarfile.open(tmp_path / "both" / f"{part}.tar", "w") as file:
            file.add(folder, "set")
    dataset = load_dataset(str(tmp_path / "both"), cache_dir=tmp_path / "cache")
    for part in (dataset.train, dataset.test):
        assert part.labels[:8].float().mean() not in (0, 1)


def test_decoding_happens_once_and_a_broken_cache_is_decoded_again(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = load_dataset(str(folder), cache_dir=cache)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(good[:100])
    again = load_dataset(str(folder), cache_dir=cache)
    assert torch.equal(first.train.images, again.train.images)
    assert file.read_bytes() == good
    from dynlib._vision import timm

    monkeypatch.setattr(timm.data, "create_reader", None)  # decoding would fail now
    cached = load_dataset(str(folder), cache_dir=cache)
    assert torch.equal(first.train.labels, cached.train.labels)
    with pytest.raises(DataError, match="expected class folders"):
        load_dataset(str(folder), cache_dir=tmp_path / "other")


def test_a_changed_image_is_seen_and_an_unwritable_cache_costs_only_time(folder, tmp_path, caplog):
    cache = tmp_path / "cache"
    first = load_dataset(str(folder), cache_dir=cache)
    next(cache.iterdir()).write_bytes(b"")  # what a loss of power may leave
    assert torch.equal(load_dataset(str(folder), cache_dir=cache).train.images, first.train.images)
    (folder / "cat" / "3.png").write_bytes(picture(255))
    changed = load_dataset(str(folder), cache_dir=cache)
    assert max(part.images.max() for part in (changed.train, changed.val, changed.test)) == 255
    (tmp_path / "file").write_text("no folder")
    again = load_dataset(str(folder), cache_dir=tmp_path / "file" / "cache")
    assert torch.equal(again.train.images, changed.train.images)
    assert "cannot be kept" in caplog.text


def test_a_tar_gives_the_same_images_as_its_folder(folder, tmp_path):
    tar = tmp_path / "set.tar"
    with tarfile.open(tar, "w") as file:
        file.add(folder, "set")
    one = load_dataset(str(folder), cache_dir=tmp_path / "a")
    two = load_dataset(str(tar), cache_dir=tmp_path / "b")
    assert one.classes == two.classes
    assert one.train.images.sum() == two.train.images.sum()


@pytest.mark.parametrize("form", ["set", "set.tar"])
def test_images_of_formats_that_are_not_read_are_counted(form, folder, tmp_path, caplog):
    for name in ("a.webp", "b.WEBP", "c.gif", "notes.txt"):
        (folder / "cat" / name).write_bytes(b"")
    with tarfile.open(tmp_path / "set.tar", "w") as file:
        file.add(folder, "set")
    path = tmp_path / form
    dataset = load_dataset(str(path), cache_dir=tmp_path / "cache")
    assert len(dataset.train) + len(dataset.val) + len(dataset.test) == 24
    told = f"{path}: 3 images are passed over, which are .gif, .webp; only .jpg, .jpeg and .png"
    assert told in caplog.text


def test_a_data_set_is_shown_in_a_line(folder, tmp_path):
    dataset = load_dataset(str(folder), cache_dir=tmp_path / "cache")
    shown = "set: 18 training, 2 validation and 4 test images, 2 classes, 32 px"
    assert repr(dataset) == shown


def test_a_data_set_is_found_at_home_and_in_a_place_of_data(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, place in (("~/set", ""), ("set", tmp_path)):
        found = load_dataset(name, place, cache_dir=tmp_path / "cache")
        assert (found.name, found.classes) == ("set", ("cat", "dog"))


def test_an_unknown_name_says_where_it_was_looked_for_and_what_is_near(tmp_path, monkeypatch):
    here, place = tmp_path / "here", tmp_path / "place"
    (here / "photos").mkdir(parents=True)
    (place / "other").mkdir(parents=True)
    monkeypatch.chdir(here)
    looked = rf"no such name, folder or tar in {here}, {place}, .*data; did you mean photos\?"
    with pytest.raises(DataError, match=looked):
        load_dataset("phtos", place)
    with pytest.raises(DataError, match="did you mean cifar10"):
        load_dataset("cifar")
    with pytest.raises(DataError, match="~no-such-user/set"):
        load_dataset("~no-such-user/set")


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_a_size_that_cannot_be_is_refused(size):
    with pytest.raises(DataError, match=f"size is {size}; expected a whole number of pixels"):
        load_dataset("generated", size=size, resize=True)


def test_an_image_of_the_wrong_size_is_named(folder, tmp_path):
    (folder / "cat" / "odd.png").write_bytes(picture(3, (40, 32)))
    with pytest.raises(DataError, match=r"odd.*40 x 32 px, expected 32 x 32; .* --size 32 "):
        load_dataset(str(folder), cache_dir=tmp_path / "cache")
    dataset = load_dataset(str(folder), cache_dir=tmp_path / "cache", resize=True)
    assert dataset.train.images.shape[2:] == (32, 32)


def test_a_truncated_image_is_an_error_and_leaves_no_cache(folder, tmp_path):
    (folder / "cat" / "cut.png").write_bytes(picture(3)[:60])
    with pytest.raises(DataError, match="cannot be decoded"):
        load_dataset(str(folder), cache_dir=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def downloads(pixels, targets, names):
    """A stand-in of torchvision's CIFAR10: train and test images, their labels and file names."""

    class Downloaded:
        base_folder = "batches"
        train_list, test_list = [("one", None), ("two", None)], [("test", None)]

        def __init__(self, root, *, train, download):
            self.root, self.train = root, train
            self.data, self.targets = pixels[1 - train], targets[1 - train]
            files = self.train_list if train else self.test_list
            (Path(root) / self.base_folder).mkdir(parents=True, exist_ok=True)
            parts = np.array_split(names[1 - train], len(files))
            for (file, _), part in zip(files, parts, strict=True):
                content = pickle.dumps({"filenames": part.tolist()})
                Path(root, self.base_folder, file).write_bytes(content)

    return Downloaded


def test_a_download_is_split_like_the_tars(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(2, 60, 32, 32, 3), dtype=np.uint8)
    targets = [rng.permutation(np.arange(60) % 10).tolist() for _ in range(2)]
    names = [[f"{animal}_s_{i:06}.png" for animal, i in zip("abcdef" * 10, order, strict=True)]
             for order in (rng.permutation(60), rng.permutation(60))]  # fmt: skip

    download = downloads(pixels, targets, names)
    monkeypatch.setattr(_vision.torchvision.datasets, "CIFAR10", download)
    downloaded = data._cifar10_from_torchvision([tmp_path], seed=0)
    (tmp_path / "set").mkdir()
    sets = zip(("train", "test"), pixels, targets, names, strict=True)
    for part, images, labels, files in sets:
        with tarfile.open(tmp_path / "set" / f"{part}.tar", "w") as tar:
            for image, label, name in zip(images, labels, files, strict=True):
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "PNG")
                info = tarfile.TarInfo(f"{data.CIFAR10[label]}/{name}")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)
    tars = load_dataset(str(tmp_path / "set"), cache_dir=tmp_path / "cache")
    for part in ("train", "val", "test"):
        one, other = getattr(downloaded, part), getattr(tars, part)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_missing_places_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="nowhere"):
        load_dataset("cifar10", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no such name"):
        load_dataset(str(tmp_path / "absent"))
    monkeypatch.delenv("DYNLIB_DATA", raising=False)
    monkeypatch.setenv("DYNLIB_ROOT", str(tmp_path))
    monkeypatch.setattr(data, "_cifar10_from_torchvision", _offline)
    with pytest.raises(DataError, match="DYNLIB_DATA"):
        load_dataset("cifar10")


def _offline(*_):
    raise OSError("no network")


def test_without_any_data_auto_generates_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("DYNLIB_DATA", raising=False)
    monkeypatch.setenv("DYNLIB_ROOT", str(tmp_path))
    monkeypatch.setattr(data, "_cifar10_from_torchvision", _offline)
    dataset = load_dataset("auto", generated=(100, 20))
    assert dataset.name == "generated"
    assert "download failed (no network): using the generated set" in caplog.text


@pytest.mark.parametrize("name", ["auto", "cifar10", "generated"])
def test_a_mistyped_place_is_an_error_and_not_passed_over(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNLIB_DATA", str(tmp_path / "tpyo"))
    with pytest.raises(DataError, match=r"DYNLIB_DATA is '.*tpyo'; expected a folder"):
        load_dataset(name)
    with pytest.raises(DataError, match=r"DYNLIB_DATA is '.*tpyo'; expected a folder"):
        data_places(tmp_path)


def test_cifar10_is_found_as_lossless_tars_and_half_a_copy_is_named(folder, tmp_path, monkeypatch):
    place = tmp_path / "place"
    lossless = place / "cifar10_lossless"
    lossless.mkdir(parents=True)
    monkeypatch.setenv("DYNLIB_DATA", str(place))
    with tarfile.open(lossless / "train.tar", "w") as file:
        file.add(folder, "set")
    with pytest.raises(DataError, match=r"cifar10_lossless: test.tar is missing"):
        load_dataset("auto")
    shutil.copy(lossless / "train.tar", lossless / "test.tar")
    found = load_dataset("auto", cache_dir=tmp_path / "cache")
    assert (found.name, found.classes) == ("cifar10", ("cat", "dog"))


def test_the_split_is_fixed_and_disjoint():
    one, two = (load_dataset("generated", generated=(300, 30)) for _ in range(2))
    assert torch.equal(one.val.images, two.val.images)
    train = {image.numpy().tobytes() for image in one.train.images}
    assert not train & {image.numpy().tobytes() for image in one.val.images}
    assert len(one.val) == 30
    other = load_dataset("generated", generated=(300, 30), seed=1)
    assert not torch.equal(one.val.images, other.val.images)


def test_normalised_training_images_have_zero_mean_and_unit_variance():
    dataset = load_dataset("generated", generated=(500, 20))
    images = dataset.normalise(dataset.train.images)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.mean((0, 2, 3)).abs().max() < 1e-3
    assert (images.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_generated_images_know_their_difficulty():
    images = generate(400, np.random.default_rng(0))
    again = generate(400, np.random.default_rng(0))
    assert torch.equal(images.images, again.images)
    assert images.difficulty.min() >= 0
    assert images.difficulty.max() <= 1
    assert set(images.labels.tolist()) == set(range(10))
    # Noise is a third of the difficulty, so hard images are rougher from pixel to pixel.
    rough = (images.images[..., 1:].float() - images.images[..., :-1].float()).abs().mean((1, 2, 3))
    hard = images.difficulty > images.difficulty.median()
    assert rough[hard].mean() > 1.3 * rough[~hard].mean()


def test_augmentation_keeps_pixels_and_depends_only_on_the_generator():
    images = generate(16, np.random.default_rng(1)).images
    one, two = (augment(images, torch.Generator().manual_seed(3), cutout=8) for _ in range(2))
    assert torch.equal(one, two)
    assert one.dtype == torch.uint8
    assert one.shape == images.shape
    still = augment(images, torch.Generator(), flip=torch.zeros(16, dtype=torch.bool), pad=0)
    assert torch.equal(still, images)
    mirrored = augment(images, torch.Generator(), flip=torch.ones(16, dtype=torch.bool), pad=0)
    assert torch.equal(mirrored, images.flip(3))


def test_every_crop_is_a_window_of_the_padded_image():
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).reshape(2, 3, 8, 8)
    none = torch.zeros(2, dtype=torch.bool)
    crops = augment(images, torch.Generator().manual_seed(0), flip=none, pad=2)
    padded = torch.nn.functional.pad(images.float(), (2,) * 4, "reflect").byte()
    for crop, whole in zip(crops, padded, strict=True):
        windows = [whole[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        assert any(torch.equal(crop, window) for window in windows)


def test_cutout_blanks_one_square():
    ones = torch.ones(64, 1, 16, 16)
    none = torch.zeros(64, dtype=torch.bool)
    cut = augment(ones, torch.Generator().manual_seed(0), flip=none, pad=0, cutout=4)
    blanked = (cut == 0).sum((1, 2, 3))
    assert blanked.max() <= 25
    assert blanked.min() >= 4


def test_cifar10_from_the_tars(data_root, tmp_path):
    dataset = load_dataset("cifar10", str(data_root))
    assert dataset.classes == tuple(data.CIFAR10)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (45_000, 5_000, 8_000)
    assert torch.bincount(dataset.test.labels).min() > 700
    assert torch.bincount(dataset.test.labels[:1000]).min() > 70
    assert len(with_train(dataset, 100).train) == 100


@pytest.mark.faults
def test_what_is_no_set_of_images_is_refused_unwaited_for(folder, tmp_path):
    cache = tmp_path / "cache"

    def refused(message, path=folder, **options):
        with pytest.raises(DataError, match=message):
            load_dataset(str(path), cache_dir=cache, **options)

    refused("has no name", "")
    os.mkfifo(folder / "cat" / "pipe.png")
    refused(r"pipe\.png: neither a file nor a folder")
    (folder / "cat" / "pipe.png").unlink()
    (folder / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    refused(r"gone\.png: neither")
    (folder / "cat" / "gone.png").unlink()
    (folder / "dog" / "up").symlink_to(folder)
    refused("which is there already")
    (folder / "dog" / "up").unlink()
    (folder / "cat" / "large.png").write_bytes(blank_png(13_300))
    refused("13300 x 13300 px, expected at most", resize=True)
    refused("13300 x 13300 px, expected 32 x 32")
    (folder / "cat" / "large.png").unlink()
    assert load_dataset(str(folder), cache_dir=cache).classes == ("cat", "dog")
    for path in folder.glob("*/*.png"):
        if path.name != "0.png" or path.parent.name == "dog":
            path.unlink()
    refused("expected 3 or more")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("1.png", "2.png", "3.png"):
        (alone / name).write_bytes(picture(1))
    refused("expected class folders", alone)
    refused("alone|decoded|class", alone / "1.png")


def blank_png(side: int) -> bytes:
    """A large image in few bytes; what it would decode to is never made here."""
    whole = bytearray(picture(0))
    at = whole.index(b"IHDR") + 4
    whole[at : at + 8] = struct.pack(">II", side, side)
    whole[at + 13 : at + 17] = struct.pack(">I", zlib.crc32(whole[at - 4 : at + 13]))
    return bytes(whole)


def test_a_changed_image_behind_a_link_is_seen(folder, tmp_path):
    (folder / "cat").rename(tmp_path / "cat")
    (folder / "cat").symlink_to(tmp_path / "cat")
    cache = tmp_path / "cache"
    load_dataset(str(folder), cache_dir=cache)
    (tmp_path / "cat" / "3.png").write_bytes(picture(255))
    changed = load_dataset(str(folder), cache_dir=cache)
    assert max(part.images.max() for part in (changed.train, changed.val, changed.test)) == 255


def test_an_oblong_image_is_cropped_and_not_squeezed(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200  # the square in the middle
    for kind in ("cat", "dog"):
        (tmp_path / "set" / kind).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(pixels).save(tmp_path / "set" / kind / f"{i}.png")
    dataset = load_dataset(str(tmp_path / "set"), size=10, resize=True, cache_dir=tmp_path)
    assert (dataset.train.images == 200).all()


def test_a_data_set_is_normalised_as_a_model_expects():
    dataset = load_dataset("generated", generated=(40, 10))

    model = torch.nn.Linear(1, 1)
    model.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    alike = dataset.like(model)
    pixel = torch.tensor([128, 51, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    want = (torch.tensor([128 / 255, 0.2, 0.0]) - torch.tensor([0.5, 0.4, 0.3])) / alike.std
    torch.testing.assert_close(alike.normalise(pixel).flatten(), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="Linear: its pretrained_cfg has no 'mean'"):
        dataset.like(torch.nn.Linear(1, 1))
    with pytest.raises(DataError, match="'resnet18'; expected a model, not its name"):
        dataset.like("resnet18")


def test_a_size_is_honoured_or_refused_for_cifar10_too(tmp_path, monkeypatch):
    pixels = np.full((2, 10, 32, 32, 3), 7, np.uint8)
    names = [[f"{i}.png" for i in range(10)]] * 2
    download = downloads(pixels, [list(range(10))] * 2, names)
    monkeypatch.delenv("DYNLIB_DATA", raising=False)
    monkeypatch.setenv("DYNLIB_ROOT", str(tmp_path))
    monkeypatch.setattr(_vision.torchvision.datasets, "CIFAR10", download)
    assert load_dataset("cifar10", size=64, resize=True).test.images.shape[2:] == (64, 64)
    with pytest.raises(DataError, match="cifar10: images are 32 x 32 px, expected 64 x 64"):
        load_dataset("cifar10", size=64)
