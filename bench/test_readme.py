"""Every figure in the README stands in a file of the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bench.table import table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_and_comparisons_are_those_of_the_kept_results():
    results = sorted((ROOT / "bench" / "results").glob("*.json"))
    report = (ROOT / "docs" / "runs" / "demo" / "report.md").read_text(encoding="utf-8")
    texts = [*(table(json.loads(path.read_text())) for path in results), report]
    kept = [line for text in texts for line in text.splitlines()]
    figures = [line for line in README.splitlines() if re.match(r"\|.*\d\.\d|- seed", line)]
    assert len(figures) >= 17
    assert [line for line in figures if line not in kept] == []


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) >= 3
    assert [link for link in links if not (ROOT / link).exists()] == []
