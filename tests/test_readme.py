"""What the README shows runs, and what it names is there."""

import re
import sys
import types
from pathlib import Path

import published

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_code_blocks_run(capsys, monkeypatch):
    theirs = types.ModuleType("your_project")
    theirs.make_model = published.RSANet
    monkeypatch.setitem(sys.modules, "your_project", theirs)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "modules swapped" in printed
    assert "torch.Size([2, 8, 9, 4])" in printed


def test_commands_and_files_are_there():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).is_file(), path
    assert not re.search(r"[A-Z]+_TABLE|TODO|FIXME", README)
