"""open-r1's code reward, from its description, without its sandbox: the share of the test cases that pass."""


def code_reward(completions, cases, **kwargs):
    rewards = []
    for completion, tests in zip(completions, cases):
        names = {}
        try:
            exec(completion[0]["content"], names)
            passed = [names["f"](given) == expected for given, expected in tests]
        except Exception:
            rewards.append(0.0)
            continue
        rewards.append(sum(passed) / len(passed))
    return rewards
