"""The house rules that a machine can check: layers, sizes, docstrings, README, docs, commands."""

from __future__ import annotations

import ast
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import scd
from docs import tables
from scd.cli import COMMANDS, main
from scd.model.build import build, num_parameters
from scd.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent

LAYERS = (
    ("ground", "runtime device_memory atomic stopping runlog results config diffusers_folder"),
    (
        "data",
        "clip data.video data.source data.toy data.manifest data.headers data.teco data.minecraft "
        "data.dmlab data.square data.ucf101 data.published data.latents data.latent_writer "
        "data.folder data.check data.doom data.record data.loader data.prompts",
    ),
    (
        "autoencoders, text",
        "autoencoder.pixels autoencoder.latents autoencoder.deep autoencoder.networks "
        "autoencoder.pictures autoencoder.wan autoencoder.tiny autoencoder.build text",
    ),
    ("flow matching", "flow"),
    (
        "model",
        "model.visibility model.attention model.block model.augment model.cache model.embed "
        "model.encoder model.decoder model.sizes model.skip model.cost model.initialise "
        "model.shards model.pretrained model.separable model.dense model.wan.config "
        "model.wan.block model.wan.transformer model.wan.text model.wan.times model.wan.names "
        "model.wan.cost model.wan.dense model.wan.decoder model.wan.compose model.wan.separable "
        "model.build",
    ),
    ("optimizers", "optim_states muon optim"),
    (
        "objectives",
        "objective.denoise objective.teacher_forcing objective.distill objective.score "
        "objective.self_forcing objective.match objective.discriminator objective.perceptual "
        "objective.reconstruct",
    ),
    ("state of a run", "checkpoint shipped encode_settings encode_parts encode"),
    (
        "engine",
        "engine.interface engine.plain engine.linear engine.attention engine.block engine.embed "
        "engine.modulation engine.encoder engine.decoder engine.graph engine.separable "
        "engine.dense engine.open engine.pool",
    ),
    ("rollout", "frame_timing rollout session streams text_stream"),
    (
        "measurement",
        "metrics.image metrics.memory metrics.drift metrics.frechet metrics.weights metrics.lpips "
        "metrics.fvd metrics.compress metrics.judge media plots predict judged measure evaluate "
        "train_judge sample side_by_side page report first_look processes protocols "
        "protocol_settings trajectories parts protocol_rows protocol_page evaluate_protocol",
    ),
    ("text to video", "text_to_video sample_text vbench pipeline embed_prompts"),
    (
        "trainer",
        "run run_folder initial sharding learner wan_source teacher matching tasks running fit "
        "held_out train plan autoencoder_settings autoencoder_parts autoencoder_run "
        "train_autoencoder",
    ),
    ("named runs", "presets distill distill_wan"),
    (
        "benchmark",
        "bench.limits bench.models bench.case bench.stream bench.crowd bench.timing bench.card "
        "bench.measure bench.compare",
    ),
    (
        "probe",
        "probe.intercept probe.subject probe.ours probe.our_wan probe.open probe.wan "
        "probe.trajectory probe.similarity probe.colours probe.attention probe.leave_one_out "
        "probe.reuse probe.splice probe.split probe.entries probe.measure probe.settings "
        "probe.maps probe.plots probe.sections probe.page probe.run",
    ),
    (
        "interventions",
        "intervene.settings intervene.change intervene.models intervene.table intervene.compare",
    ),
    (
        "serving",
        "serve.settings serve.client_messages serve.server_messages serve.protocol serve.errors "
        "serve.events serve.history serve.identity serve.memory serve.notes serve.snapshot "
        "serve.player serve.admission serve.starts serve.players serve.commands serve.rounds "
        "serve.shelf serve.eviction serve.inbox serve.stage serve.host serve.picture serve.decode "
        "serve.upload "
        "serve.rate serve.statistics serve.checks serve.service serve.access serve.outlet "
        "serve.seat serve.connection serve.http_api serve.app serve.run serve.ray_replica "
        "serve.ray_front serve.ray_app serve.play client "
        "environment",
    ),
    ("top", "convert convert_autoencoder convert_wan export demo cli __main__"),
)
"""The only allowed direction of imports: a module imports from modules before it, never after.
docs/architecture.md shows the same list."""

ORDER = [module for _, modules in LAYERS for module in modules.split()]

OPTIONAL_PACKAGES = {
    "vizdoom": {"data.doom"},
    "tensorboard": {"runlog"},
    "wandb": {"runlog"},
    "diffusers": {"probe.wan", "autoencoder.wan", "autoencoder.tiny", "autoencoder.networks"},
    "transformers": {"text"},
    "ftfy": {"text"},
    "torchao": {"optim_states"},
    "ray": {"serve.ray_app", "serve.ray_replica"},
    "aiohttp": {"serve.ray_front"},
    "yarl": {"serve.ray_front"},
}
"""Packages that an install may lack, or that are slow to load -> the modules that may import them,
inside functions too."""

LINES_SOFT, LINES_HARD = 300, 500
LONG_MODULES = {
    "checkpoint": "all that is written of a world and of a run, and how it is read again",
    "cli": "one small function per command, and what they share",
    "clip": "clips, batches and what steers them: every other module knows them by this one",
    "data.toy": "the rules of a world, how it is drawn and who walks in it are one thing",
    "model.dense": "one model, read beside the separable one from top to bottom",
    "model.separable": "one model, read beside the dense one from top to bottom",
    "model.wan.separable": "one model, read beside the dense one from top to bottom",
    "rollout": "one class with every phase of a stream, and its settings",
    "streams": "one class with every phase of many streams; its parts are in session and pool",
}
"""Modules above the soft limit -> why they are better whole."""

SCREEN_LINES = 60
LONG_FUNCTIONS = {"running.start_run": "all parts of a run, in the order in which they are made"}
"""Functions whose body is longer than a screen -> why they are better whole."""

SKIPPED_FOLDERS = {"__pycache__", ".git", ".venv", "build", "dist", "data", "demo", "out"}


def module_path(module: str) -> Path:
    return ROOT / "scd" / (module.replace(".", "/") + ".py")


def files_below(folder: Path, suffix: str = "") -> list[Path]:
    """Files of the project, without what tools and runs leave behind."""
    found = []
    for where, folders, names in os.walk(folder):
        here = Path(where)
        folders[:] = sorted(
            name
            for name in folders
            if not name.endswith((".egg-info", "_cache"))
            and not (name in SKIPPED_FOLDERS and (here / name) != ROOT / "scd" / "data")
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


def test_the_list_of_layers_holds_every_module():
    found = {name_of(path) for path in source_files() if path.name != "__init__.py"}
    assert found == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


def test_architecture_page_shows_the_same_layers():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    page = page[page.index("## Layers") : page.index("## The one interface")]
    rows = re.findall(r"^\| ([^|]+) \| ((?:`[\w./]+\.py`,? ?)+)\|", page, re.MULTILINE)
    shown = [
        (
            layer.strip(),
            " ".join(name[:-3].replace("/", ".") for name in re.findall(r"`(.+?)`", files)),
        )
        for layer, files in rows
    ]
    assert shown == list(LAYERS)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_one_way(module: str):
    allowed = set(ORDER[: ORDER.index(module)])
    for name, line in imported_modules(parsed(module_path(module))):
        if name.split(".")[0] != "scd" or name == "scd.__version__":
            continue
        # `from scd.flow import schedule` and `from scd import flow` both stand for scd.flow.
        target = name.removeprefix("scd.")
        if target not in ORDER:
            target = target.rpartition(".")[0]
        assert target in allowed, f"{module}.py:{line} imports {name}, which stands after it"


def test_folders_have_empty_roots():
    for folder in {path.parent for path in source_files()} - {ROOT / "scd"}:
        assert (folder / "__init__.py").read_text(encoding="utf-8") == "", folder
    # The root gives two names when asked for them, and loads nothing before.
    found = {name for name, _ in imported_modules(parsed(ROOT / "scd/__init__.py"))}
    assert found <= {"importlib", "importlib.import_module"}


def test_imports_stand_at_the_top_unless_the_package_is_optional():
    for path in source_files():
        tree = parsed(path)
        for node in ast.walk(tree):
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
    assert callers == {"model.attention", "engine.attention", "probe.intercept"}


def test_modules_are_short():
    lengths = {
        name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()
    }
    long = {name: lines for name, lines in lengths.items() if lines > LINES_SOFT}
    assert set(long) == set(LONG_MODULES), f"more than {LINES_SOFT} lines: {long}"
    assert max(lengths.values()) <= LINES_HARD


def test_functions_fit_a_screen():
    long = set()
    for path in source_files():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
                if (node.end_lineno or 0) - first.lineno >= SCREEN_LINES:
                    long.add(f"{name_of(path)}.{node.name}")
    assert long == set(LONG_FUNCTIONS)


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def undocumented(body: list[ast.stmt], where: str) -> Iterator[str]:
    """Public names in a module or class that lack a docstring."""
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if node.name.startswith("_"):
            continue
        # A setter has the docstring of its property.
        is_setter = any(ast.unparse(one).endswith(".setter") for one in node.decorator_list)
        if not ast.get_docstring(node) and not is_setter:
            yield f"{where}{node.name} (line {node.lineno})"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{where}{node.name}.")
            if is_dataclass(node):
                yield from undocumented_fields(node, f"{where}{node.name}.")


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


@pytest.mark.parametrize("module", ["__init__", *ORDER])
def test_every_public_name_and_field_has_a_docstring(module: str):
    tree = parsed(module_path(module))
    assert ast.get_docstring(tree), f"{module} has no docstring"
    assert not list(undocumented(tree.body, ""))


def test_a_missing_docstring_is_noticed():
    tree = ast.parse(
        "@dataclass\nclass Size:\n  'doc'\n  rows: int\n  'doc'\n  columns: int\n  def f(self): ..."
    )
    assert list(undocumented(tree.body, "")) == ["Size.f (line 7)", "Size.columns (line 6)"]


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)


def readme_tree() -> list[str]:
    """Paths of the README's file tree; a name may stand for several: `a.py, b.py  words`."""
    (block,) = [text for text in readme_blocks("text") if text.startswith("scd/")]
    paths, folders = [], []
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        del folders[indent // 2 :]
        for name in re.split(r"\s{2,}", line.strip())[0].split(", "):
            paths.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_readme_tree_is_true():
    shown = readme_tree()
    assert len(shown) == len(set(shown))
    for path in shown:
        found = ROOT / path
        assert found.is_dir() if path.endswith("/") else found.is_file(), f"{path} is not there"
    modules = {str(path.relative_to(ROOT)) for path in source_files() if path.stat().st_size > 0}
    folders = {
        f"{path.name}/"
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith(".")
    }
    folders -= {
        name for name in folders if name[:-1] in SKIPPED_FOLDERS or name.endswith("egg-info/")
    }
    pages = {str(path.relative_to(ROOT)) for path in files_below(ROOT / "docs", ".md")}
    scripts = {
        str(path.relative_to(ROOT))
        for folder, ending in (
            ("runs", ".sh"),
            ("examples", ".py"),
            ("benchmarks", ".py"),
            ("docs", ".py"),
        )
        for path in files_below(ROOT / folder, ending)
    }
    missing = (modules | folders | pages | scripts) - set(shown)
    assert not missing, f"not in the README's tree: {sorted(missing)}"


def test_readme_python_runs():
    (block,) = readme_blocks("python")
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["frame"].shape == (1, 3, 64, 64)
    assert names["rollout"].num_frames == 4


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
        "distill wan-dmd",
        "bench compare",
        "intervene skip",
    ],
)
def test_every_command_explains_itself(command: str):
    assert "--" in help_of(command.split())


def documents() -> list[Path]:
    return [ROOT / "README.md", *files_below(ROOT / "docs", ".md")]


def shown_commands() -> list[str]:
    """Lines of the pages' code blocks that run `scd`, continuation lines joined."""
    blocks = "".join(
        block
        for page in documents()
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    )
    return sorted(set(re.findall(r"^scd (?!/).*$", blocks.replace("\\\n", " "), re.M)))


@pytest.mark.parametrize("line", shown_commands())
def test_flags_in_the_pages_exist(line: str):
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    takes_name = (
        names[0] in ("train", "record", "convert", "export", "intervene") and names[1] != "PRESET"
    )
    takes_name = takes_name or names[:2] in (["bench", "compare"], ["distill", "wan-dmd"])
    page = help_of(names[: 2 if takes_name else 1])
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"{flag}\b", page), f"{flag} is no flag of scd {' '.join(names)}"


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
    for page in documents():
        for name in re.findall(
            r"`(scd/[\w/.]+|tests/[\w/.]+|docs/[\w/.]+)`", page.read_text("utf-8")
        ):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_conventions_page_has_all_letters():
    legend = dict(re.findall(r"^    (\w)  (.+)$", scd.__doc__ or "", re.MULTILINE))
    page = (ROOT / "docs/conventions.md").read_text(encoding="utf-8")
    page = page[page.index("## Letters") : page.index("## Names")]
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
