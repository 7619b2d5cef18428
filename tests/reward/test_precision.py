"""smart.reward.precision: what rounds float32 outside does not round ratings, and stays set."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smart.reward import load_reward, resample
from smart.reward.precision import exact_float32

OUTSIDE: dict[str, Callable[[], None]] = {
    "default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),  # as does TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "products": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}
KINDS = [(backend, kind) for backend in ("cuda", "mkldnn") for kind in ("matmul", "conv", "rnn")]
PRODUCTS = ("matmul", "mm", "addmm", "bmm", "baddbmm", "mv", "linear", "convolution", "conv1d")


def settings() -> list[str]:
    return [torch._C._get_fp32_precision_getter(*kind) for kind in [("generic", "all"), ("cuda", "all"), *KINDS]]


@pytest.fixture(params=OUTSIDE)
def outside(request: pytest.FixtureRequest) -> Any:
    """Something has set torch's precision; afterwards it is the default again."""
    before = settings()
    OUTSIDE[request.param]()
    now = settings()
    yield
    assert settings() == now
    torch.set_float32_matmul_precision("highest")
    for kind, value in zip([("generic", "all"), ("cuda", "all"), *KINDS], before, strict=True):
        torch._C._set_fp32_precision_setter(*kind, value)
    assert settings() == before


class Products(TorchDispatchMode):
    """Notes the precision of matrix products and convolutions on CUDA, and which of them there are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.partition("::")[2].rstrip("_")
        if name in PRODUCTS:
            kind = ("cuda", "conv" if name.startswith("conv") else "matmul")
            self.seen.add((name, torch._C._get_fp32_precision_getter(*kind)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["ce_proxy", "naturalness", "naturalness_mel"])
def test_products_and_convolutions_of_the_shipped_rewards_are_exact(outside: None, kind: str) -> None:
    clips = torch.rand(2, 16_000, generator=torch.Generator().manual_seed(1)) - 0.5
    reward = load_reward(kind)
    with Products() as products:
        reward.score(resample(clips, 44_100, 16_000))
    names = {name for name, _ in products.seen}
    assert names & {"matmul", "mm"} and names & {"convolution", "conv1d"}
    assert {precision for _, precision in products.seen} == {"ieee"}


def test_older_and_newer_settings_agree_within(outside: None) -> None:
    with exact_float32():  # each of these raises where they do not
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_settings_come_back_after_an_error(outside: None) -> None:
    with pytest.raises(ZeroDivisionError), exact_float32():
        raise ZeroDivisionError
