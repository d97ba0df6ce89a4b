"""LitGPT: `litgpt finetune_full` and `finetune_lora`, and the conversions from and to transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import litgpt.config
import torch
from conformance.adapter import Configuration, Job, NotOffered, isolated, serve
from litgpt.__main__ import PARSER_DATA, main  # noqa: F401
from litgpt.finetune import full, lora  # noqa: F401
