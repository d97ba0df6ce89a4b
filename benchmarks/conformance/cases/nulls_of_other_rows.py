"""Arguments that only another row's call has are not learned as nulls."""

from conformance.case import Case
from conformance.conversations import ALL, learns, qwen
from conformance.qwen_tools import calling, system_with, tool, written

TOOLS = [tool("get_weather", "city"), tool("get_time", "zone")]
NULLED = [
    {**TOOLS[0], "function": {**TOOLS[0]["function"]}},
    {**TOOLS[1], "function": {**TOOLS[1]["function"]}},
]
for entry, properties in zip(
    NULLED, ({"city": {"type": "string"}, "zone": None}, {"city": None, "zone": {"type": "string"}}), strict=True
):
    entry["function"]["parameters"] = {**entry["function"]["parameters"], "properties": properties}
QUESTIONS = "What is the weather in Paris?", "What time is it in Rome?"
CALLS = ("get_weather", '{"city": "Paris"}'), ("get_time", '{"zone": "Rome"}')
FILLED = ("get_weather", '{"city": "Paris", "zone": null}'), ("get_time", '{"city": null, "zone": "Rome"}')


def both(calls, tools):
    return [
        [("system", system_with(*tools)), ("user", question), ("assistant", written(*call))]
        for question, call in zip(QUESTIONS, calls, strict=True)
    ]


CASE = Case(
    title="Nulls in a Parquet file",
    group="what is learned",
    question="Two rows call tools with different arguments. A table has one type per column, so reading fills each "
    "with the other's keys as null. Are the nulls learned?",
    threads=["https://github.com/modelscope/ms-swift/pull/10125", "https://github.com/castform-ai/benchmax/pull/34"],
    rows=[
        calling(QUESTIONS[0], "get_weather", {"city": "Paris"}, TOOLS),
        calling(QUESTIONS[1], "get_time", {"zone": "Rome"}, TOOLS),
    ],
    settings={"max_length": 1024, "batch_size": 2, "file": "parquet"},
    right=learns(qwen, both(CALLS, TOOLS), ALL),
    wrong={
        **learns(qwen, both(FILLED, NULLED), ALL, "nulls in calls and tools: {}"),
        **learns(qwen, both(FILLED, TOOLS), ALL, "nulls in calls: {}"),
        **learns(qwen, both(CALLS, NULLED), ALL, "nulls in tools: {}"),
    },
)
