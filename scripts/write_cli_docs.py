"""Write docs/cli.md from the command line's own help: `make docs`."""

from __future__ import annotations

from pathlib import Path

from selfray.cli import COMMANDS, command_parser, top_parser

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def cli_page() -> str:
    """The page, as Markdown."""
    helps = {"selfray": top_parser().format_help()}
    helps |= {f"selfray {name}": command_parser(name).format_help() for name in COMMANDS}
    sections = [f"## {name}\n\n```\n{text.rstrip()}\n```\n" for name, text in helps.items()]
    note = "Written by `make docs` from the help of each command. Do not edit.\n"
    return "\n".join(["# The command line\n", note, *sections])


if __name__ == "__main__":
    PAGE.write_text(cli_page())
    print(f"wrote {PAGE}")
