"""Compiles the GPU kernels for all targets, without a GPU, and checks what comes out.

One line for each kernel, configuration and target; exits with 1 if any fails. A kernel fails if it spills registers or
uses more of them, or more shared memory, than the target has; if it loads from memory in too small pieces; if a product
misses the target's instruction for tiles; if products and sums are fused where the bits of the reference are promised;
or if tiles that may replace each other add in different orders.

What was found out about a kernel is kept (``--kept``) and looked up until its operations or the compiler change, so a
run that was interrupted goes on where it ended.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import io
import json
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["TRITON_INTERPRET"] = "0"

COLUMNS = (
    f"{'kernel':<26} {'config':<34} {'target':<7} {'regs':>5} {'spill':>5} {'stack':>5} {'smem/limit KiB':>14} "
    f"{'instruction':<34} {'load':>4}  verdict"
)
INSTRUCTIONS = {
    80: r"mma\.sync[.\w]*",
    86: r"mma\.sync[.\w]*",
    89: r"mma\.sync[.\w]*",
    90: r"wgmma\.mma_async[.\w]*",
    100: r"tcgen05\.mma[.\w]*",
    120: r"mma\.sync[.\w]*",
    "gfx942": r"v_mfma_\w+",
}
"""The instruction for products of tiles, by architecture."""
KEPT = Path(os.environ.get("OCTAVO_CACHE_DIR") or Path.home() / ".cache" / "octavo") / "check_kernels"
FOUND = ("registers", "spills", "stack", "shared", "instruction", "has_mma_sync", "fused", "min_load", "fingerprint")
"""What is kept of a kernel: fields of ``Line``."""
REGISTERS = Path(__file__).with_name("kernel_registers.json")
"""Registers of each kernel when they were last noted (``--keep-registers``); a tenth more is a failure. By Triton's
version, target, and kernel with its configuration: of each launch, in order."""
SPARE_REGISTERS = 4
"""More than a tenth that is allowed: compilers round up."""
ONE_FUNCTION = {90: {"v2 k8": "v3 k16"}, 100: {"v2 k8": "tcgen05"}}
"""Instructions that add like another one of the same GPU, as a model of the hardware says (MMA-Sim, arXiv:2511.10909);
``tests/gpu`` compares them on a card."""


@dataclass
class Line:
    """What was found out about one kernel, in one configuration, on one target."""

    kernel: str
    config: str
    target: str
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    max_shared: int = 0
    instruction: str = ""
    has_mma_sync: bool = False
    fused: int = 0
    """Products that are fused with sums."""
    min_load: int = 0
    fingerprint: str = ""
    family: str = ""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """Of all launches of a case that are the same kernel."""
        return f"{self.kernel} {self.config}"

    def __str__(self) -> str:
        verdict = "FAIL: " + "; ".join(self.failures) if self.failures else "ok"
        shared = f"{self.shared / 1024:.0f}/{self.max_shared / 1024:.0f}"
        return (
            f"{self.kernel:<26} {self.config:<34} {self.target:<7} {self.registers:>5} {self.spills:>5} "
            f"{self.stack:>5} {shared:>14} {self.instruction:<34} {self.min_load or '-':>4}  {verdict}"
        )


def source_of(launch: Any) -> tuple[Any, Any]:
    """A launch's kernel with the types of its arguments, and the target, as Triton's compiler takes them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ops.triton.catalog import signature

    types, constants, attributes = signature(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    return source, GPUTarget(launch.target.backend, launch.target.arch, launch.target.warp_size)


def compiled(launch: Any) -> tuple[Any, str]:
    """A launch's kernel, compiled for the launch's target, and what ptxas said."""
    import triton

    source, goal = source_of(launch)
    said = io.StringIO()
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(said):
        kernel = triton.compile(source, target=goal, options=launch.options)
    return kernel, said.getvalue()


def operations(launch: Any) -> str:
    """What the compiler makes of a kernel first: its operations, without names and places in the source."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    source, goal = source_of(launch)
    backend = make_backend(goal)
    options = backend.parse_options({**launch.options, **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    module = source.make_ir(goal, options, functions, backend.get_module_map(), context)
    return str(module.str_nodebug())


def key_of(launch: Any) -> str:
    """Identifies a kernel, how it is compiled, and how the result is read."""
    import triton

    own = (compiled, measure, measure_nvidia, measure_amd, fingerprint, _size_of, _short)
    readers = "".join(inspect.getsource(each) for each in own)
    parts = (triton.__version__, readers, operations(launch), launch.target, sorted(launch.options.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def measure(line: Line, launch: Any, kept: Path) -> None:
    """Compiles a launch's kernel and measures it, if it is not known."""
    file = kept / f"{key_of(launch)}.json"
    if file.exists():
        for name, value in json.loads(file.read_text()).items():
            setattr(line, name, value)
        return
    kernel, said = compiled(launch)
    line.shared = kernel.metadata.shared
    target = launch.target
    if target.backend == "cuda":
        measure_nvidia(line, kernel, said)
    else:
        measure_amd(line, kernel)
    listing = kernel.asm["amdgcn"] if target.backend == "hip" else kernel.asm["ptx"]
    found = sorted(set(re.findall(INSTRUCTIONS[target.arch], listing)), key=_size_of)
    line.instruction = _short(found[0]) if found else ""
    line.has_mma_sync = "mma.sync" in listing
    line.fused = len(re.findall(r"\bfma\.r\w+\.f32", listing))
    line.fingerprint = fingerprint(kernel)
    if not line.failures:
        kept.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({name: getattr(line, name) for name in FOUND}))
        new.rename(file)


def measure_nvidia(line: Line, kernel: Any, said: str) -> None:
    """Reads registers, spills and stack from what ptxas said, and loads from the PTX."""
    used = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if used is None or spills is None:
        line.failures.append("ptxas did not say how many registers it used")
        return
    line.registers, line.stack = int(used[1]), int(spills[1])
    line.spills = int(spills[2]) + int(spills[3])
    if "C7510" in said or "wgmma.mma_async instructions are serialized" in said:
        line.failures.append("wgmma instructions are serialised")
    sizes = []
    for vector, bits in re.findall(
        r"ld\.global(?:\.[a-zA-Z_:0-9]+?)*?(?:\.(v[248]))?\.[bfsu](8|16|32|64)\b", kernel.asm["ptx"]
    ):
        sizes.append(int(bits) // 8 * int(vector[1:] or 1) if vector else int(bits) // 8)
    sizes += [
        int(size, 16)
        for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+),", kernel.asm["ptx"], re.I)
    ]
    line.min_load = min(sizes, default=0)


def measure_amd(line: Line, kernel: Any) -> None:
    """Reads registers, spills and loads from the assembly."""
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return 0 if found is None else int(found[1])

    line.registers = number("vgpr_count") + number("agpr_count")
    line.spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    line.stack = number("private_segment_fixed_size")
    bytes_of = {"ubyte": 1, "sbyte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    loads = re.findall(r"\b(?:global|buffer)_load_(\w+?)(?:_d16\w*)?\s", text)
    line.min_load = min((bytes_of[each] for each in loads if each in bytes_of), default=0)


def check(line: Line, case: Any, target: Any) -> None:
    """Compares what was measured with the limits."""
    if line.spills or (target.backend == "hip" and line.stack):
        line.failures.append("spills registers")
    if line.registers > target.max_registers:
        line.failures.append(f"more than {target.max_registers} registers")
    if line.shared > line.max_shared:
        line.failures.append("too much shared memory")
    if case.needs_tensor_cores and not line.instruction:
        line.failures.append("no tensor core instruction")
    if target.has_wgmma and case.needs_tensor_cores and line.has_mma_sync:
        line.failures.append("mma.sync instead of the instruction for warp groups")
    if line.min_load and line.min_load < case.min_load:
        line.failures.append(f"loads {line.min_load} bytes at a time")
    if case.is_exact and target.backend == "cuda" and line.fused:
        line.failures.append(f"{line.fused} fused multiply-adds")


def _size_of(instruction: str) -> int:
    """Numbers that an instruction multiplies: of m64n256k16 their product."""
    sizes = re.search(r"m(\d+)n(\d+)k(\d+)", instruction) or re.search(r"_(\d+)x(\d+)x(\d+)", instruction)
    return 0 if sizes is None else int(sizes[1]) * int(sizes[2]) * int(sizes[3])


def _short(instruction: str) -> str:
    return re.sub(r"\.(sync|aligned|row|col)", "", instruction)[:34]


def fingerprint(kernel: Any) -> str:
    """What decides in which order a kernel's products add."""
    text = kernel.asm["ttgir"]
    parts = set()
    for layout in re.findall(r"#ttg\.(?:nvidia_mma|amd_mfma)<\{([^}]*)\}>", text):
        version = re.search(r"version(?:Major)? = (\d+)", layout)
        shape = re.search(r"instrShape = \[([\d, ]+)\]", layout)
        k = shape[1].split(", ")[-1] if shape else "?"
        parts.add(f"v{version[1] if version else '?'} k{k}")
    if "tc_gen5_mma" in text or "tcgen05" in text:
        parts.add("tcgen05")
    parts |= {f"imprecise {each}" for each in re.findall(r"maxNumImpreciseAcc = (\d+)", text) if each != "0"}
    return ", ".join(sorted(parts))


def examine(index: int, target_name: str, kept: Path) -> list[Line]:
    """Compiles and checks a case for a target."""
    from ops.triton import catalog
    from ops.triton.configs import TARGETS

    case = list(catalog.cases())[index]
    target = TARGETS[target_name]
    lines = []
    for launch in case.launches(target):
        name = launch.name.removesuffix("_kernel")
        line = Line(name, case.config, target_name, max_shared=target.max_shared, family=case.family)
        start = time.monotonic()
        try:
            measure(line, launch, kept)
            check(line, case, target)
        except Exception as error:  # whatever a compiler raises, the other kernels are compiled
            line.failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        line.seconds = time.monotonic() - start
        lines.append(line)
    return lines


def compare_families(lines: list[Line]) -> None:
    """Fails the tiles of a family that add in another order than its first."""
    from ops.triton.configs import TARGETS

    def order(line: Line) -> str:
        same = ONE_FUNCTION.get(TARGETS[line.target].capability, {})
        return same.get(line.fingerprint, line.fingerprint)

    families: dict[tuple[str, str, str], list[Line]] = defaultdict(list)
    for line in lines:
        if line.family:
            families[line.kernel, line.family, line.target].append(line)
    for members in families.values():
        for line in members[1:]:
            if order(line) != order(members[0]) and not line.failures:
                line.failures.append(f"adds as {line.fingerprint!r}, others as {members[0].fingerprint!r}")


def known_registers(file: Path, version: str) -> dict[str, dict[str, list[int]]]:
    """What a file like ``REGISTERS`` notes for a version of Triton, by target and key."""
    every = json.loads(file.read_text()) if file.exists() else {}
    found: dict[str, dict[str, list[int]]] = every.get(version, {})
    return found


def compare_registers(lines: list[Line], file: Path, version: str) -> None:
    """Fails kernels that use a tenth more registers than they did."""
    known = known_registers(file, version)
    if not known:
        print(f"note: {file.name} notes no registers for Triton {version}; they are not compared")
    launches: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        launches[line.target, line.key].append(line)
    for (target, key), members in launches.items():
        before = known.get(target, {}).get(key, [])
        if len(before) != len(members):
            continue  # it is new, or launches something else
        for line, registers in zip(members, before, strict=True):
            if line.registers > 1.1 * registers + SPARE_REGISTERS:
                line.failures.append(f"{registers} registers became {line.registers}")


def keep_registers(lines: list[Line], file: Path, version: str) -> None:
    """Notes the registers of kernels that passed, in place of what was noted for them."""
    known = known_registers(file, version)
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    failed = {(line.target, line.key) for line in lines if line.failures}
    for line in lines:
        if (line.target, line.key) not in failed:
            found[line.target][line.key].append(line.registers)
    for target, own in found.items():
        known[target] = dict(sorted({**known.get(target, {}), **own}.items()))
    parts = []
    for target, own in sorted(known.items()):
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(registers)}" for key, registers in own.items())
        parts.append(f"{json.dumps(target)}: {{\n{rows}\n}}")
    file.write_text(f"{{{json.dumps(version)}: {{\n" + ",\n".join(parts) + "\n}}\n")


def selected(pattern: str, targets: list[str]) -> Iterator[tuple[int, str]]:
    """The cases and targets to compile."""
    from ops.triton import catalog
    from ops.triton.configs import TARGETS

    for index, case in enumerate(catalog.cases()):
        for target in targets:
            if case.targets is not None and target not in case.targets:
                continue
            names = {launch.name.removesuffix("_kernel") for launch in case.launches(TARGETS[target])}
            if any(re.search(pattern, f"{name} {case.config}") for name in names):
                yield index, target


def arguments() -> argparse.Namespace:
    from ops.triton.configs import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="default: all")
    parser.add_argument("--kernels", default="", metavar="RE", help="of names and configurations; default: all")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes that compile; default: one per core"
    )
    parser.add_argument("--kept", type=Path, metavar="FOLDER", default=KEPT, help=f"what is known; default: {KEPT}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there as well")
    parser.add_argument(
        "--registers", type=Path, default=REGISTERS, help=f"as noted earlier; default: {REGISTERS.name}"
    )
    parser.add_argument("--keep-registers", action="store_true", help="note the registers there")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    import triton

    start = time.monotonic()
    lines: list[Line] = []
    print(COLUMNS)
    with ProcessPoolExecutor(options.jobs) as pool:
        work = list(selected(options.kernels, options.targets))
        futures = [pool.submit(examine, index, target, options.kept) for index, target in work]
        for future in futures:
            found = future.result()
            lines += found
            for line in found:
                print(line, flush=True)
    settled = {id(line) for line in lines if line.failures}
    compare_families(lines)
    if not options.keep_registers:
        compare_registers(lines, options.registers, triton.__version__)
    failed = [line for line in lines if line.failures]
    for line in failed:
        if id(line) not in settled:
            print(line)
    if options.keep_registers:
        keep_registers(lines, options.registers, triton.__version__)
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1))
    seconds = time.monotonic() - start
    print(f"{len(lines)} compiled, {len(failed)} failed, triton {triton.__version__}, {seconds:.0f} s")
    return 1 if failed or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
