"""Functions that are one kernel on CUDA and several operations on a CPU: attention and the RMS norm."""

from typing import Any

import torch

from simulated_cuda.device import DEVICE, CudaTensor

plain_attention = torch.nn.functional.scaled_dot_product_attention
plain_rms_norm = torch.nn.functional.rms_norm


def attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    """``scaled_dot_product_attention``; notes the kernel that a GPU of compute capability 8.0 or later would take."""
    given = (query, key, value, attn_mask)
    if isinstance(query, CudaTensor):
        DEVICE.attention[DEVICE.place(), _kernel(*given, is_causal)] += 1
        if torch.is_autocast_enabled("cuda") and not _needs_grad(given):
            fast = torch.get_autocast_dtype("cuda")
            given = tuple(p.to(fast) if p is not None and p.is_floating_point() else p for p in given)  # type: ignore[assignment]
        if DEVICE.device.type != "cuda" and _needs_grad(given):  # torch asks a registry without such a device
            return torch.ops.aten._scaled_dot_product_attention_math(*given, dropout_p, is_causal, **options)[0]
    return _one_kernel("attention", plain_attention, *given, dropout_p, is_causal, **options)


def rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """``rms_norm``, which is one kernel on CUDA from torch 2.9 on, if input and weight have the same dtype."""
    if weight is not None and weight.dtype != input.dtype:
        return plain_rms_norm(input, normalized_shape, weight, eps)
    return _one_kernel("rms_norm", plain_rms_norm, input, normalized_shape, weight, eps)


def _needs_grad(given: Any) -> bool:
    tensors = [part for part in given if isinstance(part, torch.Tensor)]
    return torch.is_grad_enabled() and any(part.requires_grad for part in tensors)


def _one_kernel(name: str, function: Any, *given: Any, **options: Any) -> Any:
    """Call ``function``, which counts as one launch if its first argument is a tensor of the device."""
    if not isinstance(given[0], CudaTensor):
        return function(*given, **options)
    DEVICE.note("launch", name if DEVICE.by_name else "")
    if _needs_grad(given):
        DEVICE.paused += 1
        try:
            return function(*given, **options)
        finally:
            DEVICE.paused -= 1
    strangers = [part for part in given if isinstance(part, torch.Tensor) and not isinstance(part, CudaTensor)]
    DEVICE.refuse_two_devices(name, given, [given[0]], strangers)
    inner = [part.held if isinstance(part, CudaTensor) else part for part in given]
    out = function(*inner, **options)
    if DEVICE.capturing:
        DEVICE.record(function, inner, options, out)
    return CudaTensor(out)


def _kernel(query: Any, key: Any, value: Any, mask: Any, is_causal: bool) -> str:
    """Which one, by the rules of torch's sdp_utils as far as calls of this package can meet them."""
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else query.dtype
    if not autocast and len({query.dtype, key.dtype, value.dtype}) > 1:
        raise RuntimeError("Expected query, key, and value to have the same dtype")
    half, size = dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    dense = all(part.stride(-1) == 1 for part in (query, key, value))
    square = query.shape[-2] == key.shape[-2]
    if mask is None and half and size <= 256 and dense and (square or not is_causal):
        return "flash"
    aligned = all(part.storage_offset() * part.element_size() % 16 == 0 for part in (query, key, value))
    if size % (8 if half else 4) or not dense or not aligned:
        return f"math (head size {size}, dense {dense}, aligned {aligned})"
    if mask is None:
        return "memory-efficient"
    if mask.dtype not in (torch.bool, query.dtype) and not autocast:
        raise RuntimeError(f"attention mask of {mask.dtype} for queries of {query.dtype}")
    if mask.stride(-1) != 1:
        return "math (the mask is not dense)"
    odd = mask.shape[-1] % 8 or any(mask.stride(d) % 8 for d in range(mask.ndim - 1) if mask.shape[d] > 1)
    return "memory-efficient" + (", the mask copied to be aligned" if odd else "")
