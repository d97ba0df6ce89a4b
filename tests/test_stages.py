"""The three recipes of docs/stages.md, one after the other: SFT, DPO, and rewards of sampled answers."""

import json
import re
import textwrap
from pathlib import Path

import pytest
from support.rows import write_jsonl
from support.runs import invoke

from llmtune.evaluate.evaluation_file import load_evaluation

PAGE = Path(__file__).resolve().parent.parent / "docs/stages.md"
REWARD = 'def vowels(row, answer):\n    return sum(one in "aeiou" for one in answer.lower()) / max(1, len(answer))\n'
SMALL = ("train.max_steps=2", "train.batch_size=4", "data.test=0.4", "adapter.r=4")
OF_STAGE = {
    "sft": (),
    "dpo": (),
    "rewards": (
        *("reinforce.samples=4", "reinforce.max_new_tokens=6", "reinforce.mask_truncated=false"),
        *("reinforce.control=false", "data.max_length=256"),
    ),
}


def test_each_stage_continues_the_adapter_of_the_one_before(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vowels.py").write_text(REWARD)
    questions = [f"Which number comes after {i}?" for i in range(30)]
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": str(i + 1)}]
        for i, question in enumerate(questions)
    ]
    for name in ("answers", "prompts"):
        write_jsonl(Path(f"{name}.jsonl"), [{"messages": one} for one in turns])
    pairs = [{"prompt": one, "chosen": str(i + 1), "rejected": "x"} for i, one in enumerate(questions)]
    write_jsonl(Path("pairs.jsonl"), pairs)
    text = PAGE.read_text()
    blocks = [textwrap.dedent(one) for one in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)]
    commands = re.findall(r"^ {4}llmtune (run .*)$", text, flags=re.MULTILINE)
    assert len(blocks) == len(commands) == len(OF_STAGE)
    before = None
    for (name, changes), block, command in zip(OF_STAGE.items(), blocks, commands, strict=True):
        Path(f"{name}.yaml").write_text(f"recipe_version: 1\n{block}".replace("exact_match", '"vowels.py:vowels"'))
        sets = [f"model.name={tiny_llama}", *SMALL, *changes]
        done = invoke(*command.split(), *(word for one in sets for word in ("--set", one)))
        assert done.exit_code == 0, done.output
        run = Path("runs") / name
        assert json.loads((run / "report.json").read_text())["recipe"]["adapter"]["start_from"] == before
        before = str(run.resolve())
    evaluation = load_evaluation(run / "evaluation")
    assert evaluation is not None
    assert "start_from" in evaluation.signatures["base"], "the base is the stage before"
    assert evaluation.base["kl"] > 0, "which two stages have moved away from the model"
    assert evaluation.contamination is not None
    assert evaluation.contamination.inherited > 0
