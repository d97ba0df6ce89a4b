"""Train SetFit with its published settings, and print its accuracy as a line of JSON (text_classification.py runs it).

    python benchmarks/setfit_trainer.py MODEL TRAIN.jsonl TEST.jsonl

Settings as in Tunstall et al. (2022, arXiv 2209.11055): 20 pairs of each kind a row, batches of 16, one epoch at 2e-5,
then its logistic regression. It needs `setfit`, which llmtune does not.
"""

from __future__ import annotations

import json
import sys

from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments


def read(path: str) -> Dataset:
    with open(path, encoding="utf-8") as lines:
        return Dataset.from_list([json.loads(line) for line in lines])


def main() -> int:
    model, train, test = sys.argv[1:]
    tuned = SetFitModel.from_pretrained(model, labels=sorted(set(read(train)["label"])))
    asked = TrainingArguments(
        batch_size=16, num_epochs=1, num_iterations=20, report_to="none", save_strategy="no", show_progress_bar=False
    )
    trainer = Trainer(tuned, asked, train_dataset=read(train))
    trainer.train()
    rows = read(test)
    right = [str(given) == wanted for given, wanted in zip(tuned.predict(rows["text"]), rows["label"], strict=True)]
    print(json.dumps({"setfit": sum(right) / len(right)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
