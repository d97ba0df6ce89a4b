"""Test the suites of `evaluate`: refusals for tasks that cannot run them, and gates on their metrics."""

import subprocess
import sys

import pytest

from llmtune.recipe.eval_suites_section import describe_key_variable, plain_name, suite_name
from llmtune.recipe.gate_grammar import GATE
from llmtune.recipe.loader import load_recipe

FAIR = "evaluate.fairness={}"
HARNESS = "evaluate.benchmarks=[arc_easy, own/colours.yaml]"
ACCURACY_GATE = "evaluate.gates=['forgetting.accuracy >= base']"
SWAPS = "evaluate.fairness.swaps=[own]"
JUDGE = "evaluate.judge={endpoint: 'http://localhost:8000', model: m}"


@pytest.mark.parametrize("suite", ["evaluate.benchmarks=[arc_easy]", "evaluate.forgetting={}"])
@pytest.mark.parametrize(
    ("sets", "why"),
    [
        (["task=classify"], "models of task: classify"),
        (["task=speech"], "models of task: speech"),
        (["task=completion", "completion.objective=masked"], "only fills in words"),
        (["task=qa", "qa.style=extractive"], "marks answers"),
        (["task=preference", "preference.loss=reward"], "only gives scores"),
    ],
)
def test_a_suite_for_decoders_is_refused_for_tasks_without_decoders(refuse, suite, sets, why):
    key = suite.partition("=")[0]
    assert [problem for problem in refuse(sets=[*sets, suite]) if f"'{key}'" in problem.what and why in problem.what]


@pytest.mark.parametrize(
    "sets",
    [
        ["task=classify"],
        ["task=speech"],
        ["task=preference"],
        ["task=completion", "completion.objective=masked"],
        ["task=qa", "qa.style=extractive"],
    ],
)
def test_a_judge_is_refused_for_tasks_that_do_not_answer_texts_in_free_text(refuse, sets):
    assert [one for one in refuse(sets=[*sets, JUDGE]) if "'evaluate.judge' compares written answers" in one.what]


@pytest.mark.parametrize("task", ["chat", "completion", "translate", "summarize", "qa"])
def test_a_judge_compares_the_answers_of_every_task_that_writes(write, task):
    loaded = load_recipe(write(), [JUDGE, f"task={task}", "evaluate.metrics=[loss]", "evaluate.limit=5"])
    assert loaded.recipe.evaluate.judge.model == "m"


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        ([SWAPS, "task=speech"], "swaps"),
        ([SWAPS, "task=translate"], "swaps"),
        ([SWAPS, "data.test=0"], "swaps"),
        (["evaluate.fairness.groups=[sex]", "data.test=0"], "groups"),
    ],
)
def test_suite_keys_without_effect_for_task_or_rows_are_refused(refuse, sets, key):
    assert [problem for problem in refuse(sets=sets) if f"'evaluate.fairness.{key}' has no effect" in problem.what]


@pytest.mark.parametrize("task", ["chat", "classify", "token-classify", "speech", "translate", "qa", "preference"])
def test_unstated_keys_are_left_to_the_suite(write, task):
    for test in (0, 0.2):
        recipe = load_recipe(write(), [FAIR, f"task={task}", f"data.test={test}"]).recipe
        assert recipe.evaluate.fairness.swaps == ("own",)


@pytest.mark.parametrize(
    ("sets", "what", "fix"),
    [
        (["evaluate.fairness={swaps: []}"], "measures nothing", "groups"),
        (["evaluate.forgetting={texts: [], questions: []}"], "measures nothing", "texts or questions"),
        (["evaluate.fairness.groups=[a, a]"], "names something twice", "once"),
        (["evaluate.forgetting.texts=[own, own]"], "names something twice", "once"),
        (["evaluate.forgetting={questions: []}", ACCURACY_GATE], "not measured", "Give evaluate.forgetting.questions"),
        (["evaluate.forgetting.texts=['hub:x/y']"], "'hub:x/y' is not a file", "files"),
        (["evaluate.fairness.swaps=['hub:x/y']"], "'hub:x/y' is not a file", "CSV"),
        (["evaluate.benchmarks=[own/a.yaml, other/a.yml]"], "would both be called a", "Name each once"),
        (["evaluate.gates=['fairness.gap > 1']"], "a study that is not run", "Set evaluate.fairness"),
        (["evaluate.gates=['farness.gap > 1']"], "an unknown study", "Did you mean 'fairness'?"),
        ([FAIR, "evaluate.gates=['fairness.gap <= 0.05']"], "not measured", "evaluate.fairness.groups"),
        ([FAIR, "evaluate.gates=['fairness.swap_changes < base']", "data.test=0"], "not measured here", "Remove it"),
        ([FAIR, "evaluate.gates=['fairness.gpa < 1']"], "unknown metric", "Did you mean"),
        ([FAIR, "evaluate.gates=['fairness.swap_changes < 1']", "task=speech"], "not measured here", "Remove it"),
        ([HARNESS, "evaluate.gates=['benchmarks.arc_easy > 0.5']"], "names a task without a metric", "TASK.METRIC"),
        ([JUDGE, "evaluate.gates=['judge.agreement > 0.8']"], "not measured", "Give evaluate.judge.labelled"),
        ([JUDGE, "evaluate.gates=['judge.winrate > 0.5']"], "unknown metric", "Did you mean 'win_rate'?"),
        (["evaluate.gates=['judge.win_rate > 0.5']"], "a study that is not run", "Set evaluate.judge"),
        ([JUDGE, "data.test=0"], "'evaluate.judge' has no effect without test rows", "data.test"),
        ([JUDGE, "evaluate.judge.endpoint=localhost:8000"], "not the address of an endpoint", "https://HOST/v1"),
        ([JUDGE, "evaluate.judge.endpoint='http://me:key@host'"], "not the address of an endpoint", "without a key"),
        ([JUDGE, "evaluate.judge.endpoint='http://[bad'"], "not the address of an endpoint", "https://HOST/v1"),
        ([JUDGE, "evaluate.judge.api_key_env=sk-12345678901234567890"], "not the name of", "in the environment"),
        ([JUDGE, "evaluate.judge.api_key_env=AWS_PROFILE"], "AWS_PROFILE does not end in _KEY", "MY_JUDGE_KEY"),
        *(
            ([JUDGE, f"evaluate.judge.api_key_env={name}"], f"{name} is the key of another service", "MY_JUDGE_KEY")
            for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "GITHUB_TOKEN", "LLMTUNE_API_KEY")
        ),
    ],
)
def test_impossible_measurements_are_refused(refuse, sets, what, fix):
    (problem,) = refuse(sets=sets)
    assert what in problem.what
    assert fix in problem.fix


@pytest.mark.parametrize(
    ("name", "endpoint", "is_sent"),
    [
        ("MY_JUDGE_KEY", "https://example.com", True),
        ("HF_TOKEN", "https://router.huggingface.co/v1", True),
        ("HF_TOKEN", "https://router.huggingface.co.example.com/v1", False),
        ("OPENAI_API_KEY", "https://api.openai.com/v1", True),
        ("OPENAI_API_KEY", "https://notapi.openai.com", False),
        ("AZURE_OPENAI_API_KEY", "https://mine.openai.azure.com", True),
        ("WANDB_API_KEY", "https://api.wandb.ai", False),
    ],
)
def test_the_key_of_a_service_is_sent_to_that_service_only(name, endpoint, is_sent):
    assert (describe_key_variable(name, endpoint) is None) == is_sent


@pytest.mark.parametrize(
    ("suite", "gate"),
    [
        (HARNESS, "benchmarks.arc_easy.acc > base"),
        (HARNESS, "benchmarks.gsm8k.exact_match.strict-match.low > base"),
        ("evaluate.forgetting={}", "forgetting.perplexity <= base * 1.05"),
    ],
)
def test_gates_on_suites_work_without_test_rows(write, suite, gate):
    recipe = load_recipe(write(), [suite, "data.test=0", f"evaluate.gates=['{gate}']"]).recipe
    assert recipe.evaluate.gates == (gate,)


@pytest.mark.parametrize(
    "name", ["arc_easy", "20_newsgroups", "longproc_html_0.5k", "mmlu_(general)", "maj@64", "low", "a--b", "v1.1-x"]
)
def test_gates_can_name_every_lm_eval_task(name):
    assert GATE.fullmatch(f"benchmarks.{plain_name(name)}.{plain_name(name)} > 0.5")


def test_files_are_relative_to_the_recipe_and_names_are_unchanged(write, tmp_path):
    write("evaluate: {fairness: {swaps: [own, x/w.csv]}}\n")
    evaluate = load_recipe("recipe.yaml", [HARNESS]).recipe.evaluate
    assert evaluate.fairness.swaps == ("own", str(tmp_path / "x" / "w.csv"))
    assert [one.task for one in evaluate.benchmarks] == ["arc_easy", str(tmp_path / "own" / "colours.yaml")]
    assert [suite_name(one.task) for one in evaluate.benchmarks] == ["arc_easy", "colours"]


def test_checking_a_recipe_imports_no_heavy_library(write):
    code = (
        "import sys; from llmtune.recipe.loader import load_recipe; load_recipe(sys.argv[1], [sys.argv[2]]);"
        "print([m for m in ('torch', 'transformers', 'numpy', 'peft', 'datasets', 'lm_eval') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(write()), HARNESS]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
