"""The first example of TRL's page on custom rewards, from its description: longer completions get more."""


def reward_func(completions, **kwargs):
    return [float(len(completion)) for completion in completions]
