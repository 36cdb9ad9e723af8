"""The mean of LoRA's products, for comparison with the mean of its factors.

What a LoRA module adds to its projection is the product B A, and mean(B) mean(A) is not mean(B A).
Here the products are averaged, and the mean goes back to the devices as the rank-R factors nearest
to it (Eckart and Young 1936, as in FlexLoRA, Bai et al. 2024); it has a rank of up to K R, so
what is beyond R is lost. Adapters and biases are averaged as tensors.

Shape letters: P entries of the layout, R rank, K clients.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from cloud_aggregator.aggregation.mean import weighted_mean
from device_profiles.modules import is_lora
from messaging.layout import Layout, Tensors, Vector

Matrix = npt.NDArray[np.float64]


def mean_of_products(
    state: Vector, updates: Iterable[tuple[Vector, int]], layout: Layout
) -> Vector:
    """Return the next state. Shape (P,).

    Args:
        state: The global state that the updates were trained from. Shape (P,).
        updates: (difference to the state, examples), in client order, taken once.
        layout: With both factors of every LoRA module, A before B.
    """
    sites = [s.name.removesuffix(".lora_A.weight") for s in layout.specs if ".lora_A." in s.name]
    sums: dict[str, Matrix] = {}
    weights: dict[str, int] = dict.fromkeys(sites, 0)

    def watched() -> Iterable[tuple[Vector, int]]:
        for update, examples in updates:
            held = _unpack_first(state[: update.size] + update, layout)
            for site in sites:
                if f"{site}.lora_B.weight" in held:
                    part = examples * _product(held, site)
                    sums[site] = sums[site] + part if site in sums else part
                    weights[site] += examples
            yield update, examples

    mean = layout.unpack(state + weighted_mean(watched(), layout.size))
    for site, total in sums.items():
        a, b = factors(total / weights[site], like=mean[f"{site}.lora_A.weight"])
        mean[f"{site}.lora_A.weight"], mean[f"{site}.lora_B.weight"] = a, b
    return layout.pack(mean)


def _unpack_first(vector: Vector, layout: Layout) -> Tensors:
    """Return the LoRA tensors of a vector that may hold only the first tensors of the layout."""
    tensors: Tensors = {}
    start = 0
    for spec in layout.specs:
        if start + spec.size > vector.size:
            break
        if is_lora(spec.name):
            tensors[spec.name] = vector[start : start + spec.size].reshape(spec.shape)
        start += spec.size
    return tensors


def _product(tensors: Tensors, site: str) -> Matrix:
    b = tensors[f"{site}.lora_B.weight"].astype(np.float64)
    return b @ tensors[f"{site}.lora_A.weight"].astype(np.float64)


def factors(product: Matrix, *, like: Vector) -> tuple[Vector, Vector]:
    """Return the rank-R factors A (R, in) and B (out, R) whose product is nearest to ``product``.

    Factors are free up to an invertible R x R matrix. Here A has the size of ``like`` and is turned
    to lie as near to it as it can (orthogonal Procrustes), so that training goes on from factors of
    the usual size and a device's moments keep their meaning as far as they can.

    Args:
        product: Shape (out, in).
        like: Shape (R, in).
    """
    rank = like.shape[0]
    left, size, right = np.linalg.svd(product, full_matrices=False)
    left, size, right = left[:, :rank], size[:rank], right[:rank]
    if len(size) < rank:  # a projection narrower than the rank
        missing = rank - len(size)
        left = np.pad(left, ((0, 0), (0, missing)))
        size, right = np.pad(size, (0, missing)), np.pad(right, ((0, missing), (0, 0)))
    u, _, v = np.linalg.svd(like.astype(np.float64) @ right.T)
    turn = u @ v  # (R, R), orthogonal
    # The rows of ``right`` have length 1; a mean of factors that cancel out has no size to go by.
    scale = np.linalg.norm(like) / np.sqrt(rank) or 1.0
    a = scale * turn @ right
    b = (left * size) @ turn.T / scale
    return a.astype(np.float32), b.astype(np.float32)
