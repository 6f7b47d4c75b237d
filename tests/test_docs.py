"""What the pages of docs/ and the docstrings show runs, what they link to is there, and nothing public is left out."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import INTERPRETED, PATIENCE

import dyreg_triton as dt
from dyreg_triton import testing
from dyreg_triton.layers.dyreg import DynamicGraph

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(dt.__path__, "dyreg_triton.")
    if not module.name.startswith(("dyreg_triton.demo", "dyreg_triton.kernels", "dyreg_triton.__main__"))
)
# interpreted, kernels take a minute for these, and strategies draw other sizes than the pages show
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="shown as it is where kernels are not interpreted")
on_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


class Markdown(doctest.DocTestParser):
    """Lines that open or close a block of code are no part of an example's output."""

    def parse(self, string: str, name: str = "<string>") -> list[str | doctest.Example]:
        return super().parse(re.sub(r"^```.*$", "", string, flags=re.MULTILINE), name)


def text_of(*pages: Path) -> str:
    return "\n".join(page.read_text() for page in pages or PAGES)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run_page(page: Path) -> doctest.TestResults:
    return doctest.testfile(
        str(page), module_relative=False, optionflags=FLAGS, parser=Markdown(), globs={"__name__": "__docs__"}
    )


# --- examples -------------------------------------------------------------------------------------------------------


@not_interpreted
@on_pages
def test_examples_of_a_page(page: Path, capsys: pytest.CaptureFixture) -> None:
    failed, run = run_page(page)
    assert run > 0, f"{page.name} has no example"
    assert failed == 0, capsys.readouterr().out


def test_a_wrong_example_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The last line before a closing fence counts, and so does an exception that does not come."""
    page = tmp_path / "page.md"
    page.write_text("```pycon\n>>> 1 + 1\n2\n```\n")
    assert run_page(page) == (0, 1)
    page.write_text(
        "```pycon\n>>> 1 + 1\n3\n```\n```pycon\n>>> 1\nTraceback (most recent call last):\nValueError\n```\n"
    )
    assert run_page(page) == (2, 2)
    assert "Expected:\n    3\nGot:\n    2\n" in capsys.readouterr().out


@on_pages
def test_python_shown_is_python_run(page: Path) -> None:
    """Code without prompts is not run, so there is none."""
    assert "```python" not in page.read_text()


@pytest.mark.parametrize("name", ["dyreg_triton", *MODULES])
def test_examples_of_docstrings(name: str, capsys: pytest.CaptureFixture) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert failed == 0, capsys.readouterr().out


# --- links and names ------------------------------------------------------------------------------------------------


@on_pages
def test_links(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = page.parent / path if path else page
        assert target.is_file(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"


def test_index_names_every_page() -> None:
    index = text_of(DOCS / "README.md")
    assert {page.name for page in PAGES} - {"README.md"} == set(re.findall(r"\]\(([\w-]+\.md)\)", index))


def test_pictures_are_shown_and_small() -> None:
    shown = set(re.findall(r"!\[[^\]]*\]\(([\w-]+\.webp)\)", text_of()))
    assert shown == {"contributions.webp", "profiles.webp", "variants.webp"}
    for name in shown:
        assert (DOCS / name).stat().st_size < 150_000, name


@pytest.mark.parametrize("module", [dt.ops, dt.layers, dt.tuning, dt.viz, testing], ids=lambda module: module.__name__)
def test_public_names_are_documented(module: object) -> None:
    text = text_of()
    assert [name for name in module.__all__ if not re.search(rf"\b{name}\b", text)] == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("page", "functions"),
    [
        ("dyreg.md", (dt.layers.DyReG.__init__, DynamicGraph.__init__, dt.layers.regions_from_offsets)),
        ("rstg.md", (dt.layers.RSTG.__init__,)),
        ("region.md", (dt.ops.region_pool, dt.ops.region_remap, dt.ops.region_kernel)),
        ("rsa.md", (dt.layers.RSA.__init__, dt.layers.RSA.kernels)),
        ("relational.md", (dt.ops.relational_attention, dt.reference.vanilla_relational_attention)),
        ("bilinear.md", (dt.ops.bilinear_transform,)),
        ("bat.md", (dt.layers.BATransform.__init__, dt.layers.BATBlock.__init__, dt.layers.NonLocalBlock.__init__)),
        ("viz.md", (dt.viz.attention_weights, dt.viz.contribution_maps, dt.viz.draw_frames, dt.viz.draw_sheet)),
        ("tuning.md", (dt.tuning.tune, dt.tuning.use.__init__)),
        ("testing.md", (testing.check_op, testing.Call.__init__, testing.TensorSpec.__init__, testing.mismatch)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_option_is_documented(page: str, functions: tuple) -> None:
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`\n]+`", text_of(DOCS / page)))))
    words |= {"self", "options", "graph"}  # **options of DyReG, **graph of its branch
    for function in functions:
        missing = set(inspect.signature(function).parameters) - words
        assert not missing, f"{page} does not tell of {sorted(missing)}"


def test_style() -> None:
    for page in PAGES:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            assert line.isascii(), f"{page.name}:{number}: {line}"
            assert not re.search(r"/work/|/tmp/|TODO|FIXME", line), f"{page.name}:{number}: {line}"


# --- pictures -------------------------------------------------------------------------------------------------------


@not_interpreted
@pytest.mark.slow
def test_pictures_can_be_drawn(tmp_path: Path) -> None:
    for package in ("matplotlib", "PIL", "mlxtend"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; `make pictures` brings it")
    from PIL import Image

    command = [sys.executable, str(DOCS / "pictures.py"), "--out", str(tmp_path), "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("contributions.webp", "profiles.webp", "variants.webp"):
        with Image.open(tmp_path / name) as drawn, Image.open(DOCS / name) as kept:
            assert drawn.size == kept.size, name
            assert len(drawn.convert("L").getcolors()) > 50, name
