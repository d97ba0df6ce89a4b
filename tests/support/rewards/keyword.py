"""A keyword reward of TRL's page on rewards, from its description: the completion mentions the ground truth."""


def reward_func(completions, ground_truth, **kwargs):
    return [1.0 if gold in completion else 0.0 for completion, gold in zip(completions, ground_truth)]
