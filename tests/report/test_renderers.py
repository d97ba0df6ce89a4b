import io
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.browser import ParsedPage

from llmtune.display.blocks import (
    Beside,
    Bullets,
    Cell,
    Column,
    Compared,
    Details,
    Heatmap,
    Html,
    KeyValues,
    Links,
    Page,
    Section,
    Shares,
    Table,
    Text,
    difference_table,
)
from llmtune.display.charts import Curve, draw_curves, draw_meter
from llmtune.display.console import print_blocks, print_columns, print_page, spinner, track_items
from llmtune.records import Difference
from llmtune.report.render_html import to_html
from llmtune.report.render_markdown import code, table, to_markdown

HOSTILE = (
    "<script>alert(1)</script> \"'><img src=x onerror=alert(1)> | `a``b` | </pre></style> {{ 7*7 }} {% raw %} "
    "\x00\x1b[31m\u2028 # h [red]"
)
GAIN = Compared("exact_match", 0.1, 0.5, Difference(0.4, 0.3, 0.5, 0.001, 148), 1, "answer equals the reference")
COST = Compared("loss", 1.5, 1.7, Difference(0.2, 0.1, 0.3, 0.01, 148), -1)
FEW = Compared("f1", 0.5, 0.6, Difference(0.1, math.nan, math.nan, math.nan, 4), 1)
ALONE = Compared("kl", None, 0.2, None)


def page_of(text: str) -> Page:
    blocks = [
        Table(
            [text, Column(text, "number"), Column("", "picture")], [[text, text, Cell(picture=draw_meter(0.5))]], text
        ),
        Html(draw_curves([Curve(text, [(0, 1), (1, 2)]), Curve("b", [(0, 2)], "validation")], label=text, title=text)),
        Heatmap([text], [text], [[0.5]], text, texts=[[text]], tips=[[text]]),
        Shares([(text, text, 0.5)], text),
        Text(text),
        Bullets([text]),
        KeyValues([(text, text)], text),
        Links([("#x", text, text)]),
        Details(text, [Text(text)]),
        Beside([Text(text)], [Text(text)]),
    ]
    return Page(text, [Section(text, blocks, anchor="one"), Section("Other", [Text(text)])], [(text, text)], text)


def test_text_stays_text_in_a_page_in_markdown_and_on_the_terminal():
    page = page_of(HOSTILE)
    parsed = ParsedPage(to_html(page))
    assert {tag for tag, _ in parsed.tags} & {"script", "img"} == set()
    assert parsed.text.count("<script>alert(1)</script>") >= 15
    assert "49" not in parsed.text.split("{{ 7*7 }}")[1][:5]
    lines = [line for line in to_markdown(page).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in lines} == {2}
    written = Console(file=io.StringIO(), width=1000)
    print_page(page, written)
    assert "[red]" in written.file.getvalue()


def test_a_page_loads_nothing_from_the_network_and_has_only_its_own_script():
    text = to_html(page_of("words"))
    for tag, attributes in ParsedPage(text).tags:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form", "img", "video", "audio"}
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert re.match(r"(#|data:,$)", attributes.get(name) or "#")
    assert not re.search(r"@import|url\s*\(", text)
    assert "default-src 'none'" in text
    assert "script-src" not in text
    scripted = to_html(Page("x", [], script="go()", data={"a": "</script><!--", "b": math.nan}))
    assert "script-src 'unsafe-inline'" in scripted
    assert '{"a":"\\u003c/script>\\u003c!--","b":null}' in scripted


@pytest.mark.parametrize("render", [to_html, to_markdown])
def test_a_difference_row_has_base_tuned_difference_interval_p_and_rows(render):
    text = render(Page("p", [Section("Scores", [difference_table([GAIN, COST, FEW, ALONE], base="baseline")])]))
    flat = " ".join(re.sub(r"<[^>]+>|\|", " ", text.replace("\\", "")).split())
    assert "exact_match" in flat
    assert re.search(r"0\.1000 0\.5000 (✅ )?\+0\.4000 \+0\.3000 to \+0\.5000 0\.001 148", flat)
    assert "too few rows" in flat
    assert re.search(r"kl.* – 0\.2000 – – – –", flat)


def test_a_difference_is_better_or_worse_by_its_interval_and_the_better_side():
    assert [row.tone for row in (GAIN, COST, FEW, ALONE)] == ["better", "worse", "unsure", ""]
    assert (GAIN.picture is not None, FEW.picture) == (True, None)
    assert Compared("length_ratio", 1, 2, GAIN.difference).tone == "unsure"


def test_a_cell_of_a_heatmap_is_tinted_by_its_size_and_coloured_by_its_sign():
    values, texts = [[0.75, -0.25], [0.0, math.nan]], [["3\n75 %", "1\n25 %"], ["", ""]]
    page = to_html(Page("p", [Section("A", [Heatmap(["a", "b"], ["a", "b"], values, "x", texts=texts)])]))
    cells = re.findall(r'<td(?: class="(\w+)" style="--heat: ([\d.]+)%")?>(.*?)</td>', page)
    assert cells == [
        ("hit", "39.5", "<b>3</b><small>75 %</small>"),
        ("miss", "18.5", "<b>1</b><small>25 %</small>"),
        ("", "", ""),
        ("", "", ""),
    ]


def test_markdown_shows_the_first_rows_of_a_long_table_and_nothing_collapsed():
    rows = [[str(number)] for number in range(40)]
    text = to_markdown(Page("p", [Section("A", [Table(["n"], rows), Details("more", [Text("hidden")])])]))
    assert "10 more on the page." in text
    assert "hidden" not in text
    assert to_markdown(Page("p", [Section("A", [Text("x")], brief=False)])) == "# p\n"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(st.characters(), max_size=60))
def test_a_code_span_holds_any_text_in_one_table_cell(text):
    span = code(text)
    assert span.splitlines() == [span]
    assert not re.search(r"(?<!\\)\|", span)
    fence = re.match(r"`+", span)
    if fence:
        inside = span[len(fence[0]) : -len(fence[0])]
        assert fence[0] not in re.findall(r"`+", inside)
        assert span.endswith(fence[0])
    assert len(table(["a"], [[span]]).splitlines()) == 3


@pytest.mark.parametrize("terminal", [True, False])
def test_long_work_shows_progress_only_on_a_terminal(terminal: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80)
    with spinner(console, "merging"):
        assert list(track_items(console, "abc", "answers")) == ["a", "b", "c"]
    said = file.getvalue()
    assert ("merging" in said, "3/3" in said, said == "") == (terminal, terminal, not terminal)


def test_an_interval_stays_on_one_line_in_80_columns_and_words_are_not_cut():
    names = ("choice_accuracy", "token_accuracy", "f1_macro")
    cells = [[name, "0.9123", "0.9456", "+0.0333", "\u22120.0123 to +0.0789", "< 0.001", "1,234"] for name in names]
    heads = [Column("metric"), *(Column(one, "number") for one in ("baseline", "tuned", "difference"))]
    heads += [Column(one, "number") for one in ("95 % interval", "p", "rows")]
    console = Console(width=80, file=io.StringIO())
    print_blocks([Table(heads, cells)], console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for row in cells:
        assert any(all(cell in line for cell in row) for line in lines), row


LISTED = [["owner/a-long-name-of-a-model", "0.13 G", "en de fr"], ["b", "12.00 G", "one other language"]]


def print_listed(width: int, *, terminal: bool, wraps: bool = False) -> tuple[list[str], list[str]]:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    omitted = print_columns(("model", "size", "languages"), LISTED, console, numbers=("size",), wraps=wraps)
    return console.file.getvalue().splitlines(), omitted


def test_a_list_in_a_pipe_has_a_line_per_row_and_truncates_nothing() -> None:
    lines, omitted = print_listed(20, terminal=False)
    assert lines == [
        "model                            size  languages",
        "owner/a-long-name-of-a-model   0.13 G  en de fr",
        "b                             12.00 G  one other language",
    ]
    assert omitted == []


def test_a_list_on_a_narrow_terminal_omits_its_last_columns_and_names_them() -> None:
    lines, omitted = print_listed(40, terminal=True)
    assert lines[1] == "owner/a-long-name-of-a-model   0.13 G"
    assert omitted == ["languages"]
    assert print_listed(200, terminal=True)[1] == []


def test_a_list_on_a_narrow_terminal_may_wrap_its_last_column() -> None:
    lines, omitted = print_listed(48, terminal=True, wraps=True)
    assert omitted == []
    assert max(map(len, lines)) <= 52
    assert lines[-2:] == ["b                             12.00 G  one other", " " * 39 + "language"]
