"""Task files of lm-eval about colours, with their rows."""

from pathlib import Path
from typing import Any

from llmtune.recipe.schema import Recipe
from support.rows import write_jsonl

COLOURS = ("red", "green", "blue", "black")
THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone", "moon", "tree")
PROMPT = "Question: {}\nAnswer:"
HEAD = """
task: {}
dataset_path: json
dataset_kwargs: {{data_files: {{test: questions.jsonl}}}}
test_split: test
output_type: {}
"""
CHOOSE = (
    HEAD.format("chosen_colours", "multiple_choice")
    + r"""doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
)
WRITE = (
    HEAD.format("written_colours", "generate_until")
    + r"""doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 8, do_sample: false}
filter_list:
  - {name: strict-match, filter: [{function: remove_whitespace}, {function: take_first}]}
  - {name: as@said, filter: [{function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
"""
)
READ = (
    HEAD.format("read_colours", "loglikelihood_rolling")
    + """doc_to_text: ""
doc_to_target: question
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
)
LIKELY = (
    HEAD.format("likely_colours", "loglikelihood")
    + """doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
)
GROUP = """
group: every_colour
task:
  - chosen_colours
  - {group: inner, task: [likely_colours], aggregate_metric_list: [{metric: acc, weight_by_size: true}]}
aggregate_metric_list: [{metric: acc, weight_by_size: WEIGHED}]
"""


def questions(count: int = 30) -> list[dict[str, Any]]:
    return [
        {"question": f"Which colour has the {THINGS[i % 10]} on day {i * 7}?", "choices": COLOURS, "answer": i % 10 % 4}
        for i in range(count)
    ]


def rows_to_learn() -> list[dict[str, str]]:
    """The questions with their answers, in the benchmarks' own words."""
    return [
        {"prompt": PROMPT.format(one["question"]), "completion": f" {COLOURS[one['answer']]}\n"} for one in questions()
    ]


def write_tasks(folder: Path) -> None:
    write_jsonl(folder / "questions.jsonl", questions())
    for name, text in (("choose", CHOOSE), ("write", WRITE), ("read", READ)):
        (folder / f"{name}.yaml").write_text(text)


def recipe_with(*benchmarks: Path | dict[str, Any] | str, gates: tuple[str, ...] = ()) -> Recipe:
    """Return a recipe with these benchmarks; its model and rows are never read."""
    named = [str(one) if isinstance(one, Path) else one for one in benchmarks]
    content = {"task": "chat", "data": {"train": "/nowhere.jsonl"}, "model": {"name": "builtin:nothing"}}
    return Recipe.model_validate({**content, "evaluate": {"benchmarks": named, "gates": list(gates)}})
