"""The rules that keep the package readable and safe: one-way imports, small files, no pickles, no late start."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_guard

PACKAGE = Path(lora_guard.__file__).parent

# A module imports only from those above it. docs/decisions/0001-flat-modules-one-way-imports.md says why.
ORDER = [
    "errors",
    "process_memory",
    "files",
    "progress",
    "config",
    "conversation",
    "normalise",
    "taxonomy",
    "render",
    "verdict",
    "artifact",
    "norms",
    "pieces",
    "default_model",
    "base_model",
    "kv_cache",
    "attention",
    "sharding",
    "adapter",
    "heads",
    "model",
    "engine",
    "engine.session",
    "engine.torch_engine",
    "engine.torch_guard",
    "export",
    "export.adapter_gguf",
    "export.bundle",
    "token_head",
    "engine.llama_cpp",
    "engine.llama_cpp_text",
    "engine.llama_cpp_engine",
    "engine.device_guard",
    "engine.stop",
    "engine.stream",
    "guard",
    "data",
    "data.example",
    "data.relabel",
    "data.perturbation",
    "data.augment",
    "data.sources",
    "data.public",
    "data.split",
    "data.batch",
    "evaluation",
    "evaluation.metrics",
    "evaluation.calibrate",
    "evaluation.plots",
    "evaluation.provenance",
    "evaluation.references",
    "evaluation.sets",
    "evaluation.scores",
    "evaluation.perturb",
    "evaluation.slices",
    "evaluation.report",
    "evaluation.figures",
    "evaluation.page",
    "evaluation.run",
    "export.texts",
    "export.vectors",
    "export.peft_seqcls",
    "export.parity",
    "export.run",
    "training",
    "training.checkpointing",
    "training.loss",
    "training.state",
    "training.card",
    "training.prefix_cache",
    "training.rows",
    "training.start",
    "training.run",
    "training.finish",
    "training.loop",
    "training.tokens",
    "bench",
    "bench.rows",
    "bench.timing",
    "bench.report",
    "bench.peak",
    "bench.paper",
    "bench.chat",
    "bench.setup",
    "bench.dual_path",
    "bench.check",
    "bench.score",
    "bench.train",
    "bench.probe",
    "bench.memory",
    "bench.grow",
    "bench.device_chat",
    "bench.device_probe",
    "bench.device",
    "bench.run",
    "terminal",
    "serving",
    "serving.config",
    "serving.job",
    "serving.metrics",
    "serving.worker",
    "serving.samples",
    "serving.wire",
    "serving.disconnect",
    "serving.schemas",
    "serving.results",
    "serving.guards",
    "serving.audit",
    "serving.service",
    "serving.playground",
    "serving.access",
    "serving.completions",
    "serving.moderations",
    "serving.detectors",
    "serving.status",
    "serving.app",
    "serving.run",
    "scale.deployment",
    "moderate_file",
    "moderate_command",
    "scale",
    "scale.bulk_store",
    "scale.bulk_table",
    "scale.bulk_rows",
    "scale.bulk_plan",
    "scale.bulk_shard",
    "scale.bulk_manifest",
    "scale.bulk",
    "bulk_command",
    "calibrate_command",
    "doctor",
    "cli",
    "__main__",
]

HEAVY = {"torch", "transformers", "peft", "sklearn", "datasets", "numpy", "pandas", "matplotlib"}
LIGHT_MODULES = (
    "errors",
    "files",
    "config",
    "conversation",
    "normalise",
    "taxonomy",
    "render",
    "verdict",
    "artifact",
    "engine.stream",
    "guard",
)
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
MAX_LINES = 400

FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted(Path(__file__).parent.rglob("*.py"))
MODULES = [path for path in FILES if path != PACKAGE / "__init__.py"]


def name_of(path: Path) -> str:
    """``src/lora_guard/engine/session.py`` is ``engine.session``, ``engine/__init__.py`` is ``engine``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imported(tree: ast.Module) -> Iterator[str]:
    """Every import, inside functions too, as ``package.module``; ``from a import b`` gives ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """The package's modules that a file imports, as they are named in ORDER; other names are not modules."""
    own = {name.removeprefix("lora_guard.") for name in imported(tree_of(path)) if name.startswith("lora_guard.")}
    return own.intersection(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_has_a_place_in_the_order_and_imports_only_from_those_before_it(path: Path) -> None:
    name = name_of(path)
    assert name in ORDER, f"{name} is new: give it a place in ORDER"
    allowed = set(ORDER[: ORDER.index(name)])
    assert own_imports(path) <= allowed


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_from_where_a_name_is_defined(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "lora_guard":
            assert {alias.name for alias in node.names} <= set(ORDER)


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=lambda path: path.name)
def test_a_file_is_short(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_opens_with_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(tree_of(path))
    assert docstring, "no docstring"
    assert docstring.splitlines()[0].endswith((".", ":")), "the first line is not a sentence"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_adapter_module_imports_peft(path: Path) -> None:
    imports_peft = any(name.partition(".")[0] == "peft" for name in imported(tree_of(path)))
    assert not imports_peft or name_of(path) == "adapter"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_unpickles_or_runs_a_models_own_code(path: Path) -> None:
    tree = tree_of(path)
    names = set(imported(tree))
    assert PICKLES.isdisjoint(name.partition(".")[0] for name in names)
    assert names.isdisjoint({"torch.load", "torch.save"})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("load", "save"), f"line {node.lineno}: torch.{node.attr} pickles"
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            assert off, f"line {node.value.lineno}: {node.arg} is on"


@pytest.mark.parametrize(
    "code",
    [
        "import lora_guard",
        *(f"import lora_guard.{name}" for name in LIGHT_MODULES),
        "import lora_guard.cli",
        "sys.argv = ['lora-guard', '--help']; runpy.run_module('lora_guard', run_name='__main__')",
    ],
)
def test_what_must_start_at_once_imports_nothing_heavy(code: str) -> None:
    program = f"import atexit, runpy, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))\n{code}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = result.stderr.split()
    assert "lora_guard" in loaded
    assert HEAVY.isdisjoint(loaded)
