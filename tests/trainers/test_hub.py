"""Hub upload, against a server that speaks the hub's API: what arrives, when, and that a failure loses nothing.

Each run is a process of its own: huggingface_hub reads `HF_ENDPOINT` and `HF_HUB_OFFLINE` when it is imported.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from alignment.data.preferences import read_rows
from alignment.files import write_json_lines
from alignment.recipes import RecipeError, load_recipe
from tests import tiny_lm

TOKEN = "hf_notatokenbutasecret"
SECRET_TEXT = "unpublished"  # stands in every preference row


@dataclass
class Hub:
    """What a server was asked and given."""

    url: str = ""
    refuse: str = ""  # a path that answers 403
    requests: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    private: bool | None = None


class _Handler(BaseHTTPRequestHandler):
    """The few calls that creating a repository and committing regular files take."""

    hub: Hub

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body)

    def _answer(self, body: bytes) -> None:
        path, hub = self.path.partition("?")[0], self.hub
        hub.requests.append(f"{self.command} {path}")
        status, found = 200, {}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status, found = 401, {"error": "Invalid username or password."}
        elif hub.refuse and re.search(hub.refuse, path):
            status, found = 403, {"error": "You have no right to do this."}
        elif path == "/api/whoami-v2":
            found = {"name": "me", "type": "user"}
        elif path == "/api/repos/create":
            asked = json.loads(body)
            hub.private = asked.get("visibility") == "private"
            found = {"url": f"{hub.url}/{asked.get('organization') or 'me'}/{asked['name']}"}
        elif "/preupload/" in path:
            found = {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
            }
        elif "/commit/" in path:
            hub.commits.append(path)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            found = {"commitUrl": f"{hub.url}/me/x/commit/abc", "commitOid": "abc", "hookOutput": ""}
        elif self.command == "GET" and (there := re.fullmatch(r"/api/models/(\w+/\w+)", path)):
            found = {"id": there[1]}
        elif not path.startswith(("/api/validate-yaml", "/api/models")):
            status, found = 404, {"error": "not here"}
        answer = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": found}))
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def started(root, tiny, tmp_path, hub):
    """A function: one DPO step on the tiny model with the hub at `hub`; (exit code, all that was printed)."""
    rows = [{"prompt": o, "chosen": f" warm {SECRET_TEXT} .", "rejected": " cold ."} for o in tiny_lm.openings()[:8]]
    write_json_lines(tmp_path / "pairs.jsonl", rows)

    def start(*more: str, **environment: str) -> tuple[int, str]:
        keys = [override.partition("=")[0] for override in more]
        given = [
            f"model.name_or_path={tiny}",
            "data.sample=null",
            "evaluation=null",
            f"data.train={tmp_path / 'pairs.jsonl'}",
            f"training.output_dir={tmp_path / 'run'}",
            "training.push_to_hub=true",
            "training.save_strategy=steps",
            "training.save_steps=1",
        ]
        given = [*(g for g in given if g.partition("=")[0] not in keys), *more]
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",  # plain commits: the storage behind large files is another service
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "scripts/train.py", "recipes/quickstart/dpo.yaml", *given],
            cwd=root,
            env={key: value for key, value in (os.environ | settings | environment).items() if value},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout + done.stderr

    return start


def everything(run: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file())


def test_final_arrives_and_nothing_else(started, hub, tmp_path):
    code, said = started("training.hub_model_id=me/kind", "training.hub_private_repo=true", "training.hub_revision=v1")
    assert code == 0, said
    final = tmp_path / "run" / "final"
    assert set(hub.files) == {path.name for path in final.iterdir()} and "model.safetensors" in hub.files
    assert all(hub.files[path.name] == path.read_bytes() for path in final.iterdir())
    assert SECRET_TEXT.encode() not in b"".join(hub.files.values())
    assert hub.private is True and hub.commits == ["/api/models/me/kind/commit/v1"]
    assert hub.requests.index("GET /api/whoami-v2") < hub.requests.index("POST /api/repos/create")
    assert {"POST /api/models/me/kind/branch/v1", "GET /api/models/me/kind/auth-check/write"} <= set(hub.requests)
    card = hub.files["README.md"].decode()
    assert "# kind" in card and "me/kind" in card and "- alignment" in card and "- dpo" in card  # our card and tags
    assert f"uploaded {final} to me/kind" in said and TOKEN not in said
    assert TOKEN.encode() not in everything(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-1").is_dir()  # checkpoints stay here


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        pytest.param({"HF_TOKEN": ""}, "Token is required", id="not logged in", marks=pytest.mark.slow),
        pytest.param({"HF_TOKEN": "hf_wrong"}, "Invalid", id="unknown token"),
        pytest.param({"HF_HUB_OFFLINE": "1"}, "offline", id="offline", marks=pytest.mark.slow),
    ],
)
def test_who_cannot_log_in_is_told_before_anything_is_done(started, hub, tmp_path, environment, reason):
    code, said = started(**environment)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and "training.push_to_hub: the hub does not let us in" in line and reason.lower() in line.lower()
    assert "`hf auth login`" in line
    assert not (tmp_path / "run").exists() and "[1/3]" not in said and not hub.files


@pytest.mark.slow
def test_a_repository_that_is_not_ours_is_found_before_training(started, hub, tmp_path):
    hub.refuse = "/repos/create|/auth-check/write"  # it is there, and we may read it
    code, said = started("training.hub_model_id=them/kind")
    assert code == 2 and "the repository cannot be made ready" in said and "hf auth login" in said
    assert not (tmp_path / "run").exists() and not hub.commits


@pytest.mark.slow
def test_an_upload_that_fails_loses_nothing(started, hub, tmp_path):
    hub.refuse = "/commit/"
    code, said = started("training.logging_steps=50", "training.save_strategy=no")  # nothing but final/ is there
    final = tmp_path / "run" / "final"
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and f"the trained model is safe in {final}" in line and f"`hf upload me/run {final}`" in line
    assert "`hf auth login`" in line
    assert (final / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["steps"] == 1
    assert read_rows(tmp_path / "pairs.jsonl")


def problem(*overrides: str) -> str:
    with pytest.raises(RecipeError) as found:
        load_recipe("recipes/quickstart/dpo.yaml", overrides)
    return str(found.value)


def test_keys_of_the_hub(root, monkeypatch):
    monkeypatch.chdir(root)
    assert "hub_strategy: 'every_save' is not accepted: checkpoints hold" in problem(
        "training.hub_strategy=every_save"
    )
    assert "a recipe is shared, a secret is not" in problem("training.hub_token=hf_x")
    for key in ("hub_model_id=me/x", "hub_private_repo=true", "hub_revision=v1"):
        assert problem(f"training.{key}").endswith("needs push_to_hub: true")
    training = load_recipe("recipes/quickstart/dpo.yaml", ["training.push_to_hub=true"]).training
    assert "push_to_hub" not in training.trl_arguments()  # TRL's would upload the whole run
