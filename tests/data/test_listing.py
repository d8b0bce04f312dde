"""What a URL names is what the same path would name on a disk."""

from __future__ import annotations

import pytest

from batchinfer.data.bucket import _opened
from batchinfer.data.listing import find
from batchinfer.errors import InputError, JobError
from tests.echo_jobs import texts, write

TREE = (
    "in/a.parquet",
    "in/b.parq",
    "in/notes.txt",
    "in/.hidden.parquet",
    "in/_temporary/c.parquet",
    "in/day=1/x.parquet",
    "in/day=1/hour=2/y.PARQUET",
    "in/day=2/x.parquet",
    "in/.git/d.parquet",
    "in/out/part-000000-1.parquet",
    "in/out-2/part-000000-1.parquet",
    "in/out-2.batchinfer/plan-000.parquet",
    "in/out.batchinfer/plan-000.parquet",
    "in/odd [1] ü#%/z.parquet",
    "other/e.parquet",
)
ASKED = (
    ("in",),
    ("in/",),
    ("in/a.parquet",),
    ("in/notes.txt",),
    ("in/*.parquet",),
    ("in/day=*",),
    ("in/day=?/x.parquet",),
    ("in/day=[!1]/*",),
    ("in/**/x.parquet",),
    ("in/**",),
    ("in/*/*.parquet",),
    ("in/odd [1] ü#%",),
    ("in/odd [[]1] ü#%/*",),
    ("in/.git",),
    ("in/.*/*.parquet",),
    ("in/day=1", "other/e.parquet"),
    ("in/a.parquet", "in/a.parquet", "in"),
)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    for name in TREE:
        write(folder / name, texts(1))
    return folder


@pytest.fixture
def filled(bucket, disk):
    for name in TREE:
        bucket.put(name, (disk / name).read_bytes())
    return bucket


def found(base: str, asked: tuple[str, ...], output: str | None) -> dict[str, str]:
    names = find([f"{base}/{path}" for path in asked], output and f"{base}/{output}")
    return {name: path.removeprefix(f"{base}/") for name, path in names.items()}


def test_a_url_names_what_the_same_path_names_on_a_disk(filled, disk):
    for asked in ASKED:
        for output in ("in/out", None):
            wanted = found(str(disk), asked, output)
            assert wanted and found(filled.url, asked, output) == wanted, asked
            assert {name: path for name, path in found(disk.as_uri(), asked, output).items()}.keys() == wanted.keys()


@pytest.mark.parametrize(
    "asked, said",
    [
        ("none", "no input at s3://.*/none: expected a Parquet file, a glob or a folder"),
        ("in/*.csv", r"the input glob s3://.*/in/\*.csv matches no object"),
        ("in/.git/*.txt", "matches no object"),
    ],
)
def test_what_names_nothing_is_an_error_that_says_so(filled, asked, said):
    with pytest.raises(InputError, match=said):
        find([f"{filled.url}/{asked}"], None)


def test_a_bucket_may_be_the_input_and_two_buckets_too(bucket, filled):
    assert len(find([bucket.url], None)) == len([name for name in TREE if "/." not in name and "/_" not in name]) - 1
    both = find([f"{bucket.url}/in/day=1/x.parquet", f"{bucket.url}/other"], None)
    assert list(both) == ["in/day=1/x.parquet", "other/e.parquet"]


def test_one_job_reads_disks_or_object_stores(bucket, disk):
    with pytest.raises(InputError, match="one job reads one of the two"):
        find([f"{bucket.url}/in", str(disk)], None)


def test_where_obstore_is_missing_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    _opened.cache_clear()
    with pytest.raises(JobError, match=r'needs the package obstore: pip install "batchinfer\[cloud\]"'):
        find(["s3://bucket/in"], None)
