"""Imports go down only, between floors and between the rooms of a floor, and processes load only what they need."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FORBIDDEN = {
    "api": {"executor", "ops", "torch", "triton"},
    "engine_core": {"api", "ops", "torch", "triton", "asyncio", "starlette"},
    "executor": {"api", "engine_core"},
    "ops": {"api", "engine_core", "executor"},
}
CONTRACTS = {
    "api": {
        "engine_core": {"messages", "config", "launch", "restart", "hashing", "replicas", "replica_duties", "snapshots"}
    },
    "engine_core": {
        "executor": {
            "messages",
            "config",
            "base",
            "device",
            "log",
            "multiproc",
            "nodes",
            "parallel",
            "simulated",
            "process",
            "registry",
            "liveness",
            "host_memory",
            "helper",
            "files",
            "supported",
            "adapter_files",
        }
    },
}
"""What a floor may import of the one below."""
TORCH_FREE = [
    "messages",
    "config",
    "base",
    "device.base",
    "log",
    "multiproc",
    "nodes.agent",
    "nodes.head",
    "nodes.ray_driver",
    "nodes.ray_machines",
    "simulated",
    "pooling",
    "files",
    "adapter_files",
    "supported",
    "parallel",
    "process",
    "registry",
    "liveness",
    "host_memory",
    "helper",
    "helper_process",
    "kv_transfer.disk",
]
ROOMS = (
    ("", "__main__", "cli", "llm", "llm_inputs", "llm_outputs", "llm_pooling", "octavo", "ray_agent", "ray_machines"),
    ("commands",),
    ("server",),
    ("anthropic", "responses"),
    ("openai",),
    ("http",),
    ("generation",),
    ("engine",),
    ("params",),
    ("text",),
    ("media",),
    ("model",),
    ("config",),
    ("parsers",),
    # What any room may use: limits and errors, flags and their types, and the search for patterns, which parsers need
    # for the expressions of a tool's schema.
    (
        "admission",
        "errors",
        "flags",
        "llm_options",
        "lora_modules",
        "machines",
        "otlp",
        "regex_syntax",
        "replica_options",
        "speculation",
        "stop_regex",
        "version",
        "vllm_options",
    ),
)
"""Folders and modules of ``api/`` from the top down. Each imports what is below its line, and itself. Only the modules
of the first and of the last line, which are no rooms, import others of their line."""

FOLDERS: dict[str, set[str]] = {
    # A model is described by layers. It knows no step but the batch that it is handed, and no device.
    "executor/models": {"base", "checkpoint", "hf_config", "input_batch", "layers.*", "registry", "weights_mapper"},
    "executor/layers": {
        # Of backends and methods what they have in common; each is looked up by its name.
        *("attention.base", "base", "hf_config", "input_batch", "log", "parallel", "quantization", "quantization.base"),
    },
    "executor/quantization": {"base", "checkpoint", "config", "input_batch", "layers.parameter", "registry"},
    "executor/adapters": {
        *("adapter_files", "base", "checkpoint", "config", "gguf", "gguf_architectures", "gguf_experts", "hf_config"),
        *("layers.*", "loader", "messages", "models.registry", "quantization.packed", "weights_mapper"),
    },
    "executor/attention": {"log", "messages", "registry"},
    "executor/device": {
        *("base", "config", "deferred", "host_memory", "log", "messages", "parallel", "parallel.store", "registry"),
    },
    # What is done with logits: no model, and of a device only how values come back from it.
    "executor/sampling": {"base", "deferred", "device.steps", "messages", "registry", "request_states", "scripts"},
    "executor/speculative": {
        "base",
        "config",
        "draft_runner",
        "messages",
        "registry",
        "request_states",
        "sampling.base",
        "sampling.draft_sampler",
        "scripts",
    },
    # Other machines: no model, and of workers their processes and frames.
    "executor/nodes": {
        *("base", "config", "identity", "liveness", "log", "messages", "multiproc", "parallel", "parallel.store"),
        *("process", "stages"),
    },
    # Who holds what, which nobody else decides.
    "executor/parallel": {"config"},
    # Stores know blocks; open.py, which the worker imports, takes them from its model.
    "executor/kv_transfer": {"base", "log", "messages", "model_runner", "registry"},
    "engine_core/kv_transfer": {
        *("config", "kv_cache_manager", "memory", "messages", "request", "single_type_kv_cache_manager"),
    },
    # Grammars know requests, not plans.
    "engine_core/structured": {"messages", "request"},
    # The definitions of ops know no implementation; op sets know each other not at all.
    "ops/reference": {"adapters", "collective", "dispatch", "metadata", "packed"},
    "ops/cpu": {"", "adapters", "arena", "collective", "dispatch", "metadata", "packed"},
    "ops/triton": {
        "",
        "adapters",
        "arena",
        "collective",
        "dispatch",
        "metadata",
        "packed",
        "reference.sampling",
    },  # of which: constants
}
"""What the modules of a folder import of their own package, beside each other."""
MAX_FUNCTION_LINES = 60

HEAVY = {"torch", "transformers", "triton"}
HTTP = {"starlette", "sse_starlette", "uvicorn"}
ENGINE = {"zmq", "api.engine", "engine_core.core", "engine_core.scheduler", "executor.worker", "executor.model_runner"}
UNPICKLES = "executor.conversion"
"""The only module that reads pickles: tensors alone, as a job of a helper."""
NO_PICKLE = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing"}


def modules(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for floor in FORBIDDEN for path in modules(floor)}


@cache
def imported_modules(module: str) -> frozenset[str]:
    """The modules of the four packages that one imports anywhere: for types alone and inside functions, too."""
    found = set()
    for name in imports(MODULES[module]):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return frozenset(found - {"", module})


def within(package: str, module: str) -> str | None:
    """The rest of a module's name in a package; None if it is elsewhere."""
    return module[len(package) + 1 :] if f"{module}.".startswith(f"{package}.") else None


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_imports_go_down_only(floor: str) -> None:
    for path in modules(floor):
        for name in imports(path):
            top, *rest = name.split(".")
            assert top not in FORBIDDEN[floor], f"{path.relative_to(ROOT)} imports {name}"
            allowed = CONTRACTS.get(floor, {}).get(top)
            if allowed is not None:
                assert rest and rest[0] in allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", [room for line in ROOMS for room in line])
def test_rooms_import_what_is_below_them(room: str) -> None:
    level = next(level for level, line in enumerate(ROOMS) if room in line)
    allowed = {room, *(name for line in ROOMS[level + 1 :] for name in line)}
    if level in (0, len(ROOMS) - 1):
        allowed |= {*ROOMS[level]}
    for module in MODULES:
        name = within("api", module)
        if name is None or name.split(".")[0] != room:
            continue
        for other in imported_modules(module):
            target = within("api", other)
            assert target is None or target.split(".")[0] in allowed, f"{module} imports {other}"


def test_every_room_has_a_rule() -> None:
    known = {name for line in ROOMS for name in line}
    found = {name.split(".")[0] for module in MODULES if (name := within("api", module)) is not None}
    assert found <= known, f"say in ROOMS where these belong: {', '.join(sorted(found - known))}"
    for package in ("executor", "engine_core", "ops"):
        folders = {f"{package}/{path.parent.name}" for path in (ROOT / package).glob("*/__init__.py")}
        assert folders <= FOLDERS.keys(), f"say what they may import: {', '.join(sorted(folders - FOLDERS.keys()))}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_what_they_are_made_of(folder: str) -> None:
    package, _, name = folder.partition("/")
    allowed = FOLDERS[folder]
    for module in MODULES:
        if within(f"{package}.{name}", module) is None:
            continue
        for other in imported_modules(module):
            target = within(package, other)
            if target is None or target.split(".")[0] == name:
                continue
            assert target in allowed or f"{target.split('.')[0]}.*" in allowed, f"{module} imports {other}"


def test_there_is_no_circle_of_imports() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(imported_modules(module)):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_functions_stay_short(floor: str) -> None:
    for path in modules(floor):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                num_lines = (node.end_lineno or first) - first + 1
                where = f"{path.relative_to(ROOT)}: {node.name}"
                assert num_lines <= MAX_FUNCTION_LINES, f"{where} has {num_lines} lines"


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_nothing_unpickles(floor: str) -> None:
    for path in modules(floor):
        for name in imports(path):
            assert name.split(".")[0] not in NO_PICKLE, f"{path.relative_to(ROOT)} imports {name}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"send_pyobj", "recv_pyobj"}, path
                is_load = ast.unparse(node) == "torch.load"
                assert not is_load or module_name(path) == UNPICKLES, f"{path.relative_to(ROOT)} calls torch.load"


def test_weights_are_unpickled_in_a_helper_and_with_care() -> None:
    importing = [module for module in MODULES if UNPICKLES in imported_modules(module)]
    assert importing == [], "helpers find it by its name"
    calls = [node for node in ast.walk(ast.parse(MODULES[UNPICKLES].read_text())) if isinstance(node, ast.Call)]
    loads = [node for node in calls if ast.unparse(node.func) == "torch.load"]
    assert loads
    for node in loads:
        assert "weights_only=True" in [ast.unparse(keyword) for keyword in node.keywords]


@pytest.mark.parametrize(
    "module",
    [
        "api.server.app",
        "api.server.run",
        "engine_core.core",
        "engine_core.__main__",
        "engine_core.process",
        *(f"executor.{name}" for name in TORCH_FREE),
    ],
)
def test_processes_without_torch(module: str) -> None:
    assert not loaded(f"import {module}", HEAVY)


@pytest.mark.parametrize("statement", ["from api import LLM", "import api.generation.generation"])
def test_nothing_but_a_server_loads_http(statement: str) -> None:
    assert not loaded(statement, HEAVY | HTTP)


@pytest.mark.parametrize("arguments", ["--version", "chat --help", "bench serve --help"])
def test_commands_that_need_no_engine_load_none(arguments: str) -> None:
    run = f"with contextlib.suppress(SystemExit): main({arguments.split()})"
    assert not loaded(f"import contextlib\nfrom api.cli import main\n{run}", HEAVY | HTTP | ENGINE)


def loaded(code: str, names: set[str]) -> str:
    """Which of these modules a new interpreter has after some code."""
    program = f"import sys\n{code}\nprint(*sorted({names} & {{*sys.modules}}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stderr.strip()


def test_public_names() -> None:
    import api

    names = ["LLM", "BeamSearchParams", "LoRARequest", "PoolingParams", "SamplingParams", "StructuredOutputsParams"]
    assert api.__all__ == names


def test_files_stay_short() -> None:
    for floor in (*FORBIDDEN, "tests", "scripts"):
        for path in modules(floor):
            assert len(path.read_text().splitlines()) <= 800, f"{path.relative_to(ROOT)} is longer than 800 lines"
