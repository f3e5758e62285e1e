"""A folder goes to the hub, or it is said before the work why it cannot."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from routed_models import export

from megaskip.checkpoint.hub import push_to_hub, require_hub
from megaskip.cli.convert import main as convert
from megaskip.config.commands.hub import HubTarget
from megaskip.errors import ConfigError, MegaskipError


class Hub(BaseHTTPRequestHandler):
    """What a client needs of the hub to send a small folder, on this machine."""

    repos: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    is_full = False

    def do_GET(self) -> None:  # noqa: N802  the name that http.server asks for
        if self.headers.get("authorization") != "Bearer good":
            self._answer({"error": "Invalid token"}, 401)
        else:
            self._answer({"type": "user", "name": "ada", "orgs": [{"name": "lab"}]})

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path.endswith("/repos/create"):
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'ada'}/{asked['name']}"
            # Older clients ask for private, newer ones for a visibility.
            seen = asked.get("visibility") or ("private" if asked["private"] else "public")
            self.repos.setdefault(name, {"visibility": seen, "files": {}})
            self._answer({"url": f"http://{self.headers['host']}/{name}", "id": name})
        elif self.path.endswith("/validate-yaml"):
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            kind = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            modes = [{"path": f["path"], **kind} for f in files]
            self._answer({"files": modes})
        elif self.is_full:
            self._answer({"error": "storage is full"}, 507)
        else:
            name = "/".join(self.path.split("/")[3:5])
            repo = self.repos[name]
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    repo["files"][line["value"]["path"]] = content
            url = f"http://{self.headers['host']}/{name}/commit/{'0' * 40}"
            self._answer({"success": True, "commitUrl": url, "commitOid": "0" * 40})

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """Hold a hub open that the client talks to, with a good token in the environment."""
    kind = type("OneHub", (Hub,), {"repos": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "good")
    yield kind
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("public", [False, True])
def test_a_folder_becomes_a_repository_that_is_private_unless_asked(
    public: bool, hub: type[Hub], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "config.json").write_text("{}")
    target = HubTarget(push_to_hub="lab/small", hub_public=public)
    require_hub(target)
    address = push_to_hub(tmp_path, target)
    assert address is not None
    assert address.endswith("/lab/small")
    files = {"README.md": b"a card", "config.json": b"{}"}
    assert hub.repos == {
        "lab/small": {"visibility": "public" if public else "private", "files": files}
    }
    hub.is_full = True
    (tmp_path / "config.json").write_text("{1}")
    with pytest.raises(MegaskipError, match=r"did not take it .*507.* is whole: send it with `hf"):
        push_to_hub(tmp_path, target)


def test_convert_sends_the_folder_that_it_has_written(
    hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export("llama", tmp_path)
    source = ["--routers", str(tmp_path / "routers"), "--base", str(tmp_path / "base")]
    folder = tmp_path / "out"
    convert([*source, "--output", str(folder), "--push_to_hub", "small"])
    assert f"{constants.ENDPOINT}/ada/small" in capsys.readouterr().out
    written = [path for path in folder.rglob("*") if path.is_file()]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in written}
    assert {"config.json", "README.md", "model.safetensors.index.json"} < files.keys()
    assert hub.repos == {"ada/small": {"visibility": "private", "files": files}}


def test_what_cannot_be_sent_is_said_before_the_work(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            require_hub(HubTarget(push_to_hub=name))

    require_hub(HubTarget())
    refused("lab//small", r"--push_to_hub lab//small: ")
    refused("others/small", "'ada' is logged in, and may write to ada, lab")
    monkeypatch.setenv("HF_TOKEN", "stale")
    refused("small", "not logged in .*; run `hf auth login` with")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("small", "the hub does not answer .*check the network")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("small", "HF_HUB_OFFLINE is set")
    with pytest.raises(ConfigError, match="add it"):
        HubTarget(hub_public=True)
