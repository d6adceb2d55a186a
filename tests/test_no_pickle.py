"""No file of lmppo can run code when it is loaded, and nothing is handed to a shell."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("lmppo", "reward_models", "recipes") for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
                   "os.system", "os.popen", "numpy.load", "np.load", "pandas.read_pickle", "pd.read_pickle"}  # fmt: skip


def offences(source: str) -> list[str]:
    """What a file does that it must not, by reading its syntax tree."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [m for m in modules if m.split(".")[0] in FORBIDDEN_MODULES]
            if isinstance(node, ast.ImportFrom):
                found += [f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in FORBIDDEN_CALLS]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in FORBIDDEN_CALLS else []
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if (keyword.arg, value) in {("shell", True), ("trust_remote_code", True), ("weights_only", False),
                                            ("use_safetensors", False), ("allow_pickle", True)}:  # fmt: skip
                    found.append(f"{name}({keyword.arg}={value})")
    return found


def test_there_is_something_to_read():
    names = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert {"lmppo/run/checkpoint.py", "lmppo/trainer.py", "lmppo/functional/losses.py"} <= names


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell():
    found = {path.relative_to(ROOT).as_posix(): offences(path.read_text()) for path in FILES}
    assert not {name: what for name, what in found.items() if what}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import dump", "eval('1')", "import torch\ntorch.load('x')", "from torch import load",
     "import os\nos.system('ls')", "import yaml\nyaml.load(f)", "subprocess.run('ls', shell=True)",
     "M.from_pretrained('x', trust_remote_code=True)", "np.load('x', allow_pickle=True)"],
)  # fmt: skip
def test_this_test_can_fail(source):
    assert offences(source)
