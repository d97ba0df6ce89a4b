"""open-r1's repetition penalty, from its description: minus the share of repeated n-grams."""


def repetition_penalty_reward(completions, ngram_size=3, max_penalty=-1.0, **kwargs):
    rewards = []
    for completion in completions:
        words = completion[0]["content"].lower().split()
        grams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
        rewards.append((1 - len(set(grams)) / len(grams)) * -1.0 if grams else 0.0)
    return rewards
