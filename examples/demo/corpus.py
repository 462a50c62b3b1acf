"""Docstrings of the Python standard library, the demo's raw material: real English and code, on every machine.

The sources of the running interpreter are parsed, never imported. Whole modules and packages are held out: training
sees none of their text. `tasks.py` makes examples of what is found here.
"""

from __future__ import annotations

import ast
import itertools
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# area -> (modules to train on, held-out modules). A package brings all that is below it; a module that this version
# of Python lacks is passed over.
AREAS: dict[str, tuple[str, str]] = {
    "network": (
        "http urllib ftplib imaplib poplib xmlrpc wsgiref socket ssl telnetlib cgi asynchat asyncore webbrowser",
        "smtplib socketserver ipaddress nntplib",
    ),
    "mail": ("email mimetypes quopri mailcap", "mailbox smtpd"),
    "concurrency": (
        "asyncio threading concurrent queue selectors sched _threading_local",
        "multiprocessing subprocess",
    ),
    "data formats": (
        "xml tarfile json bz2 csv pickletools shelve wave aifc sunau chunk",
        "zipfile configparser gzip lzma plistlib tomllib pickle",
    ),
    "numbers and dates": (
        "_pydecimal decimal statistics fractions datetime _pydatetime _pylong heapq bisect colorsys",
        "calendar random numbers zoneinfo _strptime",
    ),
    "files": (
        "os pathlib ntpath tempfile _pyio io fileinput glob dbm",
        "shutil posixpath genericpath filecmp fnmatch stat linecache",
    ),
    "testing and debugging": (
        "unittest logging pdb traceback warnings tracemalloc pstats trace cProfile cgitb",
        "doctest bdb timeit profile",
    ),
    "language": (
        "importlib inspect typing types enum abc _py_abc functools collections _collections_abc operator code codeop"
        " tokenize pyclbr runpy tabnanny copyreg weakref py_compile compileall",
        "ast symtable dis pkgutil zipimport contextlib dataclasses modulefinder",
    ),
}
# Modules of no one area, to train on: more sentences and signatures.
OTHER = (
    "argparse optparse getopt cmd pydoc turtle ctypes platform uuid encodings codecs difflib locale gettext textwrap"
    " string re pprint shlex html base64 secrets hmac hashlib site sysconfig venv zipapp curses pty rlcompleter"
    " graphlib copy reprlib getpass netrc _pyrepl imp pipes crypt sndhdr imghdr"
)
FEWEST = 1000  # docstrings; a complete library has about 6,000

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_NOT_PROSE = re.compile(r">>>|\.\. |[-=*+~]{3}|\|")


class Docstring(NamedTuple):
    """The beginning of a docstring, as far as it is prose, and where it stands.

    Attributes:
        module: Top-level module or package.
        area: A key of `AREAS`, or None.
        held_out: Kept from training.
        name: Of the function, class or module.
        signature: "def name(arguments)" of a function, else None.
        paragraphs: Each on one line.
    """

    module: str
    area: str | None
    held_out: bool
    name: str
    signature: str | None
    paragraphs: tuple[str, ...]

    def sentences(self) -> list[str]:
        """Return all sentences, in their order."""
        return [sentence for paragraph in self.paragraphs for sentence in _SENTENCE_END.split(paragraph)]


def mine_docstrings(stdlib: Path | None = None) -> list[Docstring]:
    """Collect the docstrings of the chosen modules, in a fixed order, without those that share a sentence across parts.

    Args:
        stdlib: Folder of the sources; None: the running interpreter's.

    Returns:
        About 6,000 docstrings, the held-out ones first.

    Raises:
        FileNotFoundError: The interpreter comes without the sources of its library.
    """
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    held_out = _collect(stdlib, {area: names for area, (_, names) in AREAS.items()}, held_out=True)
    held_out_sentences = {sentence for docstring in held_out for sentence in docstring.sentences()}
    train = _collect(stdlib, {**{area: names for area, (names, _) in AREAS.items()}, None: OTHER}, held_out=False)
    docstrings = held_out + [each for each in train if held_out_sentences.isdisjoint(each.sentences())]
    if len(docstrings) < FEWEST:
        raise FileNotFoundError(
            f"Found {len(docstrings)} docstrings under {stdlib}, expected thousands: this Python seems to come without "
            "the sources of its standard library. Run the demo with one that has them (python.org, uv, conda, or your "
            "distribution's full python3 package)."
        )
    return docstrings


def _collect(stdlib: Path, modules: dict[str | None, str], held_out: bool) -> list[Docstring]:
    """Return the docstrings of one part; of equal ones only the first."""
    found: dict[tuple[str, ...], Docstring] = {}
    for area, names in modules.items():
        for module in names.split():
            for name, signature, text in _documented(stdlib, module):
                if paragraphs := _prose(text):
                    found.setdefault(paragraphs, Docstring(module, area, held_out, name, signature, paragraphs))
    return list(found.values())


def _documented(stdlib: Path, module: str) -> Iterator[tuple[str, str | None, str]]:
    """Yield name, signature and docstring of everything documented in a module or package."""
    file = stdlib / f"{module}.py"
    files = [file] if file.exists() else sorted((stdlib / module).rglob("*.py"))
    for file in files:
        if "test" in file.parts or "tests" in file.parts:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules have invalid escapes
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                name, signature = node.name, f"def {node.name}({ast.unparse(node.args)})"
            elif isinstance(node, (ast.Module, ast.ClassDef)):
                name, signature = getattr(node, "name", module), None
            else:
                continue
            if text := ast.get_docstring(node):
                yield name, signature, text


def _prose(docstring: str) -> tuple[str, ...]:
    """Return the paragraphs up to the first doctest, list or table; none where the first says too little."""
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", docstring))
    paragraphs = tuple(itertools.takewhile(lambda block: not _NOT_PROSE.search(block), blocks))
    return paragraphs if paragraphs and len(paragraphs[0].split()) > 3 else ()
