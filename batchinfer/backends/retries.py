"""Retries: a row that failed for no fault of its own is asked again."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterator
from typing import Any

from batchinfer.backends.base import Backend
from batchinfer.request import Completion, Request

_END: Any = object()


def with_retries(backend: Backend, requests: Iterator[Request | None], retries: int) -> Iterator[Completion]:
    """``backend.generate``, where a ``retryable`` error stands only after ``retries`` further tries.

    A row to be asked again goes before those that were not asked yet; one that fails after the last of those does not
    hold them up.
    """
    under_way: dict[Hashable, Request] = {}
    failed: Counter[Hashable] = Counter()
    again: deque[Request] = deque()

    def line() -> Iterator[Request | None]:
        while (request := again.popleft() if again else next(requests, _END)) is not _END:
            if request is not None:
                under_way[request.key] = request
            yield request

    while True:
        for completion in backend.generate(line()):
            request = under_way.pop(completion.key, None)
            if completion.retryable and request is not None and failed[completion.key] < retries:
                failed[completion.key] += 1
                again.append(request)
            else:
                failed.pop(completion.key, None)
                yield completion
        if not again:
            return
