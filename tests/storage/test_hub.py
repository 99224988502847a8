"""Revisions of a repository of the Hugging Face hub, on a local server that speaks its API."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from command import one_line, run
from safetensors.torch import load_file, save

pytest.importorskip("huggingface_hub")
REPO = "org/model"
SHA = "0123456789abcdef0123456789abcdef01234567"
Files = dict[str, bytes]


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that reading needs: refs, revisions, trees and ranges."""

    branches: dict[str, Files] = {}  # noqa: RUF012
    tags: dict[str, Files] = {}  # noqa: RUF012

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self, head: bool = False) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        path = urlsplit(self.path).path
        api = re.fullmatch(rf"/api/models/{REPO}/(refs|revision|tree|paths-info)/?(.*)", path)
        resolve = re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.*)", path)
        every = self.branches | self.tags
        revision, _, inner = ((resolve[2] and "") or "") if False else ("", "", "")
        if api and api[1] == "refs":
            self._json(
                {
                    kind: [
                        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": SHA}
                        for name in names
                    ]
                    for kind, names in {
                        "branches": self.branches,
                        "tags": self.tags,
                        "converts": {},
                    }.items()
                }
            )
            return
        if api:
            revision, _, inner = api[2].partition("/")
            revision, inner = unquote(revision), unquote(inner)
        if resolve:
            revision, inner = unquote(resolve[1]), unquote(resolve[2])
        files = every.get(revision)
        if files is None:
            self._json({"error": "Revision Not Found"}, 404, "RevisionNotFound")
        elif api and api[1] == "revision":
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": REPO, "sha": SHA, "siblings": siblings, "tags": []})
        elif api and api[1] == "tree":
            self._json([self._entry(name, files) for name in files])
        elif api:
            wanted = json.loads(body)["paths"] if body.startswith("{") else []
            wanted = wanted or re.findall(r"paths=([^&]*)", body)
            self._json([self._entry(unquote(p), files) for p in wanted if unquote(p) in files])
        elif inner in files:
            self._file(files[inner], head)
        else:
            self._json({"error": "Entry not found"}, 404, "EntryNotFound")

    @staticmethod
    def _entry(name: str, files: Files) -> dict[str, Any]:
        return {"type": "file", "oid": SHA, "size": len(files[name]), "path": name}

    def _file(self, data: bytes, head: bool) -> None:
        parts = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first = int(parts[1]) if parts else 0
        last = min(int(parts[2]) if parts and parts[2] else len(data) - 1, len(data) - 1)
        self.send_response(206 if parts else 200)
        if parts:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("ETag", f'"{SHA}"')
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if not head:
            self.wfile.write(data[first : last + 1])

    def _json(self, content: object, status: int = 200, code: str = "") -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""


@contextmanager
def hub(branches: dict[str, Files], tags: dict[str, Files] | None = None) -> Iterator[str]:
    """Serve the revisions of a repository; yield the address."""
    kind = type("Hub", (Hub,), {"branches": branches, "tags": tags or {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def files(seed: float) -> Files:
    state = {"a.weight": torch.full((64, 3), seed), "a.bias": torch.tensor([seed, 1.0])}
    return {"model.safetensors": save(state, {"format": "pt"}), "config.json": b'{"a": 1}'}


BRANCHES = {
    "main": files(100.0),
    "stage1-step1000-tokens2B": files(1.0),
    "stage1-step10000-tokens20B": files(4.0),
    "stage1-step2000-tokens4B": files(2.0),
    "stage2/step5000": files(50.0),
}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with hub(BRANCHES, {"v1": files(8.0)}) as address:
        yield address


def on_hub(folder: Path, endpoint: str, *arguments: str) -> Any:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1",
                   "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}  # fmt: skip
    return run(folder, *arguments, env=environment)


def inputs_of(ended: Any) -> list[str]:
    assert ended.returncode == 0, ended.stderr
    return [source["path"] for source in json.loads(ended.stdout)["inputs"]]


def test_pattern_of_revisions(tmp_path: Path, endpoint: str) -> None:
    """A pattern gives the branches in the order of their steps; the output is the folder's mean."""
    ended = on_hub(tmp_path, endpoint, f"hf://{REPO}@stage1-step*", "-o", "swa", "--json")
    assert inputs_of(ended) == [
        f"hf://{REPO}@stage1-step{step}"
        for step in ("1000-tokens2B", "2000-tokens4B", "10000-tokens20B")
    ]
    found = load_file(tmp_path / "swa/model.safetensors")
    assert torch.equal(found["a.bias"], torch.tensor([7 / 3, 1.0]))
    assert (tmp_path / "swa/config.json").read_bytes() == b'{"a": 1}'
    pattern = f"hf://{REPO}@stage1-step*/*.safetensors"
    ended = on_hub(tmp_path, endpoint, pattern, "--last", "2", "-o", "swa.pt", "--json")
    assert [path.rpartition("@")[2][:16] for path in inputs_of(ended)] == [
        "stage1-step2000-", "stage1-step10000"]  # fmt: skip
    assert torch.load(tmp_path / "swa.pt")["a.bias"][0] == 3.0


def test_revisions_by_name(tmp_path: Path, endpoint: str) -> None:
    """Branches, a tag and a branch with a slash in its name are inputs; others are refused."""
    given = [f"hf://{REPO}@stage1-step1000-tokens2B", f"hf://{REPO}@v1", f"hf://{REPO}@stage2*"]
    ended = on_hub(tmp_path, endpoint, *given, "-o", "swa", "--json")
    assert set(inputs_of(ended)) == {*given[:2], f"hf://{REPO}@stage2%2Fstep5000"}
    found = load_file(tmp_path / "swa/model.safetensors")["a.bias"][0]
    assert found == torch.tensor(59 / 3)
    line = one_line(on_hub(tmp_path, endpoint, f"hf://{REPO}@stage3*", "-o", "none"), 2)
    assert f"hf://{REPO}@stage3*: matches no file" in line
    line = one_line(on_hub(tmp_path, endpoint, f"hf://{REPO}@stage3", "-o", "none"))
    assert f"hf://{REPO}@stage3" in line and not (tmp_path / "none").exists()
