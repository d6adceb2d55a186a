"""The shape of the code: imports point downward, and rooms stay small enough to be read at once."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lower layers first. A module may import what stands before it, in its own layer or below.
LAYERS = (
    ("functional",),
    ("setting_rules", "settings", "config", "checks", "axes", "support", "records", "control"),
    ("tables", "plots", "protocols"),
    ("rewards", "models", "critics", "prompts", "sampling", "optimizer"),
    ("collector", "loss", "estimators", "metrics", "trpo", "update", "launch"),
    ("run", "explain", "trainer"),
    ("cli", "__main__"),
)
ORDER = [name for layer in LAYERS for name in layer]

SOURCES = sorted(p for folder in ("lmppo", "reward_models", "recipes") for p in (ROOT / folder).rglob("*.py"))
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), label(path))


def imported(path: Path) -> set[str]:
    """Full names of all modules a file imports, anywhere in it: lazily and for type checkers too."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}:{node.lineno}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def module_of(name: str) -> str | None:
    """The module of lmppo that ``lmppo.<module>...`` belongs to."""
    parts = name.split(".")
    return parts[1] if parts[0] == "lmppo" and len(parts) > 1 and parts[1] in ORDER else None


LMPPO = sorted(p for p in (ROOT / "lmppo").rglob("*.py") if p.parent.name != "functional" and p.stem != "__init__")


def unit(path: Path) -> str:
    """A module of lmppo, or the package of lmppo that it is in."""
    return path.relative_to(ROOT / "lmppo").parts[0].removesuffix(".py")


def test_every_module_has_its_layer():
    assert {unit(p) for p in LMPPO} | {"functional"} == set(ORDER)


@pytest.mark.parametrize("path", LMPPO, ids=label)
def test_imports_point_downward(path):
    own = unit(path)
    names = {n for n in imported(path) if path.parent.name == "lmppo" or not n.startswith(f"lmppo.{own}")}
    upward = {name for name in names if (m := module_of(name)) and ORDER.index(m) >= ORDER.index(own)}
    assert not upward, f"{path.stem} imports {sorted(upward)}, which stands above it"


@pytest.mark.parametrize("path", sorted((ROOT / "lmppo").rglob("*.py")), ids=label)
def test_the_library_never_imports_rewards_or_recipes(path):
    assert not {n for n in imported(path) if n.split(".")[0] in ("reward_models", "recipes", "tests")}


@pytest.mark.parametrize("path", sorted((ROOT / "reward_models").rglob("*.py")), ids=label)
def test_rewards_never_import_recipes(path):
    assert not {n for n in imported(path) if n.split(".")[0] in ("recipes", "tests")}


def test_the_lowest_modules_do_without_the_hugging_face_stack():
    for name in LAYERS[1] + LAYERS[2]:
        heavy = {n.split(".")[0] for n in imported(ROOT / "lmppo" / f"{name}.py")}
        assert not heavy & {"transformers", "peft", "datasets", "accelerate", "trl"}, name


def test_rollout_and_update_meet_only_in_the_records():
    assert not {n for n in imported(ROOT / "lmppo" / "update.py") if n.startswith("lmppo.collector")}
    assert not {n for n in imported(ROOT / "lmppo" / "collector.py") if n.startswith("lmppo.update")}


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_files_are_short(path):
    limit = 120 if path.is_relative_to(ROOT / "recipes") else 400
    lines = len(path.read_text().splitlines())
    assert lines <= limit, f"{lines} lines, at most {limit}: move what is a thought of its own to a file of its own"


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_functions_are_short_and_flat(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, FUNCTIONS):
            lines, depth = body_lines(node), nesting(node.body)
            assert lines <= 60, (
                f"{label(path)}:{node.lineno} {node.name} has {lines} lines without docstring, at most 60"
            )
            assert depth <= 3, f"{label(path)}:{node.lineno} {node.name} is nested {depth} deep, at most 3"


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_functions_return_at_most_pairs(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            assert len(node.value.elts) <= 2, f"{label(path)}:{node.lineno}: return a record instead of a long tuple"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def nesting(statements: list[ast.stmt]) -> int:
    """How deep blocks stand in blocks; ``elif`` is no deeper than its ``if``, nested functions count for themselves."""
    return max((block_depth(s) for s in statements if isinstance(s, BLOCKS)), default=0)


def block_depth(block: ast.stmt) -> int:
    if isinstance(block, ast.Match):
        return 1 + max(nesting(case.body) for case in block.cases)
    otherwise = getattr(block, "orelse", [])
    chained = isinstance(block, ast.If) and len(otherwise) == 1 and isinstance(otherwise[0], ast.If)
    inner = [
        getattr(block, "body", []),
        getattr(block, "finalbody", []),
        *(h.body for h in getattr(block, "handlers", [])),
    ]
    depth = 1 + max(nesting(body) for body in [*inner, [] if chained else otherwise])
    return max(depth, block_depth(otherwise[0])) if chained else depth


MEASURED = '''
def f():
    """Doc.

    More.
    """
    for x in y:
        if x:
            pass
        elif y:
            while z:
                pass
'''


def test_the_measures_measure():
    function = ast.parse(MEASURED).body[0]
    assert body_lines(function) == 6
    assert nesting(function.body) == 3


def test_there_is_no_utils_file():
    assert not [p for p in SOURCES if p.stem in ("utils", "util", "helpers", "common", "misc")]
