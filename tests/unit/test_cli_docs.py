"""What the documents say about the command line is what the command line accepts."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from selfray.cli import parse

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = ROOT / "docs" / "cli.md"
_CALL = re.compile(r"(?:^|.*[\s/])(?:python3? -m |-m )?selfray\s+(?P<words>.+)")


def _commands(text: str) -> list[str]:
    """The words after `selfray` of each command line in fenced blocks of shell."""
    found = []
    for language, block in re.findall(
        r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE
    ):
        if language not in {"", "bash", "sh", "console"}:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            call = _CALL.match(line.split(" #")[0])
            if call and not line.lstrip().startswith("#"):
                found.append(re.split(r"\s[|&><;]", call["words"])[0])
    return found


def _inline_commands(text: str) -> list[str]:
    """The same of inline code, but for patterns such as `selfray pretrain RECIPE ...`."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`selfray ([^`]+)`", outside)
    return [span for span in spans if " " in span and not re.search(r"\.\.\.|…|\b[A-Z]{2,}", span)]


CASES = [
    pytest.param(command, id=f"{page.name}: {command[:60]}")
    for page in PAGES
    if page != GENERATED
    for command in [*_commands(page.read_text()), *_inline_commands(page.read_text())]
]


@pytest.mark.parametrize("command", CASES)
def test_the_command_line_in_the_documents_parses(command: str) -> None:
    try:
        parse(shlex.split(command))
    except SystemExit as ending:
        assert ending.code == 0, "only --help and --version leave here"


def test_the_readme_shows_every_step_of_the_work() -> None:
    shown = {command.split()[0] for command in _commands((ROOT / "README.md").read_text())}
    assert {"ingest", "pretrain", "evaluate", "summary"} <= shown


def test_the_page_of_the_command_line_is_fresh() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "write_cli_docs.py"))
    assert GENERATED.read_text() == script["cli_page"](), "docs/cli.md is stale: run `make docs`"


def test_links_between_documents_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
