"""The house's laws that a machine can check, on the source text."""

import ast
import re
from pathlib import Path

import pytest

import qtjax

PACKAGE = Path(qtjax.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Rooms from the bottom up; a file imports only from rooms of its own or a lower level.
LEVELS = {
    "errors": 0, "atomic": 1, "tree": 1, "config": 1, "sections": 1, "flags": 1, "hub": 1, "pages": 1, "models": 2, "scoring": 2, "records": 2, "pruning": 3,
    "data": 3, "parallel": 3, "smol": 3, "overlays": 3, "checkpoints": 4, "report": 5, "evals": 6, "training": 6,
}  # fmt: skip
DOORS = 7


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def level(path: Path) -> int:
    return DOORS if path.name == "__main__.py" else LEVELS.get(room(path), DOORS)


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at top level) of every import in a file."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            found += [(name.name, top) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", top))
            if node.module == "qtjax":
                found += [(f"qtjax.{name.name}", top) for name in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward_and_stay_in_their_rooms(path):
    """Only models and checkpoints know flax; data knows no jax; torch and peft are for tests; nothing imports upward."""
    for module, top in imports(path):
        head = module.split(".")[0]
        assert head not in ("torch", "peft", "tensorflow", "pickle", "dill", "cloudpickle"), module
        if head == "flax":
            assert room(path) in ("models", "checkpoints")
        if room(path) == "data":
            assert head not in ("jax", "jaxlib", "optax", "orbax"), module
        if room(path) in ("scoring", "pruning"):
            assert not module.startswith(("qtjax.models", "qtjax.data", "qtjax.checkpoints")), module
        if room(path) == "report" and path.name != "__main__.py":
            assert not module.startswith(("qtjax.models", "qtjax.training", "jax")), module
        if module.startswith("qtjax.") and path.name != "__init__.py" and top:
            target = module.split(".")[1]
            assert LEVELS.get(target, DOORS) <= level(path), f"{path.name} imports upward: {module}"


def test_sources_hold_no_machine_and_no_leftover():
    """No path of a machine, no unfinished mark, no file named for nothing, in anything that is tracked."""
    for path in [*FILES, *ROOT.glob("configs/*.py"), *ROOT.glob("benchmarks/**/*.py"), ROOT / "README.md"]:
        text = path.read_text() if path.exists() else ""
        assert not re.search(r"(?<![\w.])/(work|tmp|root|home)/", text), path
        assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", text), path
        assert path.name not in ("utils.py", "helpers.py", "common.py", "misc.py")


def test_files_hold_one_idea():
    """A file past 350 lines wants a seam."""
    assert {str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text().splitlines())) > 350} == {}


def test_unsafe_calls_are_absent():
    """No pickle by another name, no remote code, no eval of text."""
    for path in FILES:
        text = path.read_text()
        assert "trust_remote_code=True" not in text and "allow_pickle=True" not in text, path
        assert not re.search(r"(?<![\w.])(eval|exec)\(", text), path


def names_compared(tree: ast.Module, names: set[str]) -> list[int]:
    """Lines on which a value is compared with one of the names: ==, in (...), a match's case, or a mapping's keys [value]."""
    places = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            places += [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            places.append(node.value)
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            places += [key for key in node.value.keys if key]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Dict):
            places += [key for key in node.func.value.keys if key]  # {"a": f, "b": g}.get(value)
    texts = [n for place in places for n in ast.walk(place) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return sorted({n.lineno for n in texts if n.value in names})


def test_nothing_asks_which_method_an_overlay_is():
    """A registered method's name is compared with in that method's own file alone; all else asks for what its record says."""
    from qtjax.overlays import METHODS

    asking = {}
    for path in FILES:
        own = {path.stem} if path.parent.name == "overlays" else set()
        if lines := names_compared(ast.parse(path.read_text()), set(METHODS) - own):
            asking[str(path.relative_to(PACKAGE))] = lines
    assert asking == {}


@pytest.mark.parametrize(
    "source",
    [
        'if method == "lora": pass', 'x = "lora" != method', 'if m in ("dora", "lora"): pass', 'x = {"lora": 1, "dora": 2}[m]',
        'x = {"lora": 1}.get(m)', 'match m:\n    case "dora" | "lora": pass', 'x = [o for o in many if o.method == "lora"]',
    ],
)  # fmt: skip
def test_a_chain_by_method_names_is_found(source):
    """The law above sees every spelling of the question; a name as a value or a default is no question."""
    assert names_compared(ast.parse(source), {"lora"})
    assert not names_compared(ast.parse('def f(method="lora"): return {"overlay.method": "lora"}, method == "none"'), {"lora"})


def test_every_module_says_what_it_is_for():
    """A docstring at the head of each file, and of each public function and class."""
    bare = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree) and path.read_text().strip():
            bare.append(str(path.relative_to(PACKAGE)))
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.name != "main":
                if not ast.get_docstring(node) and not isinstance(node, ast.ClassDef):
                    bare.append(f"{path.relative_to(PACKAGE)}:{node.name}")
    assert bare == []


def test_commands_in_readme_and_configs_parse(monkeypatch):
    """Every training command that a user is told to type names flags and files that exist, with values that pass."""
    import shlex

    from qtjax.config import load_config

    monkeypatch.chdir(ROOT)
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.py"))]
    commands = [
        match
        for path in texts
        for match in re.findall(r"python -m qtjax\.train (--config configs/(?:[^\n`\\]|\\+\n)*)", path.read_text())
    ]
    assert len(commands) >= 8
    for command in commands:
        argv = shlex.split(re.sub(r"\\+\n", " ", command))
        load_config("python -m qtjax.train", "", argv)
