"""The head of a classifier is in its adapter folder."""

import torch
from conformance.case import Case, Finding
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROWS = [{"text": "red green blue", "label": "colour"}, {"text": "cat dog bird", "label": "animal"}]


def judge(case, reference, results):
    [result] = results.values()
    tokenizer = AutoTokenizer.from_pretrained(reference.folder)
    outputs = []
    for seed in (1, 2):  # a head that is not in the folder is drawn at random
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(reference.folder, num_labels=2, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, result.model).eval()
        outputs.append(model(**tokenizer(ROWS[0]["text"], return_tensors="pt")).logits)
    same = torch.equal(*outputs)
    return Finding("right" if same else "silently wrong", "" if same else "the head is another one at each reload")


CASE = Case(
    title="A classifier's head after a reload",
    group="what ships",
    question="A classifier is trained with LoRA. Loaded twice by PEFT, does it give the same scores, or is the head "
    "drawn anew?",
    threads=[
        "https://github.com/huggingface/peft/issues/310",
        "https://github.com/huggingface/sentence-transformers/issues/3980",
    ],
    rows=ROWS,
    settings={"kind": "classify", "method": "lora", "batch_size": 2, "learning_rate": 0.1},
    reason=r"\b(classifier|score|head)\b.{0,60}\bnot (be )?saved|modules_to_save",
    judge=judge,
)
