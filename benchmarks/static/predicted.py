"""What models cost on paper: the bytes, launches and FLOPs that `resfuse.explain` predicts for an H200."""

from __future__ import annotations

import torch

import resfuse
from benchmarks.static.subjects import EAGER, FUSED, STAGES, models
from benchmarks.static.table import Row

DEVICE = "h200"
QUANTITIES = ("bytes", "launches", "flops")
BATCH, SIZE = 128, 224


def rows(group: str, toolchain: str) -> list[Row]:
    """Of blocks and ResNet-50 in bfloat16, inference and training (forward and backward, without the optimizer)."""
    found = []
    for subject in (*STAGES, *models(BATCH, SIZE, ["resnet50"])):
        with torch.device("meta"):
            model = subject.build().bfloat16()
        for mode in ("inference", "train"):
            with resfuse.use_backend(None):
                explanation = resfuse.explain(model.train(mode == "train"), subject.shape, device=DEVICE)
            phase = "step" if mode == "train" else "forward"
            for provider, totals in ((FUSED, explanation.total), (EAGER, explanation.unfused)):
                found += [
                    Row(group, subject.level, f"{subject.name} {quantity}", mode, phase, provider,
                        getattr(totals, quantity), "", toolchain)
                    for quantity in QUANTITIES
                ]  # fmt: skip
    return found
