"""The tools of a row are in its prompt."""

from conformance.case import Case
from conformance.conversations import ALL, learns, qwen
from conformance.qwen_tools import OWN, calling, system_with, tool, written

WEATHER = tool("get_weather", "city")
ASKED = ("user", "What is the weather in Paris?")
CALL = ("assistant", written("get_weather", '{"city": "Paris"}'))

CASE = Case(
    title="Tools are in the prompt",
    group="what is learned",
    question="A row lists the tools that its answer calls. Does the model see them, as the template writes them?",
    threads=[
        "https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/4072",
        "https://github.com/THUDM/slime/issues/1008",
    ],
    rows=[calling(ASKED[1], "get_weather", {"city": "Paris"}, [WEATHER])],
    settings={"max_length": 1024},
    right=learns(qwen, [[("system", system_with(WEATHER)), ASKED, CALL]], ALL),
    wrong={
        **learns(qwen, [[("system", OWN), ASKED, CALL]], ALL, "tools dropped: {}"),
        **learns(qwen, [[("system", system_with(WEATHER)), ASKED, ("assistant", "")]], ALL, "the call dropped: {}"),
        **learns(qwen, [[("system", OWN), ASKED, ("assistant", "")]], ALL, "tools and call dropped: {}"),
    },
)
