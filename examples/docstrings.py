"""A small real data set that every Python carries with it: the docstrings of its standard library.

A text is one paragraph of a docstring, its label the subject area of the module. Sources are parsed, never imported,
and only those of the modules named below, so that installed packages do not show. Contents follow the Python version:
8,361 passages in 3.11. How hard it is depends on the split: trained on about 80% of them, a linear SVM on TF-IDF
reaches .79 split at random, .73 split by definition as here, and .30 split by module. So a figure on this test split
is for new functions of known modules, and says little about modules never seen.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

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


def sources(root: Path, module: str) -> Iterator[Path]:
    """Source files of a module or package, without its tests."""
    for path in sorted([*root.glob(f"{module}.py"), *root.glob(f"{module}/**/*.py")]):
        if not {"test", "tests"} & set(path.relative_to(root).parts):
            yield path


def _passages(root: Path, area: int, module: str) -> Iterator[tuple[str, dict[str, str | int]]]:
    """Key of the definition, and row, for each passage of a module or package."""
    for path in sources(root, module):
        place = path.relative_to(root).as_posix()
        for name, docstring in _docstrings(path):
            for paragraph in docstring.split("\n\n"):
                text = " ".join(paragraph.split())
                if len(text.split()) >= LEAST_WORDS and not text.startswith(">>>"):
                    yield f"{place}:{name}", {"text": text, "label": area}


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_of(key: str) -> str:
    """Where what has this key belongs: train (70%), validation (10%) or test (20%)."""
    place = fraction(key)
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
    for key, row in sorted(kept.values(), key=lambda kept: fraction(str(kept[1]["text"]))):
        splits[split_of(key)].append(row)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(AREAS))})
    return DatasetDict({name: Dataset.from_list(rows, features=features) for name, rows in splits.items()})
