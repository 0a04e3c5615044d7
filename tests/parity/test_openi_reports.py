"""All 3,955 reports of OpenI, as torchxrayvision ships them, against a reading of their text."""

import importlib.util
import re
import tarfile
from collections import Counter
from html import unescape
from pathlib import Path

import pytest

from selfray.data.report_files import read_report_files
from selfray.data.report_text import SECTIONS, parse_report, sentences

pytest.importorskip("torchxrayvision")

NAMES = ("COMPARISON", "INDICATION", "FINDINGS", "IMPRESSION")
INNER = re.compile(r"(?:COMPARISON|INDICATION|FINDINGS|IMPRESSION) ?:")


@pytest.fixture(scope="module")
def archive() -> Path:
    package = importlib.util.find_spec("torchxrayvision")
    assert package and package.origin
    path = Path(package.origin).with_name("data") / "NLMCXR_reports.tgz"
    if not path.exists():
        pytest.skip("this torchxrayvision has no reports of OpenI")
    return path


@pytest.fixture(scope="module")
def found(archive):
    return read_report_files(archive)


@pytest.fixture(scope="module")
def by_hand(archive) -> dict[str, dict[str, str]]:
    """Each section by a regular expression over the file, no XML parser."""
    reports = {}
    with tarfile.open(archive) as files:
        for member in files:
            content = files.extractfile(member)
            if content is None:
                continue
            text = content.read().decode()
            labelled = re.findall(r'<AbstractText Label="(\w+)">(.*?)</AbstractText>', text, re.S)
            values = {name: " ".join(unescape(value).split()) for name, value in labelled}
            reports[Path(member.name).stem] = {name: v for name, v in values.items() if v}
    return reports


def test_every_report_is_read_or_counted_as_empty(found, by_hand):
    assert len(by_hand) == 3955
    assert set(found.reports) == {key for key, sections in by_hand.items() if sections}
    assert found.unread == {"is empty": 28}
    assert len(found.reports) + 28 == 3955 and found.passed_over == 0


def test_each_section_is_as_often_there_as_by_hand(found, by_hand):
    counts = found.section_counts()
    # One indication goes on with "COMPARISON : XXXX.", where the element COMPARISON is empty.
    more = {"INDICATION": 0, "COMPARISON": 1, "FINDINGS": 0, "IMPRESSION": 0}
    for name in NAMES:
        labelled = sum(name in sections for sections in by_hand.values())
        assert counts[name.lower()] == labelled + more[name]
    assert (counts["findings"], counts["impression"]) == (3425, 3921)
    assert counts["findings_and_impression"] == 3419
    assert counts["neither_findings_nor_impression"] == 0  # the 28 empty ones have neither


def test_no_word_is_lost_but_those_removed_before(found, by_hand):
    inner = {key for key, values in by_hand.items() if INNER.search(" ".join(values.values()))}
    assert len(inner) == 12  # headings inside of a section: their words move, and none is lost
    for key, report in found.reports.items():
        sections = parse_report(report)
        if key in inner:
            texts = " ".join(re.sub("X{4,}", "___", value) for value in by_hand[key].values())
            kept = " ".join(getattr(sections, name.lower()) for name in NAMES)
            assert sorted(kept.split()) == sorted(INNER.sub("", texts).split())
        else:
            for name in NAMES:
                expected = by_hand[key].get(name, "")
                assert getattr(sections, name.lower()) == re.sub("X{4,}", "___", expected)
        assert not sections.other and not sections.technique
        assert parse_report(sections.text()) == sections
        for name in SECTIONS:
            text = getattr(sections, name)
            assert " ".join(sentences(text)).split() == text.split()


def test_every_image_finds_its_report(found, archive):
    images = Counter()
    with tarfile.open(archive) as files:
        for member in files:
            content = files.extractfile(member)
            if content is None:
                continue
            for image in re.findall(r'<parentImage id="([^"]+)"', content.read().decode()):
                key = found.key_of(f"NLMCXR_png/{image}.png")
                assert key in (Path(member.name).stem, None)
                assert key == found.key_of(f"{re.sub('^CXR([0-9]+_(?=[0-9]+_))?', '', image)}.dcm")
                images[key is not None] += 1
    assert sum(images.values()) == 7470
