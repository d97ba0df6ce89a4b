"""DAPO's soft overlong punishment, from its description in TRL and verl: nothing up to a length, then less and less."""

LONGEST, CACHE = 1200, 1000


def soft_overlong_punishment(completions, **kwargs):
    rewards = []
    for completion in completions:
        over = len(completion) - (LONGEST - CACHE)
        rewards.append(0.0 if over <= 0 else -1.0 if over > CACHE else -over / CACHE)
    return rewards
