"""The documentation says what the code does: tables against the code, examples run, links that lead somewhere."""

import json
import re
import runpy
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "reward_models").glob("*.md")])


def tables(path: Path, header: str) -> list[list[str]]:
    """The cells of every row of the tables whose header row starts with ``header``."""
    rows, inside = [], False
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0].startswith(header):
            inside = True
        elif inside and not set(line) <= set("|- "):
            rows.append(cells)
    return rows


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def documented_metrics() -> list[str]:
    """The names in docs/metrics.md; test_metrics.py holds them to what runs log."""
    return [name for row in tables(DOCS / "metrics.md", "name") for name in quoted(row[0])]


def test_every_metric_is_explained_once():
    rows = tables(DOCS / "metrics.md", "name")
    assert len(set(documented_metrics())) == len(documented_metrics()) > 40
    for name, formula, unit, healthy, _ in rows:
        assert formula and unit and healthy, name


def test_old_metric_names_lead_to_new_ones():
    from lmppo.config import PPOConfig

    metrics = set(documented_metrics())
    known = {*metrics, *PPOConfig().to_dict()}
    rows = [row for header in ("trl 0.11", "trl 1.12", "OpenAI") for row in tables(DOCS / "metrics.md", header)]
    assert len(rows) > 40
    for old, new, difference in rows:
        assert new == "none" or set(quoted(new)) <= metrics, old
        assert quoted(old) and (new != "none" or difference or "var" in old or "len" in old), old
        assert set(quoted(difference)) <= {*known, "num_mini_batches", "completions.jsonl"}, old


def test_every_setting_is_explained_with_its_true_default():
    from lmppo.config import PPOConfig

    rows = tables(DOCS / "configuration.md", "setting")
    defaults = {name: yaml.safe_load(default.strip("`")) for (name,), default in ((quoted(r[0]), r[1]) for r in rows)}
    defaults = {name: None if value == "none" else value for name, value in defaults.items()}
    real = PPOConfig().to_dict()
    assert list(defaults) == list(real), "the same settings, in the order of PPOConfig"
    for name, value in real.items():
        written = float(defaults[name]) if isinstance(value, float) else defaults[name]  # YAML reads 1e-5 as text
        assert written == value and type(written) is type(value), name
    for name, _, why, source in rows:
        assert why and source, name


def test_the_settings_that_may_change_on_resume_are_listed():
    from lmppo.run.directory import FREE_SETTINGS

    text = (DOCS / "configuration.md").read_text().partition("## Settings that may change on resume")[2]
    listed = text.partition("accepts them:")[2].partition("Any other change")[0]
    assert set(quoted(listed)) == FREE_SETTINGS


def test_the_reward_examples_run(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "rewards.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    (tmp_path / "rewards.py").write_text("\n".join(blocks))
    runpy.run_path(str(tmp_path / "rewards.py"))


def test_the_code_names_ideas_and_not_the_numbers_of_the_notes():
    """Only docs/notes.md numbers its sections; a module may point to them by title."""
    headings = re.findall(r"^##+ (?:N\d+ )?(.*)$", (DOCS / "notes.md").read_text(), re.MULTILINE)
    sources = [path for folder in ("lmppo", "reward_models", "recipes") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 40
    for path in sources:
        text = path.read_text()
        assert not re.findall(r"\bN\d{1,2}\b", text), path
        pointers = re.findall(r"^Background: docs/notes\.md, (.*)$", text, re.MULTILINE)
        titles = re.findall(r'"([^"]+)"', " ".join(pointers))
        assert len(pointers) <= 1 and set(titles) <= set(headings), (path, titles)


def test_the_readme_example_runs_and_learns(tmp_path, monkeypatch):
    """As it is printed, from a directory that looks like the repository's root."""
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "example.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("example.py")
    (run,) = (tmp_path / "runs").iterdir()
    rewards = [json.loads(line)["reward"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rewards) == 20 and sum(rewards[-5:]) > 5 * sum(rewards[:5])
    assert (run / "final" / "model.safetensors").exists()


def anchors(page: Path) -> set[str]:
    """What a link may name after ``#``."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    broken, count = [], 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            file, _, anchor = target.partition("#")
            path, count = (page.parent / file).resolve() if file else page, count + 1
            if not path.exists() or (anchor and anchor not in anchors(path)):
                broken.append(f"{page.relative_to(ROOT)} links to {target}")
    assert count > 100 and not broken


def test_files_named_in_commands_exist():
    """A command that a reader may copy names only files that are there."""
    missing = [
        f"{page.relative_to(ROOT)} names {name}"
        for page in PAGES
        for block in re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        for name in re.findall(r"(?<![\w/.])((?:recipes|benchmarks|tests|reward_models)/[\w/.-]*\w)", block)
        if not (ROOT / name).exists()
    ]
    assert not missing


def test_the_tree_of_the_architecture_page_is_the_tree():
    text = (DOCS / "architecture.md").read_text().partition("## The tree")[2].partition("```\n")[2].partition("```")[0]
    package = text.partition("lmppo/\n")[2].partition("\nreward_models/")[0]
    named = set(re.findall(r"([a-z_]+)\.py", package)) | ({"functional"} if "functional/" in package else set())
    modules = {p.stem for p in (ROOT / "lmppo").rglob("*.py") if not p.stem.startswith("_")} | {"functional"}
    assert named == modules
