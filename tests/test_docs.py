"""The documents: commands that the bundle understands, links that lead somewhere, and no leftovers."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_bundle import blob, save_image
from monai.bundle import ConfigParser
from monai.bundle import scripts as commands

from equireg import cli
from equireg.io import write_displacement_field
from equireg.landmarks import Landmarks, write_landmarks

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (ROOT / "README.md", ROOT / "bundle" / "docs" / "README.md") if path.exists()]
PAGES += sorted(ROOT.glob("bundle/docs/hosts/*.md"))
# Scripts among the documents tell in their first lines how they are run.
SCRIPTS = sorted({*ROOT.glob("bundle/docs/**/*.py"), *ROOT.glob("bundle/docs/**/*.sh")})
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("bundle/docs/**/*.md")})
PREFIX = "python -m monai.bundle"
# Options of MONAI's commands themselves; everything else overrides the config.
OWN_OPTIONS = {
    *("config_file", "meta_file", "logging_file", "run_id", "init_id", "final_id", "args_file", "tracking"),
    *("net_id", "filepath", "ckpt_file", "key_in_ckpt", "use_trace", "input_shape", "use_onnx", "converter_kwargs"),
    *("p", "n", "any", "device", "create_dir", "hash_val", "hash_type"),
}


def lines(path: Path, *languages: str) -> list[str]:
    """Return the commands of a page's fenced blocks, continued lines joined, without prompts and comments.

    Of a script these are the lines of its docstring; in shell, of its comments and of itself.
    """
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".sh":
        text = re.sub(r"^#(?!!)", "", text, flags=re.MULTILINE)
    else:
        fence = re.compile(rf"^[ \t]*```(?:{'|'.join(languages)})[ \t]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
        text = "\n".join(fence.findall(text))
    text = text.replace("\\\n", " ")
    stripped = (line.strip().removeprefix("$ ").strip() for line in text.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def monai_commands() -> list[tuple[str, str]]:
    """Return (page, command) for each MONAI command of the documents, also one behind `cd bundle &&`."""
    found = []
    for page in (*DOCUMENTS, *SCRIPTS):
        for line in lines(page, "bash", "sh", "shell", "console"):
            line = re.sub(r"torchrun .*-m monai\.bundle", PREFIX, line)
            for part in re.split(r"&&|;", line):
                if PREFIX in part:
                    found.append((page.relative_to(ROOT).as_posix(), part[part.index(PREFIX) :].strip()))
    return found


def parse(command: str) -> tuple[str, list[str], dict[str, str | None]]:
    """Split a command into MONAI's subcommand, positional arguments and options."""
    words = shlex.split(command.removeprefix(PREFIX), comments=True)
    positional: list[str] = []
    options: dict[str, str | None] = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            positional.append(word)
        elif "=" in word:
            key, value = word[2:].split("=", 1)
            options[key] = value
        else:
            options[word[2:]] = next(rest, None)
    return positional[0], positional[1:], options


def config_names(option: str) -> list[str]:
    """Return the files of a `--config_file` option: one name, or a list in Python's notation."""
    return list(ast.literal_eval(option)) if option.startswith("[") else [option]


def merged(names: Sequence[str], meta: str | None = None) -> ConfigParser:
    """Return the merged configs, with the metadata if they are named; files are named from inside the bundle."""
    parser = ConfigParser()
    parser.read_config([str(ROOT / "bundle" / name) for name in names])
    if meta:
        parser.read_meta(str(ROOT / "bundle" / meta))
    return parser


def problems(command: str) -> list[str]:
    """Say what is wrong with a MONAI command."""
    name, positional, options = parse(command)
    if not hasattr(commands, name):
        return [f"MONAI has no command '{name}'"]
    configs = config_names(options["config_file"] or "") if "config_file" in options else []
    found = [f"{config} does not exist" for config in configs if not (ROOT / "bundle" / config).is_file()]
    if found or not configs:
        return found
    parser = merged(configs, options.get("meta_file"))
    if name == "run":
        run_id = positional[0] if positional else "run"
        found += [] if run_id in parser else [f"no run id '{run_id}' in {configs}"]
    overrides = [key for key in options if key not in OWN_OPTIONS]
    return found + [f"no key '{key}' in {configs}" for key in overrides if key.replace("::", "#") not in parser]


MONAI_COMMANDS = monai_commands() or [pytest.param("", "", marks=pytest.mark.skip("no page shows a MONAI command yet"))]


@pytest.mark.parametrize(("page", "command"), MONAI_COMMANDS)
@pytest.mark.filterwarnings("ignore:(?s).*parsing config_file")
def test_monai_commands_name_configs_and_keys_that_exist(page: str, command: str) -> None:
    assert problems(command) == [], page


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("run training --config_file configs/train.json --epochs 3 --train#dataloader#num_workers=2", []),
        ("run --config_file \"['configs/train.json', 'configs/evaluate.json']\" --split test", []),
        ("run trainig --config_file configs/train.json", ["no run id 'trainig'"]),
        ("run training --config_file configs/trian.json", ["configs/trian.json does not exist"]),
        ("run training --config_file configs/train.json --epoch 3", ["no key 'epoch'"]),
        ("run --config_file configs/train.json --split test", ["no key 'split'"]),
        ("export --config_file configs/train.json", ["no command 'export'"]),
    ],
)
@pytest.mark.filterwarnings("ignore:(?s).*parsing config_file")
def test_the_check_itself_tells_right_from_wrong(command: str, expected: list[str]) -> None:
    found = problems(f"{PREFIX} {command}")
    assert len(found) == len(expected) and all(part in whole for part, whole in zip(expected, found))


@pytest.mark.parametrize("page", PAGES or [None], ids=str)
def test_make_targets_exist(page: Path | None) -> None:
    if page is None:
        pytest.skip("there are no pages yet")
    known = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        match for line in lines(page, "bash", "sh", "shell", "console") for match in re.findall(r"^make (\S+)", line)
    }
    named |= set(re.findall(r"`make ([a-z][\w-]*)", page.read_text()))
    assert named <= known


@pytest.mark.parametrize("page", DOCUMENTS or [None], ids=str)
def test_links_and_named_files_exist(page: Path | None) -> None:
    if page is None:
        pytest.skip("there are no pages yet")
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"#]+)\"", text)
    missing = [link for link in links if not re.match(r"\w+:", link) and not (page.parent / link).exists()]
    pages = set(re.findall(r"`([\w./-]+\.md)`", text))
    missing += [
        name for name in pages if not any((base / name).exists() for base in (page.parent, ROOT, ROOT / "bundle"))
    ]
    assert missing == []


@pytest.mark.parametrize("page", DOCUMENTS or [None], ids=str)
def test_no_leftovers(page: Path | None) -> None:
    if page is None:
        pytest.skip("there are no pages yet")
    found = re.findall(r"\b(?:TODO|FIXME|TBD|XXX|[Ll]orem ipsum)\b|/tmp/\S+", page.read_text())
    assert found == []


def test_shipped_weights_are_documented() -> None:
    page = ROOT / "README.md"
    names = json.loads((ROOT / "bundle" / "configs" / "metadata.json").read_text())["weights"]
    if not page.exists() or not names:
        pytest.skip("there is no README, or there are no shipped weights, yet")
    assert all(name in page.read_text() for name in names)


def equireg_commands(page: Path) -> list[list[str]]:
    """Return the words of each `equireg` command of a page."""
    found = [re.sub(r"torchrun .*-m equireg ", "equireg ", line) for line in lines(page, "bash")]
    found = [line for line in found if line.startswith("equireg ")]
    return [shlex.split(line)[1:] for line in found]


@pytest.mark.parametrize(
    "page", [page for page in (*DOCUMENTS, *SCRIPTS) if equireg_commands(page)], ids=lambda page: page.name
)
def test_equireg_commands_have_these_options(page: Path) -> None:
    for words in equireg_commands(page):
        assert cli._normalized(words)[0] in cli.COMMANDS


def script_commands() -> list[tuple[str, str]]:
    """Return (page, command) for each command of the documents that runs a script, without what is set before it."""
    starts = re.compile(r"(?:\w+=\S+ +)*((?:python3?|bash) +[^\s-]\S*\.(?:py|sh)\b.*)")
    return [
        (page.relative_to(ROOT).as_posix(), match.group(1))
        for page in (*DOCUMENTS, *SCRIPTS)
        for line in lines(page, "bash", "sh", "shell", "console")
        if (match := starts.match(line))
    ]


def arguments(script: Path) -> dict[str, list[str]]:
    """Return the arguments of a script's commands as python-fire takes them; a single command is called ""."""
    tree = ast.parse(script.read_text())
    functions = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    names = {name: [arg.arg for arg in (*args.args, *args.kwonlyargs)] for name, args in functions.items()}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "fire.Fire"]
    if not calls:
        return {"": []}
    given = calls[0].args[0]
    if isinstance(given, ast.Dict):
        return {ast.literal_eval(key): names[ast.unparse(value)] for key, value in zip(given.keys, given.values) if key}
    return {"": names[ast.unparse(given)]}


def script_problems(command: str) -> list[str]:
    """Say what is wrong with a command that runs a script from inside the repository or the bundle."""
    name, *words = shlex.split(command, comments=True)[1:]
    script = next((base / name for base in (ROOT, ROOT / "bundle") if (base / name).is_file()), None)
    if script is None:
        return [f"{name} does not exist"]
    if script.suffix == ".sh":
        return []
    known = arguments(script)
    called = "" if "" in known else words[0] if words else ""
    if called not in known:
        return [f"{name} has no command '{called}'"]
    options = [word[2:].split("=")[0] for word in words if word.startswith("--")]
    return [f"{name} has no option '{option}'" for option in options if option not in known[called]]


@pytest.mark.parametrize(("page", "command"), script_commands())
def test_commands_run_scripts_that_exist_with_options_that_they_have(page: str, command: str) -> None:
    assert script_problems(command) == [], page


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python bundle/docs/hosts/tutorial_loop.py --spatial_dims 3", []),
        ("python bundle/docs/hosts/tutorial_loop.py --spatial_dim=3", ["tutorial_loop.py has no option 'spatial_dim'"]),
        ("python docs/hosts/deploy/app.py -i in -o out -m model.ts", []),
        ("python app.py -i in -o out -m model.ts", ["app.py does not exist"]),
        ("python bundle/docs/benchmarks/benchmark.py all", ["no command 'all'"]),
        ("bash bundle/docs/hosts/labels.sh", ["labels.sh does not exist"]),
    ],
)
def test_the_check_of_scripts_tells_right_from_wrong(command: str, expected: list[str]) -> None:
    found = script_problems(command)
    assert len(found) == len(expected) and all(part in whole for part, whole in zip(expected, found))


def test_scripts_say_how_they_are_run() -> None:
    """Commands are found in docstrings and comments: each script of the hosts that can be run shows its own."""
    shown = {(page, shlex.split(command, comments=True)[1]) for page, command in script_commands()}
    for script in sorted(ROOT.glob("bundle/docs/hosts/**/*.*")):
        runs = script.suffix == ".sh" or (script.suffix == ".py" and "__main__" in script.read_text())
        page = script.relative_to(ROOT).as_posix()
        assert not runs or (page, page) in shown or (page, page.removeprefix("bundle/")) in shown


def test_the_page_on_files_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command and every piece of Python of the page runs, in its order, on files called as there."""
    page = ROOT / "bundle" / "docs" / "registering.md"
    monkeypatch.chdir(tmp_path)
    far = np.diag([1.0, 1.0, 1.2, 1.0])
    far[:3, 3] = (90, -40, 10)
    for name, affine in (("moving", far), ("fixed", np.eye(4))):
        save_image(tmp_path / f"{name}.nii.gz", blob((26, 24, 22), (12, 12, 11), 9, seed=len(name)), affine)
    save_image(tmp_path / "label.nii.gz", (blob((26, 24, 22), (12, 12, 11), 6) > 0).astype(np.int16), far)
    (tmp_path / "pairs.csv").write_text(
        "moving,fixed,moving_label,fixed_label\nmoving.nii.gz,fixed.nii.gz,label.nii.gz,\n"
    )
    write_landmarks(Landmarks(torch.tensor([[102.0, -28.0, 22.0]])), tmp_path / "landmarks.fcsv")
    for name in ("fixed_to_middle", "middle_to_moving"):
        write_displacement_field(torch.ones(3, 26, 24, 22), np.eye(4), tmp_path / f"{name}.nii.gz")
    for words in equireg_commands(page):
        cli.main(words)
    names = ("moved.nii.gz", "moved_label.nii.gz", "landmarks_in_fixed.csv", "fixed_to_moving.nii.gz", "affine.tfm")
    assert all((tmp_path / name).exists() for name in names[1:]) and (tmp_path / "registered" / names[0]).exists()
    assert (tmp_path / "evaluation" / "evaluation.csv").exists() and (tmp_path / "registered" / "batch.csv").exists()
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(block, scope)
    assert (tmp_path / "registered" / "fixed_to_moving.h5").exists()
