"""Optimizers and schedules of the official recipes that transformers does not have."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_MANY_STEPS = 2.0**40


class AdamWithoutBiasCorrection(torch.optim.AdamW):
    """Adam with decoupled weight decay and no bias correction, epsilon outside the square root.

    The first update is 3.16 learning rates long instead of one, and warm-up is tuned to that. It is `torch.optim.AdamW` with
    its step counter so far on that both corrections are one, so the fused and multi-tensor kernels stay in use.

    Source: `AdamWeightDecayOptimizer` of the official BERT and ELECTRA code.
    """

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        fresh = [p for p in group["params"] if p.grad is not None and len(self.state[p]) == 0]
        has_complex = super()._init_group(group, *lists)
        for parameter in fresh:
            self.state[parameter]["step"].fill_(_MANY_STEPS)
        return has_complex


def linear_product_schedule(optimizer: Optimizer, *, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Return the schedule that multiplies linear decay by linear warm-up.

    At step s of T with w steps of warm-up the factor is ``(1 - s/T) * min(1, s/w)``; the rate is zero at step 0.

    Args:
        optimizer: Optimizer whose learning rates are scheduled.
        num_warmup_steps: Steps of warm-up, w.
        num_training_steps: All steps, T.

    Source: `create_optimizer` of the official ELECTRA code. (BERT's leaves the decay out while warming up.)
    """
    return LambdaLR(optimizer, partial(_linear_product, warmup=num_warmup_steps, total=num_training_steps))


def _linear_product(step: int, *, warmup: int, total: int) -> float:
    return max(0.0, 1.0 - step / total) * min(1.0, step / max(1, warmup) if warmup else 1.0)
