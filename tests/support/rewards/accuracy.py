"""TRL's accuracy reward, from its description: 1 if the last boxed answer equals the solution."""

import re


def boxed(text):
    found = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return found[-1].strip() if found else None


def accuracy_reward(completions, solution, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if boxed(content) == gold.strip() else 0.0 for content, gold in zip(contents, solution)]
