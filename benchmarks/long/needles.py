"""Documents whose difficulty is known: statements hidden among real paragraphs, and a question that takes hops.

The answer is one of twenty people and follows from a chain of statements; each link beyond the first is a hop. A second
chain tells of other people. So hops, and where the last statement stands, are known for every document.

- `handed`: "Ada has the lamp", "Ada gives the lamp to Bruno", and so on, in order. "Who has the lamp?" The second chain
  is about another object and as long.
- `scattered`: the same, in any order; the two chains have as many statements and people together whatever the hops,
  which the question alone decides.
- `reported`: "Ada reports to Bruno", "Bruno reports to Clara", in any order. "Who is at the top above Ada?" The two
  chains as in `scattered`.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple


PEOPLE = (
    "Ada", "Bruno", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leon", "Maria",
    "Nadia", "Oscar", "Paula", "Rosa", "Simon", "Tessa", "Viktor",
)  # fmt: skip
OBJECTS = ("lamp", "key", "map", "coin", "book", "ring", "clock", "letter", "violin", "kettle")
PASSES = ("{0} gives the {2} to {1}.", "{0} hands the {2} to {1}.", "{0} passes the {2} on to {1}.")
REPORTS = ("{0} reports to {1}.", "{0} works for {1}.", "{0} is led by {1}.")


class Told(NamedTuple):
    """What a document says.

    Args:
        chain: Statements that the answer follows from, in the order of telling.
        others: Those of the second chain.
        question: About the first.
        answer: Who.
    """

    chain: list[str]
    others: list[str]
    question: str
    answer: str


def _ways(hops: int, people: Sequence[str], draw: random.Random) -> Told:
    """Who has a thing that went through so many hands of `people`, in order; the others hand on another."""
    things, holders = draw.sample(OBJECTS, 2), people[: hops + 1]

    def way(people: Sequence[str], thing: str) -> list[str]:
        links = [draw.choice(PASSES).format(giver, taker, thing) for giver, taker in pairwise(people)]
        return [f"{people[0]} has the {thing}.", *links]

    return Told(way(holders, things[0]), way(people[hops + 1 :], things[1]), f"Who has the {things[0]}?", holders[-1])


def handed(hops: int, most_hops: int, draw: random.Random) -> Told:
    """Who has a thing that went from hand to hand."""
    return _ways(hops, draw.sample(PEOPLE, 2 * hops + 2), draw)


def scattered(hops: int, most_hops: int, draw: random.Random) -> Told:
    """The same, out of order."""
    content = _ways(hops, draw.sample(PEOPLE, most_hops + 2), draw)
    chain, others = (draw.sample(way, len(way)) for way in (content.chain, content.others))
    return Told(chain, others, content.question.replace("?", " at the end?"), content.answer)


def reported(hops: int, most_hops: int, draw: random.Random) -> Told:
    """Who is above all others that somebody reports to."""
    people = draw.sample(PEOPLE, most_hops + 4)
    line, others = people[: hops + 2], people[hops + 2 :]

    def chain(people: Sequence[str]) -> list[str]:
        links = [draw.choice(REPORTS).format(*pair) for pair in pairwise(people)]
        return draw.sample(links, len(links))

    return Told(chain(line), chain(others), f"Who is at the top above {line[0]}?", line[-1])


TASKS: dict[str, Callable[[int, int, random.Random], Told]] = {
    task.__name__: task for task in (handed, scattered, reported)
}


def insert(statements: list[list[str]], paragraphs: list[str], draw: random.Random) -> tuple[str, int]:
    """A document, and after how many of its paragraphs the last statement of the first chain stands.

    Args:
        statements: Of each chain, in order.
        paragraphs: Between which they go.
        draw: Of the places.
    """
    # Of each chain rising, so that its statements stay in order; the chains lie in one another.
    places = [sorted(draw.uniform(0, len(paragraphs) + 1) for _ in chain) for chain in statements]
    placed = [x for spots, chain in zip(places, statements, strict=True) for x in zip(spots, chain, strict=True)]
    parts: list[list[str]] = [[], *([x] for x in paragraphs)]
    for place, statement in sorted(placed):
        parts[int(place)].append(statement)
    return " ".join(sentence for part in parts for sentence in part), int(places[0][-1])


def make_documents(
    task: str, paragraphs: Sequence[str], count: int, seed: int, words: int, most_hops: int = 3
) -> Iterator[dict[str, Any]]:
    """Rows of text, text_pair (the question), label (who, by number), hops, and depth.

    The depth is the share of the paragraphs before the last statement of the chain that is asked about.

    Args:
        task: One of `TASKS`.
        paragraphs: To hide statements among.
        count: Rows; hops come equally often.
        seed: Of all draws.
        words: Of the paragraphs of a document, about.
        most_hops: Of the chain that is asked about.
    """
    draw = random.Random(seed)
    for number in range(count):
        hops = number % (most_hops + 1)
        content = TASKS[task](hops, most_hops, draw)
        filling: list[str] = []
        while sum(len(x.split()) for x in filling) < words:
            filling.append(draw.choice(paragraphs))
        text, last = insert([content.chain, content.others], filling, draw)
        depth = last / len(filling) if filling else 1.0
        label = PEOPLE.index(content.answer)
        yield {"text": text, "text_pair": content.question, "label": label, "hops": hops, "depth": depth}
