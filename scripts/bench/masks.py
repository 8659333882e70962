"""Placements of a given number of computed steps: 1 computes, 0 skips; first and last compute."""

from __future__ import annotations


def evenly(count: int, steps: int) -> list[int]:
    return placed([round(i * (steps - 1) / (count - 1)) for i in range(count)], steps)


def growing(count: int, steps: int, power: float = 1.6) -> list[int]:
    """Gaps grow towards the end."""
    places: list[int] = []
    for i in range(count):
        wanted = round((i / (count - 1)) ** power * (steps - 1))
        places.append(max(wanted, places[-1] + 1 if places else 0))
    return placed(places, steps)


def front(head: int, count: int, steps: int) -> list[int] | None:
    """The first `head` steps, the others spread evenly; None where that is impossible."""
    if not 1 <= head < count:
        return None
    gap = (steps - head) / (count - head)
    rest = [head - 1 + round((i + 1) * gap) for i in range(count - head)]
    return placed([*range(head), *rest], steps)


def placed(places: list[int], steps: int) -> list[int]:
    mask = [0] * steps
    for place in places:
        mask[place] = 1
    return mask


def placements(count: int, steps: int) -> list[list[int]]:
    """All of the above with several heads, without repetitions."""
    masks = [evenly(count, steps), growing(count, steps)]
    masks += [mask for head in (4, 6, 8) if (mask := front(head, count, steps)) is not None]
    unique = {tuple(mask): mask for mask in masks if sum(mask) == count and mask[-1] == 1}
    return list(unique.values())


def run_lengths(mask: list[int]) -> tuple[list[int], list[int]]:
    """A mask as lengths of computed and skipped runs in turn."""
    lengths: tuple[list[int], list[int]] = ([], [])
    for before, now in zip([None, *mask], mask, strict=False):
        turn = lengths[0 if now else 1]
        if before == now:
            turn[-1] += 1
        else:
            turn.append(1)
    return lengths
