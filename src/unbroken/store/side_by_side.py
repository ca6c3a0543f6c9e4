"""Several threads that take tasks in turn: while one waits for the disk, another computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

Task = TypeVar("Task")
Desk = TypeVar("Desk")


def side_by_side(
    tasks: Sequence[Task],
    desk: Callable[[], AbstractContextManager[Desk]],
    work: Callable[[Desk, Task], None],
    threads: int,
) -> None:
    """Do all tasks, each once, in their order but for what is in work at the same time.

    Args:
        tasks: What is to be done.
        desk: Makes what a thread works with, and no other thread touches.
        work: Does one task.
        threads: How many work at once; one of them is the caller's.

    Raises:
        BaseException: What the first of the failing tasks raised; none after it was begun then.
    """
    failures: dict[int, BaseException] = {}
    numbers = iter(range(len(tasks)))
    turn = threading.Lock()

    def take_turns() -> None:
        number = len(tasks)
        try:
            with desk() as own:
                while not failures:
                    with turn:
                        number = next(numbers, len(tasks))
                    if number == len(tasks):
                        return
                    work(own, tasks[number])
        except BaseException as error:
            failures[number] = error

    more = [threading.Thread(target=take_turns, daemon=True) for _ in range(threads - 1)]
    for thread in more:
        thread.start()
    take_turns()
    for thread in more:
        thread.join()
    if failures:
        raise failures[min(failures)]
