"""Compiles the kernels on first use.

There is one library per capability, all built from the same sources with exactly the flags of that capability
(``-march=native`` would put AVX-512 into the portable path, and forcing that path would test nothing). Libraries are
cached in a folder, named by a hash of sources, flags and compiler.

Nothing else in ``ops`` reads the environment: ``OCTAVO_CACHE_DIR``, ``OCTAVO_CPU_CAPABILITY``, ``CXX``.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("g++", "c++", "clang++")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-ffp-contract=off",  # fuse multiply and add only where the source says so: same bits everywhere
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-uninitialized",  # false positives in GCC 12's own AVX-512 headers
    "-Wno-maybe-uninitialized",
)
REFERENCE = "reference"
"""Value of ``OCTAVO_CPU_CAPABILITY`` that disables the kernels."""


class BuildError(Exception):
    """The kernels cannot be built on this machine; the message says why."""


@dataclass(frozen=True)
class Capability:
    """What a CPU can do, and how to compile for it."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]
    """Flags of /proc/cpuinfo."""


def _capability(name: str, flags: str, needs: str) -> Capability:
    return Capability(name, tuple(flags.split()), frozenset(needs.split()))


_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq"
_AVX512VNNI = f"{_AVX512} -mavx512vnni"
_AVX512BF16 = f"{_AVX512VNNI} -mavx512bf16"  # every CPU that has the one has the other
_AVXVNNI = f"{_AVX2} -mavxvnni"
_NEEDS_AVX2 = "avx2 fma f16c"
_NEEDS_AVX512 = f"{_NEEDS_AVX2} avx512f avx512bw avx512vl avx512dq"
_NEEDS_AVX512VNNI = f"{_NEEDS_AVX512} avx512_vnni"
_NEEDS_AVX512BF16 = f"{_NEEDS_AVX512VNNI} avx512_bf16"

CAPABILITIES = {
    capability.name: capability
    for capability in (
        _capability("amx", f"{_AVX512BF16} -DOCTAVO_AMX", f"{_NEEDS_AVX512BF16} amx_tile amx_bf16 amx_int8"),
        _capability("avx512bf16", _AVX512BF16, _NEEDS_AVX512BF16),
        _capability("avx512vnni", _AVX512VNNI, _NEEDS_AVX512VNNI),
        _capability("avx512", _AVX512, _NEEDS_AVX512),
        _capability("avxvnni", _AVXVNNI, f"{_NEEDS_AVX2} avx_vnni"),
        _capability("avx2", _AVX2, _NEEDS_AVX2),
        _capability("portable", "", ""),
    )
}
"""Best first, on most CPUs: see :func:`available`."""

AMX_EMULATION = _capability(
    "amx_emulation", f"{_AVX512BF16} -DOCTAVO_AMX -DOCTAVO_AMX_EMULATION -O1", _NEEDS_AVX512BF16
)
"""The AMX path with its instructions emulated in plain C++, for tests; compiled in half the time."""
VNNI_EMULATION = _capability("vnni_emulation", f"{_AVX2} -DOCTAVO_VNNI_EMULATION -O0", _NEEDS_AVX2)
"""The AVX-VNNI path with its instruction emulated, likewise; compiled quickly."""
ALL = {**CAPABILITIES, AMX_EMULATION.name: AMX_EMULATION, VNNI_EMULATION.name: VNNI_EMULATION}


@cache
def cpu_flags() -> frozenset[str]:
    """Flags of the first CPU in /proc/cpuinfo; empty where that file does not exist."""
    return frozenset(_cpu_info("flags").split())


@cache
def cpu_vendor() -> str:
    """Who made the first CPU in /proc/cpuinfo, such as GenuineIntel; empty where that is not said."""
    return _cpu_info("vendor_id").strip()


def _cpu_info(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1] for line in lines if line.startswith(key)), "")


def runs_here(capability: Capability) -> bool:
    return capability.needs <= cpu_flags()


def available() -> list[Capability]:
    """The capabilities of this machine, best first."""
    names = [name for name, capability in CAPABILITIES.items() if runs_here(capability)]
    if _multiplies_floats_faster() and "avx512bf16" in names:
        names.remove("avx512bf16")
        names.insert(names.index("avx512vnni") + 1, "avx512bf16")
    return [CAPABILITIES[name] for name in names]


def _multiplies_floats_faster() -> bool:
    """Whether bfloat16 is multiplied faster after conversion to float32 than with AVX-512's own instruction.

    Intel's CPUs that have AMX are made to multiply bfloat16 with that: one core of an Emerald Rapids does 1.25 G/s of
    ``vdpbf16ps`` (40 G products), but 5.2 G/s of ``vfmadd231ps`` (83 G). It matters where a hypervisor hides AMX, and
    AVX-VNNI tells them from Cooper Lake, which was made for that instruction. AMD's CPUs do as many of either.
    """
    return cpu_vendor() == "GenuineIntel" and "avx_vnni" in cpu_flags()


def configured() -> str | None:
    """The capability that the environment selects, if any."""
    return os.environ.get("OCTAVO_CPU_CAPABILITY") or None


# ---------------------------------------------------------------------------------------------------------
# building


def build(capability: Capability) -> Path:
    """The library of a capability, compiled unless cached.

    Raises:
        BuildError: No compiler was found, or it failed.
    """
    compiler = find_compiler()
    name = f"{capability.name}-{_key(capability, compiler)}.so"
    for folder in _folders():
        library = folder / name
        if library.exists():  # renamed into place once complete; the folder may be read-only
            return library
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _lock(folder / f"{name}.lock"):
                if not library.exists():
                    _compile(capability, compiler, library)
        except OSError:  # read-only or full: try the next folder
            continue
        return library
    raise BuildError("no writable folder for compiled kernels; set OCTAVO_CACHE_DIR to one with 20 MB free")


def find_compiler() -> str:
    """Path of a C++ compiler.

    Raises:
        BuildError: None was found.
    """
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else COMPILERS:
        path = shutil.which(name)
        if path:
            return path
    raise BuildError(f"no C++ compiler found ({wanted or ', '.join(COMPILERS)})")


def _folders() -> Iterator[Path]:
    """Where libraries may be kept, in order of preference."""
    configured_folder = os.environ.get("OCTAVO_CACHE_DIR")
    if configured_folder:
        yield Path(configured_folder).expanduser() / "kernels"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        yield Path(base) / "octavo" / "kernels"
    yield _users_folder() or _own_folder()


def _users_folder() -> Path | None:
    """A temporary folder shared by all processes of this user, so that a restart finds the compiled library.

    Anyone who can write there can run code here, and /tmp is open to all: None if another user took the name.
    """
    folder = Path(tempfile.gettempdir()) / f"octavo-kernels-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    is_private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return folder if is_private else None


@cache
def _own_folder() -> Path:
    """A temporary folder that is removed when this process exits."""
    folder = tempfile.mkdtemp(prefix="octavo-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _key(capability: Capability, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(version)
    digest.update(repr((FLAGS, capability.flags, platform.machine())).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Admits one process at a time; the others wait and then find the library built."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(capability: Capability, compiler: str, library: Path) -> None:
    flags = [*FLAGS, *capability.flags]
    # We hold the lock, so a process that left such a folder was killed.
    folder = library.with_name(f"{library.name}.building")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        _compile_in(folder, flags, compiler, library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compile_in(folder: Path, flags: list[str], compiler: str, library: Path) -> None:
    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        _run([compiler, *flags, "-c", str(source), "-o", str(target)])
        return target

    # Largest first: they take longest.
    sources = sorted(SOURCES.glob("*.cpp"), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        objects = list(threads.map(compile_one, sources))
    result = folder / library.name
    _run([compiler, "-shared", "-fopenmp", *map(str, objects), "-o", str(result)])
    os.replace(result, library)


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if result.returncode:
        if os.strerror(errno.ENOSPC) in result.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise BuildError(f"{' '.join(command)} failed:\n{result.stderr.strip()}")
