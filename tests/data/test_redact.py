"""Credentials of URLs are used, kept in the user's own recipe, and told nowhere."""

import json
import time

import fsspec
import pytest
import yaml
from fsspec.implementations.local import LocalFileSystem

from data.errors import DataError
from data.redact import redacted
from trainer.checkpoint import files as checkpoint_files
from trainer.config.parser import configure


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://me:pa@ss@host:8080/a/{0..9}.tar, twice", "https://***@host:8080/a/{0..9}.tar, twice"),
        ("s3://bucket/a?X-Amz-Signature=abc&X-Amz-Date=1 'is' gone", "s3://bucket/a?*** 'is' gone"),
        ("(gs://h/a?sig=x): no", "(gs://h/a?***): no"),
        ("['https://h/a?sig=x', 'gs://u@h/b?token=y']", "['https://h/a?***', 'gs://***@h/b?***']"),
        ("simplecache::https://u:p@h/a", "simplecache::https://***@h/a"),
        (
            "pipe:curl -u me:word -H 'Authorization: Bearer abc' https://u:p@h/a?b",
            "pipe:curl -u *** -H 'Authorization: Bearer ***' https://***@h/a?***",
        ),
        ("pipe:AWS_SECRET_ACCESS_KEY=abc aws s3 cp s3://b/a -", "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp s3://b/a -"),
        ("no URL: is it?yes KeyError: key me@home /a/b", "no URL: is it?yes KeyError: key me@home /a/b"),
    ],
)
def test_what_is_secret_in_a_text_is_hidden_and_nothing_else(text, told):
    assert redacted(text) == told
    assert redacted(told) == told
    assert str(DataError(text)) == told


def test_a_runs_credentials_are_in_its_own_recipe_alone(here, digits, tmp_path, monkeypatch):
    """The shards are read through fsspec, by a URL with a password and a signature that the file system ignores."""

    class Guarded(LocalFileSystem):
        protocol = "guarded"

        @classmethod
        def _strip_protocol(cls, path):
            return path.rpartition("://me:hunter2@host")[2].partition("?")[0]

    monkeypatch.setattr("data.shards.remote.PAUSES", ())
    fsspec.register_implementation("guarded", Guarded, clobber=True)
    index = tmp_path / "index.json"
    index.write_text((digits / "train" / "index.json").read_text())
    entries = json.loads(index.read_text())
    for entry in entries["shardlist"]:
        entry["url"] = f"guarded://me:hunter2@host{digits / 'train' / entry['url']}?X-Amz-Signature=hunter2"
    index.write_text(json.dumps(entries))
    url = f"guarded://me:hunter2@host{index}?sig=hunter2"
    run_dir = tmp_path / "run"
    run = ["--system", "AE", "--data.train", url, "--data.cache", tmp_path / "cache", "--trainer.run_dir", run_dir]
    done = here(*run, "--trainer.steps", "1")
    assert done.returncode == 0, done.stderr
    kept = [path for path in run_dir.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert kept == [run_dir / "config.yaml"]
    assert kept[0].stat().st_mode & 0o777 == 0o600
    assert "hunter2" not in done.stderr
    assert "guarded://***@host" in done.stderr
    manifest = checkpoint_files.load(run_dir / "checkpoints" / "step_00000001")[1]
    assert manifest["configuration"]["data"]["train"].startswith("guarded://***@host")
    assert configure(["--config", str(run_dir / "config.yaml")]).data.train == url, "it is still a recipe"
    again = here(*run, "--trainer.steps", "2")
    assert again.returncode == 0, again.stderr
    assert "Resuming at step 1" in again.stderr
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    (tmp_path / "index.json").unlink()
    gone = here(*run, "--trainer.steps", "3")
    assert (gone.returncode, "hunter2" in gone.stderr) == (2, False)
    assert "cannot fetch guarded://***@host" in gone.stderr


def test_a_recipe_without_credentials_is_as_readable_as_other_files(tmp_path):
    config = configure(["--system", "AE", "--data.train", "https://host/train"])
    config.write(tmp_path / "config.yaml")
    (tmp_path / "other").touch()
    assert (tmp_path / "config.yaml").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert config.redacted_yaml() == config.yaml == (tmp_path / "config.yaml").read_text()
    secret = configure(["--system", "AE", "--data.train", "https://me:word@host/train"])
    assert yaml.safe_load(secret.redacted_yaml()) == secret.resolved()
    assert list(yaml.safe_load(secret.redacted_yaml())) == list(yaml.safe_load(config.redacted_yaml()))


@pytest.mark.parametrize("piece", ["://", "://a@", ":", "token", "token ", "a@", "?", "pipe:"])
def test_a_long_text_of_a_stranger_takes_no_longer_than_it_is_long(piece):
    """Against a hundred thousand pieces, what grows with the square of their number would take minutes."""
    began = time.process_time()
    redacted("pipe:x http://h/?" + piece * 100_000)
    assert time.process_time() - began < 20
