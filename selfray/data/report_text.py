"""The text of a report: its sections, sentences and placeholders.

Headings are those that occur in MIMIC-CXR (Johnson et al., Scientific Data 2019), by the counts of
its published sectioning, and those of OpenI.
"""

from __future__ import annotations

import difflib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

SECTIONS = ("indication", "technique", "comparison", "findings", "impression")

PLACEHOLDER = "___"
"""What any mark of removed text becomes; that of MIMIC-CXR."""

_ALIASES = {
    "indication": (
        "INDICATION", "INDICATIONS", "HISTORY", "CLINICAL HISTORY", "PATIENT HISTORY",
        "CLINICAL INFORMATION", "CLINICAL INDICATION", "CLINICAL DETAILS", "CLINICAL DATA",
        "REASON FOR EXAM", "REASON FOR EXAMINATION", "REASON FOR THIS EXAMINATION",
        "REASON FOR STUDY",
    ),
    "technique": ("TECHNIQUE", "TECHNIQUES"),
    "comparison": (
        "COMPARISON", "COMPARISONS", "COMPARISON EXAM", "COMPARISON FILM", "REFERENCE EXAM",
    ),
    "findings": ("FINDINGS", "FINDING"),
    "impression": (
        "IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS", "OPINION",
        "FINDINGS AND IMPRESSION", "FINDINGS/IMPRESSION",
    ),
    "other": (
        "EXAMINATION", "TYPE OF EXAMINATION", "NOTIFICATION", "RECOMMENDATION", "RECOMMENDATIONS",
        "RECOMMENDATION(S)", "ADDENDUM", "FINAL ADDENDUM", "WET READ", "WETREAD", "OTHER",
        "PRELIMINARY REPORT",
    ),
}  # fmt: skip
# Words that also open sentences ("NOTE: ..."): headings at the start of a line only.
_LINE_ALIASES = ("EXAM", "DATE", "COMMENT", "COMMENTS", "NOTE", "PROCEDURE", "STUDY", "PFI")
_KIND = {alias: kind for kind, aliases in _ALIASES.items() for alias in aliases} | dict.fromkeys(
    _LINE_ALIASES, "other"
)
_UNHEADED = ""
_FINAL = "FINAL REPORT"
# What these hold below their first paragraph is the description, where there is no other.
_BEFORE_DESCRIPTION = {"EXAMINATION", "EXAM", "TYPE OF EXAMINATION", "STUDY", "PROCEDURE"}
_WITHIN = re.compile(r"\b(FINDINGS|IMPRESSION|COMPARISON|INDICATION|HISTORY|TECHNIQUE)\b")
_PROJECTION = re.compile(
    r"\b(?:CHEST|PORTABLE|RIBS|(?:PA|AP|FRONTAL|LATERAL) AND"
    r"|(?:ONE|TWO|FRONTAL|LATERAL|PA|AP) VIEWS?)"
)
_CAPITALS = r"[A-Z0-9 \t()/,&.'-]"
_HEADING = re.compile(r"[ \t]*([A-Za-z][^:：\n]{0,59}?)[ \t]*[:：][ \t]*(.*)")
_IN_LINE = re.compile(
    r"(?<![^\s:：])(?:"
    + "|".join(
        re.escape(alias).replace(r"\ ", r"[ \t]+")
        for alias in sorted(
            (a for aliases in _ALIASES.values() for a in aliases), key=len, reverse=True
        )
    )
    + r")[ \t]*[:：]"
)
_FINAL_MARK = re.compile(r"(?<![^\s:：])FINAL\s+REPORT\s*[:：]?(?!\S)")
# The foot of a page to the head of the next, which repeats who and when; heads are a few lines.
_PAGE_BREAK = re.compile(r"\(Over\).{0,600}?\(Cont\)|\((?:Over|Cont)\)", re.DOTALL)
_RULE = re.compile(r"^[ \t]*[-_=*]{5,}[ \t]*$", re.MULTILINE)
_MARKS = r"X{4,}|(?<![A-Za-z])XXX(?![A-Za-z])|\[\*\*[^\n]{0,60}?\*\*\]|![A-Z]{3,40}!|<#{2,40}>"
_REMOVED = re.compile(rf"_*(?:_{{2}}|{_MARKS})(?:_|{_MARKS})*")
_MOST_PASSES = 3
_CONTROL = dict.fromkeys((*range(9), *range(14, 28), 127, 0xFEFF))


@dataclass(frozen=True)
class Sections:
    """A report by its sections, each of one line; "" where there is none.

    Attributes:
        indication: Why the image was taken, or the history.
        technique: How.
        comparison: With which earlier images.
        findings: What is seen.
        impression: What it means.
        other: All else, a line `HEADING: text` each; `OTHER` where it had no heading.
    """

    indication: str = ""
    technique: str = ""
    comparison: str = ""
    findings: str = ""
    impression: str = ""
    other: str = ""

    def text(self) -> str:
        """The canonical text: a line `HEADING: text` for each section that there is.

        `parse_report` gives these sections again, if they came from it.
        """
        lines = [f"{name.upper()}: {value}" for name in SECTIONS if (value := getattr(self, name))]
        return "\n".join([*lines, self.other] if self.other else lines)

    @property
    def placeholders(self) -> int:
        """How often text was removed before we saw it."""
        return self.text().count(PLACEHOLDER)


@dataclass
class _Block:
    """A heading and the lines below it."""

    kind: str
    name: str
    lines: list[str]

    @property
    def text(self) -> str:
        return _one_line(" ".join(self.lines))

    @property
    def paragraphs(self) -> list[str]:
        parts = re.split(r"\n\s*\n", "\n".join(self.lines))
        return [part for part in map(_one_line, parts) if part]


def parse_report(text: str) -> Sections:
    """Find the sections of a report.

    A heading is a known name with a colon, in capitals anywhere, or at the start of a line; also a
    misspelt one, or one that contains a known name, in capitals at the start of a line. A section
    that is there twice is joined. Of a report with a line `FINAL REPORT`, what stands above it is
    preliminary, and goes to `other`. A heading that names projections (`CHEST, TWO VIEWS:`) opens
    the findings where no other does. Without findings and impression, the paragraphs below the
    first one of the last section are the findings, as in MIMIC-CXR; a text without any heading is
    findings. Page breaks (`(Over)` to `(Cont)`) and ruled lines are dropped, placeholders become
    `___`, and spaces and line breaks one space.

    Args:
        text: Of any length and script, as it was written, or canonical.
    """
    sections = _parsed(text)
    # A heading broken over two lines is none until the lines are one: it is looked for again.
    for _ in range(_MOST_PASSES):
        again = _parsed(sections.text())
        if again == sections:
            break
        sections = again
    return sections


def _parsed(text: str) -> Sections:
    """The sections by the lines as they are."""
    lines = "\n".join(text.translate(_CONTROL).splitlines())
    marked = _FINAL_MARK.sub(f"\n{_FINAL}:\n", _PAGE_BREAK.sub(" ", lines))
    marked = _IN_LINE.sub(_on_its_own_line, _RULE.sub("", marked))
    blocks = _blocks(marked)
    last_final = max((n for n, b in enumerate(blocks) if b.name == _FINAL), default=0)
    if any(block.text for block in blocks[last_final:]):
        preliminary, blocks = blocks[:last_final], blocks[last_final:]
    else:
        preliminary = []
    found: dict[str, list[str]] = {name: [] for name in SECTIONS}
    other = [_other_line(block) for block in preliminary]
    stated = any(b.text for b in blocks if b.kind in ("findings", "impression"))
    if not stated:
        _name_description(blocks)
    for block in blocks:
        if block.kind == "projection":
            other.append(f"EXAMINATION: {_one_line(block.name)}")
            if stated:
                other.append(_line("EXAMINATION", block.text))
            else:
                found["findings"].append(block.text)
        elif block.kind in found:
            found[block.kind].append(block.text)
        else:
            other.append(_other_line(block))
    sections = {name: " ".join(filter(None, texts)) for name, texts in found.items()}
    return Sections(**sections, other="\n".join(filter(None, other)))


def says_something(text: str) -> bool:
    """Whether a text has a letter of any script; placeholders, numbers and marks say nothing.

    Args:
        text: Of a section or sentence from `parse_report`, where removed text is `___`.
    """
    return any(character.isalpha() for character in text)


def count_sections(reports: Iterable[str]) -> dict[str, int]:
    """How many reports have each section.

    Args:
        reports: Texts.

    Returns:
        Counts: `reports`, one for each of `SECTIONS`, `findings_and_impression`,
        `neither_findings_nor_impression`, and `placeholders`, reports with text removed.
    """
    names = ("reports", *SECTIONS, "findings_and_impression", "neither_findings_nor_impression")
    counts: Counter[str] = Counter(dict.fromkeys((*names, "placeholders"), 0))
    for report in reports:
        sections = parse_report(report)
        counts.update(name for name in SECTIONS if getattr(sections, name))
        counts["reports"] += 1
        counts["findings_and_impression"] += bool(sections.findings and sections.impression)
        counts["neither_findings_nor_impression"] += not (sections.findings or sections.impression)
        counts["placeholders"] += sections.placeholders > 0
    return dict(counts)


def _blocks(text: str) -> list[_Block]:
    blocks = [_Block(_UNHEADED, _UNHEADED, [])]
    for line in text.splitlines():
        name, rest = line.strip(), ""
        if name not in _KIND:
            match = _HEADING.match(line)
            if match is None:
                blocks[-1].lines.append(line)
                continue
            name, rest = " ".join(match[1].split()), match[2]
        kind = _kind(name, blocks[-1].kind)
        if kind is None:
            blocks[-1].lines.append(line)
        else:
            blocks.append(_Block(kind, name.upper(), [rest]))
    return blocks


def _kind(name: str, above: str) -> str | None:
    """Which section a heading at the start of a line opens, or None if it is none."""
    if name == _FINAL:
        return _UNHEADED
    if name.upper() in _KIND and name[0].isupper():
        return _KIND[name.upper()]
    if not re.fullmatch(f"{_CAPITALS}+", name):
        return None
    within = _WITHIN.search(name)
    if within:
        return _KIND[within[1]]
    # Misspelt ones are one or two letters off: "IMPRESSON" is 0.95 alike, "EXPRESSION" 0.80.
    close = difflib.get_close_matches(name, [s.upper() for s in SECTIONS], 1, 0.84)
    if close:
        return close[0].lower()
    # Below FINDINGS, "CHEST:" is one of several regions.
    described = above in ("findings", "impression")
    return "projection" if _PROJECTION.search(name) and not described else None


def _on_its_own_line(heading: re.Match[str]) -> str:
    """Break the line before a heading, unless it ends a longer heading ("CHEST FINDINGS:")."""
    start = heading.start()
    line = heading.string[max(0, start - 61) : start].rpartition("\n")[2]
    words = " ".join(heading[0][:-1].split())
    name = f"{' '.join(line.split())} {words}"
    opens = line.strip()[:1].isalpha() and len(line) + len(words) < 60
    longer = opens and _kind(name, _UNHEADED) is not None
    return heading[0] if longer else f"\n{words}: "


def _name_description(blocks: list[_Block]) -> None:
    """Turn what must be the description, where no heading says so, into findings."""
    if any(block.kind == "projection" and block.text for block in blocks):
        return
    for block in reversed(blocks):
        if block.kind == _UNHEADED and block.text:
            block.kind = "findings"
            return
        if block.kind in SECTIONS or block.name in _BEFORE_DESCRIPTION:
            first, *rest = block.paragraphs or [""]
            if rest:
                blocks.append(_Block("findings", "FINDINGS", [" ".join(rest)]))
                block.lines = [first]
            if block.text:
                return


def _other_line(block: _Block) -> str:
    if block.kind == "other":
        return _line(block.name, block.text)
    # What stands above FINAL REPORT may have headings, too, that must not open sections again.
    return _line("PRELIMINARY REPORT" if block.kind else "OTHER", block.text)


def _line(name: str, text: str) -> str:
    return f"{name}: {text}" if text else ""


def _one_line(text: str) -> str:
    return " ".join(_REMOVED.sub(PLACEHOLDER, text).split())


# Not the end of a sentence; those of the second line only before a small letter.
_ABBREVIATIONS = frozenset(
    {"dr", "drs", "mr", "mrs", "ms", "prof", "st", "vs", "e.g", "i.e", "cf", "approx", "ca", "fig"}
)
_BEFORE_SMALL = frozenset({"a.m", "p.m", "etc", "resp", "incl", "max", "min", "dist", "ext", "int"})
_END = re.compile(r"[.!?…]+[\"')\]]*(?=\s|$)|[。！？]+[”」』）\"')\]]*|\n")
_LIST_NUMBER = re.compile(r"\s*\(?\d{1,2}[.)]\s*")


def sentences(text: str) -> list[str]:
    """Split a text at the ends of its sentences.

    Decimals (2.5 cm), list numbers (1. ...) and abbreviations (Dr., vs.) do not end one; a line
    break does, and so do 。！？ without a space.

    Args:
        text: Of any length and script.

    Returns:
        Sentences without the space around them, none empty.
    """
    ends = _sentence_ends(text)
    parts = (text[start:end].strip() for start, end in zip([0, *ends], ends, strict=False))
    return [part for part in parts if part]


def cut_at_sentence(text: str, fits: Callable[[str], bool]) -> tuple[str, bool]:
    """Keep the longest beginning of whole sentences that fits.

    Where not even the first sentence fits, it is cut at a word, and where not even the first word
    fits, at a character.

    Args:
        text: Of any length and script.
        fits: Whether a beginning fits; what begins one that fits must fit, too. It is called about
            log2 times as often as there are sentences.

    Returns:
        The beginning, "" if nothing fits, and whether anything was cut off.
    """
    text = text.strip()
    if fits(text):
        return text, False
    ends = _sentence_ends(text)
    words = [match.end() for match in re.finditer(r"\S+", text[: ends[0]])]
    for places in (ends, words, range(len(text) + 1)):
        count = bisect_right(places, False, key=lambda end: not fits(text[:end].rstrip()))
        if count and (kept := text[: places[count - 1]].rstrip()):
            return kept, True
    return "", True


def _sentence_ends(text: str) -> list[int]:
    """Where sentences end, ascending; the last is the end of the text."""
    ends, start = [], 0
    for match in _END.finditer(text):
        if _ends_sentence(text, start, match):
            ends.append(match.end())
            start = match.end()
    return ends if text[start:].strip() == "" and ends else [*ends, len(text)]


def _ends_sentence(text: str, start: int, mark: re.Match[str]) -> bool:
    if not mark[0].startswith("."):
        return True
    if _LIST_NUMBER.fullmatch(text, start, mark.end()):
        return False
    # Longer words are no abbreviations; without a bound, long text would be slow.
    before, word = ["", "", *text[max(start, mark.start() - 12) : mark.start()].split()][-2:]
    following = text[mark.end() : mark.end() + 8].lstrip()[:1]
    bare = word.lower().lstrip("([\"'")
    if bare in _ABBREVIATIONS or (word == "No" and following.isdigit()):
        return False
    initial = len(bare) == 1 and word.isupper()
    if initial and before.lower().rstrip(".") in _ABBREVIATIONS:
        return False
    return not (following.islower() and (initial or bare in _BEFORE_SMALL))
