"""Rewards for questions whose answer is a number."""

import re


def last_number(row: dict, answer: str) -> float:
    """1 if the last number of an answer is the reference."""
    numbers = re.findall(r"\d+", answer)
    return float(numbers[-1:] == [row["messages"][-1]["content"]])


def one_number(row: dict, answer: str) -> float:
    """1 if an answer has one number that is not in the question: an answer that lists numbers may hit by chance."""
    question = re.findall(r"\d+", row["messages"][-2]["content"])
    return float(len({*re.findall(r"\d+", answer)} - {*question}) == 1)
