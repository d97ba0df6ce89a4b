"""A call's arguments, given as JSON text as OpenAI's API writes them, are learned as an object."""

from conformance.case import Case
from conformance.conversations import ALL, learns, qwen
from conformance.qwen_tools import calling, system_with, tool, written

WEATHER = tool("get_weather", "city")
ASKED = [("system", system_with(WEATHER)), ("user", "What is the weather in Paris?")]

CASE = Case(
    title="Arguments given as JSON text",
    group="what is learned",
    question="OpenAI's API returns the arguments of a call as JSON text. Does the model learn an object, or a quoted "
    "string?",
    threads=["https://github.com/oumi-ai/oumi/pull/2599", "https://github.com/vortico/flama/issues/258"],
    rows=[calling(ASKED[1][1], "get_weather", '{"city": "Paris"}', [WEATHER])],
    settings={"max_length": 1024},
    reason=r"arguments\b.{0,40}\b(must|should|not|expected)\b.{0,40}(string|text|object|JSON|mapping|dict)",
    right=learns(qwen, [[*ASKED, ("assistant", written("get_weather", '{"city": "Paris"}'))]], ALL),
    wrong={
        **learns(
            qwen,
            [[*ASKED, ("assistant", written("get_weather", '"{\\"city\\": \\"Paris\\"}"'))]],
            ALL,
            "a quoted string: {}",
        ),
        **learns(qwen, [[*ASKED, ("assistant", "")]], ALL, "the call dropped: {}"),
    },
)
