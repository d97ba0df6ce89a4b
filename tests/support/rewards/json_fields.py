"""A reward for JSON in ms-swift's form: the share of the reference's fields that the answer has."""

import json


class JsonFields:
    def __call__(self, completions, solution, **kwargs):
        rewards = []
        for completion, gold in zip(completions, solution):
            expected = json.loads(gold)
            try:
                given = json.loads(completion)
            except ValueError:
                rewards.append(0.0)
                continue
            same = [isinstance(given, dict) and given.get(key) == value for key, value in expected.items()]
            rewards.append(sum(same) / len(same))
        return rewards
