"""Uploading an export, to a server that answers as the Hugging Face hub does."""

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from trainer.export.command import main


class Hub(BaseHTTPRequestHandler):
    """Keeps what it is sent: `server.repositories` and `server.files`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == "Bearer hf_test"
        if self.path == "/api/repos/create":
            if self.server.broken:
                return self.answer({"error": "You have no rights here"}, 403)
            self.server.repositories.append(json.loads(body))
            return self.answer({"url": "https://huggingface.co/org/name", "name": "org/name"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            named = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in named]
            return self.answer({"files": modes})
        assert self.path == "/api/models/org/name/commit/main"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitUrl": "https://huggingface.co/org/name/commit/1", "commitOid": "1" * 40})

    def answer(self, content, code=200):
        self.send_response(code)
        text = json.dumps(content).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Error-Message", content.get("error", ""))
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as made:
        made.repositories, made.files, made.broken = [], {}, False
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{made.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()


def refusal(capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("error: ")
    assert "Traceback" not in said
    return said


def test_an_export_is_pushed_with_all_its_files(server, tiny_run, tmp_path, capsys):
    main([str(tiny_run("VAEGAN")), str(tmp_path / "out"), "--num", "0", "--full", "--push", "org/name", "--private"])
    assert capsys.readouterr().out.endswith(f"{constants.ENDPOINT}/org/name\n")
    (repository,) = server.repositories
    assert (repository["name"], repository["organization"]) == ("name", "org")
    assert "private" in repository.values() or repository["private"], "older versions"
    files = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert server.files == {name: path.read_bytes() for name, path in files.items()}
    assert "training/checkpoints/step_00000003/optimizer.binary.safetensors" in files
    assert 'models.load(snapshot_download("org/name"))' in server.files["README.md"].decode()


def test_a_refusal_names_the_reason_and_how_to_try_again(server, tiny_run, tmp_path, capsys):
    server.broken, out = True, tmp_path / "out"
    said = refusal(capsys, tiny_run("VAEGAN"), out, "--num", "0", "--push", "org/name")
    assert "--push org/name: " in said
    assert "You have no rights here" in said
    assert f"{out} is complete: try again with `hf upload org/name {out}`" in said
    assert (out / "README.md").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("a b", "no ORG/NAME"), ("name", "names no owner"), ("a/b/c", "no ORG/NAME"), ("--x/..", "no ORG/NAME")],
)
def test_a_name_that_is_none_is_refused_before_the_work(server, tmp_path, capsys, name, words):
    assert words in refusal(capsys, "nowhere", tmp_path / "out", f"--push={name}")


def test_without_a_token_or_the_package_the_message_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    said = refusal(capsys, "nowhere", tmp_path / "out", "--push", "org/name")
    assert "log in by `hf auth login`, or set HF_TOKEN" in said
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = refusal(capsys, "nowhere", tmp_path / "out", "--push", "org/name")
    assert "--push needs huggingface_hub, which is not installed: pip install 'vaegan-trainer[hub]'" in said
