"""Paths and URLs: which are understood, what they name, and that no password gets any further."""

from __future__ import annotations

import pytest

from batchinfer.data.bucket import _opened
from batchinfer.data.object_store import ObjectStore
from batchinfer.data.store import LocalStore, open_store
from batchinfer.errors import ExitCode, JobError, OutputError
from batchinfer.location import Location, local_path, redacted
from tests.echo_jobs import echo_job

ABFS = "abfs://box@account.dfs.core.windows.net"


@pytest.mark.parametrize(
    "url, bucket, key",
    [
        ("s3://bucket/a/b.parquet", "s3://bucket", "a/b.parquet"),
        ("s3a://bucket/a/", "s3://bucket", "a"),
        ("gs://bucket", "gs://bucket", ""),
        (f"{ABFS}/a/day=1", ABFS, "a/day=1"),
        ("az://box/a b/ü#?%20", "az://box", "a b/ü#?%20"),
    ],
)
def test_a_url_names_a_bucket_and_a_key(url, bucket, key):
    assert Location.parse(url) == Location(bucket, key)


@pytest.mark.parametrize(
    "url, said",
    [
        ("ftp://host/a", "expected a path, file:// or one of s3://, gs://, .* found ftp://"),
        ("s3:///a", "names no bucket"),
        (
            "s3://KEY:hunter2@bucket/a",
            r"s3://\*\*\*@bucket/a holds a password, .* credentials belong into the environment",
        ),
    ],
)
def test_a_url_that_cannot_be_is_refused_by_the_job_and_shows_no_password(tmp_path, url, said):
    for key in ("input__path", "output__path"):
        with pytest.raises(JobError, match=said) as raised:
            echo_job(tmp_path, **{key: url})
        assert "hunter2" not in str(raised.value) and raised.value.exit_code == ExitCode.USAGE
    with pytest.raises(JobError, match=said):
        open_store(url)


def test_file_urls_are_paths(tmp_path):
    assert local_path("file:///a/b%20c") == local_path("file://localhost/a/b%20c") == "/a/b c"
    store = open_store(tmp_path.as_uri())
    assert isinstance(store, LocalStore) and store.root == tmp_path
    with pytest.raises(JobError, match="file://host/a: expected file:///absolute/path, found a path on host"):
        local_path("file://host/a")


def test_signed_urls_lose_their_signature():
    said = "error for PUT https://account.blob.core.windows.net/box/a?sv=2024&sig=abc%3D (x) s3://k:s@b/c, https://h/p"
    assert redacted(said) == "error for PUT https://account.blob.core.windows.net/box/a (x) s3://***@b/c, https://h/p"


def test_a_whole_bucket_cannot_be_an_output():
    with pytest.raises(OutputError, match="s3://bucket is a whole bucket; .* such as s3://bucket/completions"):
        open_store("s3://bucket/")


# Google's and Azure's stores are made and addressed as their documentation has it; no request is sent to either here.


@pytest.mark.parametrize("url, kind", [("gs://bucket/out", "GCSStore"), (f"{ABFS}/out", "AzureStore")])
def test_google_and_azure_stores_are_made_without_being_asked_anything(url, kind):
    _opened.cache_clear()
    store = open_store(f"{url}/")
    assert isinstance(store, ObjectStore) and type(store.bucket.store).__name__ == kind
    assert store.root == url and store.path("commits/1.json") == f"{url}/commits/1.json"


def test_azure_takes_its_account_from_the_environment(monkeypatch):
    _opened.cache_clear()
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(JobError, match="cannot open az://box: no credentials found; set AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://box/out")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert type(open_store("az://box/out").bucket.store).__name__ == "AzureStore"
