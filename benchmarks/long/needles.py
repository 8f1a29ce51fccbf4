"""Documents whose difficulty is known: statements about who has what, hidden among real paragraphs.

The answer follows from a chain of statements: "Ada has the lamp", "Ada gives the lamp to Bruno", and so on; each link
beyond the first is a hop. A second chain, about another object, tells of other people. The question is who has the
object at the end: one of twenty. So hops, and where the last statement stands, are known for every document.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any


PEOPLE = (
    "Ada", "Bruno", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leon", "Maria",
    "Nadia", "Oscar", "Paula", "Rosa", "Simon", "Tessa", "Viktor",
)  # fmt: skip
OBJECTS = ("lamp", "key", "map", "coin", "book", "ring", "clock", "letter", "violin", "kettle")
PASSES = ("{0} gives the {2} to {1}.", "{0} hands the {2} to {1}.", "{0} passes the {2} on to {1}.")


def chain(people: Sequence[str], thing: str, draw: random.Random) -> list[str]:
    """Statements by which a thing goes from the first of `people` to the last."""
    links = [draw.choice(PASSES).format(giver, taker, thing) for giver, taker in pairwise(people)]
    return [f"{people[0]} has the {thing}.", *links]


def insert(statements: list[list[str]], paragraphs: list[str], draw: random.Random) -> tuple[str, int]:
    """A document, and after how many of its paragraphs the last statement of the first chain stands.

    Args:
        statements: Of each chain, in order.
        paragraphs: Between which they go.
        draw: Of the places.
    """
    parts: list[list[str]] = [[x] for x in paragraphs]
    parts.insert(0, [])
    last = 0
    for number, told in enumerate(statements):
        places = sorted(draw.choices(range(len(parts)), k=len(told)))
        for place, statement in zip(places, told, strict=True):
            parts[place].append(statement)
        last = places[-1] if number == 0 else last
    return " ".join(sentence for part in parts for sentence in part), last


def make_documents(
    paragraphs: Sequence[str], count: int, seed: int, words: int, most_hops: int = 3
) -> Iterator[dict[str, Any]]:
    """Rows of text, text_pair (the question), label (who, by number), hops, and depth.

    The depth is the share of the paragraphs before the last statement of the chain that is asked about.

    Args:
        paragraphs: To hide statements among.
        count: Rows; hops come equally often.
        seed: Of all draws.
        words: Of the paragraphs of a document, about.
        most_hops: Of the chain that is asked about.
    """
    draw = random.Random(seed)
    for number in range(count):
        hops = number % (most_hops + 1)
        people, things = draw.sample(PEOPLE, 2 * hops + 2), draw.sample(OBJECTS, 2)
        own, others = people[: hops + 1], people[hops + 1 :]
        filling: list[str] = []
        while sum(len(x.split()) for x in filling) < words:
            filling.append(draw.choice(paragraphs))
        text, last = insert([chain(own, things[0], draw), chain(others, things[1], draw)], filling, draw)
        depth = last / len(filling) if filling else 1.0
        label = PEOPLE.index(own[-1])
        yield {"text": text, "text_pair": f"Who has the {things[0]}?", "label": label, "hops": hops, "depth": depth}
