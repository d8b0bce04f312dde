"""PagePool: fixed-size pages of the KV cache, shared by reference count, found again by content.

Only page numbers are handled here; the attention kernel owns the memory behind them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def page_hashes(token_ids: np.ndarray, page_size: int) -> list[bytes]:
    """Content keys of the full pages of a prompt: each digests its own tokens and all before them.

    Args:
        token_ids: int32 [tokens].
    """
    hashes, parent = [], b""
    data = token_ids.tobytes()
    width = page_size * token_ids.itemsize
    for start in range(0, len(data) - width + 1, width):
        parent = hashlib.blake2b(data[start : start + width], key=parent, digest_size=16).digest()
        hashes.append(parent)
    return hashes


class PagePool:
    """Hands out pages, counts who uses them, and keeps published pages findable until their memory is needed.

    A page is *free* (no content), *held* (``references > 0``) or *idle* (published, held by nobody: found by content,
    and the least recently used is given away when no free page is left).
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.references = np.zeros(num_pages, np.int32)
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # a stack: recently used memory is warm
        self._num_free = num_pages
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that ``allocate`` can hand out."""
        return self._num_free + len(self._idle)

    @property
    def held(self) -> int:
        return self.num_pages - self.available

    def allocate(self, count: int) -> np.ndarray:
        """``count`` pages, int32, each with one reference. The caller has checked ``available``."""
        if count > self.available:
            raise ValueError(f"{count} pages asked for, {self.available} are available")
        while self._num_free < count:
            self._forget_oldest()
        self._num_free -= count
        pages = self._free[self._num_free : self._num_free + count].copy()
        self.references[pages] = 1
        return pages

    def release(self, pages: np.ndarray) -> None:
        """Give up one reference to each of ``pages`` (distinct)."""
        self.references[pages] -= 1
        unused = pages[self.references[pages] == 0]
        if self._hash_of:
            published = [page for page in unused.tolist() if page in self._hash_of]
            # The end of a prefix goes first: without its beginning it could not be found.
            self._idle.update(dict.fromkeys(reversed(published)))
            unused = unused[[page not in self._hash_of for page in unused.tolist()]] if published else unused
        self._free[self._num_free : self._num_free + len(unused)] = unused
        self._num_free += len(unused)

    def publish(self, page: int, content: bytes) -> None:
        """Make a held page findable. A second page with the same content stays private."""
        if content not in self._page_of:
            self._page_of[content] = page
            self._hash_of[page] = content

    def find(self, contents: Sequence[bytes]) -> list[int]:
        """Pages of the longest known prefix of ``contents``, without a reference: see ``share``."""
        pages = []
        for content in contents:
            if (page := self._page_of.get(content)) is None:
                break
            pages.append(page)
        return pages

    def idle_among(self, pages: Sequence[int]) -> int:
        """How many of ``pages`` sharing would take out of what is available."""
        return sum(page in self._idle for page in pages)

    def share(self, pages: Sequence[int]) -> None:
        """Take one more reference to each of ``pages``."""
        self.references[list(pages)] += 1
        for page in pages:
            self._idle.pop(page, None)

    def forget_idle(self) -> None:
        """Make every idle page free: nothing computed before will be found."""
        while self._idle:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._hash_of.pop(page)]
        self._free[self._num_free] = page
        self._num_free += 1
