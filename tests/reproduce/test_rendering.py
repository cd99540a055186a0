import csv
import io

import jinja2
import pytest

from reproduce.rendering import csv_table, latex_table, markdown_list, markdown_page, markdown_table, render


def test_a_markdown_table_escapes_bars_and_can_be_aligned():
    assert markdown_table(["a", "b|c"], [[1, "x"]]) == "| a | b\\|c |\n| --- | --- |\n| 1 | x |"
    aligned = markdown_table(["run", "b"], [["x", "long"]], aligned=True)
    assert aligned == "| run | b    |\n| --- | ---- |\n| x   | long |"
    assert markdown_table(["a"], []) == ""


def test_a_page_leaves_out_what_is_empty():
    assert markdown_page("# T", markdown_list("Notes:", []), markdown_list("Runs:", ["a", "b"])) == (
        "# T\n\nRuns:\n\n- a\n- b\n"
    )


def test_csv_reads_back():
    rows = [["1,5", 'a "b"'], ["", "ü"]]
    assert list(csv.reader(io.StringIO(csv_table(["x", "y"], rows)))) == [["x", "y"], *rows]


def test_latex_escapes_what_has_a_meaning_there():
    text = latex_table("L_c & 5 %", "a #1", ["K"], [["~ p_data ± 1"]])
    assert r"\caption{L\_c \& 5 \% (a \#1)}" in text
    assert r"$\sim$ p\_data $\pm$ 1 \\" in text
    assert r"\begin{tabular}{l}" in text


def test_a_template_leaves_markdown_as_it_is_and_misses_no_fact():
    card = {"name": "a<b", "stamp": "s", "splits": [], "labels": [["t", 2, "x|y"]]}
    card |= {"source": {"licence": "free", "home": "h"}, "manifest": {"generated": False, "digest": "0"}}
    text = render("data_card.md.j2", card)
    assert text.startswith("# Data card: a<b\n")
    assert "| t | 2 | x\\|y |" in text
    with pytest.raises(jinja2.UndefinedError):
        render("data_card.md.j2", {"name": "x"})
