"""Fixtures that several test files share: the paper's tokenizer and a tiny random model over it."""

from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from smart.tokens import build_tokenizer

    return build_tokenizer()


def make_tiny_model(tokenizer: Any) -> Any:
    """Random Phi-3, 2 layers x 32; logits spread enough that sampling is not uniform."""
    from smart.model import build_model

    model = build_model(tokenizer, layers=2, hidden=32, heads=4, intermediate=64, seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture
def tiny_model(tokenizer: Any) -> Any:
    return make_tiny_model(tokenizer)
