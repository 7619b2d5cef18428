"""Random weights for Audiobox Aesthetics, full-size or thin."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

aes = pytest.importorskip("audiobox_aesthetics.model.aes")
TRANSFORM = {
    "CE": {"mean": 5.1, "std": 1.5},
    "CU": {"mean": 5.7, "std": 1.8},
    "PC": {"mean": 3.2, "std": 1.3},
    "PQ": {"mean": 6.4, "std": 1.6},
}


def random_network(seed: int) -> Any:
    """AesMultiOutput with random weights that make ratings differ between clips."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch on the package's weight_norm
        torch.manual_seed(seed)
        network = aes.AesMultiOutput(target_transform=TRANSFORM)
        with torch.no_grad():
            for axis in TRANSFORM:
                network.proj_layer[axis][-1].weight.mul_(20)
                network.layer_weights[axis].normal_()
            for layer in network.wavlm_model.encoder.layers:
                layer.self_attn.grep_a.normal_(1, 0.3)
    return network


@contextmanager
def thin_architecture() -> Iterator[None]:
    """Within the block, the architecture is thin: 3 layers of 48 channels over 32-channel convolutions."""
    config = dict(vars(aes.DEFAULT_AUDIO_CFG)) | {
        "encoder_layers": 3,
        "encoder_embed_dim": 48,
        "encoder_ffn_embed_dim": 96,
        "encoder_attention_heads": 4,
        "conv_feature_layers": "[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2)] * 2",
        "conv_pos_groups": 4,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aes, "DEFAULT_AUDIO_CFG", type(aes.DEFAULT_AUDIO_CFG)(config))
        patch.setattr(aes.AesMultiOutput, "nth_layer", 4)
        patch.setattr(
            aes.AesMultiOutput.__init__,
            "__defaults__",
            tuple(4 if value == 13 else value for value in aes.AesMultiOutput.__init__.__defaults__),
        )
        yield
