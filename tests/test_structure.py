"""The house rules that a machine can check: layers, sizes, docstrings, README, docs, commands."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

import scd
from scd.cli import COMMANDS, main
from scd.models.build import build, num_parameters
from scd.training.presets import PRESETS
from tools import tables

ROOT = Path(__file__).resolve().parent.parent

ROOMS = (
    "common data autoencoders models preprocessing optim engine objectives streaming evaluation "
    "training sampling serving bench probing demo convert export"
).split()
"""The only allowed direction of imports: a room imports from itself and from rooms before it.
docs/architecture.md and the README's tree show the same list."""

TOP = {"__init__", "__main__", "cli", "completion", "probe", "usage"}
"""Modules that stand in no room."""

MAX_FILES = 60
"""Python files in one room."""

OPTIONAL_PACKAGES = {
    "vizdoom": {"data.doom"},
    "h5py": {"data.hdf5"},
    "pyarrow": {"data.lerobot_tables"},
    "crafter": {"data.environments.crafter"},
    "tensorboard": {"common.runlog"},
    "wandb": {"common.runlog"},
    "diffusers": {
        "probing.diffusers_wan",
        "autoencoders.wan",
        "autoencoders.tiny",
        "autoencoders.diffusers",
    },
    "transformers": {"autoencoders.text_encoder"},
    "ftfy": {"autoencoders.text_encoder"},
    "peft": {"models.lora"},
    "torchao": {"optim.states"},
    "ray": {"serving.ray_app", "serving.ray_replica"},
    "aiohttp": {"serving.ray_router"},
    "yarl": {"serving.ray_router"},
    "onnx": {"export.onnx_files"},
    "onnxscript": {"export.onnx_files"},
    "onnxruntime": {"export.onnx_engine"},
}
"""Packages that an install may lack, or that are slow to load -> the modules that may import them,
inside functions too."""

MAX_LINES = 600
"""Lines of a module above which it certainly holds more than one thing."""

SCREEN_LINES = 60
"""Lines of a function's body that fit a screen."""

SKIPPED_FOLDERS = {".git", ".venv", "build", "dist", "data", "demo", "out"}
KEPT_PLACES = {ROOT / "scd", ROOT / "tests"}
"""Where folders of these names are rooms."""


def files_below(folder: Path, suffix: str = "") -> list[Path]:
    """Files of the project, without what tools and runs leave behind."""
    found = []
    for where, folders, names in os.walk(folder):
        here = Path(where)
        folders[:] = sorted(
            name
            for name in folders
            if not name.endswith((".egg-info", "_cache", "__pycache__"))
            and not (name in SKIPPED_FOLDERS and here not in KEPT_PLACES)
        )
        found += [here / name for name in sorted(names) if name.endswith(suffix)]
    return found


def source_files() -> list[Path]:
    return files_below(ROOT / "scd", ".py")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    """`data.loader` for scd/data/loader.py; `` for scd/__init__.py."""
    parts = path.relative_to(ROOT / "scd").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Full names of everything a tree imports, also inside functions, with line numbers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name the package in full"
            assert node.module is not None
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def modules_by_name() -> dict[str, Path]:
    return {name_of(path): path for path in source_files() if path.name != "__init__.py"}


def graph_of_imports() -> dict[str, set[str]]:
    """Our modules -> those of ours that they import, also inside functions."""
    modules = modules_by_name()
    graph = {}
    for name, path in modules.items():
        graph[name] = set()
        for imported, line in imported_modules(parsed(path)):
            if imported.split(".")[0] != "scd" or imported == "scd.__version__":
                continue
            # `from scd.models.flow import schedule` and `from scd.models import flow` both
            # stand for scd.models.flow.
            target = imported.removeprefix("scd.")
            if target not in modules:
                target = target.rpartition(".")[0]
            assert target in modules, f"{path}:{line} imports {imported}, which is not there"
            graph[name].add(target)
    return graph


def test_every_module_stands_in_a_room():
    rooms = {path.parent.name for path in (ROOT / "scd").glob("*/__init__.py")}
    assert rooms == set(ROOMS)
    assert {path.stem for path in (ROOT / "scd").glob("*.py")} == TOP
    for room in ROOMS:
        found = files_below(ROOT / "scd" / room, ".py")
        assert len(found) <= MAX_FILES, f"{room} holds {len(found)} files"


def test_pages_show_the_same_rooms():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    page = page[page.index("## Rooms") : page.index("## The one interface")]
    assert re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE) == ROOMS


def test_rooms_import_one_way():
    for name, targets in graph_of_imports().items():
        room = name.partition(".")[0]
        allowed = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else [*ROOMS, *TOP]
        for target in targets:
            assert target.partition(".")[0] in allowed, f"{name} imports {target}"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; none: empty."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_module_imports_itself_through_others():
    assert circle(graph_of_imports()) == []


def test_a_circle_is_noticed():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) in (["b", "c", "b"], ["c", "b", "c"])


def test_folders_have_empty_roots():
    for folder in {path.parent for path in source_files()} - {ROOT / "scd"}:
        assert (folder / "__init__.py").read_text(encoding="utf-8") == "", folder


def test_the_root_gives_its_names_and_loads_nothing_before():
    code = "import scd, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert not loaded & {"torch", "numpy", "gymnasium", "matplotlib", "huggingface_hub"}
    assert sorted(scd.__all__) == scd.__all__ and set(scd.__all__) <= set(dir(scd))
    assert all(callable(getattr(scd, name)) for name in scd.__all__)
    # What a type checker reads is what is given.
    typed = {
        name.removeprefix("scd.")
        for name, _ in imported_modules(parsed(ROOT / "scd/__init__.py"))
        if name.rpartition(".")[2] in scd.__all__
    }
    assert typed == {f"{getattr(scd, name).__module__}.{name}"[4:] for name in scd.__all__}
    with pytest.raises(AttributeError, match="no attribute 'Wrld'.*World"):
        scd.Wrld  # noqa: B018


def test_imports_stand_at_the_top_unless_the_package_is_optional():
    for path in source_files():
        tree = parsed(path)
        # The command line imports a command when it is called, so that help answers at once.
        for node in ast.walk(tree) if name_of(path) != "cli" else ():
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                for name, line in imported_modules(node):
                    package = name.split(".")[0]
                    assert package in OPTIONAL_PACKAGES, f"{path}:{line}: {name} inside {node.name}"
        for name, line in imported_modules(tree):
            owners = OPTIONAL_PACKAGES.get(name.split(".")[0], {name_of(path)})
            assert name_of(path) in owners, f"{path}:{line}: {name} belongs to {owners}"


def test_torchvision_is_never_needed():
    for path in [*source_files(), *files_below(ROOT / "tests", ".py")]:
        assert "torchvision" not in {
            name.split(".")[0] for name, _ in imported_modules(parsed(path))
        }
    for name in ("constraints.txt", "pyproject.toml"):
        assert "torchvision" not in (ROOT / name).read_text(encoding="utf-8")


def test_only_the_attention_files_call_the_fused_kernels():
    callers = {
        name_of(path)
        for path in source_files()
        if re.search(r"scaled_dot_product_attention|flex_attention\(", path.read_text("utf-8"))
    }
    assert callers == {"models.attention", "engine.layers", "probing.intercept"}


def test_files_of_tensors_are_written_where_a_full_disk_is_an_os_error():
    """safetensors has an error of its own for it, which is none, nor a ValueError."""
    modules = [
        name_of(path)
        for path in source_files()
        if re.search(r"^from safetensors.* import .*save", path.read_text("utf-8"), re.MULTILINE)
    ]
    assert modules == ["common.weights"]


def is_av(call: ast.Call) -> bool:
    """Whether it opens a video."""
    return isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "av"


def loose_texts(tree: ast.AST) -> Iterator[int]:
    """Lines where a text file's encoding is not named, or its lines are cut by `splitlines`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        words = [one.value for one in node.args if isinstance(one, ast.Constant)]
        named = any(word.arg == "encoding" for word in node.keywords) or "utf-8" in words
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        is_open = isinstance(node.func, ast.Name) and node.func.id == "open"
        is_open |= method == "open" and bool({"r", "w", "a", "x"} & set(words)) and not is_av(node)
        is_binary = any(isinstance(word, str) and "b" in word and len(word) < 4 for word in words)
        if (is_open and not is_binary) or method in ("read_text", "write_text"):
            if not named:
                yield node.lineno
        elif method == "splitlines" and isinstance(cut := node.func, ast.Attribute):
            read = cut.value.func if isinstance(cut.value, ast.Call) else None
            if isinstance(read, ast.Attribute) and read.attr == "read_text":
                yield node.lineno


def test_texts_are_utf_8_by_name_and_lines_end_at_line_breaks_alone():
    folders = ("scd", "examples", "benchmarks")
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in folders
        for path in files_below(ROOT / folder, ".py")
        for line in loose_texts(parsed(path))
    ]
    assert not found
    for loose in (
        "open('a')",
        "open('a', 'w')",
        "path.open('a')",
        "path.read_text()",
        "path.write_text('a')",
        "path.read_text(encoding='utf-8').splitlines()",
    ):
        assert list(loose_texts(ast.parse(loose))) == [1], loose
    for fine in ("open('a', 'rb')", "path.read_text('utf-8')", "source.open('toy:32')"):
        assert not list(loose_texts(ast.parse(fine))), fine


def test_modules_are_short():
    for path in source_files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES, f"{name_of(path)} has {lines} lines"


def test_functions_fit_a_screen():
    long = set()
    for path in source_files():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
                if (node.end_lineno or 0) - first.lineno >= SCREEN_LINES:
                    long.add(f"{name_of(path)}.{node.name}")
    assert not long


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public classes without a docstring, and fields of settings without a string beneath them."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{node.name} (line {node.lineno})"
        # What a command reads is explained by --help, which shows these strings.
        if is_dataclass(node) and node.name.endswith("Config"):
            yield from undocumented_fields(node, f"{node.name}.")


def undocumented_fields(node: ast.ClassDef, where: str) -> Iterator[str]:
    """Public fields of a dataclass without a string beneath them."""
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        documented = (
            isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        )
        if not documented and not field.target.id.startswith("_"):
            yield f"{where}{field.target.id} (line {field.lineno})"


@pytest.mark.parametrize("room", ROOMS)
def test_modules_classes_and_settings_are_explained(room: str):
    for path in files_below(ROOT / "scd" / room, ".py"):
        if path.name != "__init__.py":
            tree = parsed(path)
            assert ast.get_docstring(tree), f"{path} has no docstring"
            assert not list(undocumented(tree)), path


def test_a_missing_docstring_is_noticed():
    tree = ast.parse(
        "class Size: ...\n@dataclass\nclass SizeConfig:\n  'doc'\n  rows: int\n  'doc'\n"
        "  columns: int"
    )
    assert list(undocumented(tree)) == ["Size (line 1)", "SizeConfig.columns (line 7)"]


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)


def test_readme_tree_shows_the_rooms():
    (block,) = [text for text in readme_blocks("text") if text.startswith("scd/")]
    shown = re.findall(r"^ *([\w.]+/?)  ", block, re.MULTILINE)
    rooms = [name.rstrip("/") for name in shown if (ROOT / "scd" / name).is_dir()]
    assert [name for name in rooms if name in ROOMS] == ROOMS
    folders = {
        f"{path.name}/"
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith(".")
    }
    folders -= {
        name for name in folders if name[:-1] in SKIPPED_FOLDERS or name.endswith("egg-info/")
    }
    assert folders - {"scd/"} <= set(shown), f"not in the tree: {folders - set(shown)}"


def test_ci_runs_the_readme_commands():
    commands = [line for block in readme_blocks("bash") for line in block.splitlines()]
    run = subprocess.run(
        [ROOT / ".ci/run", "--show"], capture_output=True, text=True, check=True, timeout=60
    )
    demo, test = run.stdout.splitlines()
    assert demo in commands and demo.endswith("&& scd demo")
    assert test in commands and test.endswith("&& pytest")
    for command in (demo, test):
        assert "-c constraints.txt" in command


def test_versions_agree():
    assert f"\nversion: {scd.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [pin for pin in pins if not pin.startswith("#")]
    assert "torch==2.13.0" in pins
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    names = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    required = re.findall(
        r'^    "([\w-]+)[\[>]', (ROOT / "pyproject.toml").read_text("utf-8"), re.M
    )
    assert required and {name.replace("_", "-") for name in required} <= names


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name: str):
    with torch.device("meta"):
        model = build(PRESETS[name].model)
    assert num_parameters(model) > 0


def help_of(words: list[str]) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        try:
            status = main([*words, "--help"])
        except SystemExit as stop:
            status = stop.code
    assert status in (0, None), words
    return printed.getvalue()


@pytest.mark.parametrize(
    "command",
    [
        "",
        *COMMANDS,
        "train toy",
        "record toy",
        "record doom",
        "record gym",
        "distill wan-dmd",
        "bench compare",
        "intervene skip",
    ],
)
def test_every_command_explains_itself(command: str):
    assert "--" in help_of(command.split())


def documents() -> list[Path]:
    return [ROOT / "README.md", *files_below(ROOT / "docs", ".md")]


def test_the_package_runs_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "scd", "--help"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_resolve():
    for page in documents():
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if re.match(r"https?://|mailto:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert target.is_relative_to(ROOT), f"{page.name}: {link} leaves the project"
            assert not anchor or anchor in anchors(target), f"{page.name}: no heading for {link}"


def test_modules_named_in_the_docs_exist():
    # The log is dated: it names files as they were called on that day.
    for page in set(documents()) - {ROOT / "docs/log.md"}:
        for name in re.findall(
            r"`(scd/[\w/.]+|tests/[\w/.]+|docs/[\w/.]+)`", page.read_text("utf-8")
        ):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_conventions_page_has_all_letters():
    legend = dict(re.findall(r"^    (\w)  (.+)$", scd.__doc__ or "", re.MULTILINE))
    page = (ROOT / "docs/conventions.md").read_text(encoding="utf-8")
    page = page[page.index("## Dimension names") : page.index("## Names")]
    shown = {
        letter for cell in re.findall(r"\| (\w(?:, \w)*) \|", page) for letter in cell.split(", ")
    }
    assert shown == set(legend) | {"w"}


def test_no_path_of_one_machine():
    machine_path = re.compile(r"(?<![\w.$}\])-])/" + r"(work|tmp|home|root|Users|mnt)/")
    texts = [
        path
        for path in files_below(ROOT)
        if path.suffix in {".py", ".md", ".sh", ".toml", ".txt", ".json"}
    ]
    for path in [*texts, ROOT / ".ci/run"]:
        found = machine_path.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(ROOT)} names {found}"


def test_generated_tables_are_up_to_date(capsys: pytest.CaptureFixture[str]):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
