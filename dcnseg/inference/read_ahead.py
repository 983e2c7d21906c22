"""Reading of the next items in threads; the entry point is `read_ahead`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

NUM_AHEAD = 3  # items read while one is in use

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    pool: Executor,
    items: Iterable[Item],
    read: Callable[[Item], Result],
    *,
    is_large: Callable[[Item], bool] = lambda _item: False,
) -> Iterator[tuple[Item, Future[Result]]]:
    """Yield each item with the future of its result, while a few more are being read.

    `is_large` tells whether an item is too large to be in memory together with others.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    was_large = False
    for item in items:
        large = is_large(item)
        while waiting and (large or was_large or len(waiting) > NUM_AHEAD):
            yield waiting.popleft()
        was_large = large
        waiting.append((item, pool.submit(read, item)))
    while waiting:
        yield waiting.popleft()  # removed first, so that its memory can be freed
