"""``exact_float32``: ratings in float32 that no setting outside this package rounds."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within, or within a function that it decorates, matrix products and convolutions in float32 keep all their bits.

    By default cuDNN rounds to TensorFloat-32, 10 bits; ``torch.set_float32_matmul_precision``, its newer attributes
    ``fp32_precision`` and ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`` do the same to matrix products. Of torch's settings, the
    older ones and the newer ones must agree, since parts of it read either.
    """
    kinds = _kinds()
    newer = [kind.fp32_precision for kind in kinds]
    older: dict[str, Any] = {}
    with suppress(RuntimeError):  # it cannot be read where only a newer setting was changed
        older["products"] = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        older["convolutions"] = torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        if "products" in older:
            torch.set_float32_matmul_precision(older["products"])
        if "convolutions" in older:
            torch.backends.cudnn.allow_tf32 = older["convolutions"]
        for kind, value in zip(kinds, newer, strict=True):
            kind.fp32_precision = value


def _kinds() -> list[Any]:
    """The kinds of operations that have a precision each; none before torch 2.9."""
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    if not hasattr(cudnn, "conv"):
        return []
    return [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
