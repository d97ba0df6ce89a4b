"""open-r1's tag count reward, from its description: a quarter for each tag that is there exactly once."""

TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")


def tag_count_reward(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [sum(0.25 for tag in TAGS if content.count(tag) == 1) for content in contents]
