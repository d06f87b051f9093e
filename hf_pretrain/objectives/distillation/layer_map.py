"""Which layer of the teacher each layer of the student learns from."""

from __future__ import annotations

from collections.abc import Sequence

from hf_pretrain.errors import InputError


def layer_map(spec: str | Sequence[int], *, student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Return the teacher's layer for each of the student's layers 1 to M; embeddings (layer 0) go with embeddings.

    Args:
        spec: "uniform" (every N/M-th layer, up to the last), "last" (the last M layers), or the M layers themselves, as numbers
            or as text such as "3,6,9,12"; layers count from 1 and may repeat, but not fall.
        student_layers: M.
        teacher_layers: N.

    Returns:
        g(1), ..., g(M).

    Raises:
        InputError: If the map has another length, leaves 1 to N or falls, or if "uniform" does not divide N.

    Source: Jiao et al. 2020, "TinyBERT", section 3.1.
    """
    layers = _read(spec, student_layers, teacher_layers)
    if len(layers) != student_layers:
        raise InputError(
            f"layer_map={spec!r} has {len(layers)} entries for {student_layers} student layers: give one a layer"
        )
    if not all(1 <= layer <= teacher_layers for layer in layers):
        raise InputError(f"layer_map={spec!r} leaves the teacher's layers, 1 to {teacher_layers}: map into these")
    if any(below > above for below, above in zip(layers, layers[1:], strict=False)):
        raise InputError(
            f"layer_map={spec!r} falls: a higher student layer learns from no lower teacher layer; sort it"
        )
    return layers


def _read(spec: str | Sequence[int], student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    if not isinstance(spec, str):
        return tuple(spec)
    if spec == "last":
        return tuple(range(teacher_layers - student_layers + 1, teacher_layers + 1))
    if spec == "uniform":
        step, rest = divmod(teacher_layers, student_layers)
        if rest:
            raise InputError(
                f"layer_map='uniform': {student_layers} student layers do not divide {teacher_layers} teacher layers; "
                "use 'last' or list the layers, such as layer_map='3,6,9,12'"
            )
        return tuple(step * layer for layer in range(1, student_layers + 1))
    try:
        return tuple(int(layer) for layer in spec.split(","))
    except ValueError:
        raise InputError(
            f"layer_map={spec!r} is unknown: use 'uniform', 'last' or teacher layers such as '3,6,9,12'"
        ) from None
