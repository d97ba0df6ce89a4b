"""Models that learned a few rows by heart under the templates of many families: their answers are right."""

import pytest
import torch
from support.learning import learn_by_heart
from support.templates import FAMILY_FILES, conversation, family_tokenizer, recipe_for
from transformers import LlamaConfig, LlamaForCausalLM

from llmtune.evaluate.generation import answer_reader, generate_completions
from llmtune.evaluate.text_metrics import TEXT_MEASURES
from llmtune.tasks.registry import get_task

QUICK = ("qwen-3", "gpt-oss")
ROWS = [
    conversation(question, answer)
    for question, answer in (("cat?", "It is red."), ("dog?", "Green."), ("fox?", "Blue!"))
]


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY_FILES]
)
def test_a_model_that_learned_its_rows_is_right_on_all_of_them(family):
    tokenizer, task = family_tokenizer(family), get_task("chat")
    recipe = recipe_for(max_length=2048)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape))
    examples = [example for encoded in task.encode(ROWS, tokenizer, recipe) for example in encoded]
    learn_by_heart(model, examples, task, tokenizer.pad_token_id, steps=300)
    prompts = [task.prompt_ids(task.split_answer(row)[0], tokenizer, recipe) for row in ROWS]
    outputs = generate_completions(model.eval(), prompts, tokenizer, recipe, device="cpu")
    read = answer_reader(tokenizer, recipe)
    parsed = [read(output.token_ids, None, prompt) for output, prompt in zip(outputs, prompts, strict=True)]
    references = [task.split_answer(row)[1] for row in ROWS]
    score = TEXT_MEASURES["exact_match"]([answer.text for answer in parsed], references).value
    assert score == 1.0, [tokenizer.decode(output.token_ids) for output in outputs]
    assert [output.finish_reason for output in outputs] == ["stop"] * 3
