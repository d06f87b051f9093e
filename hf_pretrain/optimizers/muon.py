"""Muon for the hidden matrices of a model and AdamW for all else, as one optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from hf_pretrain.modeling.backbone import HiddenMatrix
from hf_pretrain.optimizers.adam import FusedAdamW, whole

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPSILON = 1e-7
# Numbers of the matrices that are orthogonalised together; more of them would need much memory at once.
_AT_ONCE = 1 << 25


class Muon(FusedAdamW):
    """Muon for hidden matrices, and AdamW for tables, heads, norms, biases and all else.

    A step takes a matrix W of A rows and B columns to ``W - r (0.2 sqrt(max(A, B)) O + d W)``, with learning rate r and weight
    decay d. O is the mean of the gradients (decay `momentum`, looked ahead with `nesterov`) made about orthogonal by steps of a
    Newton-Schulz iteration. The factor gives the update the size that Adam's updates have, so rates and decays of AdamW hold for
    all parameters. Matrices that are stored as one, such as the queries, keys and values of ModernBERT, are made orthogonal
    apart, and so are the matrices of experts. Those of one shape are computed together, in bf16 on GPUs that have it, else in
    the precision of the weights. The state of a matrix is one mean, half of Adam's.

    Args:
        params: Parameters or groups of them, in float32 or float64. Each group becomes one of AdamW and one for each kind of
            matrix.
        matrices: The hidden matrices by parameter, as [`hidden_matrices`] finds them; AdamW has all others.
        lr: Learning rate.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Decoupled weight decay.
        momentum: Decay of the mean of gradients.
        nesterov: Whether the gradient counts once more after it has entered the mean.
        ns_steps: Steps of the iteration.

    Raises:
        InputError: If a parameter has half precision: most steps would be lost when they are rounded.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", with queries, keys and values apart;
        factor and decay of Liu et al. 2025, "Muon is scalable for LLM training". A whole matrix moves as by
        `torch.optim.Muon` with ``adjust_lr_fn="match_rms_adamw"``.
    """

    name = "muon"

    def __init__(
        self,
        params: Any,
        *,
        matrices: Mapping[nn.Parameter, HiddenMatrix],
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        **options: Any,
    ) -> None:
        self._matrices: dict[Any, HiddenMatrix] = dict(matrices)
        self._of_matrices = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__(params, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state; Adam's own method would look for a step counter of each matrix."""
        torch.optim.Optimizer.__setstate__(self, state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters: as one group of AdamW, and one for each kind of matrix in it."""
        if "matrix" in param_group:
            super().add_param_group(param_group)
            return
        params = param_group["params"]
        members: dict[HiddenMatrix | None, list[Any]] = defaultdict(list)
        for parameter in [params] if isinstance(params, Tensor) else list(params):
            members[self._matrices.get(parameter)].append(parameter)
        for kind, found in members.items():
            # A plain tuple: checkpoints are read without classes of ours.
            own = {"matrix": None} if kind is None else {"matrix": tuple(kind), **self._of_matrices}
            super().add_param_group({**param_group, **own, "params": found})

    def _update(self, group: dict[str, Any]) -> None:
        if group["matrix"] is None:
            super()._update(group)
            return
        params = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not params:
            return
        grads: list[Tensor] = [parameter.grad for parameter in params]
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        means: list[Tensor] = [self.state[parameter]["momentum_buffer"] for parameter in params]
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        updates = list(torch._foreach_lerp(grads, means, group["momentum"])) if group["nesterov"] else means
        kind, rate = HiddenMatrix(*group["matrix"]), group["lr"]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        for indices in _together(updates):
            pieces = [kind.pieces(whole(updates[index])) for index in indices]
            _, rows, columns = pieces[0].shape
            made = orthogonalised(torch.cat(pieces), steps=group["ns_steps"]).split([len(one) for one in pieces])
            for index, piece in zip(indices, made, strict=True):
                parameter = params[index]
                step = _shared_out(kind.joined(piece.to(parameter.dtype), parameter.shape), parameter)
                parameter.add_(step, alpha=-rate * 0.2 * math.sqrt(max(rows, columns)))


def _together(tensors: Iterable[Tensor]) -> Iterator[list[int]]:
    """Yield the indices of tensors of one shape, as many at once as there is memory for."""
    shapes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        shapes[tuple(tensor.shape)].append(index)
    for shape, indices in shapes.items():
        size = max(1, _AT_ONCE // max(1, math.prod(shape)))
        yield from (indices[first : first + size] for first in range(0, len(indices), size))


def orthogonalised(matrices: Tensor, *, steps: int) -> Tensor:
    """Return matrices with the same singular vectors, whose singular values are about 1.

    Args:
        matrices: ``[K, A, B]``, of any size; a matrix of zeros stays one.
        steps: Steps of the iteration. After 5, singular values are from 0.7 to 1.2, but those that were far below the largest.

    Returns:
        ``[K, A, B]``, in bf16 on GPUs that have it.

    Source: The quintic Newton-Schulz iteration of Jordan et al. 2024, with its coefficients.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPSILON)
    x = x.to(_precision(x))
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _precision(tensor: Tensor) -> torch.dtype:
    has_bf16 = tensor.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else tensor.dtype


def _shared_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's share of a tensor that all processes have, as FSDP2 has shared out another one."""
    if not isinstance(like, DTensor):
        return tensor
    everywhere = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(tensor, like.device_mesh, everywhere, run_check=False).redistribute(
        placements=like.placements
    )
