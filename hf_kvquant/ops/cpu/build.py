"""Building the C++ kernels: on first use, once per user and instruction set, in a second or three.

A wheel may bring them along (`make wheel`, on Linux), for machines without a compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("kernels.cpp")
_PREBUILT = Path(__file__).with_name("prebuilt")

# Not -ffast-math: a library that is linked with it flushes denormals to zero in the whole process.
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-w")
# For instruction sets by name and not for "this machine": a home directory may be shared by several.
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
    "-mprefer-vector-width=512",
)
_BYTES = (*_AVX512, "-mavx512vbmi", "-mavx512vnni")  # permuted and multiplied
_INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": (*_BYTES, "-mavx512bf16"),
    "avx512_vnni": _BYTES,
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "default": (),
}
_TIMEOUT = 120.0  # seconds
# Its compilers lack what the sources need: one has no vector types, the other does not align them (GCC's PR 54412).
_NOT_FOR_WINDOWS = "there are no kernels for Windows"
NO_OPENMP = "the compiler has found no OpenMP (install libomp for clang++, libgomp for g++; it is looked for again)"


class BuildError(RuntimeError):
    """There are no kernels for this machine; says why."""


def instruction_sets() -> list[str]:
    """Those that this machine runs and torch uses, the widest first. `default` is what every such machine has."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith(("AVX512", "AVX10")):
        flags = _flags()
        has_bytes = {"avx512_vnni", "avx512vbmi"} <= flags  # Intel's Ice Lake, AMD's Zen 4, and later ones
        has_bf16 = has_bytes and "avx512_bf16" in flags  # Zen 4 as well, Intel's Sapphire Rapids
        return [*["avx512_bf16"] * has_bf16, *["avx512_vnni"] * has_bytes, "avx512", "avx2", "default"]
    return ["avx2", "default"] if capability == "AVX2" else ["default"]


def _flags() -> set[str]:
    """What the processor says of itself, as Linux spells it."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


def load(instructions: str) -> ctypes.CDLL:
    """The kernels for `instructions`: those that came with the package, else a build, cached. Raises BuildError."""
    if sys.platform == "win32":
        raise BuildError(_NOT_FOR_WINDOWS)
    _share_openmp()
    for flags in _flag_sets(instructions):
        with suppress(OSError):
            return ctypes.CDLL(str(_PREBUILT / _file_name(flags)))
    cached = _cache_directory()
    error = BuildError("no writable cache directory")
    for directory in (cached, None):  # None: a temporary one, for when the first cannot be written to or run from
        try:
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                if not _is_private(directory):
                    raise OSError(
                        f"{directory} is not a directory that belongs to this user and that nobody else writes"
                    )
                noexec = getattr(os, "ST_NOEXEC", 0)  # not every system has it
                if noexec and os.statvfs(directory).f_flag & noexec:
                    raise OSError(f"{directory} is on a file system from which nothing may be run")
                return _load_from(directory, instructions)
            with tempfile.TemporaryDirectory(prefix="hf_kvquant-") as temporary:
                return _load_from(Path(temporary), instructions)
        except OSError as problem:
            error = BuildError(str(problem))
    raise error


def _share_openmp() -> None:
    """Have the kernels find the OpenMP library that torch has loaded, where torch keeps its symbols to itself.

    torch for 64-bit ARM does, and may have renamed the file: kernels would start threads of their own beside torch's,
    and those that ask for no library by name would not load.
    """
    if not sys.platform.startswith("linux"):
        return
    package = Path(torch.__file__).parent
    for directory in (package / "lib", package.with_name("torch.libs")):
        for path in directory.glob("libgomp*.so*"):
            with suppress(OSError):  # it is not loaded
                ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_GLOBAL)


def outlook() -> str:
    """What `load` would give on this machine, in words; nothing is built."""
    if sys.platform == "win32":
        return f"torch operators (several times slower: {_NOT_FOR_WINDOWS})"
    compiler, cached = _compiler(), _cache_directory()
    if cached is not None and not _is_private(cached):
        cached = None
    for instructions in instruction_sets():
        threaded, single = (_file_name(flags) for flags in _flag_sets(instructions))
        if (_PREBUILT / threaded).exists():
            return f"C++ for {instructions}, prebuilt"
        if cached is not None and (cached / threaded).exists():
            return f"C++ for {instructions}, built before"
        if cached is not None and (cached / single).exists():
            return f"C++ for {instructions}, built before for one thread, because {NO_OPENMP}"
        if compiler is not None and shutil.which(compiler.split()[0]):
            return f"C++ for {instructions}, built on first use (compiler found: {compiler})"
    return f"torch operators (no compiler: several times slower): {remedy()}"


def remedy() -> str:
    """What to do for kernels where they could not be built; nothing where that is in vain."""
    if sys.platform == "win32":
        return ""
    if sys.platform == "darwin":
        return "install the Command Line Tools (`xcode-select --install`)"
    return "install g++ or clang++, or a wheel that has them built (`make wheel`)"


def is_threaded(library: ctypes.CDLL, instructions: str) -> bool:
    """Whether what `load` has returned was built with OpenMP."""
    return Path(library._name).name == _file_name(_flag_sets(instructions)[0])


def _load_from(directory: Path, instructions: str) -> ctypes.CDLL:
    """Raises OSError if the directory cannot be used and BuildError if the compiler cannot."""
    builds = [(directory / _file_name(flags), flags) for flags in _flag_sets(instructions)]
    (threaded, flags), (single, _) = builds
    # What was built for one thread serves until the compiler finds OpenMP.
    good = builds[:1] if not threaded.exists() and single.exists() and _links(flags) else builds
    for path, _ in good:
        with suppress(OSError):  # it is not there, or damaged
            return ctypes.CDLL(str(path))
    with _lock(directory / "build.lock"):
        for path, _ in good:
            with suppress(OSError):  # another process was faster
                return ctypes.CDLL(str(path))
        failure: Exception = BuildError("nothing to build")
        for path, flags in builds:
            if message := _compile(path, flags):
                failure = BuildError(message)
                continue
            try:
                return ctypes.CDLL(str(path))
            except OSError as problem:  # a library that it was linked with is not there, or nothing may be run
                failure = problem
    raise failure


def _flag_sets(instructions: str) -> list[tuple[str, ...]]:
    """With threads, and without for compilers that lack OpenMP.

    The OpenMP library that torch has loaded is the one that gets used: its symbols are global (`_share_openmp`), or its
    name the same.
    """
    flags = (*_FLAGS, *_INSTRUCTIONS[instructions])
    openmp: tuple[str, ...] = ("-fopenmp",)
    if sys.platform == "darwin":
        openmp = ("-Xpreprocessor", "-fopenmp", f"-L{Path(torch.__file__).parent / 'lib'}", "-lomp")
    return [(*flags, *openmp), flags]


def prebuild(directory: Path = _PREBUILT) -> list[Path]:
    """Build the kernels for every processor of this architecture into `directory`; returns the files.

    They ask for no OpenMP library by name: the one that torch has loaded serves them, and there may be no other.
    Raises BuildError.
    """
    if not sys.platform.startswith("linux"):  # elsewhere a library cannot leave open where OpenMP is to come from
        raise BuildError(
            f"wheels with kernels are made on Linux, and this is {sys.platform}; `pip install .` makes do without"
        )
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    made = []
    for instructions in _INSTRUCTIONS if is_x86 else ["default"]:
        flags = (*_FLAGS, *_INSTRUCTIONS[instructions], "-fopenmp")
        target = directory / _file_name(flags)
        part = target.with_suffix(".o")
        # Linked apart, and without -fopenmp, which would name a library.
        if message := _compile(part, (*flags, "-c")) or _compile(target, ("-shared",), part):
            raise BuildError(message)
        part.unlink()
        made.append(target)
    return made


def _file_name(flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256("\0".join((platform.machine(), sys.platform, *flags)).encode())
    for source in sorted((*_SOURCE.parent.glob("*.h"), _SOURCE)):
        digest.update(source.read_bytes())
    return f"kernels-{digest.hexdigest()[:20]}.so"


def _compiler() -> str | None:
    chosen = os.environ.get("CXX", "").strip()
    found = [chosen] if chosen else filter(shutil.which, ("c++", "g++", "clang++"))
    return next((command for command in found if not _asks_for_tools(command)), None)


def _asks_for_tools(command: str) -> bool:
    """Whether it only stands for a compiler, as on a Mac without the Command Line Tools: it asks to install them."""
    if sys.platform != "darwin":
        return False
    program = shutil.which(command.split()[0])
    return program is not None and program.startswith("/usr/bin/") and not _has_command_line_tools()


@functools.cache
def _has_command_line_tools() -> bool:
    try:
        return subprocess.run(["xcode-select", "-p"], capture_output=True, timeout=_TIMEOUT).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _compile(target: Path, flags: tuple[str, ...], source: Path = _SOURCE) -> str:
    """Build `target`; returns why it could not be done, or nothing."""
    compiler = _compiler()
    if compiler is None:
        return "no C++ compiler was found (c++, g++ or clang++)"
    # Under another name first: whoever sees the file may load it.
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [*compiler.split(), str(source), "-o", unfinished, *flags]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
        if result.returncode == 0:
            os.replace(unfinished, target)
            return ""
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        return f"{compiler}: {lines[0] if lines else f'exit status {result.returncode}'}"
    except (OSError, subprocess.TimeoutExpired) as problem:
        return f"{compiler}: {problem}"
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _links(flags: tuple[str, ...]) -> bool:
    """Whether the compiler makes a library with these flags, tried on an empty one."""
    try:
        with tempfile.TemporaryDirectory(prefix="hf_kvquant-") as directory:
            source = Path(directory, "empty.cpp")
            source.touch()
            return not _compile(source.with_suffix(".so"), flags, source)
    except OSError:
        return False


def _cache_directory() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # A relative one is invalid by the XDG specification: it would be another for every working directory.
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "hf_kvquant"
    except RuntimeError:  # no home
        return None


def _is_private(directory: Path) -> bool:
    """Whether it is there and what lies in it is this user's own: code from anybody else must not be run.

    Where there are no user numbers (Windows), the cache is in the user's own profile.
    """
    if not hasattr(os, "getuid"):
        return directory.is_dir()
    try:
        found, above = os.lstat(directory), os.stat(directory.parent)
    except OSError:
        return False
    user = os.getuid()
    only_ours = found.st_uid == user and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    # Who owns the directory above could put another one in the place of this one.
    return stat.S_ISDIR(found.st_mode) and only_ours and above.st_uid in (user, 0)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process builds and the others wait. Where files cannot be locked all build, which does no harm."""
    # No link is followed: what it leads to is not ours to create.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    with open(handle, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield
