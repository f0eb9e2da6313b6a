"""Evidence as Markdown, plot and HTML."""

from __future__ import annotations

from xml.etree import ElementTree

from steersman.report.evidence import evidence_html, evidence_markdown, evidence_svg

RECORD = {
    "method": "pndm",
    "scale": "quick",
    "seed": 0,
    "claims": [
        {
            "id": "better",
            "statement": "Better | than <b>DDIM</b> at `10` calls.",
            "source": "Table 2",
            "verdict": "holds",
            "effect": 0.31,
            "interval": [0.22, 0.4],
            "unit": "seed",
            "n": 8,
            "margin": 0.1,
            "reason": "the interval lies above the margin",
        },
        {
            "id": "exact",
            "statement": "Exact on two lines\nof text",
            "source": "",
            "verdict": "fails",
            "effect": -1.0,
            "interval": [-1.0, -1.0],
            "unit": "exact",
            "n": 1,
            "margin": 0.0,
            "reason": "the worst instance",
        },
        {
            "id": "unknown",
            "statement": "Nothing known.",
            "source": "",
            "verdict": "not shown",
            "effect": None,
            "interval": None,
            "unit": "fit",
            "n": 0,
            "margin": 0.0,
            "reason": "rows are missing",
        },
    ],
}


def test_the_table_has_a_line_a_claim_and_stays_a_table():
    text = evidence_markdown(RECORD, "pndm.svg")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 5
    assert all(line.replace("\\|", "").count("|") == 7 for line in lines)
    assert "| ✔ holds | 0.31 | 0.22 to 0.4 | 0.1 | 8 seeds |" in text
    assert "| ✘ fails | −1 | – | 0 | 1 instance |" in text
    assert "| ? not shown | – | – | 0 | 0 fits |" in text
    assert "Quick scale, first seed 0: 1 holds, 1 fails, 1 not shown." in text
    assert "(pndm.svg)" in text and "<b>" not in text


def test_no_claims():
    assert "no claims" in evidence_markdown({"method": "m", "scale": "quick", "claims": []})


def test_the_plot_is_svg():
    assert ElementTree.fromstring(evidence_svg(RECORD)).tag.endswith("svg")


def test_html_escapes():
    text = evidence_html(RECORD)
    assert "&lt;b&gt;DDIM&lt;/b&gt;" in text and "<b>" not in text
    assert text.count("<tr>") == 4
