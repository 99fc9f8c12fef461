"""A discrete-event simulation of tasks on devices and links.

Each device and each link does its tasks in the order in which they were added. A task begins when
its own place is free and the tasks that it waits for have ended. So there is no queue of events:
the time of a task follows from the times of others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

Place = Hashable
Task = Hashable


@dataclass(frozen=True)
class Times:
    """When tasks ended, in seconds, and for how long each place was busy."""

    ends: dict[Task, float]
    busy: dict[Place, float]

    @property
    def end(self) -> float:
        """The end of the last task."""
        return max(self.ends.values())


@dataclass
class Timeline:
    """Tasks by the device or link that does them."""

    _queues: dict[Place, deque[tuple[Task, float, tuple[Task, ...]]]] = field(default_factory=dict)

    def add(self, place: Place, task: Task, seconds: float, after: Iterable[Task] = ()) -> None:
        """Add a task behind the others of its place.

        Args:
            place: a device or a link.
            task: its name, which no other task has.
            seconds: that it takes.
            after: tasks that must have ended. They may be added later than this one.
        """
        self._queues.setdefault(place, deque()).append((task, seconds, tuple(after)))

    def run(self) -> Times:
        """Return when each task ends. The timeline is empty afterwards.

        Raises:
            ValueError: tasks wait for each other, or for one that does not exist.
        """
        ends: dict[Task, float] = {}
        free = dict.fromkeys(self._queues, 0.0)
        busy = dict.fromkeys(self._queues, 0.0)
        # The first task of a place that waits, by the task that it waits for.
        waiting: dict[Task, list[Place]] = {}
        ready = deque(self._queues)
        while ready:
            place = ready.popleft()
            queue = self._queues[place]
            while queue:
                task, seconds, after = queue[0]
                missing = next((other for other in after if other not in ends), None)
                if missing is not None:
                    waiting.setdefault(missing, []).append(place)
                    break
                queue.popleft()
                begin = max([free[place], *(ends[other] for other in after)])
                ends[task] = free[place] = begin + seconds
                busy[place] += seconds
                ready.extend(waiting.pop(task, ()))
        if waiting:
            raise ValueError(f"tasks wait for others that never end: {sorted(map(str, waiting))}")
        return Times(ends, busy)
