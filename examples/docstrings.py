"""Two small real data sets that every Python carries with it: the docstrings of its standard library.

`load_docstrings` is for classification, `load_retrieval` for search. Sources are parsed, never imported, and only those
of the modules named below, so that installed packages do not show.

For classification a text is one paragraph of a docstring, its label the subject area of the module. Contents follow the
Python version: 8,361 passages in 3.11. How hard it is depends on the split: trained on about 80% of them, a linear SVM
on TF-IDF reaches .79 split at random, .73 split by definition as here, and .30 split by module. So a figure on this
test split is for new functions of known modules, and says little about modules never seen.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value  # type: ignore[import-untyped]


# Left out: what later versions removed (distutils, lib2to3), and tkinter, which some systems package apart.
AREAS = {
    "concurrency": "_threading_local asyncio concurrent contextvars multiprocessing queue sched selectors threading",
    "data types": """_collections_abc _pydatetime _pydecimal _strptime bisect calendar collections
        colorsys copy dataclasses datetime enum fractions functools graphlib hashlib heapq hmac numbers operator random
        secrets statistics types uuid weakref zoneinfo""",
    "debugging": """bdb cProfile cmd code codeop doctest logging pdb profile pstats pydoc timeit trace traceback
        tracemalloc unittest warnings""",
    "files and system": """_pyio argparse bz2 dbm fileinput filecmp fnmatch genericpath getopt getpass glob gzip io
        linecache lzma ntpath optparse os pathlib platform posixpath shelve shutil signal site sqlite3 stat subprocess
        sysconfig tarfile tempfile venv zipapp zipfile""",
    "language": """__future__ abc ast compileall contextlib copyreg ctypes dis importlib inspect keyword modulefinder
        opcode pickle pickletools pkgutil py_compile pyclbr runpy symtable tabnanny tokenize typing zipimport""",
    "mail": "base64 email imaplib mailbox poplib quopri smtplib",
    "networking": """ftplib http ipaddress mimetypes netrc socket socketserver ssl urllib webbrowser wsgiref xmlrpc""",
    "text": """_markupbase codecs configparser csv difflib encodings gettext html json locale plistlib pprint re
        reprlib shlex string stringprep textwrap tomllib xml""",
}
LEAST_WORDS = 6


def opening(text: str) -> str:
    """The words by which two passages count as near-duplicates."""
    return " ".join(text.lower().split()[:LEAST_WORDS])


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Top-level definition and docstring, for each docstring of a source file."""
    module = ast.parse(path.read_bytes())
    for top in [None, *module.body]:
        for node in [module] if top is None else ast.walk(top):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield getattr(top, "name", ""), ast.get_docstring(node) or ""


def _sources(root: Path, module: str) -> Iterator[Path]:
    """Source files of a module or package, without its tests."""
    for path in sorted([*root.glob(f"{module}.py"), *root.glob(f"{module}/**/*.py")]):
        if not {"test", "tests"} & set(path.relative_to(root).parts):
            yield path


def _passages(root: Path, area: int, module: str) -> Iterator[tuple[str, dict[str, str | int]]]:
    """Key of the definition, and row, for each passage of a module or package."""
    for path in _sources(root, module):
        place = path.relative_to(root).as_posix()
        for name, docstring in _docstrings(path):
            for paragraph in docstring.split("\n\n"):
                text = " ".join(paragraph.split())
                if len(text.split()) >= LEAST_WORDS and not text.startswith(">>>"):
                    yield f"{place}:{name}", {"text": text, "label": area}


def _fraction(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _split_of(key: str) -> str:
    place = _fraction(key)
    return "train" if place < 0.7 else "validation" if place < 0.8 else "test"


def load_docstrings(root: Path | None = None) -> DatasetDict:
    """Builds the data set.

    The passages of one top-level function or class stay together, and of passages that open with the same words only
    one is kept, so that a test passage's twin is never trained on. Modules are not kept apart: an unseen function of a
    known module is what the test split asks for.

    Args:
        root: Folder of the standard library; None: that of the running Python.

    Returns:
        Splits train (70%), validation (10%) and test (20%), with columns text and label, a class label.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    kept: dict[str, tuple[str, dict[str, str | int]]] = {}
    for area, modules in enumerate(AREAS.values()):
        for module in modules.split():
            for key, row in _passages(root, area, module):
                kept.setdefault(opening(str(row["text"])), (key, row))
    splits: dict[str, list[dict[str, str | int]]] = {"train": [], "validation": [], "test": []}
    # By hash, so that neither the split nor the order depends on what else there is.
    for key, row in sorted(kept.values(), key=lambda kept: _fraction(str(kept[1]["text"]))):
        splits[_split_of(key)].append(row)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(AREAS))})
    return DatasetDict({name: Dataset.from_list(rows, features=features) for name, rows in splits.items()})


class Retrieval(NamedTuple):
    """Texts to search, and queries that one of them each is the answer to.

    Args:
        passages: Of all definitions, without what is asked for.
        queries: Splits train (70%), validation (10%) and test (20%): pairs of a text and the number of its passage.
    """

    passages: list[str]
    queries: dict[str, list[tuple[str, int]]]


def _definitions(node: ast.AST, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], ast.AST]]:
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
    """Builds the set for search: what does this function do, and where is it?

    A passage is what a definition's docstring says behind its first sentence, and its source code. Two queries ask for
    it: that sentence, and the words of module, class and function. Queries to the definitions of one top-level function
    or class are in one split; the passages are shared by all splits.

    Args:
        root: Folder of the standard library; None: that of the running Python.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found: dict[str, tuple[str, list[str]]] = {}
    for module in " ".join(AREAS.values()).split():
        for path in _sources(root, module):
            place = path.relative_to(root)
            source = path.read_text(encoding="utf-8", errors="replace")
            lines = source.splitlines()
            for names, node in _definitions(ast.parse(source)):
                docstring = " ".join((ast.get_docstring(node) or "").split())  # type: ignore[arg-type]
                body = node.body[1:]  # type: ignore[attr-defined]
                sentence = re.match(r".+?[.!?](?= |$)|.+", docstring)
                if sentence is None or not body:
                    continue
                code = " ".join(" ".join(lines[body[0].lineno - 1 : body[-1].end_lineno]).split())
                passage = f"{docstring[sentence.end() :].strip()} {code}".strip()
                if len(passage.split()) >= LEAST_WORDS:
                    words = _words((*place.with_suffix("").parts, *names))
                    queries = [sentence[0], " ".join(dict.fromkeys(words))]
                    asked = [query for query in queries if len(query.split()) >= 3]
                    found.setdefault(opening(passage), (f"{place.as_posix()}:{names[0]}", [passage, *asked]))
    retrieval = Retrieval([], {"train": [], "validation": [], "test": []})
    seen = set()
    for key, (passage, *queries) in sorted(found.values(), key=lambda kept: _fraction(kept[1][0])):
        for query in queries:
            if query.lower() not in seen:  # of two passages that one query asks for neither could be called wrong
                retrieval.queries[_split_of(key)].append((query, len(retrieval.passages)))
            seen.add(query.lower())
        retrieval.passages.append(passage)
    return retrieval
