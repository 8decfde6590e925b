"""docs/TRUST.md is what docs/trust.json gives, and what it says of the last soak is good."""

import json
import re

import soak


def test_the_committed_page_is_what_the_committed_figures_give():
    figures = json.loads(soak.FIGURES.read_text())
    page = soak.page(figures)
    assert soak.PAGE.read_text() == page and not re.search(r"\{[\w. ]+\}", page)


def test_the_last_soak_lost_nothing_and_saw_no_traceback():
    figures = json.loads(soak.FIGURES.read_text())
    faults, hostile = figures["faults"], figures["hostile"]
    assert faults["equal"] == faults["runs"] > 100 and faults["lost"] == 0 < faults["fallbacks"]
    assert hostile["tracebacks"] == hostile["executed"] == 0 and hostile["wrong"] == []
    assert figures["determinism"]["unequal"] == [] and figures["long"]["flat"]
    assert set(faults["by kind"]) == set(soak.faults.FAULTS)
