"""A small set for search that every Python carries with it: what do the definitions of its standard library do?

A passage is what a definition's docstring says behind its first sentence, and its source code. Two queries ask for it:
that sentence, and the words of module, class and function. Contents follow the Python version: 4,059 passages and
7,304 queries in 3.11. Among the hundred best by BM25 is the answer to 64% of the test queries.
"""

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from docstrings import AREAS, LEAST_WORDS, fraction, opening, sources, split_of


class Retrieval(NamedTuple):
    """Texts to search, and queries that one of them each is the answer to.

    Args:
        passages: Of all definitions, without what is asked for.
        queries: Splits train (70%), validation (10%) and test (20%): pairs of a text and the number of its passage.
    """

    passages: list[str]
    queries: dict[str, list[tuple[str, int]]]


def _definitions(node: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Qualified name and node of each class and function below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            qualified = (*names, child.name)
            yield qualified, child
            yield from _definitions(child, qualified)


def _words(names: Iterator[str] | tuple[str, ...]) -> list[str]:
    """Words of identifiers: `("zipfile", "ZipFile", "read_all")` -> zipfile zip file read all."""
    return [word.lower() for name in names for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def load_retrieval(root: Path | None = None) -> Retrieval:
    """Builds the set.

    Queries to the definitions of one top-level function or class are in one split; all splits share the passages.

    Args:
        root: Folder of the standard library; None: that of the running Python.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    entries: dict[str, tuple[str, list[str]]] = {}
    for module in " ".join(AREAS.values()).split():
        for path in sources(root, module):
            place = path.relative_to(root)
            source = path.read_text(encoding="utf-8", errors="replace")
            lines = source.splitlines()
            for names, node in _definitions(ast.parse(source)):
                docstring = " ".join((ast.get_docstring(node) or "").split())
                body = node.body[1:]
                sentence = re.match(r".+?[.!?](?= |$)|.+", docstring)
                if sentence is None or not body:
                    continue
                code = " ".join(" ".join(lines[body[0].lineno - 1 : body[-1].end_lineno]).split())
                passage = f"{docstring[sentence.end() :].strip()} {code}".strip()
                if len(passage.split()) >= LEAST_WORDS:
                    words = _words((*place.with_suffix("").parts, *names))
                    queries = [sentence[0], " ".join(dict.fromkeys(words))]
                    questions = [query for query in queries if len(query.split()) >= 3]
                    entries.setdefault(opening(passage), (f"{place.as_posix()}:{names[0]}", [passage, *questions]))
    retrieval = Retrieval([], {"train": [], "validation": [], "test": []})
    seen = set()
    for key, (passage, *queries) in sorted(entries.values(), key=lambda kept: fraction(kept[1][0])):
        for query in queries:
            if query.lower() not in seen:  # of two passages that one query asks for neither could be called wrong
                retrieval.queries[split_of(key)].append((query, len(retrieval.passages)))
            seen.add(query.lower())
        retrieval.passages.append(passage)
    return retrieval


class Searches(NamedTuple):
    """Queries of one split, and what is to be ranked for each.

    Args:
        queries: N texts.
        candidates: For each the texts of its candidates, the best by BM25 first.
        relevant: For each the numbers of the candidates that answer it: one.
    """

    queries: list[str]
    candidates: list[list[str]]
    relevant: list[set[int]]


def draw_searches(retrieval: Retrieval, split: str, count: int, candidates: int, seed: int = 0) -> Searches:
    """Some queries of a split and what BM25 finds for them; an answer that it misses takes the last place."""
    import bm25s  # type: ignore[import-untyped]

    pairs = random.Random(seed).sample(retrieval.queries[split], count)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(retrieval.passages, stopwords=None, show_progress=False), show_progress=False)
    tokens = bm25s.tokenize([query for query, _ in pairs], stopwords=None, show_progress=False)
    numbers, _ = index.retrieve(tokens, k=candidates, show_progress=False, n_threads=1)
    answers = np.array([answer for _, answer in pairs])
    missed = ~(numbers == answers[:, None]).any(-1)
    numbers[missed, -1] = answers[missed]
    return Searches(
        [query for query, _ in pairs],
        [[retrieval.passages[number] for number in row] for row in numbers],
        [set(np.flatnonzero(row).tolist()) for row in numbers == answers[:, None]],
    )
