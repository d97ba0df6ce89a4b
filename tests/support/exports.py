"""Exports of models in memory, which belong to no run and so get no score."""

from pathlib import Path

from llmtune.deploy.export import ExportFormat, certified_export, check_export
from llmtune.deploy.parity import Certificate
from llmtune.deploy.tuned_model import TunedModel


def export_tuned(tuned: TunedModel, form: ExportFormat, out: Path) -> Certificate:
    """Export a model to the folder `out`; return its certificate."""
    check_export(form, tuned, out)
    with certified_export(tuned, form, out) as made:
        return made.certificate
