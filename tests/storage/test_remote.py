"""Files behind URLs: the same average as of local copies, by few and small requests."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import preloaded
import pytest
import torch
from command import fails, fault, load, one_line, run
from safetensors.torch import save_file
from torch import nn

import swa_avg
from swa_avg.averaging.prepare import planned
from swa_avg.batchnorm import copy_of
from swa_avg.errors import FileError, FormatError, OutputError, SwaAvgError
from swa_avg.planning.settings import Options
from swa_avg.storage.files import InputFile, reading_ahead
from swa_avg.storage.remote import path_of

fsspec = pytest.importorskip("fsspec")

ELEMENTS = 200_000  # of the largest tensor: 800 kB


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    many = {f"layers.{number}.bias": torch.randn(40) for number in range(50)}
    return {"first": torch.randn(ELEMENTS), **many, "last": torch.randn(7, 9)}


def run_of(folder: Path, count: int = 3) -> Path:
    """Checkpoints with the state of Adam, twice the weights, beside them, and their losses."""
    folder.mkdir(exist_ok=True)
    for epoch in range(count):
        made = weights(epoch)
        adam = {"exp_avg": torch.randn(ELEMENTS), "exp_avg_sq": torch.rand(ELEMENTS)}
        torch.save({"model": made, "optimizer": adam, "epoch": epoch}, folder / f"e_{epoch}.pt")
        (folder / f"e_{epoch}.json").write_text(f'{{"val_loss": {(epoch - 1) ** 2}}}')
    return folder


def average(inputs: Any, output: str | Path, **options: Any) -> swa_avg.Report:
    return swa_avg.average(inputs, output, **options)


# A filesystem in memory -------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def stored(fs: Any, folder: Path, name: str) -> None:
    for path in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
        fs.pipe(f"/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def hugging_face(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True)
    save_file(weights(seed), folder / "model.safetensors")
    (folder / "config.json").write_text('{"hidden": 3}')
    return folder


def shards(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True)
    made = list(weights(seed).items())
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file(dict(made[:20]), folder / names[0])
    save_file(dict(made[20:]), folder / names[1])
    weight_map = {name: names[number >= 20] for number, (name, _) in enumerate(made)}
    text = str({"metadata": {}, "weight_map": weight_map}).replace("'", '"')
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def distributed(folder: Path, seed: int) -> Path:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": weights(seed)}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")  # of dcp.save: it is but one process
@pytest.mark.parametrize("make", [hugging_face, shards, distributed])
def test_folders(make: Any, memory: Any, tmp_path: Path) -> None:
    """A folder of folders that a URL names is averaged as a local copy of it is."""
    for seed in range(3):
        make(tmp_path / "run" / f"checkpoint-{seed}", seed)
    stored(memory, tmp_path / "run", "run")
    average(tmp_path / "run", tmp_path / "local.pt")
    average("memory://run", "memory://out/swa.pt")
    assert memory.cat("/out/swa.pt") == (tmp_path / "local.pt").read_bytes()
    for keep in (False, True):
        options = {"keep_wrapper": keep, "force": True}
        average(["memory://run/checkpoint-*"], tmp_path / "of_remote", **options)
        average(tmp_path / "run", tmp_path / "of_local", **options)
        assert contents(tmp_path / "of_remote") == contents(tmp_path / "of_local")


def test_choice(memory: Any, tmp_path: Path) -> None:
    """Epochs, metrics in files beside the checkpoints and --exclude work on URLs, too."""
    stored(memory, run_of(tmp_path / "run", 12), "run")

    def chosen(**choice: Any) -> list[str]:
        options = Options(choice=swa_avg.Choice(**choice))
        with planned("memory://run/", "memory://out.pt", options) as made:
            return [source.path for source in made.inputs]

    assert chosen(best=2, metric="val_loss") == ["memory://run/e_1.pt", "memory://run/e_2.pt"]
    assert chosen(last=1) == ["memory://run/e_11.pt"]
    assert chosen(epochs="3:5:2", exclude=("*e_3*",)) == ["memory://run/e_5.pt"]


@pytest.mark.parametrize("keep", [False, True])
def test_output_in_place(keep: bool, memory: Any, tmp_path: Path) -> None:
    """What is uploaded has the bytes of a local output, and leaves nothing beside it."""
    stored(memory, run_of(tmp_path / "run"), "run")
    average(str(tmp_path / "run" / "*.pt"), tmp_path / "local.pt", keep_wrapper=keep)
    average("memory://run/*.pt", "memory://out/swa.pt", keep_wrapper=keep)
    assert memory.cat("/out/swa.pt") == (tmp_path / "local.pt").read_bytes()
    assert memory.find("/out") == ["/out/swa.pt"]


def test_upload_is_watched(memory: Any, tmp_path: Path) -> None:
    """Its bytes are counted up to the size of the output, after everything else is done."""
    stored(memory, run_of(tmp_path / "run"), "run")
    seen: list[swa_avg.Progress] = []
    report = average("memory://run/*.pt", "memory://out/swa.pt", progress=seen.append)
    assert (seen[-1].step, seen[-1].done) == ("uploading", report.bytes_written)
    assert seen[-1].total == report.bytes_written


def test_existing_output(memory: Any, tmp_path: Path) -> None:
    """An output that exists is replaced with `force` only; an input never is."""
    stored(memory, run_of(tmp_path / "run"), "run")
    memory.pipe("/out.pt", b"precious")
    with pytest.raises(OutputError, match="exists already"):
        average("memory://run/*.pt", "memory://out.pt")
    with pytest.raises(OutputError, match="is one of the inputs"):
        average("memory://run/*.pt", "memory:///run/e_1.pt", force=True)
    with pytest.raises(OutputError, match="is a folder"):
        average("memory://run/*.pt", "memory://run", force=True)
    assert memory.cat("/out.pt") == b"precious"
    average("memory://run/*.pt", "memory://out.pt", force=True)
    assert memory.cat("/out.pt").startswith(b"PK")


@pytest.mark.parametrize("fails", ["put_file", "mv"])
def test_failing_upload(
    fails: str, memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload that breaks off changes nothing under the output's name, and leaves no part."""
    stored(memory, run_of(tmp_path / "run"), "run")
    memory.pipe("/out/swa.pt", b"precious")
    put_file = memory.put_file

    def broken(first: str, second: str) -> None:
        if fails == "put_file":
            (tmp_path / "part").write_bytes(Path(first).read_bytes()[:1000])
            put_file(str(tmp_path / "part"), second)
        raise ConnectionResetError(104, "the line went dead")

    monkeypatch.setattr(memory, fails, broken)
    with pytest.raises(OutputError, match=r"memory://out/swa\.pt: cannot be .* the line went dead"):
        average("memory://run/*.pt", "memory://out/swa.pt", force=True)
    assert memory.find("/out") == ["/out/swa.pt"]
    assert memory.cat("/out/swa.pt") == b"precious"


def test_folders_are_no_output(memory: Any, tmp_path: Path) -> None:
    """No store can put several files in place at once, so none is asked to."""
    hugging_face(tmp_path / "model", 0)
    with pytest.raises(OutputError, match="memory://out: would be a folder") as refused:
        average(tmp_path / "model", "memory://out")
    assert memory.find("/") == []
    remedy = refused.value.of_command().partition(" in one step. ")[2]
    assert remedy == "Write it to this machine and copy it, or name a file: swa.safetensors."
    average(tmp_path / "model", tmp_path / "out")
    stored(memory, tmp_path / "out", "out")
    average(tmp_path / "model", "memory://file/swa.safetensors")
    with (
        swa_avg.open_checkpoint("memory://out") as one,
        swa_avg.open_checkpoint("memory://file/swa.safetensors") as other,
    ):
        assert (one.read("first") == weights(0)["first"].numpy()).all()
        assert (other.read("first") == one.read("first")).all()


def test_in_place(memory: Any, tmp_path: Path) -> None:
    """A remote average can be opened, and replaced by a changed copy of itself."""
    stored(memory, run_of(tmp_path / "run"), "run")
    average("memory://run/*.pt", "memory://out/swa.pt")
    whole = memory.cat("/out/swa.pt")
    with swa_avg.open_checkpoint("memory://out/swa.pt") as checkpoint:
        assert "layers.49.bias" in checkpoint.names
        assert checkpoint.read("last").shape == (7, 9)
    with copy_of(path_of("memory://out/swa.pt")) as copy:
        file = copy.file
        file.write(b"X", len(whole) - 1)
        assert memory.cat("/out/swa.pt") == whole
        file.commit()
    assert memory.cat("/out/swa.pt") == whole[:-1] + b"X"
    assert memory.find("/out") == ["/out/swa.pt"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("memory://run/no.pt", "cannot be opened: there is no such file"),
        ("memory://run/*.safetensors", "matches no file"),
        ("memory://nowhere/", "there is no such file"),
        ("nonsense://a/b.pt", "Protocol not known"),
        ("memry://run/e_1.pt", "Did you mean memory://run/e_1.pt?"),
        ("http://127.0.0.1:9/a.pt", "Connect call failed"),
    ],
)
def test_one_line(given: str, said: str, memory: Any, tmp_path: Path) -> None:
    """What is not there is named in one line."""
    stored(memory, run_of(tmp_path / "run"), "run")
    with pytest.raises(SwaAvgError) as error:
        average(given, tmp_path / "out.pt")
    assert given.rstrip("/") in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub",
    "http": "aiohttp", "https": "aiohttp",
    # Not in the extra: fsspec's own words name the package.
    "abfs": "adlfs", "sftp": "paramiko", "oss": "ossfs",
}  # fmt: skip


@pytest.mark.parametrize("protocol", PACKAGES)
def test_missing_package(protocol: str, tmp_path: Path) -> None:
    """Without a protocol's package the line names it, and the extra, if that brings it."""
    name = PACKAGES[protocol]
    code = (
        f"import sys; sys.modules[{name!r}] = None\n"
        "from swa_avg.__main__ import main\n"
        f"sys.argv = ['swa-avg', '{protocol}://a.b/c.pt', '-o', 'out.pt']\n"
        "main()\n"
    )
    line = one_line(preloaded.run(tmp_path, (), os.environ, 100, code))
    assert name in line
    extra = [one for one in requires("swa-avg") or () if "extra == 'remote'" in one]
    brought = any(re.match(rf"{name.replace('_', '-')}\b", one) for one in extra)
    assert brought == (protocol in ("s3", "s3a", "gs", "gcs", "hf", "http", "https"))
    assert brought == line.endswith(
        "To install the packages for URLs: pip install 'swa-avg[remote]'."
    )


def test_no_url_no_fsspec(tmp_path: Path) -> None:
    """Local files bring in neither fsspec's protocols nor an event loop."""
    torch.save({"a": torch.ones(3)}, tmp_path / "1.pt")
    code = (
        "import sys, swa_avg\n"
        "swa_avg.average('1.pt', 'out.pt')\n"
        "found = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not found & {'fsspec', 's3fs', 'aiohttp', 'asyncio'}, found\n"
    )
    ended = preloaded.run(tmp_path, (), os.environ, 100, code)
    assert ended.returncode == 0, ended.stderr


# A server on the web ----------------------------------------------------------------------------


@dataclass
class Web:
    """A server of one folder, with all that it was asked for.

    Attributes:
        folder: What it serves.
        ranges: Whether it knows ranges; else it sends whole files.
        sent: Bytes sent, by name.
        asked: Ranges asked for, by name.
        most: The largest number of requests under way at once.
    """

    folder: Path
    ranges: bool = True
    sent: dict[str, int] = field(default_factory=dict)
    asked: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    most: int = 0
    url: str = ""
    together: threading.Barrier | None = None
    server: ThreadingHTTPServer | None = None

    def answering(self, handler: type[BaseHTTPRequestHandler]) -> None:
        """Have another handler answer from now on."""
        assert self.server is not None
        self.server.RequestHandlerClass = handler


class Handler(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        name = self.path.partition("?")[0].strip("/")
        path = self.web.folder / name
        if not path.is_file():
            self.send_error(403 if name.startswith("secret") else 404)
            return
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = data
        if asked and self.web.ranges:
            first, last = int(asked[1]), int(asked[2])
            part = data[first : last + 1]
            self.web.asked.setdefault(name, []).append((first, last + 1))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}-{len(data):x}"')
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if not head:
            if self.web.together:
                self.web.together.wait(20)
            self.wfile.write(part)
            self.web.sent[name] = self.web.sent.get(name, 0) + len(part)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    pytest.importorskip("aiohttp")
    made = Web(run_of(tmp_path / "run"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Handler,), {"web": made}))
    made.server = server
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


def urls(web: Web, suffix: str = "") -> list[str]:
    return [f"{web.url}/e_{number}.pt{suffix}" for number in range(3)]


def test_web(web: Web, tmp_path: Path) -> None:
    """Only headers and weights are fetched, not Adam's state, and by few requests."""
    average(str(web.folder / "*.pt"), tmp_path / "local.pt")
    average(urls(web), tmp_path / "swa.pt")
    assert (tmp_path / "swa.pt").read_bytes() == (tmp_path / "local.pt").read_bytes()
    size = (web.folder / "e_0.pt").stat().st_size
    needed = (tmp_path / "local.pt").stat().st_size
    assert size > 2.9 * needed
    for number in range(3):
        assert web.sent[f"e_{number}.pt"] < needed + 400_000  # pages of 64 KiB for the headers
        assert len(web.asked[f"e_{number}.pt"]) < 20


def test_signed_urls(web: Web, tmp_path: Path) -> None:
    """A query is no pattern, and no part of a name."""
    made = average(urls(web, "?Signature=a*b%2F&Expires=1.5"), tmp_path / "swa.pt")
    assert [source.epoch for source in made.inputs] == [0, 1, 2]


def test_web_refuses(web: Web, tmp_path: Path) -> None:
    """The web is not written; what it does not give is named with its reason."""
    with pytest.raises(OutputError, match="URLs are read-only") as refused:
        average(urls(web), f"{web.url}/swa.pt")
    assert str(refused.value).endswith("Write the output to this machine, then upload it.")
    average(urls(web), tmp_path / "swa.pt")
    (tmp_path / "swa.pt").rename(web.folder / "swa.pt")  # the upload: the server's folder
    with swa_avg.open_checkpoint(f"{web.url}/swa.pt") as checkpoint:
        assert checkpoint.read("last").shape == (7, 9)
    with pytest.raises(FileError, match="there is no such file"):
        average(f"{web.url}/none.pt", tmp_path / "swa.pt")
    with pytest.raises(FileError, match="403"):
        average(f"{web.url}/secret.pt", tmp_path / "swa.pt")
    web.ranges = False
    with pytest.raises(SwaAvgError, match=rf"{web.url}/e_0.pt: .*"):
        average(urls(web), tmp_path / "swa.pt")
    assert not (tmp_path / "swa.pt").exists()


def test_change_between_header_and_data(web: Web, tmp_path: Path) -> None:
    """A file that is written anew after its header was read is refused, by its ETag."""
    options = Options()
    with planned(urls(web), tmp_path / "swa.pt", options) as made:
        path = web.folder / "e_1.pt"
        before = path.stat()
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        changed = pytest.raises(FormatError, match=r"e_1.pt: changed while being read")
        with changed as refused, made.open_output() as file:
            made.write_to(file)
    assert not (tmp_path / "swa.pt").exists()
    assert refused.value.of_command().endswith(
        "Wait until the run has finished writing it, then run the command again."
    )
    average(urls(web), tmp_path / "swa.pt")
    average(str(web.folder / "*.pt"), tmp_path / "local.pt")
    assert (tmp_path / "swa.pt").read_bytes() == (tmp_path / "local.pt").read_bytes()


def test_several_requests_at_once(web: Web) -> None:
    """What was announced is under way before it is asked for: nothing is sent until eight are."""
    (web.folder / "big").write_bytes(os.urandom(8 << 20))
    file = InputFile(path_of(f"{web.url}/big"))
    web.together = threading.Barrier(8)
    with reading_ahead([(file, 0, 8 << 20)], threads=8):
        got = file.read(0, 8 << 20)
    file.close()
    assert got == (web.folder / "big").read_bytes()


# A server that answers something else ------------------------------------------------------------


class Wrong(Handler):
    """Answers each range of the data with another: what is wrong is the name of the class."""

    answers = ""

    def answer(self, head: bool) -> None:
        path = self.web.folder / self.path.strip("/")
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), int(asked[2])) if asked else (0, len(data) - 1)
        wrong = self.answers if asked and last - first >= 1 << 16 else ""  # headers are right
        shift = 64 if wrong == "another range" else 0
        part = data[first - shift : last + 1 - shift]
        if wrong == "a short body":
            part = part[:-7]
        if wrong == "more than was asked for":
            part += b"more"
        if wrong == "another encoding":
            part = gzip.compress(part)
        self.send_response(200 if wrong == "no range" or not asked else 206)
        if wrong not in ("no Content-Range", "no range") and asked:
            total = len(data) + (wrong == "another size")
            said = f"bytes {first - shift}-{last - shift}/{total}"
            self.send_header("Content-Range", said)
        if wrong == "another encoding":
            self.send_header("Content-Encoding", "gzip")
        tag = "new" if wrong == "another ETag" else "old"
        self.send_header("ETag", f'"{tag}"')
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if not head:
            self.wfile.write(part)


@fault(151, "a server answers with another range, length, size or ETag", "refused")
@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ("another range", "got another byte range from the server (bytes "),
        ("no Content-Range", "got another byte range from the server (no Content-Range header)"),
        ("no range", "is on a server that does not serve byte ranges"),
        ("another size", "changed while being read"),
        ("another ETag", "changed while being read"),
        ("another encoding", "was sent compressed"),
        ("a short body", "returned "),
        ("more than was asked for", "got more bytes from the server than the "),
    ],
)
def test_server_that_answers_something_else(
    web: Web, tmp_path: Path, answers: str, says: str
) -> None:
    """The command compares each answer with what it asked for, and writes nothing."""
    for number in range(3):  # without checksums: nothing else would notice
        save_file({"w": torch.full((99_999,), float(number))}, web.folder / f"{number}.safetensors")
    web.answering(type("Of", (Wrong,), {"web": web, "answers": answers}))
    given = [f"{web.url}/{number}.safetensors" for number in range(3)]
    (tmp_path / "place").mkdir()
    line = fails(tmp_path / "place", *given, "-o", "swa.pt")
    assert says in line and f"{web.url}/" in line, line
    if line.endswith("Download the file and give its path."):
        for number, url in enumerate(given):
            urllib.request.urlretrieve(url, tmp_path / "place" / f"{number}.safetensors")
        there = [f"{number}.safetensors" for number in range(3)]
        assert run(tmp_path / "place", *there, "-o", "swa.pt").returncode == 0
        assert torch.equal(load(tmp_path / "place/swa.pt")["w"], torch.ones(99_999))


# A store that speaks S3 -------------------------------------------------------------------------


@dataclass
class Store:
    """A bucket in moto's server, as the command finds it through the environment."""

    client: Any
    environment: dict[str, str]

    def command(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(folder, *arguments, env={**os.environ, **self.environment})

    def put(self, name: str, path: Path) -> None:
        self.client.put_object(Bucket="bucket", Key=name, Body=path.read_bytes())

    def get(self, name: str) -> bytes:
        found: bytes = self.client.get_object(Bucket="bucket", Key=name)["Body"].read()
        return found

    @property
    def names(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket="bucket").get("Contents", [])
        return sorted(entry["Key"] for entry in found)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    moto = DomainDispatcherApplication(create_backend_app)

    def guarded(environ: Any, start: Any) -> Any:
        """moto, but what is called secret is denied, and the second part of an upload, too."""
        asked = environ["PATH_INFO"] + "?" + environ.get("QUERY_STRING", "")
        if "secret" in asked or ("broken" in asked and "partNumber=2" in asked):
            said = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            said = b"" if environ["REQUEST_METHOD"] == "HEAD" else said
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("403 Forbidden", [("Content-Length", str(len(said)))])
            return [said]
        return moto(environ, start)

    made = make_server("127.0.0.1", 0, guarded, threaded=True)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def store(server: str, tmp_path: Path) -> Iterator[Store]:
    """The bucket `bucket`, with a run in it whose files are in the folder `run`, too."""
    import boto3

    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1", **keys)
    client.create_bucket(Bucket="bucket")
    environment = {name.upper(): value for name, value in keys.items()}
    made = Store(client, {**environment, "AWS_ENDPOINT_URL": server})
    for path in run_of(tmp_path / "run").iterdir():
        made.put(f"run/{path.name}", path)
    yield made
    for name in made.names:
        client.delete_object(Bucket="bucket", Key=name)
    client.delete_bucket(Bucket="bucket")
    client.close()


def test_command(store: Store, tmp_path: Path) -> None:
    """The command reads and writes a bucket, chooses by side files, and gives local bytes."""
    before = store.names
    choice = ("--best", "2", "--metric", "val_loss", "--mode", "min")
    assert run(tmp_path, "run/e_*.pt", "-o", "local.pt", *choice).returncode == 0
    ended = store.command(tmp_path, "s3://bucket/run/e_*.pt", "-o", "s3://bucket/swa.pt", *choice)
    assert ended.returncode == 0, ended.stderr
    assert "wrote s3://bucket/swa.pt" in ended.stdout
    assert store.get("swa.pt") == (tmp_path / "local.pt").read_bytes()
    assert store.names == sorted([*before, "swa.pt"])


def test_command_on_a_folder(store: Store, tmp_path: Path) -> None:
    """A prefix of keys is a folder of checkpoints; the output may be here."""
    assert run(tmp_path, "run/", "-o", "local.safetensors").returncode == 0
    ended = store.command(tmp_path, "s3://bucket/run/", "-o", "swa.safetensors")
    assert ended.returncode == 0, ended.stderr
    made = (tmp_path / "swa.safetensors").read_bytes()
    assert made == (tmp_path / "local.safetensors").read_bytes()


def test_large_output(store: Store, tmp_path: Path) -> None:
    """What is uploaded in several parts is whole, or not there if one of them fails."""
    torch.save({"w": torch.randn(26_500_000), "step": 3}, tmp_path / "big.pt")
    assert run(tmp_path, "big.pt", "-o", "local.pt", "--keep-wrapper").returncode == 0
    ended = store.command(tmp_path, "big.pt", "-o", "s3://bucket/out.pt", "--keep-wrapper")
    assert ended.returncode == 0, ended.stderr
    found = store.client.head_object(Bucket="bucket", Key="out.pt")
    assert re.search(r"-\d+\"$", found["ETag"]), "not uploaded in parts: the test is too small"
    assert store.get("out.pt") == (tmp_path / "local.pt").read_bytes()
    before = store.names
    line = one_line(store.command(tmp_path, "big.pt", "-o", "s3://bucket/broken.pt"))
    assert "s3://bucket/broken.pt: cannot be written: Access Denied" in line
    assert store.names == before
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket="bucket")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("s3://nowhere/run/e_1.pt", "-o", "out.pt"), "nowhere"),
        (("s3://bucket/run/none.pt", "-o", "out.pt"), "there is no such file"),
        (("s3://bucket/secret.pt", "-o", "out.pt"), "Forbidden"),
        (("s3://bucket/run/e_*.pt", "-o", "s3://bucket/secret.pt"), "Forbidden"),
        (("s3://bucket/run/e_*.pt", "-o", "s3://nowhere/swa.pt"), "there is no such bucket"),
        (("s3://bucket/run/e_*.pt", "-o", "s3://bucket/run/e_1.pt", "-f"), "is one of the inputs"),
        (("s3://bucket/run/e_2.pt", "-o", "s3://bucket/run/e_1.pt"), "exists already"),
    ],
)
def test_command_refuses(
    arguments: tuple[str, ...], said: str, store: Store, tmp_path: Path
) -> None:
    """What is missing or would be overwritten is one line, and the bucket is as it was."""
    before = {name: store.get(name) for name in store.names}
    line = one_line(store.command(tmp_path, *arguments))
    assert said in line
    assert {name: store.get(name) for name in store.names} == before
    assert not (tmp_path / "out.pt").exists()


def test_folder_in_place(store: Store, tmp_path: Path) -> None:
    """BatchNorm of a folder in a bucket: refused; copied here, changed, and copied back, it is."""
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    (tmp_path / "model").mkdir()
    save_file(network.state_dict(), tmp_path / "model/model.safetensors")
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "mod.py").write_text(
        "import torch\nfrom torch import nn\n"
        "model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))\n"
        "batches = [torch.arange(12.0).reshape(4, 3)]\n"
    )
    for path in (tmp_path / "model").iterdir():
        store.put(f"model/{path.name}", path)
    bn = ("--recompute-bn", "--data", "mod:batches", "--force", "-o")
    line = one_line(store.command(tmp_path, *bn, "s3://bucket/model"))
    assert line.endswith("Copy it to this machine, change it there, and copy it back.")
    (tmp_path / "copy").mkdir()
    for path in (tmp_path / "model").iterdir():
        (tmp_path / "copy" / path.name).write_bytes(store.get(f"model/{path.name}"))
    assert run(tmp_path, *bn, "copy").returncode == 0
    for path in (tmp_path / "copy").iterdir():
        store.put(f"model/{path.name}", path)
    ended = store.command(tmp_path, "s3://bucket/model", "-o", "back.pt")
    assert ended.returncode == 0, ended.stderr
    found = load(tmp_path / "back.pt")
    assert torch.equal(found["0.weight"], network[0].weight)
    assert not torch.equal(found["1.running_mean"], torch.zeros(4))


def test_no_credentials(store: Store, tmp_path: Path) -> None:
    """Without credentials the backend's reason is the line."""
    environment = {**os.environ, "AWS_ENDPOINT_URL": store.environment["AWS_ENDPOINT_URL"]}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    ended = run(tmp_path, "s3://bucket/run/e_1.pt", "-o", "out.pt", env=environment)
    assert "redentials" in one_line(ended)
