"""What models of many families are asked to write, stated by hand; and the table of it in docs/template-families.md.

`python tests/support/conversation_table.py` writes the table anew.
"""

import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs" / "template-families.md"
MARKS = re.compile(r"(<!-- table -->\n).*?(<!-- end of table -->)", re.DOTALL)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "A town."},
                "days": {"type": "integer", "description": "How many."},
            },
            "required": ["city"],
        },
    },
}


def call(city: str, days: int, call_id: str) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": {"city": city, "days": days}}
    return {"id": call_id, "type": "function", "function": function}


OSLO, ROME = call("Oslo", 3, "oslocall1"), call("Rome", 2, "romecall2")
ASK, ASK_AGAIN = {"role": "user", "content": "two and two?"}, {"role": "user", "content": "three and three?"}
SAY, SAY_AGAIN = {"role": "assistant", "content": "It is four."}, {"role": "assistant", "content": "It is six."}
WEATHER = {"role": "user", "content": "the weather in Oslo?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [OSLO]}
RESULT = {"role": "tool", "content": "rain all day", "tool_call_id": "oslocall1"}
RAINS = {"role": "assistant", "content": "It rains."}
SHAPES: dict[str, list[dict[str, Any]]] = {
    "one turn": [ASK, SAY],
    "many turns": [ASK, SAY, ASK_AGAIN, SAY_AGAIN],
    "system": [{"role": "system", "content": "Be brief, please."}, ASK, SAY],
    "tools": [ASK, SAY],
    "call": [WEATHER, CALL],
    "parallel calls": [WEATHER, {**CALL, "tool_calls": [OSLO, ROME]}],
    "results": [WEATHER, CALL, RESULT, RAINS],
    "thoughts": [
        *(ASK, {**SAY, "reasoning_content": "Add them up."}),
        *(ASK_AGAIN, {**SAY_AGAIN, "reasoning_content": "Twice three."}),
    ],
    "empty thoughts": [ASK, {**SAY, "content": "<think>\n\n</think>\n\nIt is four."}],
    "trailing blanks": [ASK, {**SAY, "content": "It is four. \n\n"}],
}
"""Ten kinds of conversation."""
WITH_TOOLS = ("tools", "call", "parallel calls", "results")


@dataclass(frozen=True)
class Writes:
    """What a model of a family writes behind its prompt."""

    answer: str
    """An answer whose row has no thoughts."""
    thoughts: str = ""
    """One that thinks; where nothing is said, thoughts stand before the text as DeepSeek and Qwen write them."""
    empty: str = ""
    """One whose row says that it has no thoughts; where nothing is said, likewise."""
    call: str = ""
    two_calls: str = ""
    after_result: str = ""
    """An answer to a result, where that is another."""
    refuses: dict[str, str] = field(default_factory=dict)
    """By shape, why a row of it is refused."""
    trims: bool = False
    """Whether blanks around a text are taken off."""
    file: str = ""
    """The template, where it is not that of the family's name."""
    kwargs: dict[str, Any] = field(default_factory=dict)

    def text(self, shape: str, message: dict[str, Any]) -> str:
        """What is written for an answer in a conversation of this shape."""
        content = message["content"].split("</think>")[-1].lstrip()
        if len(message.get("tool_calls", ())) > 1:
            return self.two_calls
        if "tool_calls" in message:
            return self.call
        content = content.strip() if self.trims else content
        if shape == "thoughts":
            form = self.thoughts or self.answer.replace("{text}", "<think>\n{thoughts}\n</think>\n\n{text}")
            return form.format(text=content, thoughts=message["reasoning_content"])
        form = (self.after_result if shape == "results" else "") or self.answer
        if shape == "empty thoughts":
            form = self.empty or self.answer.replace("{text}", "<think>\n\n</think>\n\n{text}")
        return form.format(text=content)


NO_TOOLS = {
    "tools": "leaves out the tools that may be called",
    "call": "leaves out the tool call in message 2",
    "parallel calls": "leaves out the tool call in message 2",
    "results": "leaves out the tool call in message 2",
}
NO_TOOL_ROLE = {**NO_TOOLS, "results": "refuses it"}
NO_DECLARATIONS = dict.fromkeys(WITH_TOOLS, "leaves out the tools that may be called")
CLOSED = {"thoughts": "the prompt closes the thoughts before the answer begins"}
ARGUMENTS, MORE = '{"city": "Oslo", "days": 3}', '{"city": "Rome", "days": 2}'
NAMED, MORE_NAMED = (f'{{"name": "get_weather", "arguments": {part}}}' for part in (ARGUMENTS, MORE))
WITH_PARAMETERS = f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}'
HERMES, MORE_HERMES = (f"<tool_call>\n{part}\n</tool_call>" for part in (NAMED, MORE_NAMED))
CODER, MORE_CODER = (
    f"<tool_call>\n<function=get_weather>\n<parameter=city>\n{city}\n</parameter>\n<parameter=days>\n{days}\n"
    "</parameter>\n</function>\n</tool_call>"
    for city, days in (("Oslo", 3), ("Rome", 2))
)
GLM, MORE_GLM = (
    f"<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>{city}</arg_value>\n"
    f"<arg_key>days</arg_key>\n<arg_value>{days}</arg_value>\n</tool_call>"
    for city, days in (("Oslo", 3), ("Rome", 2))
)
INVOKE, MORE_INVOKE = (
    f'<invoke name="get_weather">\n<parameter name="city">{city}</parameter>\n'
    f'<parameter name="days">{days}</parameter>\n</invoke>\n'
    for city, days in (("Oslo", 3), ("Rome", 2))
)
DEEPSEEK, MORE_DEEPSEEK = (
    f"<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{part}<｜tool▁call▁end｜>" for part in (ARGUMENTS, MORE)
)
DS_END = "<｜end▁of▁sentence｜>"
ACTION, MORE_ACTION = (
    f'\n    {{"tool_call_id": "{number}", "tool_name": "get_weather", "parameters": {part}}}'
    for number, part in enumerate((ARGUMENTS, MORE))
)
NO_THOUGHTS = "<think>\n\n</think>\n\n"
GPT_OSS = Writes(
    "<|channel|>final<|message|>{text}<|return|>",
    thoughts="<|channel|>analysis<|message|>{thoughts}<|end|><|start|>assistant"
    "<|channel|>final<|message|>{text}<|return|>",
    empty="<|channel|>final<|message|>{text}<|return|>",
    call=f" to=functions.get_weather<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>",
    refuses={"parallel calls": "One call at a time"},
)
GEMMA_CALL, MORE_GEMMA = (
    f'<|tool_call>call:get_weather{{city:<|"|>{city}<|"|>,days:{days}}}<tool_call|>'
    for city, days in (("Oslo", 3), ("Rome", 2))
)
GEMMA_4 = Writes(
    "{text}<turn|>",
    thoughts="<|channel>thought\n{thoughts}\n<channel|>{text}<turn|>",
    empty="{text}<turn|>",
    call=f"{GEMMA_CALL}<|tool_response>",
    two_calls=f"{GEMMA_CALL}{MORE_GEMMA}<|tool_response>",
    trims=True,
)
SEED, MORE_SEED = (
    f"<seed:tool_call>\n<function=get_weather>\n<parameter=city>{city}</parameter>\n"
    f"<parameter=days>{days}</parameter>\n</function>\n</seed:tool_call>"
    for city, days in (("Oslo", 3), ("Rome", 2))
)
SEED_OSS = Writes(
    "{text}<seed:eos>",
    thoughts="<seed:think>{thoughts}</seed:think>\n{text}<seed:eos>",
    empty="{text}<seed:eos>",
    call=f"{SEED}<seed:eos>",
    two_calls=f"{SEED}\n{MORE_SEED}<seed:eos>",
    trims=True,
)
QWEN_THINKING = Writes(
    "\n</think>\n\n{text}<|im_end|>",
    thoughts="{thoughts}\n</think>\n\n{text}<|im_end|>",
    empty="\n</think>\n\n{text}<|im_end|>",
    call=f"\n</think>\n\n{CODER}<|im_end|>",
    two_calls=f"\n</think>\n\n{CODER}\n{MORE_CODER}<|im_end|>",
    trims=True,
)
QWEN_AT_ONCE = Writes(
    "{text}<|im_end|>",
    empty="{text}<|im_end|>",
    call=f"{CODER}<|im_end|>",
    two_calls=f"{CODER}\n{MORE_CODER}<|im_end|>",
    refuses=CLOSED,
    trims=True,
    kwargs={"enable_thinking": False},
)
FAMILIES: dict[str, Writes] = {
    "chatml": Writes("{text}<|im_end|>", refuses=NO_TOOLS),
    "command-a": Writes(
        "<|START_RESPONSE|>{text}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        thoughts="<|START_THINKING|>{thoughts}<|END_THINKING|>"
        "<|START_RESPONSE|>{text}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        empty="<|START_RESPONSE|>{text}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        call=f"<|START_ACTION|>[{ACTION}\n]<|END_ACTION|><|END_OF_TURN_TOKEN|>",
        two_calls=f"<|START_ACTION|>[{ACTION},{MORE_ACTION}\n]<|END_ACTION|><|END_OF_TURN_TOKEN|>",
    ),
    "command-r": Writes("{text}<|END_OF_TURN_TOKEN|>", refuses=NO_TOOL_ROLE, trims=True),
    "deepseek-r1": Writes(
        f"\n</think>\n\n{{text}}{DS_END}",
        thoughts=f"{{thoughts}}\n</think>\n\n{{text}}{DS_END}",
        empty=f"\n</think>\n\n{{text}}{DS_END}",
        refuses=NO_DECLARATIONS,
    ),
    "deepseek-v3": Writes(f"{{text}}{DS_END}", refuses=NO_DECLARATIONS),
    "deepseek-v3.1": Writes(
        f"{{text}}{DS_END}",
        empty=f"{{text}}{DS_END}",
        call=f"<｜tool▁calls▁begin｜>{DEEPSEEK}<｜tool▁calls▁end｜>{DS_END}",
        two_calls=f"<｜tool▁calls▁begin｜>{DEEPSEEK}{MORE_DEEPSEEK}<｜tool▁calls▁end｜>{DS_END}",
        refuses=CLOSED,
    ),
    "deepseek-v3.1, thinking": Writes(
        f"</think>{{text}}{DS_END}",
        thoughts=f"{{thoughts}}</think>{{text}}{DS_END}",
        empty=f"</think>{{text}}{DS_END}",
        call=f"</think><｜tool▁calls▁begin｜>{DEEPSEEK}<｜tool▁calls▁end｜>{DS_END}",
        two_calls=f"</think><｜tool▁calls▁begin｜>{DEEPSEEK}{MORE_DEEPSEEK}<｜tool▁calls▁end｜>{DS_END}",
        after_result=f"{{text}}{DS_END}",
        file="deepseek-v3.1",
        kwargs={"thinking": True},
    ),
    "gemma-2": Writes(
        "{text}<end_of_turn>", refuses={**NO_TOOL_ROLE, "system": "System role not supported"}, trims=True
    ),
    "gemma-3": Writes("{text}<end_of_turn>", refuses=NO_TOOL_ROLE, trims=True),
    "gemma-4": GEMMA_4,
    "gemma-4, thinking": replace(GEMMA_4, file="gemma-4", kwargs={"enable_thinking": True}),
    "glm-4": Writes(
        "\n{text}<|user|>",
        call=f"get_weather\n{ARGUMENTS}<|observation|>",
        two_calls=f"get_weather\n{ARGUMENTS}<|assistant|>get_weather\n{MORE}<|observation|>",
    ),
    "glm-4.5": Writes(
        "\n<think></think>\n{text}<|user|>",
        thoughts="\n<think>{thoughts}</think>\n{text}<|user|>",
        empty="\n<think></think>\n{text}<|user|>",
        call=f"\n<think></think>\n{GLM}<|observation|>",
        two_calls=f"\n<think></think>\n{GLM}\n{MORE_GLM}<|observation|>",
        trims=True,
    ),
    "glm-4.5, not thinking": Writes(
        "\n{text}<|user|>",
        empty="\n{text}<|user|>",
        call=f"\n{GLM}<|observation|>",
        two_calls=f"\n{GLM}\n{MORE_GLM}<|observation|>",
        refuses=CLOSED,
        trims=True,
        file="glm-4.5",
        kwargs={"enable_thinking": False},
    ),
    "gpt-oss": GPT_OSS,
    "gpt-oss, high effort": replace(GPT_OSS, file="gpt-oss", kwargs={"reasoning_effort": "high"}),
    "granite-3": Writes(
        "{text}<|end_of_text|>",
        call=f"<|tool_call|>[{NAMED}]<|end_of_text|>",
        two_calls=f"<|tool_call|>[{NAMED}, {MORE_NAMED}]<|end_of_text|>",
    ),
    "granite-4": Writes(
        "{text}<|end_of_text|>", call=f"{HERMES}<|end_of_text|>", two_calls=f"{HERMES}\n{MORE_HERMES}<|end_of_text|>"
    ),
    "hunyuan": Writes("{text}<｜hy_place▁holder▁no▁2｜>", refuses=NO_TOOLS),
    "hunyuan, not thinking": Writes(
        "{text}<｜hy_place▁holder▁no▁2｜>",
        empty="{text}<｜hy_place▁holder▁no▁2｜>",
        refuses=NO_TOOLS | CLOSED,
        file="hunyuan",
        kwargs={"enable_thinking": False},
    ),
    "kimi-k2, not thinking": Writes(
        "{text}<|im_end|>",
        empty="{text}<|im_end|>",
        refuses={**dict.fromkeys(("call", "parallel calls", "results"), "leaves out the tool call"), **CLOSED},
        file="kimi-k2",
        kwargs={"thinking": False},
    ),
    "lfm-2": Writes(
        "{text}<|im_end|>",
        call='<|tool_call_start|>[get_weather(city="Oslo", days=3)]<|tool_call_end|><|im_end|>',
        two_calls='<|tool_call_start|>[get_weather(city="Oslo", days=3), get_weather(city="Rome", days=2)]'
        "<|tool_call_end|><|im_end|>",
    ),
    "lfm-2.5": Writes(
        "{text}<|im_end|>",
        thoughts="<think>{thoughts}</think>{text}<|im_end|>",
        empty="{text}<|im_end|>",
        call="<|tool_call_start|>[get_weather(city='Oslo', days=3)]<|tool_call_end|><|im_end|>",
        two_calls="<|tool_call_start|>[get_weather(city='Oslo', days=3), get_weather(city='Rome', days=2)]"
        "<|tool_call_end|><|im_end|>",
    ),
    "llama-2": Writes(" {text} </s>", refuses=NO_TOOL_ROLE, trims=True),
    "llama-3": Writes(
        "{text}<|eot_id|>",
        call=f"{WITH_PARAMETERS}<|eot_id|>",
        refuses={"parallel calls": "single tool-calls at once"},
        trims=True,
    ),
    "llama-4": Writes(
        "{text}<|eot|>",
        call=f"{WITH_PARAMETERS}<|eom|>",
        two_calls=f'{WITH_PARAMETERS}{{"name": "get_weather", "parameters": {MORE}}}<|eom|>',
        trims=True,
    ),
    "minimax-m2": Writes(
        "\n</think>\n\n{text}[e~[",
        thoughts="{thoughts}\n</think>\n\n{text}[e~[",
        empty="\n</think>\n\n{text}[e~[",
        call=f"\n</think>\n\n\n<minimax:tool_call>\n{INVOKE}</minimax:tool_call>[e~[",
        two_calls=f"\n</think>\n\n\n<minimax:tool_call>\n{INVOKE}{MORE_INVOKE}</minimax:tool_call>[e~[",
    ),
    "mistral-v1": Writes(" {text}</s>", refuses={**NO_TOOL_ROLE, "system": "Only user and assistant roles"}),
    "mistral-v3": Writes(
        "{text}</s>",
        call=f'[TOOL_CALLS][{NAMED[:-1]}, "id": "oslocall1"}}]</s>',
        two_calls=f'[TOOL_CALLS][{NAMED[:-1]}, "id": "oslocall1"}}, {MORE_NAMED[:-1]}, "id": "romecall2"}}]</s>',
    ),
    "mistral-v11": Writes(
        "{text}</s>",
        thoughts="[THINK]{thoughts}[/THINK]{text}</s>",
        empty="{text}</s>",
        call=f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}</s>",
        two_calls=f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]get_weather[ARGS]{MORE}</s>",
    ),
    "nemotron-nano": Writes(
        "\n</think>\n\n{text}\n<SPECIAL_12>",
        thoughts="{thoughts}\n</think>\n\n{text}\n<SPECIAL_12>",
        empty="\n</think>\n\n{text}\n<SPECIAL_12>",
        call=f"\n</think>\n\n<TOOLCALL>[{NAMED}]</TOOLCALL>\n<SPECIAL_12>",
        two_calls=f"\n</think>\n\n<TOOLCALL>[{NAMED}, {MORE_NAMED}]</TOOLCALL>\n<SPECIAL_12>",
        trims=True,
    ),
    "phi-3-first": Writes("{text}<|end|>", refuses={**NO_TOOLS, "system": "leaves out the system message"}),
    "phi-3.5": Writes("{text}<|end|>", refuses=NO_TOOLS),
    "phi-4": Writes("{text}<|im_end|>", refuses=NO_TOOLS),
    "qwen-2.5": Writes("{text}<|im_end|>", call=f"{HERMES}<|im_end|>", two_calls=f"{HERMES}\n{MORE_HERMES}<|im_end|>"),
    "qwen-3": Writes(
        f"{NO_THOUGHTS}{{text}}<|im_end|>",
        thoughts="<think>\n{thoughts}\n</think>\n\n{text}<|im_end|>",
        empty=f"{NO_THOUGHTS}{{text}}<|im_end|>",
        call=f"{NO_THOUGHTS}{HERMES}<|im_end|>",
        two_calls=f"{NO_THOUGHTS}{HERMES}\n{MORE_HERMES}<|im_end|>",
    ),
    "qwen-3, not thinking": Writes(
        "{text}<|im_end|>",
        empty="{text}<|im_end|>",
        call=f"{HERMES}<|im_end|>",
        two_calls=f"{HERMES}\n{MORE_HERMES}<|im_end|>",
        refuses=CLOSED,
        file="qwen-3",
        kwargs={"enable_thinking": False},
    ),
    "qwen-3-instruct": Writes(
        "{text}<|im_end|>", call=f"{HERMES}<|im_end|>", two_calls=f"{HERMES}\n{MORE_HERMES}<|im_end|>"
    ),
    "qwen-3.5": QWEN_THINKING,
    "qwen-3.5, not thinking": replace(QWEN_AT_ONCE, file="qwen-3.5"),
    "qwen-3.8": QWEN_THINKING,
    "qwen-3.8, low effort": replace(QWEN_THINKING, file="qwen-3.8", kwargs={"reasoning_effort": "low"}),
    "qwen-3.8, not thinking": replace(QWEN_AT_ONCE, file="qwen-3.8"),
    "seed-oss": SEED_OSS,
    "seed-oss, budget of 512": replace(SEED_OSS, file="seed-oss", kwargs={"thinking_budget": 512}),
    "smollm-2": Writes("{text}<|im_end|>", refuses=NO_TOOLS),
    "smollm-3": Writes(
        "{text}<|im_end|>",
        call=f"<tool_call>{NAMED}</tool_call><|im_end|>",
        two_calls=f"<tool_call>{NAMED}</tool_call>\n<tool_call>{MORE_NAMED}</tool_call><|im_end|>",
    ),
    "smollm-3, not thinking": Writes(
        "{text}<|im_end|>",
        empty="{text}<|im_end|>",
        call=f"<tool_call>{NAMED}</tool_call><|im_end|>",
        two_calls=f"<tool_call>{NAMED}</tool_call>\n<tool_call>{MORE_NAMED}</tool_call><|im_end|>",
        refuses=CLOSED,
        file="smollm-3",
        kwargs={"enable_thinking": False},
    ),
    "zephyr": Writes("{text}</s>", refuses=NO_TOOLS),
}


def tools_of(shape: str) -> list[dict[str, Any]] | None:
    """The tools of a conversation of this shape."""
    return [TOOL] if shape in WITH_TOOLS else None


def rendered_table() -> str:
    """The table as Markdown, made by encoding each conversation."""
    from llmtune.data.chat_encoding import encode_chat
    from llmtune.data.chat_rows import canonical_messages
    from support.templates import family_tokenizer, recipe_for

    reasons: dict[str, int] = {}
    lines = ["| family | " + " | ".join(SHAPES) + " |", "|---" * (len(SHAPES) + 1) + "|"]
    for name, writes in FAMILIES.items():
        cells = []
        for shape, messages in SHAPES.items():
            row = canonical_messages(messages, tools_of(shape))
            (result,) = encode_chat([row], family_tokenizer(writes.file or name), recipe_for(kwargs=writes.kwargs))
            if isinstance(result, str):
                cells.append(f"no ({reasons.setdefault(result, len(reasons) + 1)})")
            else:
                cells.append({1: "yes", 2: "split"}[len(result)])
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", "Why rows are refused:", "", *notes, ""])


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parents[1] / "tests"))
    DOCS.write_text(MARKS.sub(lambda found: found[1] + rendered_table() + found[2], DOCS.read_text("utf-8")), "utf-8")
