"""Ten people who rank answers with known noise, for statistics that must find out who is reliable."""

import random

from plaudit.wire.rankings import dense

NOISE = (0.05, 0.2, 0.4, 0.6, 0.8, 1.1, 1.5, 2.1, 3.0)
"""How much noise nine people add to what they see; the tenth answers at random."""
Tasks = list[dict[str, list[int]]]
"""For each task, the ranks that each person gave its answers."""


def people_who_rank(seed: int, *, tasks: int = 240, people_per_task: int = 5, k: int = 4) -> Tasks:
    """Ten people with known noise: person 0 sees best, person 9 answers at random."""
    draw = random.Random(seed)
    made = []
    for _ in range(tasks):
        quality = [draw.gauss(0, 1) for _ in range(k)]
        task = {}
        for person in draw.sample(range(10), people_per_task):
            if person < len(NOISE):
                seen = [round(4 * (q + draw.gauss(0, NOISE[person]))) for q in quality]
            else:
                seen = [draw.randrange(8) for _ in quality]
            task[f"p{person}"] = dense([-value for value in seen])
        made.append(task)
    return made
