"""Test scores as HTML page, as Markdown and on the terminal."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from llmtune.display.blocks import Details, Heatmap, Page, Table
from llmtune.display.console import print_sections
from llmtune.evaluate.seed_spread import describe_spread
from llmtune.report.evaluation_sections import score_sections
from llmtune.report.render_html import to_html
from llmtune.report.render_markdown import to_markdown
from llmtune.report.row_sections import overlap_sentence, overlap_table
from llmtune.report.score_sections import (
    MOST_CLASSES,
    class_section,
    confusion_blocks,
    seed_table,
)
from llmtune.store.score_records import Evaluation


def shown(evaluation: Evaluation, task: str = "chat") -> tuple[str, str, str]:
    """Return the sections as HTML page, as Markdown and as terminal output."""
    sections = score_sections(evaluation, task)
    console = Console(file=io.StringIO(), width=130)
    print_sections(sections, console)
    assert isinstance(console.file, io.StringIO)
    return to_html(Page("p", sections)), to_markdown(Page("p", sections)), console.file.getvalue()


def test_a_trivial_baseline_is_never_called_the_base_model(headed, evaluation):
    page, text, terminal = shown(headed.evaluation, "classify")
    assert '<th class="number">baseline</th>' in page
    assert "The baseline is <code>the most frequent class</code>, not a model" in page
    assert ">base<" not in page
    assert "| metric | baseline | tuned |" in text
    assert "The baseline is the most frequent class, not a model" in terminal
    why = "the base model's head for {no, yes} is replaced by a new one for {bad, good}"
    *_, terminal = shown(replace(headed.evaluation, baseline_reason=why), "classify")
    assert f"not a model: {why}." in " ".join(terminal.split())
    assert "no trained head" not in terminal
    page, *others = shown(evaluation)
    assert "The baseline is" not in page
    assert "baseline" not in "".join(others)


def test_a_metric_of_the_tuned_model_only_has_dashes(headed):
    page, text, terminal = shown(headed.evaluation, "classify")
    assert "| `loss` | – | 0.5200 | – | – | – | – |" in text
    assert "A dash: measured for the tuned model only" in page
    (line,) = [line.split() for line in terminal.splitlines() if line.split()[:1] == ["loss"]]
    assert line == ["loss", "–", "0.5200", "–", "–", "–", "–"]


def test_classes_and_their_confusion_are_shown_the_most_frequent_first(headed):
    page, text, _ = shown(headed.evaluation, "classify")
    assert 'aria-label="confusion matrix of 3 classes: 83 of 100 rows right"' in page
    assert 'title="delivery predicted as billing: 11 rows, 25.6%"><b>11</b><small>26 %</small></td>' in page
    assert "| `billing` | 43 | 0.8000 | 0.9000 | 0.6000 | 0.8500 |" in text
    assert "| delivery | billing | 11 | 25.6 % |" in text
    assert class_section(headed.evaluation.details, "base", entities=True).title.startswith("Entity types")


def test_more_classes_than_can_be_read_are_shown_as_pairs():
    def blocks(size):
        labels = [f"class {k}" for k in range(size)]
        counts = [[9 if i == k else int(k == (i + 1) % size) * (i + 1) for k in range(size)] for i in range(size)]
        return confusion_blocks(labels, counts)

    assert isinstance(blocks(MOST_CLASSES)[0], Heatmap)
    (pairs,) = blocks(MOST_CLASSES + 1)
    assert pairs.rows[0] == ["class 20", "class 0", "21", "70.0 %"]
    assert [int(row[2]) for row in pairs.rows] == list(range(21, 6, -1))


def test_a_slice_is_coloured_by_its_own_interval_and_few_rows_say_so(measured):
    page, text, terminal = shown(measured)
    assert r"| `e-mail \| post` | 0.1000 | 0.8000 | ✅ +0.7000 | +0.2000 to +0.4000 | 0.010 | 60 |" in text
    assert "❌ −0.1000" in text
    assert "| `phone` | 0.1000 | 0.3000 | +0.2000 | too few rows | – | 8 |" in text
    assert "&lt;i&gt;fax&lt;/i&gt;" in page
    assert "too few rows" in terminal


def test_flips_are_counted_each_way_with_examples(measured):
    page, text, _ = shown(measured)
    assert "| `choice_accuracy` | ✅ 50 | ❌ 1 | 148 |" in text
    assert text.index("| `choice_accuracy` | ✅ 50") < text.index("| `exact_match` | 0 | 0 |")
    assert "<summary>choice accuracy, wrong before, right now: 1 of 50</summary>" in page
    assert "&lt;b&gt;Where&lt;/b&gt; is my parcel?" in page


def test_a_suite_is_shown_by_the_names_that_gates_use_with_its_better_side(measured):
    page, text, terminal = shown(measured)
    parts = ('href="#forgetting"', 'id="forgetting"', "of general text; lower is better", "&lt;b&gt;law&lt;/b&gt;")
    assert [part for part in (*parts, "A few pages of text cannot show all.") if part not in page] == []
    assert "## Forgetting" in text
    assert "| `forgetting.perplexity` | 20.00 | 26.00 | ❌ +6.000 | +4.000 to +8.000 |" in text
    assert "forgetting.accuracy" in terminal


def test_overlapping_test_rows_are_counted_and_scored_separately(measured):
    page, text, terminal = shown(measured)
    for shown_text in (page, text, " ".join(terminal.split())):
        assert "12 of 148 test rows (8.1 %) overlap with a training row" in shown_text
    assert "3 nearly equal, 2 with the same prompt, 9 with a shared 13-word passage, 1 short, with the same" in page
    assert "same words. Set data.split_by to a column" in page
    assert "from training. 17 other rows" in page
    assert "210 13-word passages that occur in more than ten training rows" in page
    assert "test.jsonl:4" in page
    assert "/home/ada/data/test.jsonl" not in page
    assert "late &lt;b&gt;parcel&lt;/b&gt;" in page
    assert "| `clean rows` | 0.1000 | 0.7500 | ✅ +0.6500 | +0.5000 to +0.8000 | 0.010 | 136 |" in text
    assert "| `all rows` | 0.5200 | 0.8000 |" in text
    counts = [
        ["0", "148", "0.0 %"],
        ["3", "148", "2.0 %"],
        ["2", "148", "1.4 %"],
        ["9", "128", "7.0 %"],
        ["1", "20", "5.0 %"],
        ["0", "148", "0.0 %"],
    ]
    assert [row[1:] for row in overlap_table(measured.contamination).rows] == counts


def test_without_any_overlap_one_sentence_says_so(measured):
    nothing = {"equal": 0, "near": 0, "prompted": 0, "worded": 0, "shared": 0, "overlapping": 0, "dropped": {}}
    none = replace(measured.contamination, **nothing, scores=(), examples=())
    page, text, _ = shown(replace(measured, contamination=none))
    assert "None of the 148 test rows overlaps with a training row" in page
    assert "shared words" not in page
    assert "clean rows" not in text
    assert "split_by" not in page
    one = replace(none, overlapping=1, shared=1, dropped={"near a test row": 1})
    assert "1 of 148 test rows (0.7 %) overlaps with a training row" in overlap_sentence(one)
    assert "1 other row was dropped" in overlap_sentence(one)


def test_unmeasured_results_have_no_section(evaluation):
    page, text, _ = shown(replace(evaluation, samples=()))
    for anchor in ("seeds", "classes", "slices", "overlap", "flips", "samples"):
        assert f'id="{anchor}"' not in page
    assert text.count("## ") == 1


def test_the_table_of_seeds_has_each_seed(evaluation):
    other = replace(evaluation, tuned={**evaluation.tuned, "loss": 0.5})
    table = seed_table(describe_spread({7: evaluation, 8: other}, []))
    assert [column.heading for column in table.heads][2:4] == ["seed 7", "seed 8"]
    loss = table.cells[0]
    assert [cell.text for cell in loss[:4]] == ["loss", "1.480", "0.4400", "0.5000"]
    assert (loss[6].text, loss[7].tone) == ("0.4400 to 0.5000", "better")


@pytest.mark.parametrize("task", ["chat", "preference"])
def test_samples_say_how_they_were_chosen(evaluation, task):
    page, text, _ = shown(evaluation, task)
    assert "tickets.jsonl:118" in page
    assert "/home/ada" not in page + text
    assert ("log-likelihoods of the answers" in page) == (task == "preference")
    assert not any(isinstance(block, Details | Table) for block in score_sections(evaluation, task)[-1].blocks)
