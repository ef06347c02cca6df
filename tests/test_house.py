"""The house: imports point to the left, light commands stay light, nothing of this machine is in the files."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import hfvram
from hfvram.model.families import MODULES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hfvram"
ROOMS = ("read", "model", "memory", "answer", "show")
TOP = ("__init__", "errors", "request", "units")
SOURCES = sorted(PACKAGE.rglob("*.py"))
CATALOGUE = json.loads((PACKAGE / "read" / "catalogue.json").read_text())["models"]
HEAVY = ("torch", "transformers", "numpy", "safetensors", "accelerate", "peft")


def name(path: Path) -> str:
    """`hfvram.read.hub` of its path."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in it, but not for the types alone."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield from (f"{node.module}.{a.name}" for a in node.names)


def room(module: str) -> int | None:
    """The room's number from the left; −1 for what stands at the top; None where it is no module of the package."""
    parts = module.split(".")
    if parts[0] != "hfvram":
        return None
    return ROOMS.index(parts[1]) if len(parts) > 1 and parts[1] in ROOMS else -1


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_point_to_the_left(path: Path) -> None:
    here = room(name(path))
    if path == PACKAGE / "__init__.py":
        return  # the door: `estimate` walks the whole road
    rooms = {module: number for module in imported(path) if (number := room(module)) is not None}
    assert here is not None
    assert {m: n for m, n in rooms.items() if n > here} == {}


def test_there_is_nothing_but_the_rooms_and_the_top() -> None:
    assert {p.parent.name for p in PACKAGE.glob("*/__init__.py")} == set(ROOMS)
    assert {p.stem for p in PACKAGE.glob("*.py")} == set(TOP)


def test_the_import_test_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("def f():\n    from hfvram.show import cli\n    import hfvram.errors\n")
    assert [(m, room(m)) for m in imported(file)] == [("hfvram.show.cli", 4), ("hfvram.errors", -1)]


def one_model_of_each_family() -> dict[str, str]:
    """Model type → the id of the first model of the catalogue that has it."""
    found: dict[str, str] = {}
    for model_id, line in CATALOGUE.items():
        config = line.get("config") or CATALOGUE[line["like"]]["config"]
        found.setdefault(config["model_type"], model_id)
    return found


def test_importing_and_a_formula_answer_for_every_family_are_light(tmp_path: Path) -> None:
    """In a process of its own, as the modules of this one say nothing."""
    code = f"""
import json, sys
import hfvram
assert not {{"click", "huggingface_hub"}} & set(sys.modules), "import hfvram"
def heavy():
    return sorted(set({HEAVY}) & set(sys.modules))
assert not heavy(), "import hfvram"
from hfvram.answer.question import Session
session = Session()
for model_type, model in json.loads(sys.argv[1]).items():
    e = session.estimate(model, hfvram.Request(method="formula"), offline=True)
    assert e.device_bytes > e.weights_bytes > 0, model_type
    assert not heavy(), (model_type, heavy())
print("light")
"""
    families = one_model_of_each_family()
    assert len(families) >= 40
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(families)], capture_output=True, text=True, env=env, check=False
    )
    assert (done.stdout, done.stderr) == ("light\n", "")


def test_every_reader_of_a_family_exists() -> None:
    folder = PACKAGE / "model" / "families"
    assert [m for m in MODULES if not (folder / f"{m}.py").is_file()] == []


def tracked() -> list[Path]:
    """The files that a clone has: those that git knows, or in a copy without git all but what tools leave behind."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [p for p in map(ROOT.joinpath, filter(None, done.stdout.split("\0"))) if p.is_file()]
    return [p for p in ROOT.rglob("*") if p.is_file() and not {"__pycache__", ".git", ".venv"} & set(p.parts)]


# written in two pieces, so that this file does not hold what it forbids
REGISTRIES = "|".join(
    a + re.escape(b) for a, b in [("pypi", ".org"), ("pythonhosted", ".org"), ("download.pytorch", ".org")]
)
MACHINE = "|".join(["/" + "(work|root|home)" + "/", r"\.\./" + "shared", str(Path.home()) + "/"])
FORBIDDEN = re.compile(f"({REGISTRIES}|(?<![\\w.~:/-])({MACHINE}))")


def test_no_file_names_a_registry_or_a_path_of_a_machine() -> None:
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in FORBIDDEN.finditer(text)]
    assert found == []


def test_the_search_for_paths_can_find_one() -> None:
    assert FORBIDDEN.search('open("' + "/root" + '/x")')
    assert FORBIDDEN.search("see .." + "/shared" + "/SPEC.md")
    assert FORBIDDEN.search("https://pypi" + ".org/simple")
    assert not FORBIDDEN.search("src/home/x, https://example.com/root/")


def undocumented(path: Path) -> Iterator[str]:
    """A module, and its public functions and classes, that lack a docstring.

    The families' readers are all of one kind, which their package describes: there a module's own docstring is enough.
    """
    tree = ast.parse(path.read_text())
    if path.stat().st_size and not ast.get_docstring(tree):
        yield name(path)
    for node in tree.body:
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if public and path.parent.name != "families" and not ast.get_docstring(node):
            yield f"{name(path)}.{node.name}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_what_is_public_says_what_it_is(path: Path) -> None:
    assert list(undocumented(path)) == []


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == hfvram.__version__
    assert f"## {hfvram.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_light_base_stays_light_and_is_pinned_for_the_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    pinned = {k.lower().replace("-", "_") for k in pins}
    base = {"click", "httpx", "huggingface_hub", "PyYAML"}
    assert {re.split(r"[<>=]", d)[0] for d in project["dependencies"]} == base
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["exact"] + [d for d in extras["dev"] if not d.startswith("hfvram")]
    assert {re.split(r"[<>=]", d)[0].lower().replace("-", "_") for d in wanted} <= pinned
    assert (pins["torch"], pins["transformers"]) == ("2.13.0", "5.17.0")
    assert set(project["scripts"]) == {"hfvram", "hf-vram"}
