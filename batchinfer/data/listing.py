"""Listing: which Parquet files the input's paths, folders, globs and URLs name."""

from __future__ import annotations

import fnmatch
import functools
import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence

from batchinfer.data.bucket import open_bucket
from batchinfer.errors import InputError
from batchinfer.location import Location, is_remote, local_path

SUFFIXES = (".parquet", ".parq", ".pq")
MAGIC = re.compile(r"[*?[]")


def find(paths: Sequence[str], output: str | None) -> dict[str, str]:
    """Name → path of every input file, sorted by name, which is relative to the deepest folder common to the inputs.

    In folders, what starts with ``.`` or ``_`` is somebody's bookkeeping and is passed over. So are the job's
    ``output``, its forks and their control folders.
    """
    found: dict[str, None] = {}
    roots = []
    if len({is_remote(given) for given in paths}) > 1:
        raise InputError("input.path names files on this machine and in an object store; one job reads one of the two")
    for given in paths:
        root, inside = _in_bucket(given) if is_remote(given) else _on_disk(given)
        roots.append(root.split("/"))
        found.update(dict.fromkeys(inside))
    if output is not None and is_remote(output) == is_remote(paths[0]):
        real = functools.cache(str if is_remote(output) else os.path.realpath)  # a link may lead to an output
        own = tuple(f"{real(path)}{end}" for path in _outputs(output) for end in ("/", ".batchinfer/"))
        found = {path: None for path in found if not f"{real(path.rpartition('/')[0] or '/')}/".startswith(own)}
    if not found:
        raise InputError("input.path names nothing but this job's own output; name a Parquet file, a glob or a folder")
    common = os.path.commonprefix(roots)  # of lists: whole names of folders
    names = {"/".join(path.split("/")[len(common) :]): path for path in found}
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(f"the name of the input file {name!r} is not valid UTF-8; rename it") from None
    return dict(sorted(names.items(), key=lambda item: item[0].split("/")))


def _on_disk(given: str) -> tuple[str, list[str]]:
    """The folder that names are relative to, and the files."""
    path = local_path(given)
    if os.path.isdir(path):
        inside = _walk(path)
        if not inside:
            raise InputError(f"the input folder {given} holds no file ending in {', '.join(SUFFIXES)}")
        return path.rstrip("/"), inside
    if os.path.isfile(path):
        return os.path.dirname(path).rstrip("/"), [path]
    if glob.has_magic(path):
        matched = sorted(glob.glob(path, recursive=True))
        inside = [f for m in matched for f in (_walk(m) if os.path.isdir(m) else [m])]
        if not inside:
            raise InputError(f"the input glob {given} matches no file")
        return MAGIC.split(path, maxsplit=1)[0].rpartition("/")[0], inside
    raise InputError(f"no input at {given}: expected a Parquet file, a glob or a folder")


def _in_bucket(given: str) -> tuple[str, list[str]]:
    """``_on_disk``, for a URL."""
    place = Location.parse(given)
    bucket = open_bucket(place.bucket)
    if place.key and not given.endswith("/"):
        try:
            bucket.head(place.key)
            return str(place).rpartition("/")[0], [str(place)]
        except FileNotFoundError:
            pass
    keys = [version.key for version in bucket.list(place.key)]
    if keys:
        inside = [key for key in keys if _is_data(key[len(place.key) :])]
        if not inside:
            raise InputError(f"the input folder {given} holds no object ending in {', '.join(SUFFIXES)}")
        root = str(place)
    elif MAGIC.search(place.key):
        above = MAGIC.split(place.key, maxsplit=1)[0].rpartition("/")[0]
        matches = _matcher(place.key)
        inside = [version.key for version in bucket.list(above) if matches(version.key)]
        if not inside:
            raise InputError(f"the input glob {given} matches no object")
        root = str(Location(place.bucket, above))
    else:
        raise InputError(f"no input at {given}: expected a Parquet file, a glob or a folder")
    return root, [f"{place.bucket}/{key}" for key in inside]


def _is_data(key: str) -> bool:
    """Whether an object below a folder, by its key from there on, is a file that a folder stands for."""
    return key.lower().endswith(SUFFIXES) and not any(name[0] in "._" for name in key.strip("/").split("/"))


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a key is one that ``glob.glob(pattern, recursive=True)`` would find, or below a folder that it would."""
    *folders, last = pattern.split("/")
    parts = ["(?:(?!\\.)[^/]+/)*" if name == "**" else f"{_regex(name)}/" for name in folders]
    parts.append("(?:(?!\\.)[^/]+/)*(?!\\.)[^/]+" if last == "**" else _regex(last))
    whole = re.compile(f"({''.join(parts)})(/.*)?", re.DOTALL)

    def matches(key: str) -> bool:
        found = whole.fullmatch(key)
        return found is not None and (found[2] is None or _is_data(found[2]))

    return matches


def _regex(name: str) -> str:
    """A pattern of one name: ``*`` and ``?`` are no ``/``, and do not stand for a dot in front."""
    parts = "" if name.startswith(".") else r"(?!\.)"
    for part in re.findall(r"\*+|\[!?\]?[^\]]*\]|.", name, re.DOTALL):
        if part[0] == "*":
            parts += "[^/]*"
        elif part == "?":
            parts += "[^/]"
        elif len(part) > 1:
            parts += r"(?!/)" + fnmatch.translate(part).removeprefix("(?s:").rpartition(")")[0]
        else:
            parts += re.escape(part)
    return parts


def _outputs(output: str) -> list[str]:
    """An output and its forks, OUT-2 and so on, which are known by their control folders."""
    if is_remote(output):
        place = Location.parse(output)
        own, bucket = str(place), open_bucket(place.bucket)
        _, folders = bucket.list_folder(place.key.rpartition("/")[0])
        controls: Iterable[str] = (f"{place.bucket}/{key}" for key in folders if key.endswith(".batchinfer"))
    else:
        own = local_path(output)
        controls = glob.glob(f"{glob.escape(own)}-*.batchinfer")
    beside = (path.removesuffix(".batchinfer") for path in controls if path.startswith(f"{own}-"))
    return [own, *(path for path in beside if path[len(own) + 1 :].isdigit())]


def _walk(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> list[str]:
    """Parquet files below ``folder``. Links are followed, but for those that lead back to a folder that they are in."""
    try:
        stat = os.stat(folder)
        with os.scandir(folder) as entries:
            inside = [entry for entry in entries if entry.name[0] not in "._"]
            folders = {entry.path for entry in inside if entry.is_dir()}
    except OSError as error:
        raise InputError(f"cannot look into the input folder {folder}: {error.strerror}") from None
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return []
    files = [e.path for e in inside if e.path not in folders and e.name.lower().endswith(SUFFIXES)]
    return files + [file for each in sorted(folders) for file in _walk(each, above | {here})]
