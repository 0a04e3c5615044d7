"""Sections, sentences and placeholders of reports, laid out as those of MIMIC-CXR are."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfray.data.report_text import (
    SECTIONS,
    Sections,
    count_sections,
    cut_at_sentence,
    parse_report,
    sentences,
)

FULL = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 
 INDICATION:  ___F with new onset cough  // eval for infection
 
 TECHNIQUE:  Chest PA and lateral
 
 COMPARISON:  None.
 
 FINDINGS:
 
 There is no focal consolidation.  A 2.5
 cm nodule projects over the left base.
 
 IMPRESSION:
 
 1. Left nodule; CT is advised.
 2. No pneumonia.
 
 NOTIFICATION:  Told to Dr. ___ by ___ at 9:14 PM.
"""  # noqa: W293
WET = """ WET READ: ___ ___ ___ 9:14 PM
  No pneumothorax.
  IMPRESSION: Probably clear.
 ______________________________________________________________________________
                                 FINAL REPORT
 HISTORY:  Fever.
 
 FINDINGS:  Small left effusion.
 
 IMPRESSION:  Effusion.
"""  # noqa: W293
DESCRIPTION_LAST = """                                 FINAL REPORT
 REASON FOR EXAMINATION:  Line placement.
 
 COMPARISON:  ___.
 
 The line ends in the superior vena cava.
 
 No pneumothorax.
"""  # noqa: W293
TWO_VIEWS = """                                 FINAL REPORT
 CHEST, TWO VIEWS:  ___
 
 HISTORY:  Chest pain.
 
 FINDINGS:  The lungs are clear.
 
 IMPRESSION:  Normal.
"""  # noqa: W293
PORTABLE = """                                 FINAL REPORT
 HISTORY:  Intubated.
 
 PORTABLE CHEST:  The tube ends 3 cm above the carina.
 
 The lungs are clear.
"""  # noqa: W293
UNHEADED = """                                 FINAL REPORT
 Comparison is made with ___.
 
 The heart is large.  The lungs are clear.
"""  # noqa: W293
PAGES = """                                 FINAL REPORT
 FINDINGS:  The heart is large.  The lungs
                                                             (Over)
 
 ___  ___
                               FINAL REPORT
                               (Cont)
 are clear.
 
 IMPRESSION:  Large heart.
"""  # noqa: W293


def section(text: str, name: str) -> str:
    return getattr(parse_report(text), name)


def test_the_full_layout_is_split_and_nothing_of_it_is_lost():
    assert parse_report(FULL) == Sections(
        indication="___F with new onset cough // eval for infection",
        technique="Chest PA and lateral",
        comparison="None.",
        findings="There is no focal consolidation. A 2.5 cm nodule projects over the left base.",
        impression="1. Left nodule; CT is advised. 2. No pneumonia.",
        other="EXAMINATION: CHEST (PA AND LAT)\nNOTIFICATION: Told to Dr. ___ by ___ at 9:14 PM.",
    )
    assert set(FULL.split()) - {"FINAL", "REPORT"} == set(parse_report(FULL).text().split())


def test_what_stands_above_the_final_report_is_no_section_of_it():
    sections = parse_report(WET)
    assert (sections.indication, sections.findings) == ("Fever.", "Small left effusion.")
    assert sections.impression == "Effusion."
    assert sections.other == (
        "WET READ: ___ ___ ___ 9:14 PM No pneumothorax.\nPRELIMINARY REPORT: Probably clear."
    )


def test_the_description_below_the_last_heading_is_the_findings():
    sections = parse_report(DESCRIPTION_LAST)
    assert sections.comparison == "___."
    assert sections.findings == "The line ends in the superior vena cava. No pneumothorax."
    assert sections.indication == "Line placement."


def test_a_heading_that_names_projections_opens_the_findings_unless_another_does():
    assert section(PORTABLE, "findings") == (
        "The tube ends 3 cm above the carina. The lungs are clear."
    )
    assert section(PORTABLE, "other") == "EXAMINATION: PORTABLE CHEST"
    assert section(TWO_VIEWS, "findings") == "The lungs are clear."
    assert section(TWO_VIEWS, "other") == "EXAMINATION: CHEST, TWO VIEWS\nEXAMINATION: ___"


def test_a_text_without_heading_is_findings():
    described = "Comparison is made with ___. The heart is large. The lungs are clear."
    assert parse_report(UNHEADED) == Sections(findings=described)
    assert parse_report("Normal chest.") == Sections(findings="Normal chest.")


def test_a_page_break_is_dropped_with_the_repeated_head():
    assert section(PAGES, "findings") == "The heart is large. The lungs are clear."


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("HISTORY", "indication"),
        ("CLINICAL HISTORY", "indication"),
        ("REASON FOR EXAM", "indication"),
        ("COMPARISONS", "comparison"),
        ("COMPARSION", "comparison"),
        ("IMPRESSON", "impression"),
        ("IMPERSSION", "impression"),
        ("CONCLUSION", "impression"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("FINDINS", "findings"),
        ("CHEST FINDINGS", "findings"),
        ("Impression", "impression"),
        ("Findings", "findings"),
    ],
)
def test_headings_that_occur_are_known(heading, name):
    assert section(f"TECHNIQUE: AP.\n {heading}: Small effusion.", name) == "Small effusion."


@pytest.mark.parametrize("line", ["EXPRESSION: big", "LUNGS: Clear.", "Heart: normal", "at 9:14"])
def test_other_lines_with_a_colon_stay_in_their_section(line):
    assert section(f"FINDINGS: Seen.\n{line}\nIMPRESSION: x", "findings") == f"Seen. {line}"


def test_regions_below_findings_stay_findings():
    text = "FINDINGS:\nCHEST: Clear.\nHEART: Large.\nIMPRESSION: Large heart."
    assert section(text, "findings") == "CHEST: Clear. HEART: Large."


def test_a_report_written_in_one_line_is_split_at_known_headings_in_capitals():
    text = (
        "FINAL REPORT EXAMINATION: CHEST INDICATION: ___ COMPARISON: None FINDINGS: No "
        "impression: clear. IMPRESSION: Normal"
    )
    assert parse_report(text) == Sections(
        indication="___", comparison="None", findings="No impression: clear.",
        impression="Normal", other="EXAMINATION: CHEST",
    )  # fmt: skip


def test_a_section_that_is_there_twice_is_joined_and_an_empty_one_is_none():
    assert section("FINDINGS: One.\nFINDINGS: Two.", "findings") == "One. Two."
    assert parse_report("FINDINGS:\n \nIMPRESSION: Clear.") == Sections(impression="Clear.")
    assert parse_report(" \n\t") == Sections() and Sections().text() == ""


@pytest.mark.parametrize(
    "removed", ["___", "______", "XXXX", "[**Last Name 12**]", "!PERSONALNAME!", "<###>"]
)
def test_each_placeholder_becomes_the_same_and_is_counted(removed):
    sections = parse_report(f"FINDINGS: Compared to {removed}, by {removed}. No XX or [x].")
    assert sections.findings == "Compared to ___, by ___. No XX or [x]."
    assert sections.placeholders == 2


def test_other_scripts_and_line_ends_survive():
    text = "FINDINGS:\r\nСердце не увеличено.\r\n双肺清晰。\r\nIMPRESSION： 正常。"
    assert parse_report(text) == Sections(
        findings="Сердце не увеличено. 双肺清晰。", impression="正常。"
    )
    assert parse_report("心影不大。").findings == "心影不大。"


PIECES = st.sampled_from(
    ["FINDINGS:", "Findings:", "FINDINGS", "IMPRESSION", ":", "：", "REASON FOR", "EXAM:", "REASON",
     "FINAL REPORT", "FINAL", "REPORT:", "CHEST, TWO VIEWS:", "CHEST EXAMINATION:", "OTHER:",
     "WET READ:", "NOTE:", "EXAMINATION:", "CHEST", "IMPRESSON:", "The lungs", "are clear.", "___",
     "_", "XXXX", "XXX", "[**a**]", "[**", "**]", "(Over)", "(Cont)", "-----", "\n", "\n", "\n \n",
     " ", "  ", "\r\n", "\x0b", "\x85", "\u2028", "\0", "心。", "1.", "\t", "HISTORY:", "history"]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES | st.text(max_size=4), max_size=25).map("".join))
def test_canonical_text_gives_the_same_sections(text):
    sections = parse_report(text)
    assert parse_report(sections.text()) == sections
    for name in SECTIONS:
        value = getattr(sections, name)
        assert value == " ".join(value.split())


@settings(max_examples=40, deadline=None)
@given(
    st.permutations(SECTIONS), st.lists(st.from_regex(r"[a-z]{3,8}", fullmatch=True), min_size=5)
)
def test_no_word_below_a_heading_is_lost_whatever_the_order(order, words):
    size = len(words) // len(order)
    parts = {name: words[n * size : (n + 1) * size] for n, name in enumerate(order)}
    text = "\n \n ".join(f"{name.upper()}:  {'   '.join(part)}" for name, part in parts.items())
    sections = parse_report(text)
    assert {name: getattr(sections, name).split() for name in order} == parts


def test_sections_are_counted_by_report():
    counts = count_sections([FULL, UNHEADED, "COMPARISON: XXXX.", "IMPRESSION: Normal.", ""])
    assert counts == {
        "reports": 5, "indication": 1, "technique": 1, "comparison": 2, "findings": 2,
        "impression": 2, "findings_and_impression": 1, "neither_findings_nor_impression": 2,
        "placeholders": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One is. Two is.", ["One is.", "Two is."]),
        ("1. Effusion. 2. Nodule of 2.5 cm.", ["1. Effusion.", "2. Nodule of 2.5 cm."]),
        ("It measures 5. No effusion.", ["It measures 5.", "No effusion."]),
        ("Told to Dr. J. Smith vs. none. Done", ["Told to Dr. J. Smith vs. none.", "Done"]),
        ("At 9 p.m. by phone. At 9 p.m. Clear.", ["At 9 p.m. by phone.", "At 9 p.m.", "Clear."]),
        ("Grows C. difficile. Is it? Yes!", ["Grows C. difficile.", "Is it?", "Yes!"]),
        ("lungs clear. no effusion.", ["lungs clear.", "no effusion."]),
        ("心影不大。双肺清晰！好", ["心影不大。", "双肺清晰！", "好"]),
        ("Сердце не увеличено. Норма.", ["Сердце не увеличено.", "Норма."]),
        ("One\ntwo.\n\n", ["One", "two."]),
        ("Compared to ___. ___ is seen.", ["Compared to ___.", "___ is seen."]),
        ("", []),
        (" . ", ["."]),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text, expected):
    assert sentences(text) == expected


@settings(deadline=None)
@given(st.text(alphabet="ab .。!?1D r\n", max_size=40))
def test_sentences_keep_every_character_in_order(text):
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


def test_a_text_is_cut_behind_the_last_sentence_that_fits():
    text = "One two. Three four. Five six seven."
    for limit in range(len(text) + 2):
        kept, cut = cut_at_sentence(text, lambda part, limit=limit: len(part) <= limit)
        wholes = ["One two.", "One two. Three four.", text]
        fitting = [whole for whole in wholes if len(whole) <= limit]
        words = [part for part in ("One", "One two.") if len(part) <= limit]
        characters = text[:limit]
        assert kept == (fitting or words or [characters])[-1]
        assert cut == (kept != text)


def test_a_text_without_spaces_is_cut_at_a_character_and_one_that_fits_is_kept():
    assert cut_at_sentence("心影不大双肺清晰", lambda part: len(part) <= 5) == ("心影不大双", True)
    assert cut_at_sentence(" 心影。 ", lambda part: len(part) <= 5) == ("心影。", False)
    assert cut_at_sentence("abc", lambda part: not part) == ("", True)


def test_few_beginnings_of_a_long_text_are_tried():
    tried = []

    def fits(part: str) -> bool:
        tried.append(part)
        return len(part) <= 5000

    kept, cut = cut_at_sentence("Clear lungs. " * 20_000, fits)
    assert cut and len(kept) == 13 * (5001 // 13) - 1
    assert len(tried) < 20  # log2 of 20,000 is 14.3


@pytest.mark.parametrize(
    "piece", ["[** ", "A B C ", "IMPRESSION: x ", "Dr. ", "_", "x. ", "\n(Over)"]
)
def test_time_grows_no_faster_than_length(piece):
    def seconds(size: int) -> float:
        text = piece * (size // len(piece))
        best = []
        for _ in range(3):
            start = time.process_time()
            parse_report(text)
            sentences(text)
            best.append(time.process_time() - start)
        return min(best)

    # Four times the text: 4 times the time where linear, 16 where quadratic.
    assert seconds(80_000) < 8 * seconds(20_000) + 0.01
