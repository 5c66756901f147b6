"""A network as a folder, and as a repository: one format, no network unless it is asked for."""

import http.server
import socket
import threading

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file
from small_nets import SPACE, calibrated

from dynlib.errors import CheckpointError
from dynlib.nets.supernet import Supernet

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def supernet():
    return calibrated([SPACE.smallest, SPACE.largest])


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache, and an error for whoever touches the network."""

    def refuse(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def same(one, two):
    images = torch.randn(2, 3, 16, 16)
    return all(
        torch.equal(one.prepare(config)(images), two.prepare(config)(images))
        for config in (SPACE.smallest, SPACE.largest)
    )


@pytest.mark.usefixtures("offline")
def test_a_folder_holds_a_checkpoint_and_comes_back(supernet, tmp_path):
    folder = supernet.save_pretrained(
        tmp_path / "net", license="mit", dataset="cifar10", recipe={"epochs": 3}
    )
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "model.safetensors"]
    back, provenance = Supernet.from_pretrained(folder)
    assert provenance == {"license": "mit", "dataset": "cifar10", "recipe": {"epochs": 3}}
    assert same(back, supernet)
    as_file, _ = Supernet.from_checkpoint(folder / "model.safetensors")  # one format
    assert same(as_file, supernet)
    again = back.save_pretrained(tmp_path / "again", **provenance)
    twice, said = Supernet.from_pretrained(again)
    assert same(twice, supernet)
    assert said == provenance


@pytest.mark.usefixtures("offline")
def test_the_card_says_licence_data_recipe_and_every_network(supernet, tmp_path):
    said = {"dataset": "my | photos\nof cats", "recipe": {"epochs": 3}}
    folder = supernet.save_pretrained(tmp_path / "net", license="cc-by-4.0", **said)
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["license"] == "cc-by-4.0"
    assert about["library_name"] == "dynlib"
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert "| license | cc-by-4.0 |" in rows
    assert r"| dataset | my \| photos of cats |" in rows
    assert "| recipe | {'epochs': 3} |" in rows
    assert rows[-3].startswith("| --- | --- | --- |")
    assert [row.split()[1] for row in rows[-2:]] == [str(SPACE.smallest), str(SPACE.largest)]

    table = pd.DataFrame({"subnet": ["small"], "accuracy_val_pct": [np.float64(200 / 3)]})
    supernet.save_pretrained(folder, license="mit", table=table)
    assert (folder / "README.md").read_text().endswith("| small | 66.67 |\n")


@pytest.mark.usefixtures("offline")
def test_a_foreign_folder_is_refused_by_name(supernet, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"theirs: expected model\.safetensors.*config\.json"):
        Supernet.from_pretrained(folder)
    save_file({"conv1.weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a super-network"):
        Supernet.from_pretrained(folder)
    path = supernet.save_pretrained(folder, license="mit") / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        Supernet.from_pretrained(folder)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("source", ["owner/net", "no/such/folder", "../net", "a b"])
def test_without_download_only_the_cache_is_looked_at(source):
    with pytest.raises(CheckpointError, match=r"neither a folder nor a repository.*download=True"):
        Supernet.from_pretrained(source)


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """A Hub on this machine that serves one file; its folder, and the requests that came."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append((self.command, self.path))
            file = tmp_path / "served" / self.path.rpartition("/")[2]
            there = self.path.startswith("/owner/net/resolve/") and file.is_file()
            content = file.read_bytes() if there else b""
            self.send_response(200 if there else 404)
            self.send_header("ETag", '"0000"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            if not there:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "served", asked
    server.shutdown()
    server.server_close()


def test_a_repository_is_fetched_once_and_then_opened_without_the_network(
    supernet, mirror, monkeypatch
):
    served, asked = mirror
    supernet.save_pretrained(served, license="mit")
    with pytest.raises(CheckpointError, match=r"owner/none.*RepositoryNotFound"):
        Supernet.from_pretrained("owner/none", download=True)
    with pytest.raises(CheckpointError, match="in the cache"):
        Supernet.from_pretrained("owner/net")
    assert all("none" in path for _, path in asked)
    fetched, _ = Supernet.from_pretrained("owner/net", download=True)
    assert same(fetched, supernet)
    assert asked[-1][0] == "GET"
    monkeypatch.setattr(socket.socket, "connect", None)
    cached, provenance = Supernet.from_pretrained("owner/net")
    assert same(cached, supernet)
    assert provenance == {"license": "mit"}


def test_a_network_is_sent_only_where_that_is_asked_for(supernet, tmp_path, monkeypatch):
    sent = []

    class Api:
        def create_repo(self, repo_id, **settings):
            sent.append(("create", repo_id, settings))

        def upload_folder(self, *, repo_id, folder_path, allow_patterns):
            sent.append(("upload", repo_id, folder_path, allow_patterns))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    folder = supernet.save_pretrained(tmp_path / "net", license="mit")
    assert not sent
    supernet.save_pretrained(folder, license="mit", upload_to="owner/net")
    assert sent == [
        ("create", "owner/net", {"private": True, "exist_ok": True}),
        ("upload", "owner/net", folder, ["model.safetensors", "README.md"]),
    ]
    assert 'from_pretrained("owner/net")' in (folder / "README.md").read_text()


def test_what_is_no_json_writes_no_folder(supernet, tmp_path):
    with pytest.raises(TypeError):
        supernet.save_pretrained(tmp_path / "net", license="mit", recipe=object())
    assert not (tmp_path / "net").exists()
