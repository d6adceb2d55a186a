"""The package as a whole: what it exports, and that it stays light."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import lmppo.functional

HEAVY = ("transformers", "accelerate", "datasets", "peft", "trl")


def test_importing_it_loads_torch_and_nothing_heavy():
    """In a fresh process: a user who wants the math does not wait for the models."""
    script = f"import sys, lmppo.functional; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_its_modules_import_torch_and_the_standard_library_only():
    """Read from the source, so that a lazy import inside a function counts too."""
    allowed = {"torch", *sys.stdlib_module_names}
    for path in Path(lmppo.functional.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed or name.startswith("lmppo.functional."), f"{path.name}: {name}"


def test_the_public_list_is_complete():
    """Every public function of the modules is exported (those of the private _inputs are not), sorted."""
    exported = lmppo.functional.__all__
    assert exported == sorted(exported)
    defined = {
        name
        for module in ("advantages", "baselines", "kl", "losses", "masked")
        for name, thing in vars(sys.modules[f"lmppo.functional.{module}"]).items()
        if inspect.isfunction(thing) and not name.startswith("_") and thing.__module__ == f"lmppo.functional.{module}"
    }
    of_logprobs = {"support_logprobs", "token_logprobs", "token_entropy", "token_logprobs_and_entropy"}
    assert set(exported) == defined | of_logprobs


def test_scalars_are_keyword_only_and_shapes_are_documented():
    """Tensors by position, numbers by name; and each docstring has its Args and Returns."""
    for name in lmppo.functional.__all__:
        function = getattr(lmppo.functional, name)
        for argument in inspect.signature(function).parameters.values():
            is_number = argument.annotation in (float, float | None)
            assert not is_number or argument.kind is argument.KEYWORD_ONLY, f"{name}({argument.name})"
        for section in ("Args:", "Returns:", "Raises:", "``"):
            assert section in function.__doc__, f"{name}: {section}"
