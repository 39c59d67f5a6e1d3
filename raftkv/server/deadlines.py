"""Moments by id that are often put off and seldom come.

A moment that is put off costs a store in a dictionary: the heap keeps the earlier one, and looks again when that has
come. So a lease that is kept alive costs one heap operation for each of its times to live, not for each renewal, and
nothing is ever scanned.

Invariant: each id has exactly one valid place in the heap, at or before its moment; the others are passed over.
"""

from __future__ import annotations

import heapq


class Deadlines:
    """See the module. Moments are seconds of whatever clock the caller uses."""

    def __init__(self) -> None:
        self._moments: dict[int, float] = {}
        self._places: dict[int, float] = {}  # where in the heap its valid place is; places[id] <= moments[id]
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._moments)

    def __contains__(self, each: int) -> bool:
        return each in self._moments

    def get(self, each: int) -> float | None:
        """The moment of an id."""
        return self._moments.get(each)

    def set(self, each: int, moment: float) -> None:
        """Give an id its moment, in place of the one it had."""
        self._moments[each] = moment
        place = self._places.get(each)
        if place is None or moment < place:
            self._places[each] = moment
            heapq.heappush(self._heap, (moment, each))

    def discard(self, each: int) -> None:
        """Forget an id; its place in the heap goes when it is reached, or when such places are the most."""
        if self._moments.pop(each, None) is not None:
            del self._places[each]
            if len(self._heap) > 2 * len(self._moments) + 1_000:
                self._heap = [(place, live) for live, place in self._places.items()]
                heapq.heapify(self._heap)

    def clear(self) -> None:
        """Forget everything."""
        self._moments.clear()
        self._places.clear()
        self._heap.clear()

    def due(self, now: float, steps_max: int) -> list[int]:
        """Take out the ids whose moment has come, in the order of their moments, after at most so many steps."""
        found: list[int] = []
        heap, places, moments = self._heap, self._places, self._moments
        while heap and heap[0][0] <= now and steps_max > 0:
            steps_max -= 1
            place, each = heapq.heappop(heap)
            if places.get(each) != place:
                continue
            moment = moments[each]
            if moment <= now:
                found.append(each)
                del moments[each], places[each]
            else:
                places[each] = moment
                heapq.heappush(heap, (moment, each))
        return found
