"""The documentation builds without a warning, names what there is, and lacks nothing public."""

import importlib
import importlib.util
import inspect
import io
import pkgutil
import re
import shlex
import subprocess
import sys
import zlib
from contextlib import redirect_stdout
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer

import tvlens
from tvlens.cli.app import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md")])
WRITTEN = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
SHELVES = sorted(
    ".".join(("tvlens", *stub.parent.relative_to(Path(tvlens.__file__).parent).parts))
    for stub in Path(tvlens.__file__).parent.rglob("*.pyi")
)
NEEDS = ("sphinx", "myst_parser", "furo")
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
RUN = re.compile(
    r"^<!-- run -->\n```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Page(HTMLParser):
    """The anchors of a page, and what it links to or shows."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links = {""}, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors.add(given.get("id"))
        self.links += [given[key] for key in ("href", "src") if given.get(key)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of pages, built anew."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the documentation was not built: {missing[0]} is not installed")
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def entries(built):
    """Where the entry of every name stands."""
    content = (built / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = [line.split() for line in zlib.decompress(content).decode().splitlines()]
    return {line[0]: line[3].replace("$", line[0]) for line in lines if line[1].startswith("py:")}


def words(path):
    return path.read_text(encoding="utf-8")


def commands(text):
    """Lines of a shell, in blocks and in a line."""
    blocks = [body for kind, body in FENCE.findall(text) if kind == "bash"]
    lines = [line for body in blocks for line in body.splitlines()]
    return [*lines, *CODE.findall(FENCE.sub("", text))]


def anchors(path):
    """What a code host makes of the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", words(path), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {"", *(re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads)}


def test_every_link_of_the_built_pages_leads_somewhere(built):
    pages = {path: Page(path) for path in built.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = target.is_file() and (
                target not in pages or unquote(parts.fragment) in pages[target].anchors
            )
            if not there:
                broken.append((path.name, link))
    assert not broken
    assert len(pages) > len(PAGES)


def test_built_pages_need_no_network(built):
    shown = [link for path in built.rglob("*.html") for link in Page(path).links]
    assets = [link for link in shown if re.search(r"\.(js|css|woff2?|png|svg)(\?|$)", link)]
    assert assets
    assert not [link for link in assets if urlsplit(link).netloc]


@pytest.mark.parametrize("shelf", SHELVES)
def test_every_name_of_a_shelf_has_an_entry(shelf, entries):
    module = importlib.import_module(shelf)
    public = [name for name in module.__all__ if f"{shelf}.{name}" != "tvlens.errors"]
    assert not [name for name in public if f"{shelf}.{name}" not in entries]


def test_an_entry_says_what_the_docstring_says_and_shapes_as_they_are_written(built, entries):
    page = words(built / entries["tvlens.lens.ReplaceHeads"].split("#")[0])
    page = unescape(re.sub(r"<[^>]+>", "", page))
    assert "hook_z of the chosen heads is replaced by given values." in page
    assert "Bool[Tensor, 'variant layer head']" in page
    assert "jaxtyping" not in page
    assert entries["tvlens.patch"].startswith("api/tvlens.html")
    assert entries["tvlens.scores.patch"].startswith("api/scores.html")


def test_a_name_in_a_line_links_to_its_entry(built):
    assert "api/lens.html#tvlens.lens.Lens.outputs" in words(built / "lens.html")
    assert "api/scores.html#tvlens.scores.split_half" in words(built / "scores.html")


def test_every_error_has_its_cause_its_remedy_and_its_entry(entries):
    classes = [
        name
        for name, value in vars(tvlens.errors).items()
        if inspect.isclass(value) and value.__module__ == "tvlens.errors"
    ]
    text = words(DOCS / "errors.md")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    assert sorted(sections) == sorted(classes)
    for name, section in sections.items():
        assert "| cause | remedy |" in section, name
        rows = re.findall(r"^\| (?!cause)(.+?) \| (.+?) \|$", section, re.MULTILINE)
        assert rows, name
        assert f".. autoexception:: tvlens.errors.{name}\n" in section
        assert f".. raised:: {name}\n" in section
        assert f"tvlens.errors.{name}" in entries


def test_who_raises_an_error_is_linked(built):
    page = words(built / "errors.html")
    for name in ("tvlens.lens.intervene", "tvlens.lens.load", "tvlens.tasks.load_folder"):
        assert f"#{name}" in page
    assert "Raised by commands." not in page.split('id="downloaderror"')[0]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_names_in_a_page_are_there(path):
    text = words(path)
    for link in LINK.findall(FENCE.sub("", text)):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = (path.parent / parts.path).resolve() if parts.path else path
        assert target.exists(), link
        assert not parts.fragment or parts.fragment in anchors(target), link
    for name in re.findall(r"\btvlens(?:\.[A-Za-z_]\w*)+", text):
        if not name.endswith((".py", ".pyi")):
            pkgutil.resolve_name(name)
    files = re.findall(r"\b(?:analyses|scripts|notebooks|tests)/[\w/-]+\.(?:py|ipynb)", text)
    files += [f"analyses/{name}.py" for name in re.findall(r"-m analyses\.(\w+)", text)]
    for name in files:
        assert (ROOT / name).exists() or "NAME" in name, name


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_in_a_page_exist_with_their_options(path):
    targets = re.findall(r"^([a-z0-9-]+):", words(ROOT / "Makefile"), re.MULTILINE)
    for line in commands(words(path)):
        given = shlex.split(line, comments=True)
        if given[:1] == ["make"] and len(given) > 1:
            assert given[1] in targets or given[1].isupper(), line
        if given[:1] != ["tvlens"]:
            continue
        command, *rest = [typer.main.get_command(app), *given[1:]]
        known = options(command)
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            found = command.commands.get(rest.pop(0))
            assert found is not None, line
            command, known = found, known | options(found)
        asked = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert asked <= known | {"--help"}, line


def options(command):
    return {opt for one in command.params for opt in (*one.opts, *one.secondary_opts)}


RUNS = [(path, *block) for path in PAGES for block in RUN.findall(words(path))]


@pytest.mark.parametrize(
    ("path", "code", "printed"), RUNS, ids=[f"{path.stem}-{n}" for n, (path, *_) in enumerate(RUNS)]
)
def test_code_that_is_marked_runs_and_prints_what_is_shown(path, code, printed):
    said = io.StringIO()
    with redirect_stdout(said):
        exec(compile(code, str(path), "exec"), {"__name__": path.stem})
    assert said.getvalue()
    assert not printed or said.getvalue() == printed


def test_readme_is_short_and_begins_as_the_quick_start():
    readme, page = words(ROOT / "README.md"), words(DOCS / "quickstart.md")
    assert len(readme.splitlines()) <= 130
    shown = [
        [body for kind, body in FENCE.findall(text) if kind in ("python", "text")][:2]
        for text in (readme, page)
    ]
    assert shown[0] == shown[1]
    (shell,) = [body for kind, body in FENCE.findall(readme) if "tvlens tasks" in body]
    assert set(shell.splitlines()) <= set(page.splitlines())


def test_every_shelf_and_every_figure_has_its_page():
    listed = re.findall(r"^\.\. shelf:: (\S+)$", "".join(map(words, PAGES)), re.MULTILINE)
    assert sorted(listed) == SHELVES
    shown = set(re.findall(r"analyses/figures/([\w-]+\.png)", "".join(map(words, PAGES))))
    assert shown == {path.name for path in (ROOT / "analyses" / "figures").glob("*.png")}


def test_every_page_is_in_the_contents():
    contents = words(DOCS / "index.md")
    for path in DOCS.glob("*.md"):
        assert path.stem == "index" or f"\n{path.stem}\n" in contents, path.name
