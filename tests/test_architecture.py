"""What the tree promises: no methods in the engine, no unpickling anywhere, names, documentation of every setting and error."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapter_store import errors as store_errors
from server import config, errors
from server.metrics import Metrics

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "server").rglob("*.py"), *(ROOT / "adapter_store").rglob("*.py"), *(ROOT / "clients").rglob("*.py")])
METHOD_NAMES = re.compile(
    r"\b(a?lora|dora|ada_?lora|ia3|vera|loha|lokr|oft|boft|houlsby|pfeiffer|bitfit|peft|prefix[ _]tuning|prompt[ _]tuning)\b",
    re.IGNORECASE,
)
CONVERT = ROOT / "clients/python/medley_client/convert.py"
BANNED_MODULES = {"pickle", "dill", "joblib", "marshal", "shelve"}
BANNED_CALLS = {
    "eval",
    "exec",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "tarfile.extractall",
    "zipfile.extractall",
}


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_the_engine_knows_no_methods() -> None:
    executing = [*(ROOT / "server/engine").rglob("*"), *(ROOT / "server/adapters/kernels").rglob("*")]
    executing += [
        ROOT / "server/adapters" / f"{name}.py"
        for name in ("ir", "bank", "apply", "bottleneck", "rows", "sites", "packed", "program_file", "base_spec", "extents")
    ]
    for path in executing:
        if path.suffix in (".py", ".cpp", ".h"):
            found = METHOD_NAMES.search(path.read_text())
            assert found is None, f"{path.relative_to(ROOT)} names a method: {found[0]}"  # type: ignore[index]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        assert path == CONVERT or not BANNED_MODULES & {name.partition(".")[0] for name in names}
    for call in calls(tree):
        assert path == CONVERT or ast.unparse(call.func) not in BANNED_CALLS
        assert not any(word.arg == "shell" for word in call.keywords)
        if ast.unparse(call.func) == "torch.load":
            assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)


def test_names_and_docstrings() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not tree.body, f"{path.relative_to(ROOT)} does not say what it knows"
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                assert not re.search("(Manager|Handler|Helper|Util)s?$", node.name) or node.name == "BlockManager", node.name


def test_files_stay_one_noun() -> None:
    longest = sorted(((len(path.read_text().splitlines()), path) for path in SOURCES), reverse=True)
    assert longest[0][0] <= 330


def test_every_error_has_a_row() -> None:
    used = set()
    for path in [*(ROOT / "server/api").rglob("*.py"), ROOT / "server/app.py", ROOT / "server/errors.py"]:
        for call in calls(ast.parse(path.read_text())):
            if ast.unparse(call.func) == "ApiError" and call.args and isinstance(call.args[0], ast.Constant):
                used.add(call.args[0].value)
    for path in (ROOT / "server/engine").rglob("*.py"):
        for call in calls(ast.parse(path.read_text())):
            if ast.unparse(call.func) == "RequestError" and isinstance(call.args[0], ast.Constant):
                used.add(call.args[0].value)
    kinds = [item for item in vars(store_errors).values() if isinstance(item, type) and issubclass(item, store_errors.StoreError)]
    used |= {kind.code for kind in kinds}
    assert used <= errors.CODES.keys()


def test_every_fault_has_a_row() -> None:
    used = set()
    for path in [*(ROOT / "adapter_store").rglob("*.py"), *(ROOT / "server/adapters").rglob("*.py")]:
        for call in calls(ast.parse(path.read_text())):
            if (
                ast.unparse(call.func) in ("Fault", "source.fault", "self.fault")
                and call.args
                and isinstance(call.args[0], ast.Constant)
            ):
                used.add(call.args[0].value)
    assert used <= errors.FAULTS.keys(), used - errors.FAULTS.keys()


def test_settings_stay_few_and_compose_uses_known_ones() -> None:
    assert len(config.TABLE) <= 25
    known = {row.env for row in config.TABLE} | {"MEDLEY_TENANT", "MEDLEY_URL", "MEDLEY_API_KEY"}
    text = (ROOT / "docker-compose.yml").read_text() + (ROOT / "Dockerfile").read_text() + (ROOT / ".env.example").read_text()
    assert set(re.findall("MEDLEY_[A-Z_]+", text)) <= known


def test_dashboards_ask_for_metrics_that_exist() -> None:
    class Engine:
        stats = __import__("server.engine.types", fromlist=["EngineStats"]).EngineStats()
        restarts, ready = 0, True

    metrics = Metrics(Engine())  # type: ignore[arg-type]
    exported = {family.name for family in metrics.registry.collect()}
    text = (ROOT / "deploy/grafana/dashboards/overview.json").read_text()
    for name in set(re.findall("medley_[a-z_]+", text)):
        assert re.sub("(_total|_bucket|_count|_sum)$", "", name) in exported, name


def test_all_that_runs_is_installed() -> None:
    """What a wheel would leave out: directories that are no packages, and files that are no modules and not named as data."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    data = project["tool"]["setuptools"]["package-data"]
    for package in ("server", "adapter_store"):
        for path in (ROOT / package).rglob("*"):
            if "__pycache__" in path.parts or path.is_dir():
                continue
            assert (path.parent / "__init__.py").exists(), path.relative_to(ROOT)
            patterns = data.get(".".join(path.parent.relative_to(ROOT).parts), [])
            assert path.suffix == ".py" or any(path.match(pattern) for pattern in patterns), path.relative_to(ROOT)
