import threading

import pytest

from llmtune.errors import DataError, RecipeError
from llmtune.evaluate.generation import answer_reader, generate_completions
from llmtune.records import Prompt
from llmtune.serve.finished_run import ChatSession
from llmtune.serve.served_model import ServedModel
from llmtune.tasks.registry import get_task


def session_of(tuned, console=None):
    adapted, recipe = tuned
    served = ServedModel("tuned", adapted.model, adapted.selected.processor, recipe, get_task(recipe.task))
    return ChatSession(served, console)


def say(session, prompt, keep=False):
    return "".join(piece.content for piece in session.answer(prompt, keep=keep))


@pytest.mark.parametrize("generation", [{"max_new_tokens": 24}, {"max_new_tokens": 12, "num_beams": 3}])
def test_pieces_join_to_the_answer_of_evaluation(tune, generation):
    session = session_of(tune(generation=generation))
    row = {"messages": [{"role": "user", "content": "Which colour has the cat?"}]}
    ids = session.task.prompt_ids(row, session.served.processor, session.recipe)
    [output] = generate_completions(
        session.served.model, [Prompt(ids)], session.served.processor, session.recipe, device="cpu"
    )
    wanted = answer_reader(session.served.processor, session.recipe)(output.token_ids, None).text
    pieces = [piece.content for piece in session.answer("Which colour has the cat?")]
    assert "".join(pieces) == wanted != ""
    assert len(pieces) > 1 or generation.get("num_beams")


def test_a_sampled_conversation_is_reproducible(tune):
    session = session_of(tune(generation={"max_new_tokens": 16, "do_sample": True, "temperature": 1.5}))

    def talk():
        session.reset()
        return [say(session, "Again?", keep=True) for _ in range(2)]

    first = talk()
    assert talk() == first
    assert first[0] != first[1]


def test_history_is_part_of_the_next_prompt_only_if_kept(tune):
    session = session_of(tune())
    fresh = say(session, "Which colour has the fox?")
    say(session, "The fox is red.", keep=True)
    assert [message["role"] for message in session.history] == ["user", "assistant"]
    assert say(session, "Which colour has the fox?") == fresh
    assert len(session.history) == 2
    say(session, "Which colour has the fox?", keep=True)
    assert len(session.history) == 4
    session.reset()
    assert say(session, "Which colour has the fox?", keep=True) == fresh


def test_the_oldest_turns_are_dropped_when_the_context_is_full(tune, console):
    session = session_of(tune(generation={"max_new_tokens": 4}), console)
    session.served.context = 64
    for number in range(6):
        say(session, f"Question number {number}?", keep=True)
    assert len(session.history) == 12
    assert session.forgotten > 0
    assert session.forgotten % 2 == 0
    assert "Dropped the first" in console.file.getvalue()


def test_a_prompt_that_does_not_fit_the_context_is_refused_with_numbers(tune):
    session = session_of(tune())
    session.served.context = 32
    with pytest.raises(RecipeError, match="context holds 32"):
        list(session.answer("word " * 100))


def test_an_error_during_generation_reaches_the_reader(tune, monkeypatch):
    session = session_of(tune())
    monkeypatch.setattr(session.served.model.get_base_model(), "forward", lambda *inputs, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(session.answer("Hello"))


def test_closing_the_answer_ends_its_thread_and_keeps_nothing(tune):
    session = session_of(tune(generation={"max_new_tokens": 1000}))
    before = threading.active_count()
    answer = session.answer("Tell me everything.", keep=True)
    next(answer)
    answer.close()
    assert threading.active_count() == before
    assert session.history == []


def test_a_message_that_the_template_refuses_is_a_data_error(tune):
    session = session_of(tune())
    session.served.processor.chat_template = "{{ raise_exception('no roles at all') }}"
    with pytest.raises(DataError, match="no roles at all"):
        list(session.answer("Hello"))


def test_completion_runs_cannot_chat(tune, tiny_gpt2, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "The quick brown fox."}\n')
    with pytest.raises(RecipeError, match="cannot chat"):
        list(session_of(tune(tiny_gpt2, task="completion", data={"train": str(rows)})).answer("Hello", keep=True))
