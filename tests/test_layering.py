"""The shape of the code: imports point downward, and rooms stay small enough to be read at once."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Lower layers first. A module may import what stands before it, in its own layer or below.
LAYERS = (
    ("functional",),
    (
        "redaction",
        "setting_rules",
        "settings",
        "config",
        "checks",
        "axes",
        "support",
        "groups",
        "records",
        "control",
        "allocator",
        "matrix_products",
    ),
    ("tables", "plots", "protocols", "texts", "context"),
    ("pretrained",),
    ("models", "rewards", "prompts", "stopping", "sampling", "sampling_checks", "optimizer"),
    ("processes", "collector", "loss", "estimators", "metrics", "evaluation", "trpo", "update", "launch"),
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


LIBRARY = sorted((ROOT / "lmppo").rglob("*.py"))
LMPPO = [p for p in LIBRARY if p.parent.name not in ("functional",) and p != ROOT / "lmppo" / "__init__.py"]


def unit(path: Path) -> str:
    """A module of lmppo, or the package of lmppo that it is in."""
    return path.relative_to(ROOT / "lmppo").parts[0].removesuffix(".py")


def test_there_is_something_to_read():
    """A rule over no file at all would hold."""
    names = {label(path) for path in SOURCES}
    assert {
        "lmppo/trainer.py",
        "lmppo/run/run.py",
        "recipes/lab/grid.py",
        "reward_models/sentiment/training.py",
    } <= names


def test_every_module_has_its_layer():
    assert {unit(p) for p in LMPPO} | {"functional"} == set(ORDER)


def test_imports_point_downward():
    upward = []
    for path in LMPPO:
        own = unit(path)
        names = {n for n in imported(path) if path.parent.name == "lmppo" or not n.startswith(f"lmppo.{own}")}
        upward += [
            f"{label(path)} imports {name}, which stands above it"
            for name in sorted(names)
            if (m := module_of(name)) and ORDER.index(m) >= ORDER.index(own)
        ]
    assert not upward


def test_no_module_imports_from_the_package_itself():
    """``from lmppo import PPOConfig`` would hide which layer a name comes from."""
    hidden, allowed = [], (*ORDER, "__version__", "IMPORTED")
    for path in LMPPO:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and node.module == "lmppo":
                hidden += [f"{label(path)}: {a.name}" for a in node.names if a.name not in allowed]
    assert not hidden


def test_nothing_imports_what_stands_outside():
    """lmppo never imports reward_models or recipes, and reward_models never recipes."""
    rules = {"lmppo": ("reward_models", "recipes", "tests"), "reward_models": ("recipes", "tests")}
    found = [
        f"{label(path)} imports {name}"
        for folder, forbidden in rules.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in sorted(imported(path))
        if name.split(".")[0] in forbidden
    ]
    assert not found


def test_the_lowest_modules_do_without_the_hugging_face_stack():
    heavy = {"transformers", "peft", "datasets", "accelerate", "trl"}
    found = [
        f"{name} imports {module}"
        for name in LAYERS[1] + LAYERS[2]
        for path in [*(ROOT / "lmppo").glob(f"{name}.py"), *(ROOT / "lmppo" / name).glob("*.py")]
        for module in sorted(imported(path))
        if module.split(".")[0] in heavy
    ]
    assert not found


def test_rollout_and_update_meet_only_in_the_records():
    assert not {n for n in imported(ROOT / "lmppo" / "update.py") if n.startswith("lmppo.collector")}
    assert not {n for n in imported(ROOT / "lmppo" / "collector.py") if n.startswith("lmppo.update")}


def test_files_are_short():
    """Long files are worth a second look: is one thought in them another's?"""
    lines = {
        label(p): (len(p.read_text().splitlines()), 120 if label(p).startswith("recipes") else 400) for p in SOURCES
    }
    assert not {name: f"{count} lines, at most {limit}" for name, (count, limit) in lines.items() if count > limit}


def functions():
    """Every function of every source, by the place where it stands."""
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, FUNCTIONS):
                yield f"{label(path)}:{node.lineno} {node.name}", node


def test_functions_are_short_and_flat():
    long = [f"{where}: {n} lines, at most 60" for where, f in functions() if (n := body_lines(f)) > 60]
    deep = [f"{where}: nested {n} deep, at most 3" for where, f in functions() if (n := nesting(f.body)) > 3]
    assert not long + deep


def test_functions_return_at_most_pairs():
    """Longer tuples are records without names."""
    long = [
        f"{where}, line {node.lineno}"
        for where, function in functions()
        for node in ast.walk(function)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) > 2
    ]
    assert not long


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
