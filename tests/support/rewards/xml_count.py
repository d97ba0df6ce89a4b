"""The XML count reward of a GRPO demo that many copied, from its description: tags, minus text after the last one."""


def count_xml(text):
    score = 0.0
    score += 0.125 if text.count("<reasoning>") == 1 else 0.0
    score += 0.125 if text.count("</reasoning>") == 1 else 0.0
    score += 0.125 if text.count("<answer>") == 1 else 0.0
    if text.count("</answer>") == 1:
        score += 0.125 - 0.001 * len(text.split("</answer>")[-1])
    return score


def xmlcount_reward_func(completions, **kwargs):
    return [count_xml(completion[0]["content"]) for completion in completions]
