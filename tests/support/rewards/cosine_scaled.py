"""open-r1's cosine-scaled reward, from its description: short right answers and long wrong ones get more."""

import math
import re

MOST = 1000


def cosine_scaled_reward(completions, solution, **kwargs):
    rewards = []
    for completion, gold in zip(completions, solution):
        content = completion[0]["content"]
        numbers = re.findall(r"-?\d+", content)
        progress = min(1.0, len(content) / MOST)
        cosine = math.cos(progress * math.pi)
        right = bool(numbers) and numbers[-1] == gold
        low, high = (0.5, 1.0) if right else (-0.5, -1.0)
        rewards.append(low + 0.5 * (high - low) * (1.0 + cosine))
    return rewards
