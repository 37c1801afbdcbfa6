"""Shape checks at the entry of the public maths.

Without them, torch would silently broadcast [B, 1] with [B, T], or [T] with [T, T]. The idea comes from chex's
`assert_equal_shape`, which rlax calls first in each function.

A check compares Python numbers. It reads nothing from the device, so it costs no synchronisation, leaves no trace in a
recorded CUDA graph, and becomes a guard under `torch.compile`.
"""

from torch import Tensor


def require_same_shape(**tensors: Tensor) -> None:
    """Raises `ValueError` unless all have the shape of the first; it names the two that differ, and both shapes."""
    (first, expected), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != expected.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and {first} {tuple(expected.shape)}: both must have the same"
            )


def require_rank(rank: int, **tensors: Tensor) -> None:
    """Raises `ValueError` for a tensor that has not `rank` dimensions; it names the tensor and its shape."""
    for name, tensor in tensors.items():
        if tensor.ndim != rank:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: its rank must be {rank}")


def require_one_a_row(rows: Tensor, of: str, **tensors: Tensor) -> None:
    """Raises `ValueError` for a tensor that is not [B], one number for each row of `rows` [B, ...], named `of`."""
    for name, tensor in tensors.items():
        if tensor.shape != rows.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and {of} {tuple(rows.shape)}: {name} must have one number for "
                f"each row, {tuple(rows.shape[:1])}"
            )
