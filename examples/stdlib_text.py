"""Text that every Python installation carries: the standard library's sources and pydoc's topics.

Three slices, each in a fixed order: `training_text` (all documents but the held-out modules), `held_out_text`
(modules that are never trained on, for measuring) and `calibration_text` (a few of the training documents, to
calibrate scales without looking at the held-out ones). The text follows the Python version that runs this.
"""

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT = (
    "argparse.py",
    "contextlib.py",
    "difflib.py",
    "fractions.py",
    "heapq.py",
    "shlex.py",
    "statistics.py",
    "textwrap.py",
)
CALIBRATION = ("base64.py", "configparser.py", "functools.py", "random.py", "string.py", "zipfile.py")
CALIBRATION_TOPICS = ("execmodel", "formatstrings", "typesmapping", "with")

# Tests, bundled applications, third-party packages and build leftovers are not the library's own text.
SKIPPED_DIRECTORIES = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
# Tables rather than text; `_sysconfigdata*` also holds the paths of the machine that built Python.
SKIPPED_FILES = frozenset({"_compat_pickle.py", "entities.py", "locale.py", "stringprep.py", "this.py"})
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


def _is_text(path: Path) -> bool:
    """Whether a path, relative to the standard library, is one of the documents."""
    if path.name in SKIPPED_FILES or SKIPPED_DIRECTORIES.intersection(path.parts):
        return False
    return not any(part.startswith(SKIPPED_PREFIXES) for part in path.parts)


def stdlib_directory() -> Path:
    """Where this Python keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def document_files() -> list[str]:
    """Every document's path relative to the standard library, sorted, held-out ones included."""
    root = stdlib_directory()
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(path.as_posix() for path in paths if _is_text(path))


def _read(name: str) -> str:
    path = stdlib_directory() / name
    if not path.exists():  # a module of older versions that has become a package
        path = path.with_suffix("") / "__init__.py"
    return path.read_text(encoding="utf-8", errors="replace").strip() + "\n"


def training_text() -> list[str]:
    """The documents to train on: pydoc's topics, then the modules that are not held out."""
    documents = [topics[name].strip() + "\n" for name in sorted(topics)]
    documents += [_read(name) for name in document_files() if name not in HELD_OUT]
    return [document for document in documents if len(document) > 1]


def held_out_text() -> str:
    """The held-out modules as one text."""
    return "\n".join(_read(name) for name in HELD_OUT)


def calibration_text() -> str:
    """A few training documents, prose and code, as one text."""
    prose = [topics[name].strip() + "\n" for name in CALIBRATION_TOPICS if name in topics]
    return "\n".join(prose + [_read(name) for name in CALIBRATION])
