import numpy as np
import pytest
from support.plain_likelihoods import stereoset_scores
from support.rows import write_jsonl

from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.metric import PairedMeasures
from llmtune.evaluate.sentence_pairs import Pair
from llmtune.evaluate.stereotypes import StereotypeSuite, measure_stereoset
from llmtune.recipe.eval_suites_section import FairnessSection


@pytest.fixture
def suite_of(bench, tmp_path):
    """The suite of pairs of one's own, beside the bench's model."""

    def make(*pairs):
        rows = [{"more": more, "less": less, "group": group} for more, less, group in pairs]
        section = FairnessSection(pairs=(str(write_jsonl(tmp_path / "pairs.jsonl", rows)),))
        evaluate = bench.recipe.evaluate.model_copy(update={"fairness": section})
        recipe = bench.recipe.model_copy(update={"evaluate": evaluate})
        return StereotypeSuite(EvalContext(recipe, bench.task, bench.processor, None, "cpu", bench.console))

    return make


def test_stereosets_three_scores_are_means_over_terms():
    pairs = [Pair(("a", "b", "c"), f"x:{i}", "x", target=f"term {i % 3}") for i in range(10)]
    found = np.random.default_rng(3).random((len(pairs), 3)).tolist()
    names = ("stereotype", "anti-stereotype", "unrelated")
    examples = [{"target": p.target, **dict(zip(names, s, strict=True))} for p, s in zip(pairs, found, strict=True)]
    measured = {name: one.value for name, one in measure_stereoset(pairs, found).items()}
    assert measured == pytest.approx(stereoset_scores(examples))
    assert measured["icat"] > 0


def test_equally_likely_sentences_count_as_a_half_and_are_told(suite_of):
    suite = suite_of(("the cat", "the dog", "u"), ("a cat", "a dog", "v"))
    suite.outputs = {"base": [[1.0, 0.0]] * 2, "tuned": [[1.0, 1.0001], [0.0, 1.0]]}
    study = suite.compare(PairedMeasures())
    assert (study.base["stereotype"], study.tuned["stereotype"]) == (1.0, 0.25)
    assert study.tuned["stereotype_distance"] == 0.25
    assert study.difference["stereotype"].value == -0.75
    assert "1 equally likely, counted as a half" in study.signatures["stereotype"]
    del suite.outputs["base"]
    (table,) = suite.compare(PairedMeasures()).tables
    assert table.rows == (("u", "1", "0.500"), ("v", "1", "0.000"))


def test_pairs_beyond_the_models_context_are_left_out_and_counted(suite_of, bench):
    suite = suite_of(("the cat", "the dog", ""), ("the cat " * 1100, "the dog " * 1100, ""))
    suite.run("tuned", bench.load())
    assert len(suite.outputs["tuned"]) == 1
    signature = suite.compare(PairedMeasures()).signatures["stereotype"]
    assert "1 pairs are longer than the model's context; left out" in signature
    suite = suite_of(("the cat " * 1100, "the dog " * 1100, ""))
    suite.run("tuned", bench.load())
    assert "every pair is longer" in suite.compare(PairedMeasures()).signatures["stereotype"]
