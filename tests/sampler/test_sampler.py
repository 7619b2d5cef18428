"""The sampler against the model's own uncached forward pass, and its draws against exact probabilities."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Phi3Config, Phi3ForCausalLM

from smart.sampler import Rollout, Sampler, draw, filter_logits
from smart.tokens import build_grammar, build_tokenizer, unplayable

PAD, BOS, EOS, VOCABULARY = 0, 1, 2, 23


@pytest.fixture(autouse=True)
def _global_generator_untouched() -> Iterator[None]:
    """No test here may draw from the global generator, save through ``make_model``, which puts it back."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


def make_model(seed: int = 0, **changes: Any) -> Any:
    """A small random Phi-3 whose weights are large enough that position and context matter to its logits."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Phi3ForCausalLM(Phi3Config(**options)).eval()
        with torch.no_grad():  # norms start at exactly 1, which would hide a norm that was left out
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    """Read only: a test that changes weights makes its own."""
    return make_model()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_prompts(lengths: list[int], seed: int = 0, width: int | None = None) -> Tensor:
    """(B, P) int64, left-padded; no token of the prompt itself is a special one."""
    width = width or max(lengths)
    prompts = torch.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        prompts[row, width - length :] = torch.randint(3, VOCABULARY, (length,), generator=seeded(seed * 100 + row))
    return prompts


def uncached_logits(model: Phi3ForCausalLM, sequence: Tensor, completion: int) -> Tensor:
    """One unpadded sequence (L,) -> float32 logits (completion, V) that predict its last tokens."""
    with torch.no_grad():
        logits = model(input_ids=sequence[None], use_cache=False).logits[0].float()
    return logits[-completion - 1 : -1]


def reference_logprob(
    logits: Tensor, token: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> float:
    """log p(token), one row, spelled out in float64 NumPy, independent of the sampler's own filter."""
    scaled = logits.double().numpy() / temperature
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if top_k:
        order = order[:top_k]
    mass = {i: math.exp(scaled[i] - scaled[order[0]]) for i in order}
    total = sum(mass.values())
    kept: list[int] = []
    reached = 0.0
    for i in order:
        if kept and reached >= top_p * total:
            break
        kept.append(i)
        reached += mass[i]
    return math.log(mass[token] / reached) if token in kept else -math.inf


def assert_matches_uncached(
    model: Phi3ForCausalLM,
    rollout: Rollout,
    prompts: Tensor,
    group_size: int,
    tol: float = 1e-4,
    **filters: Any,
) -> None:
    """Every drawn token's log-probability equals that of the uncached forward on its row, without padding."""
    length = prompts.shape[1]
    for row in range(rollout.tokens.shape[0]):
        start = int((prompts[row // group_size] != PAD).nonzero()[0, 0])
        count = int(rollout.mask[row].sum())
        sequence = rollout.tokens[row, start : length + count]
        logits = uncached_logits(model, sequence, count)
        expected = [
            reference_logprob(logits[t], int(sequence[len(sequence) - count + t]), **filters) for t in range(count)
        ]
        np.testing.assert_allclose(rollout.logprobs[row, :count].numpy(), expected, atol=tol, rtol=0)


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped-query": {"num_key_value_heads": 2},
    "one key-value head": {"num_key_value_heads": 1},
    "partial rotary": {"partial_rotary_factor": 0.5},
    "tied": {"tie_word_embeddings": True},
    "gelu": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("lengths", [[4, 4, 4], [2, 6, 1]], ids=["equal", "left-padded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_equal_the_uncached_forward(shape: str, lengths: list[int]) -> None:
    model = make_model(seed=1, **SHAPES[shape])
    if shape == "partial rotary":
        assert len(model.model.rotary_emb.inv_freq) == 2  # of 8 / 2 = 4: the option has taken effect
    prompts = random_prompts(lengths)
    sampler = Sampler(model, pad_id=PAD, eos_id=EOS)
    rollout = sampler.sample(prompts, max_new_tokens=20, group_size=3, generator=seeded(5))
    assert rollout.mask.sum() > 60
    assert_matches_uncached(model, rollout, prompts, 3)


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.6, "top_k": 7, "top_p": 0.9},
        {"top_k": 1},
        {"top_k": VOCABULARY + 50},
    ],
    ids=str,
)
def test_logprobs_are_of_the_distribution_drawn_from(model: Phi3ForCausalLM, filters: dict[str, Any]) -> None:
    prompts = random_prompts([3, 5])
    rollout = Sampler(model, pad_id=PAD, eos_id=None).sample(
        prompts, max_new_tokens=12, group_size=4, generator=seeded(6), **filters
    )
    assert_matches_uncached(model, rollout, prompts, 4, **filters)


def test_paper_vocabulary_and_shared_fixture(tiny_model: Any) -> None:
    prompts = torch.tensor([[21, 30, 40, 50], [0, 0, 21, 31]])
    rollout = Sampler(tiny_model, pad_id=0, eos_id=2).sample(
        prompts, max_new_tokens=30, group_size=2, generator=seeded(0)
    )
    assert_matches_uncached(tiny_model, rollout, prompts, 2)


def test_group_prefill_equals_each_row_alone(model: Phi3ForCausalLM) -> None:
    prompts = random_prompts([5, 2, 4])
    sampler = Sampler(model, pad_id=PAD, eos_id=EOS)
    grouped = sampler.sample(prompts, max_new_tokens=15, group_size=3, generator=seeded(7))
    repeated = sampler.sample(prompts.repeat_interleave(3, 0), max_new_tokens=15, generator=seeded(7))
    assert torch.equal(grouped.tokens, repeated.tokens)
    torch.testing.assert_close(grouped.logprobs, repeated.logprobs, atol=1e-5, rtol=0)


def test_amount_of_padding_does_not_matter(model: Phi3ForCausalLM) -> None:
    sampler = Sampler(model, pad_id=PAD, eos_id=EOS)
    tight, wide = random_prompts([3, 5], width=5), random_prompts([3, 5], width=14)
    first = sampler.sample(tight, max_new_tokens=15, group_size=4, generator=seeded(8))
    second = sampler.sample(wide, max_new_tokens=15, group_size=4, generator=seeded(8))
    assert torch.equal(first.tokens[:, 5:], second.tokens[:, 14:])
    assert torch.equal(second.tokens[:, :14], wide.repeat_interleave(4, 0))
    torch.testing.assert_close(first.logprobs, second.logprobs, atol=1e-5, rtol=0)


def test_pad_inside_a_prompt_is_a_token(model: Phi3ForCausalLM) -> None:
    prompts = torch.tensor([[PAD, 5, PAD, 7]])
    rollout = Sampler(model, pad_id=PAD, eos_id=None).sample(prompts, max_new_tokens=8, generator=seeded(9))
    assert_matches_uncached(model, rollout, prompts, 1)


def test_an_ended_row_changes_no_other(model: Phi3ForCausalLM) -> None:
    """With and without an end-of-sequence the same numbers are drawn: rows agree up to where they end."""
    prompts = random_prompts([3, 4, 2])
    options: dict[str, Any] = {"max_new_tokens": 40, "group_size": 8}
    ended = Sampler(model, pad_id=PAD, eos_id=EOS).sample(prompts, generator=seeded(10), **options)
    endless = Sampler(model, pad_id=PAD, eos_id=None).sample(prompts, generator=seeded(10), **options)
    assert endless.mask.all()
    counts = ended.mask.sum(1)
    assert len(counts.unique()) > 4  # rows leave the batch at different steps
    for row, count in enumerate(counts.tolist()):
        completion, reference = ended.tokens[row, 4:], endless.tokens[row, 4:]
        ends = (reference == EOS).nonzero()
        assert count == (int(ends[0, 0]) + 1 if len(ends) else 40)
        assert torch.equal(completion[:count], reference[:count])
        assert (completion[count:] == PAD).all()
        assert not ended.mask[row, count:].any()
        assert (ended.logprobs[row, count:] == 0).all()
        torch.testing.assert_close(ended.logprobs[row, :count], endless.logprobs[row, :count], atol=1e-5, rtol=0)


def test_ended_rows_that_wait_for_the_next_look(model: Phi3ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where rows that have ended stay in the batch for a while: the same rollout."""
    sampler = Sampler(model, pad_id=PAD, eos_id=EOS)
    options: dict[str, Any] = {"max_new_tokens": 40, "group_size": 8}
    expected = sampler.sample(random_prompts([3, 4, 2]), generator=seeded(10), **options)
    for steps in (7, 100):
        monkeypatch.setattr("smart.sampler.eager.STEPS_PER_LOOK", {"cpu": steps})
        rollout = sampler.sample(random_prompts([3, 4, 2]), generator=seeded(10), **options)
        assert torch.equal(rollout.tokens, expected.tokens)
        assert torch.equal(rollout.mask, expected.mask)
        torch.testing.assert_close(rollout.logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_end_of_sequence_may_equal_padding(model: Phi3ForCausalLM) -> None:
    prompts = random_prompts([2, 4])
    rollout = Sampler(model, pad_id=EOS, eos_id=EOS).sample(
        torch.where(prompts == PAD, EOS, prompts), max_new_tokens=30, group_size=6, generator=seeded(11)
    )
    counts = rollout.mask.sum(1)
    ended = rollout.tokens[torch.arange(12), 4 + counts - 1] == EOS
    assert ended.any()
    assert (ended | (counts == 30)).all()


def test_completions_are_cut_to_the_longest() -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform over the vocabulary
    prompts = random_prompts([3])
    sampler = Sampler(model, pad_id=PAD, eos_id=EOS)
    rollout = sampler.sample(prompts, max_new_tokens=60, generator=seeded(12))
    longest = rollout.mask.shape[1]
    assert 1 <= longest < 60
    assert rollout.tokens.shape == (1, 3 + longest)
    assert rollout.logprobs.shape == (1, longest)
    assert rollout.tokens[0, -1] == EOS
    torch.testing.assert_close(rollout.logprobs, torch.full((1, longest), -math.log(VOCABULARY)))


def test_shorter_limit_gives_a_prefix(model: Phi3ForCausalLM) -> None:
    prompts = random_prompts([4, 3])
    sampler = Sampler(model, pad_id=PAD, eos_id=None)
    long = sampler.sample(prompts, max_new_tokens=12, group_size=2, generator=seeded(13))
    short = sampler.sample(prompts, max_new_tokens=5, group_size=2, generator=seeded(13))
    assert short.mask.all()
    assert short.mask.shape == (4, 5)
    assert torch.equal(short.tokens, long.tokens[:, :9])
    torch.testing.assert_close(short.logprobs, long.logprobs[:, :5], atol=1e-6, rtol=0)


def test_seeding(model: Phi3ForCausalLM) -> None:
    prompts = random_prompts([4, 3])
    sampler = Sampler(model, pad_id=PAD, eos_id=EOS)
    options: dict[str, Any] = {"max_new_tokens": 20, "group_size": 4}
    generator = seeded(14)
    first = sampler.sample(prompts, generator=generator, **options)
    second = sampler.sample(prompts, generator=generator, **options)
    again = sampler.sample(prompts, generator=seeded(14), **options)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    assert first.tokens.tolist() != second.tokens.tolist()
    assert first.tokens.tolist() != sampler.sample(prompts, generator=seeded(15), **options).tokens.tolist()


def test_generator_advances_alike_whatever_is_drawn(model: Phi3ForCausalLM) -> None:
    states = []
    for eos in (EOS, None):
        generator = seeded(16)
        Sampler(model, pad_id=PAD, eos_id=eos).sample(
            random_prompts([2]), max_new_tokens=30, group_size=3, generator=generator
        )
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_each_sequence_may_have_a_generator_of_its_own(model: Phi3ForCausalLM) -> None:
    """What a sequence draws then depends on that one alone, not on its neighbours."""
    sampler = Sampler(model, pad_id=PAD, eos_id=EOS)
    prompts = random_prompts([3, 3, 3])
    options: dict[str, Any] = {"max_new_tokens": 12}
    whole = sampler.sample(prompts, generator=[seeded(1), seeded(2), seeded(3)], **options)
    for row, seed in enumerate((1, 2, 3)):
        alone = sampler.sample(prompts[row : row + 1], generator=seeded(seed), **options)
        length = alone.mask.shape[1]
        assert torch.equal(alone.tokens[0], whole.tokens[row, : 3 + length])
    turned = sampler.sample(prompts.flip(0), generator=[seeded(3), seeded(2), seeded(1)], **options)
    assert torch.equal(turned.tokens.flip(0), whole.tokens)
    with pytest.raises(ValueError, match="one for each of 3 sequences, got 2"):
        sampler.sample(prompts, generator=[seeded(1), seeded(2)], **options)


def test_without_a_generator_runs_differ(model: Phi3ForCausalLM) -> None:
    sampler = Sampler(model, pad_id=PAD, eos_id=None)
    # uniform enough over 23 tokens x 160 draws that agreement by chance is out of the question
    runs = [sampler.sample(random_prompts([2]), max_new_tokens=20, group_size=8, temperature=3.0) for _ in range(2)]
    assert runs[0].tokens.tolist() != runs[1].tokens.tolist()


def test_optimiser_step_is_seen_at_once() -> None:
    model = make_model()
    prompts = random_prompts([3, 4])
    samplers = [Sampler(model, pad_id=PAD, eos_id=None, dtype=d) for d in (None, torch.bfloat16)]
    before = [s.sample(prompts, max_new_tokens=6, generator=seeded(17)) for s in samplers]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids=before[0].tokens).logits.logsumexp(-1).mean().backward()
    optimiser.step()
    after = [s.sample(prompts, max_new_tokens=6, generator=seeded(17)) for s in samplers]
    assert_matches_uncached(model, after[0], prompts, 1)
    for old, new in zip(before, after, strict=True):
        assert (old.logprobs[:, 0] - new.logprobs[:, 0]).abs().max() > 0.05


def test_weights_are_read_in_place(model: Phi3ForCausalLM) -> None:
    """In the parameters' own dtype nothing of their size is allocated."""
    from smart.sampler.network import read_network

    net = read_network(model, torch.float32)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    used = [net.embedding, net.norm, net.head, *(w for layer in net.layers for w in layer)]
    assert {w.data_ptr() for w in used} == own


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16(parameters: torch.dtype) -> None:
    model = make_model(initializer_range=0.15).to(parameters)
    prompts = random_prompts([4, 2])
    sampler = Sampler(model, pad_id=PAD, eos_id=EOS, dtype=torch.bfloat16)
    rollout = sampler.sample(prompts, max_new_tokens=20, group_size=4, generator=seeded(18))
    assert rollout.logprobs.dtype == torch.float32
    exact = make_model(initializer_range=0.15).to(parameters).float()
    assert_matches_uncached(exact, rollout, prompts, 4, tol=0.05)
    with pytest.raises(AssertionError):  # it is bfloat16 that was used
        assert_matches_uncached(exact, rollout, prompts, 4, tol=1e-5)
    if parameters == torch.bfloat16:
        same = Sampler(model, pad_id=PAD, eos_id=EOS).sample(
            prompts, max_new_tokens=20, group_size=4, generator=seeded(18)
        )
        assert torch.equal(same.tokens, rollout.tokens)


def test_float32_from_bfloat16_parameters() -> None:
    model = make_model().bfloat16()
    prompts = random_prompts([4, 2])
    rollout = Sampler(model, pad_id=PAD, eos_id=None, dtype=torch.float32).sample(
        prompts, max_new_tokens=8, generator=seeded(19)
    )
    assert_matches_uncached(model.float(), rollout, prompts, 1)


def test_model_is_left_as_it_was_and_dropout_is_off() -> None:
    model = make_model(resid_pdrop=0.5, attention_dropout=0.5)
    model.train()
    model.model.embed_tokens.weight.requires_grad_(False)
    prompts = random_prompts([3, 4])
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    rollout = Sampler(model, pad_id=PAD, eos_id=None).sample(prompts, max_new_tokens=8, generator=seeded(20))
    assert model.training
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None and torch.equal(p, state[name]) for name, p in model.named_parameters())
    assert_matches_uncached(model.eval(), rollout, prompts, 1)


def test_result_can_be_used_in_autograd(model: Phi3ForCausalLM) -> None:
    rollout = Sampler(model, pad_id=PAD, eos_id=EOS).sample(random_prompts([3]), max_new_tokens=4, generator=seeded(21))
    assert not any(part.is_inference() or part.requires_grad for part in rollout)
    scale = torch.ones((), requires_grad=True)
    ((rollout.logprobs * scale).exp() * rollout.mask).sum().backward()
    assert scale.grad is not None


def test_ambient_autocast_changes_nothing(model: Phi3ForCausalLM) -> None:
    sampler = Sampler(model, pad_id=PAD, eos_id=EOS)
    plain = sampler.sample(random_prompts([3, 5]), max_new_tokens=10, generator=seeded(22))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = sampler.sample(random_prompts([3, 5]), max_new_tokens=10, generator=seeded(22))
    assert torch.equal(plain.logprobs, cast.logprobs)


# ---------------------------------------------------------------------------- the step that can be captured


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sampling on the CPU as it goes on CUDA, but that the captured step is run instead of replayed.

    Returns a list that grows by one with every capture.
    """
    captures: list[int] = []

    def capture(step: Any) -> Any:
        step()  # the warm-up, whose traces must not be felt
        captures.append(1)
        return step

    monkeypatch.setattr("smart.sampler.sample.GRAPH_DEVICES", {"cpu"})
    monkeypatch.setattr("smart.sampler.graph._capture", capture)
    return captures


def stepwise(model: Any, prompts: Tensor, **options: Any) -> Rollout:
    """The same by the path that runs everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smart.sampler.sample.GRAPH_DEVICES", set())
        dtype = options.pop("dtype", None)
        eos = options.pop("eos_id", EOS)
        return Sampler(model, pad_id=PAD, eos_id=eos, dtype=dtype).sample(prompts, **options)


def assert_same(one: Rollout, other: Rollout) -> None:
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("lengths", [[4, 4, 4], [2, 6, 1]], ids=["equal", "left-padded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_captured_step_draws_the_same(
    captured: list[int], shape: str, lengths: list[int], filters: dict[str, Any]
) -> None:
    model = make_model(seed=1, **SHAPES[shape])
    prompts = random_prompts(lengths)
    for eos, limit in ((EOS, 50), (None, 20), (EOS, 1)):
        options: dict[str, Any] = {"max_new_tokens": limit, "group_size": 3, **filters}
        rollout = Sampler(model, pad_id=PAD, eos_id=eos).sample(prompts, generator=seeded(5), **options)
        assert_same(rollout, stepwise(model, prompts, eos_id=eos, generator=seeded(5), **options))
        assert_matches_uncached(model, rollout, prompts, 3, **filters)
    assert len(captured) == 3


def test_captured_step_in_bfloat16(captured: list[int]) -> None:
    model = make_model(initializer_range=0.15)
    prompts = random_prompts([4, 2])
    options: dict[str, Any] = {"max_new_tokens": 20, "group_size": 4, "dtype": torch.bfloat16}
    rollout = Sampler(model, pad_id=PAD, eos_id=EOS, dtype=torch.bfloat16).sample(
        prompts, max_new_tokens=20, group_size=4, generator=seeded(18)
    )
    same = stepwise(model, prompts, generator=seeded(18), **options)
    assert torch.equal(rollout.tokens, same.tokens)
    torch.testing.assert_close(rollout.logprobs, same.logprobs, atol=1e-5, rtol=0)
    assert_matches_uncached(model, rollout, prompts, 4, tol=0.05)


def test_a_graph_is_used_again_and_remembers_nothing(captured: list[int]) -> None:
    """Batches of other rows, lengths and padding in turn; after a batch of NaN, too."""
    model = make_model()
    sampler = Sampler(model, pad_id=PAD, eos_id=EOS)
    wide, tight = random_prompts([3, 7], width=7), random_prompts([4, 4])
    for seed in range(3):
        for prompts, limit in ((wide, 20), (tight, 25), (tight, 50)):
            rollout = sampler.sample(prompts, max_new_tokens=limit, group_size=2, generator=seeded(seed))
            assert_same(rollout, stepwise(model, prompts, max_new_tokens=limit, group_size=2, generator=seeded(seed)))
    assert len(captured) == 2  # up to 32 places, and up to 64
    kept = [part.clone() for part in rollout]
    weight = model.lm_head.weight.detach()
    before = weight.clone()
    weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler.sample(tight, max_new_tokens=50, group_size=2, generator=seeded(0))
    assert all(torch.equal(part, copy) for part, copy in zip(rollout, kept, strict=True))  # not a view of the slots
    weight.copy_(before)
    again = sampler.sample(tight, max_new_tokens=50, group_size=2, generator=seeded(2))
    assert_same(again, rollout)
    assert len(captured) == 2


def test_a_graph_sees_new_weights_and_new_storage(captured: list[int]) -> None:
    model = make_model()
    prompts = random_prompts([3, 4])
    for dtype, tol in ((None, 1e-4), (torch.bfloat16, 0.5)):
        sampler = Sampler(model, pad_id=PAD, eos_id=None, dtype=dtype)
        before = len(captured)
        for step in range(3):
            rollout = sampler.sample(prompts, max_new_tokens=6, generator=seeded(17))
            assert_matches_uncached(model, rollout, prompts, 1, tol=tol)
            same = stepwise(model, prompts, max_new_tokens=6, generator=seeded(17), dtype=dtype, eos_id=None)
            torch.testing.assert_close(rollout.logprobs, same.logprobs, atol=1e-5, rtol=0)
            if step == 0:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(0.7)
                assert len(captured) == before + 1
            else:  # other memory: the graph would read what is no longer the model's
                for parameter in model.parameters():
                    parameter.data = parameter.detach() * 1.1
        assert len(captured) == before + 2


class Operations(TorchDispatchMode):
    """Notes the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(function))
        kinds = [part.dtype for part in args[1] if part is not None] if "index.Tensor" in str(function) else []
        assert torch.bool not in kinds, "as many elements as are True: the host would have to wait for the number"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}], ids=str)
def test_a_step_could_be_captured(
    captured: list[int], filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads no number from the device, brings none there, and leaves everything where it was."""
    from smart.sampler.network import weights_of

    sampler = Sampler(MUSICIANS[1], pad_id=PAD, eos_id=EOS, dtype=torch.bfloat16)
    watched: list[Any] = []

    def capture(step: Any) -> Any:
        def watched_step() -> None:
            with Operations() as operations:
                step()
            watched.append(operations.names)

        return watched_step

    monkeypatch.setattr("smart.sampler.graph._capture", capture)
    sampler.sample(torch.tensor([[PAD, BOS], [21, 30]]), max_new_tokens=3, grammar=GRAMMAR, **filters)
    assert len(watched) == 3 and watched[0] == watched[1] == watched[2]
    for name in ("_local_scalar_dense", "nonzero", "masked_select", "scalar_tensor", "where.Scalar", "lift_fresh",
                 "is_nonzero", "equal.default"):  # fmt: skip
        assert not [operation for operation in watched[0] if name in operation], name
    (graph,) = sampler._graphs.values()

    def addresses() -> list[int]:
        slots = graph.slots
        parts = [*weights_of(slots.net), *slots.cache, *(slots.state or ())]
        return [part.data_ptr() for part in (*parts, *(part for part in slots if isinstance(part, Tensor)))]

    before = addresses()
    sampler.sample(torch.tensor([[PAD, BOS], [21, 30]]), max_new_tokens=3, grammar=GRAMMAR, **filters)
    assert addresses() == before


def test_only_the_newest_graphs_are_kept(captured: list[int], model: Phi3ForCausalLM) -> None:
    sampler = Sampler(model, pad_id=PAD, eos_id=EOS)
    for rows in (1, 2, 3, 4, 5, 6, 6, 5, 1):
        sampler.sample(random_prompts([3]), max_new_tokens=3, group_size=rows, generator=seeded(0))
        assert len(sampler._graphs) <= 4
    assert len(captured) == 7


def test_without_a_graph_it_goes_on_step_by_step(
    model: Phi3ForCausalLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(step: Any) -> Any:
        step()
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("the capture was invalidated")  # its end fails, too

    monkeypatch.setattr("smart.sampler.sample.GRAPH_DEVICES", {"cpu"})
    monkeypatch.setattr("smart.sampler.graph._capture", refuse)
    monkeypatch.setattr(Sampler, "_captures", True)
    sampler = Sampler(model, pad_id=PAD, eos_id=EOS)
    prompts = random_prompts([3, 5])
    for each in (sampler, sampler, Sampler(model, pad_id=PAD, eos_id=EOS)):  # no sampler of the process tries again
        rollout = each.sample(prompts, max_new_tokens=20, group_size=2, generator=seeded(5))
        assert_same(rollout, stepwise(model, prompts, max_new_tokens=20, group_size=2, generator=seeded(5)))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "no CUDA graph could be captured: operation not permitted" in said[0]


@pytest.mark.parametrize("way", ["stepwise", "captured"])
def test_who_watches_sees_the_rows_as_they_grow(model: Phi3ForCausalLM, way: str, request: Any) -> None:
    if way == "captured":
        request.getfixturevalue("captured")
    seen: list[tuple[Tensor, Tensor]] = []
    prompts = random_prompts([3, 4, 2])
    options: dict[str, Any] = {"max_new_tokens": 50, "group_size": 8, "generator": seeded(10)}
    rollout = Sampler(model, pad_id=PAD, eos_id=EOS).sample(
        prompts, watch=lambda tokens, ended: seen.append((tokens.clone(), ended.clone())), **options
    )
    assert len(seen) >= 2
    widths = [tokens.shape[1] - 4 for tokens, _ in seen]
    assert widths == sorted(set(widths)) and widths[0] == 16
    whole = torch.nn.functional.pad(rollout.tokens, (0, 50), value=PAD)
    lengths = rollout.mask.sum(1)
    ends = (rollout.tokens[:, 4:] == EOS).any(1)
    for (tokens, ended), width in zip(seen, widths, strict=True):
        assert torch.equal(tokens, whole[:, : 4 + width])
        assert torch.equal(ended, ends & (lengths <= width))
    assert len({int(ended.sum()) for _, ended in seen}) > 1


# ------------------------------------------------------------------------------------------------- the draw


def test_first_token_follows_the_exact_probabilities(model: Phi3ForCausalLM) -> None:
    prompts = random_prompts([5])
    filters: dict[str, Any] = {"temperature": 1.3, "top_k": 12, "top_p": 0.95}
    rollout = Sampler(model, pad_id=PAD, eos_id=EOS).sample(
        prompts, max_new_tokens=1, group_size=20000, generator=seeded(23), **filters
    )
    logits = uncached_logits(model, torch.cat((prompts[0], prompts[0, :1])), 1)[0]
    expected = np.exp([reference_logprob(logits, token, **filters) for token in range(VOCABULARY)])
    counts = np.bincount(rollout.tokens[:, -1].numpy(), minlength=VOCABULARY)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert kept.sum() > 3
    assert chisquare(counts[kept], expected[kept] * 20000).pvalue > 1e-3


def test_rows_and_steps_are_drawn_independently() -> None:
    """Under a uniform model pairs of neighbouring rows and steps are uniform over V x V."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokens = (
        Sampler(model, pad_id=PAD, eos_id=None)
        .sample(random_prompts([1]), max_new_tokens=20, group_size=1000, generator=seeded(24))
        .tokens[:, 1:]
    )
    for one, other in ((tokens[:-1:2], tokens[1::2]), (tokens[:, :-1:2], tokens[:, 1::2])):
        pairs = np.bincount((one * VOCABULARY + other).flatten().numpy(), minlength=VOCABULARY**2)
        assert chisquare(pairs).pvalue > 1e-3


@given(
    row=st.lists(st.one_of(st.just(-math.inf), st.floats(-200, 200, width=32)), min_size=1, max_size=40).filter(
        lambda row: max(row) > -math.inf
    ),
    uniform=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53, 2**-53, 0.5])),
)
@settings(max_examples=300, deadline=None)
def test_draw_is_the_inverse_of_the_cumulative_distribution(row: list[float], uniform: float) -> None:
    logits = torch.tensor([row], dtype=torch.float32)
    token, logprob = draw(logits, torch.tensor([uniform], dtype=torch.float64))
    exact = np.exp(np.array(row) - max(row))
    exact /= exact.sum()
    assert exact[token] > 0
    assert math.isfinite(float(logprob))
    assert float(logprob) == pytest.approx(math.log(exact[token]), abs=1e-4)
    assert exact[:token].sum() - 1e-5 <= uniform <= exact[: token + 1].sum() + 1e-5


def test_draw_never_gives_an_impossible_token() -> None:
    logits = torch.randn(4000, 50, generator=seeded(25)) * 30
    logits[torch.rand(4000, 50, generator=seeded(26)) < 0.7] = -math.inf
    logits[:, 17] = 0.0
    uniform = torch.rand(4000, dtype=torch.float64, generator=seeded(27))
    uniform[:500], uniform[500:1000] = 0.0, 1 - 2**-53
    token, logprob = draw(logits, uniform)
    assert (logits.softmax(-1).gather(-1, token[:, None]) > 0).all()
    assert logprob.isfinite().all()


def test_equal_logits_are_kept_from_the_lowest_id() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    kept = filter_logits(logits, top_k=2).isfinite()
    assert kept.tolist() == [[True, True, False, False, False], [True, True, False, False, False]]
    kept = filter_logits(logits[1:], top_p=0.5).isfinite()  # two fifths fall short of a half, three reach it
    assert kept.tolist() == [[True, True, True, False, False]]


def test_a_very_low_temperature_is_finite() -> None:
    logits = torch.tensor([[100.0, 99.0, -100.0]])
    assert filter_logits(logits, temperature=1e-38).softmax(-1).tolist() == [[1.0, 0.0, 0.0]]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    extra=st.integers(0, 3),
    group_size=st.integers(1, 4),
    limit=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_any_lengths_and_groups(lengths: list[int], extra: int, group_size: int, limit: int, seed: int) -> None:
    model = MODEL
    prompts = random_prompts(lengths, seed=seed % 1000, width=max(lengths) + extra)
    rollout = Sampler(model, pad_id=PAD, eos_id=EOS).sample(
        prompts, max_new_tokens=limit, group_size=group_size, generator=seeded(seed)
    )
    n, length = len(lengths) * group_size, prompts.shape[1]
    steps = rollout.mask.shape[1]
    assert 1 <= steps <= limit
    assert rollout.tokens.shape == (n, length + steps)
    assert rollout.tokens.dtype == torch.int64
    assert rollout.mask.dtype == torch.bool
    assert rollout.logprobs.dtype == torch.float32
    assert rollout.logprobs.shape == (n, steps)
    assert torch.equal(rollout.tokens[:, :length], prompts.repeat_interleave(group_size, 0))
    completion = rollout.tokens[:, length:]
    ends_before = ((completion == EOS) & rollout.mask).long().cumsum(1) - (completion == EOS).long()
    assert torch.equal(rollout.mask, ends_before == 0)
    assert rollout.mask.any(0).all()
    assert_matches_uncached(model, rollout, prompts, group_size)


MODEL = make_model(seed=4)


# ------------------------------------------------------------------------------------------------ a grammar


TOKENIZER = build_tokenizer()
NAMES = sorted(TOKENIZER.vocab, key=TOKENIZER.vocab.__getitem__)
GRAMMAR = build_grammar(TOKENIZER)
MUSICIANS = [make_model(seed, vocab_size=len(NAMES), initializer_range=size) for seed, size in ((5, 0.02), (6, 0.3))]


def opening(*names: str) -> list[int]:
    return [TOKENIZER.vocab[name] for name in ("Bar_None", *names)]


def naive_playable(tokens: list[int]) -> list[bool]:
    """Which of all tokens may come next, by a plain loop over names, written from the description."""
    notes = {"Bar", "Position", "Pitch", "EOS"}
    after = {"Bar": {"TimeSig"}, "TimeSig": notes, "Position": {"Tempo", "Pitch"}, "Tempo": notes,
             "Pitch": {"Velocity"}, "Velocity": {"Duration"}, "Duration": notes}  # fmt: skip
    position, beats = -1, 4
    for token in tokens:
        kind, value = NAMES[token].split("_", 1)
        if kind == "Bar":
            position = -1
        elif kind == "TimeSig":
            beats = int(value.split("/")[0])
        elif kind == "Position":
            position = int(value)
    follow = after.get(NAMES[tokens[-1]].split("_")[0], {"Bar"})
    answer = []
    for name in NAMES:
        kind, value = name.split("_", 1)
        answer.append(kind in follow and (kind != "Position" or position < int(value) < 12 * beats))
    return answer


@st.composite
def any_prompts(draw_: Any) -> Tensor:
    """(B, P), left-padded: openings, and rows of any tokens at all."""
    row = st.one_of(
        st.lists(st.integers(0, len(NAMES) - 1), min_size=1, max_size=7).filter(any),
        st.just([BOS]),
        st.just(opening("TimeSig_3/4", "Position_0", "Tempo_120.0")),
        st.just(opening("TimeSig_3/8", "Position_35")),
        st.just(opening("TimeSig_3/8", "Position_33", "Pitch_60", "Velocity_63", "Duration_1.0.12")),
    )
    rows = draw_(st.lists(row, min_size=1, max_size=4))
    width = max(map(len, rows))
    return torch.tensor([[PAD] * (width - len(tokens)) + tokens for tokens in rows])


@given(prompts=any_prompts(), musician=st.sampled_from(MUSICIANS), ends=st.booleans(), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_under_a_grammar_all_is_playable(prompts: Tensor, musician: Any, ends: bool, seed: int) -> None:
    rollout = Sampler(musician, pad_id=PAD, eos_id=EOS if ends else None).sample(
        prompts, max_new_tokens=50, group_size=4, generator=seeded(seed), grammar=GRAMMAR
    )
    assert rollout.mask.any(dim=1).all()
    assert not unplayable(rollout.tokens, prompts.shape[1], rollout.mask, GRAMMAR).any()
    completions = rollout.tokens[:, prompts.shape[1] :]
    for row, tokens in enumerate(completions.tolist()):
        so_far = prompts[row // 4].tolist()
        for token in tokens[: int(rollout.mask[row].sum())]:
            assert naive_playable(so_far)[token]
            so_far.append(token)


@pytest.mark.parametrize(
    "filters", [{}, {"temperature": 1.6}, {"top_k": 20}, {"temperature": 0.8, "top_k": 60, "top_p": 0.9}], ids=str
)
def test_under_a_grammar_logprobs_are_of_the_distribution_drawn_from(filters: dict[str, Any]) -> None:
    musician = MUSICIANS[1]
    long = opening("TimeSig_5/8", "Position_3", "Pitch_60", "Velocity_63", "Duration_1.0.12")
    prompts = torch.tensor([[PAD] * (len(long) - 1) + [BOS], long])
    rollout = Sampler(musician, pad_id=PAD, eos_id=EOS).sample(
        prompts, max_new_tokens=30, group_size=3, generator=seeded(31), grammar=GRAMMAR, **filters
    )
    assert rollout.mask.sum() > 60
    for row, tokens in enumerate(rollout.tokens):
        start = 0 if row >= 3 else len(long) - 1
        count = int(rollout.mask[row].sum())
        sequence = tokens[start : len(long) + count]
        logits = uncached_logits(musician, sequence, count)
        drawn = sequence[-count:].tolist()
        for step, token in enumerate(drawn):
            may = naive_playable(sequence[: len(sequence) - count + step].tolist())
            masked = torch.tensor([v if m else -math.inf for v, m in zip(logits[step].tolist(), may, strict=True)])
            assert rollout.logprobs[row, step].item() == pytest.approx(
                reference_logprob(masked, token, **filters), abs=1e-4
            )


def test_a_grammar_that_forbids_nothing_changes_nothing() -> None:
    lax = replace(GRAMMAR, allowed=torch.ones_like(GRAMMAR.allowed), position=torch.full_like(GRAMMAR.position, -1))
    prompts = torch.tensor([[PAD, BOS], opening("TimeSig_3/4")])
    plain, masked, strict = (
        Sampler(MUSICIANS[1], pad_id=PAD, eos_id=EOS).sample(
            prompts, max_new_tokens=40, group_size=4, generator=seeded(32), grammar=grammar
        )
        for grammar in (None, lax, GRAMMAR)
    )
    for one, other in zip(plain, masked, strict=True):
        assert torch.equal(one, other)
    assert unplayable(plain.tokens, 2, plain.mask, GRAMMAR).any()
    assert plain.tokens.tolist() != strict.tokens.tolist()


def test_under_a_grammar_an_ended_row_changes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that leave the batch, or wait in it as on an accelerator, take their place in the music with them."""
    prompts = torch.tensor([[PAD, BOS], opening("TimeSig_3/4")])
    musician = make_model(8, vocab_size=len(NAMES), initializer_range=0.02)
    with torch.no_grad():
        musician.lm_head.weight.zero_()  # uniform over what may come: the end is never far
    options: dict[str, Any] = {"max_new_tokens": 60, "group_size": 8, "grammar": GRAMMAR}
    endless = Sampler(musician, pad_id=PAD, eos_id=None).sample(prompts, generator=seeded(33), **options)
    for steps in (1, 7, 100):
        monkeypatch.setattr("smart.sampler.eager.STEPS_PER_LOOK", {"cpu": steps})
        ended = Sampler(musician, pad_id=PAD, eos_id=EOS).sample(prompts, generator=seeded(33), **options)
        counts = ended.mask.sum(1)
        assert len(counts.unique()) > 2
        for row, count in enumerate(counts.tolist()):
            assert torch.equal(ended.tokens[row, : 2 + count], endless.tokens[row, : 2 + count])


def test_captured_step_under_grammars(captured: list[int]) -> None:
    """Two grammars in turn, each with its own graph, and the same graph for rows that stand elsewhere."""
    lax = replace(GRAMMAR, allowed=torch.ones_like(GRAMMAR.allowed))
    sampler = Sampler(MUSICIANS[1], pad_id=PAD, eos_id=EOS)
    for prompts in (
        torch.tensor([[PAD, BOS], opening("TimeSig_3/4")]),
        torch.tensor([opening("TimeSig_3/8", "Position_35", "Pitch_60")]).expand(2, -1),
    ):
        for grammar in (GRAMMAR, lax, None):
            options: dict[str, Any] = {"max_new_tokens": 40, "group_size": 4, "grammar": grammar}
            rollout = sampler.sample(prompts, generator=seeded(32), **options)
            assert_same(rollout, stepwise(MUSICIANS[1], prompts, generator=seeded(32), **options))
    assert len(captured) == 3


def test_a_grammar_of_another_vocabulary_is_refused(model: Phi3ForCausalLM) -> None:
    with pytest.raises(ValueError, match="grammar: expected one of 23 tokens, got 413"):
        Sampler(model, pad_id=PAD, eos_id=EOS).sample(random_prompts([4]), max_new_tokens=3, grammar=GRAMMAR)


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature: .*got 0.0 .*top_k=1"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k: .*got -1"),
        ({"top_p": 0.0}, "top_p: .*got 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens: .*got 0"),
        ({"group_size": 0}, "group_size: .*got 0"),
        ({"max_new_tokens": 61}, "at most 64 .*max_position_embeddings.*got 65"),
        ({"prompts": torch.zeros(2, 3, dtype=torch.int64)}, "row 0 is padding only"),
        ({"prompts": torch.tensor([[3, 4], [PAD, PAD]])}, "row 1 is padding only"),
        ({"prompts": torch.tensor([3, 4])}, r"prompts: .*\(2,\)"),
        ({"prompts": torch.tensor([[3, 4]], dtype=torch.int32)}, "prompts: .*int32"),
        ({"prompts": torch.zeros(0, 4, dtype=torch.int64)}, r"prompts: .*\(0, 4\)"),
        ({"prompts": torch.tensor([[3, VOCABULARY]])}, "prompts: .*0 to 22, got 3 to 23"),
        ({"prompts": torch.tensor([[-1, 3]])}, "prompts: .*got -1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(model: Phi3ForCausalLM, changes: dict[str, Any], message: str) -> None:
    options = {"prompts": random_prompts([4]), "max_new_tokens": 4, "generator": seeded(0), **changes}
    with pytest.raises(ValueError, match=message):
        Sampler(model, pad_id=PAD, eos_id=EOS).sample(options.pop("prompts"), **options)


def test_the_last_position_may_be_used(model: Phi3ForCausalLM) -> None:
    prompts = random_prompts([4], width=20)  # padding takes up no position
    rollout = Sampler(model, pad_id=PAD, eos_id=None).sample(prompts, max_new_tokens=60, generator=seeded(28))
    assert rollout.mask.shape == (1, 60)
    assert_matches_uncached(model, rollout, prompts, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_id": VOCABULARY}, "pad_id: .*got 23"),
        ({"eos_id": -1}, "eos_id"),
        ({"dtype": torch.float16}, "dtype"),
    ],
    ids=str,
)
def test_wrong_construction_is_named(model: Phi3ForCausalLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(model, **{"pad_id": PAD, "eos_id": EOS, **options})


def test_unsupported_models_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a Phi3ForCausalLM, got Linear"):
        Sampler(torch.nn.Linear(2, 2, device="meta"), pad_id=PAD, eos_id=EOS)  # type: ignore[arg-type]
    scaled = make_model(
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        }
    )
    with pytest.raises(ValueError, match="longrope"):
        Sampler(scaled, pad_id=PAD, eos_id=EOS)


def test_sliding_window_is_a_limit() -> None:
    model = make_model(sliding_window=10)
    sampler = Sampler(model, pad_id=PAD, eos_id=None)
    prompts = random_prompts([4])
    rollout = sampler.sample(prompts, max_new_tokens=6, generator=seeded(29))
    assert_matches_uncached(model, rollout, prompts, 1)
    with pytest.raises(ValueError, match=r"at most 10 .*sliding_window.*got 11"):
        sampler.sample(prompts, max_new_tokens=7)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.5}], ids=str)
def test_broken_weights_are_reported(filters: dict[str, Any]) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        Sampler(model, pad_id=PAD, eos_id=EOS).sample(
            random_prompts([4]), max_new_tokens=3, generator=seeded(0), **filters
        )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("filters", [{}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph(
    dtype: torch.dtype, filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A captured step gives what the steps give one by one, for several sizes, and after the weights have moved."""
    model = make_model(num_key_value_heads=2, initializer_range=0.15).cuda()
    sampler = Sampler(model, pad_id=PAD, eos_id=EOS, dtype=dtype)
    plain = Sampler(model, pad_id=PAD, eos_id=EOS, dtype=dtype)
    plain._captures = False
    widths: list[int] = []
    for seed in range(3):
        for lengths, group_size in (([4, 4], 8), ([2, 6, 3], 4), ([5], 1)):
            options: dict[str, Any] = {"max_new_tokens": 50, "group_size": group_size, **filters}
            prompts = random_prompts(lengths)
            rollout = sampler.sample(
                prompts, generator=seeded(seed), watch=lambda tokens, _: widths.append(tokens.shape[1]), **options
            )
            expected = plain.sample(prompts, generator=seeded(seed), **options)
            if dtype == torch.float32:
                assert torch.equal(rollout.tokens, expected.tokens)
                torch.testing.assert_close(rollout.logprobs, expected.logprobs, atol=1e-4, rtol=0)
            else:  # attention over more places rounds otherwise, and one other token changes all that follow
                torch.testing.assert_close(rollout.logprobs[:, 0], expected.logprobs[:, 0], atol=0.1, rtol=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.97)
    assert len(sampler._graphs) == 3 and not plain._graphs
    assert widths and capsys.readouterr().err == ""


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[4, 4], [2, 6]], ids=["equal", "left-padded"])
def test_cuda(dtype: torch.dtype, lengths: list[int]) -> None:
    model = make_model(num_key_value_heads=2, initializer_range=0.15)
    prompts = random_prompts(lengths)
    rollout = Sampler(model.cuda(), pad_id=PAD, eos_id=EOS, dtype=dtype).sample(
        prompts, max_new_tokens=40, group_size=8, temperature=0.9, top_k=10, generator=seeded(30)
    )
    assert rollout.tokens.is_cuda
    on_cpu = Rollout(*(part.cpu() for part in rollout))
    # float32 on CUDA may use other summation orders, bfloat16 keeps the cache in bfloat16 too
    tol = 1e-4 if dtype == torch.float32 else 0.1
    counts = on_cpu.mask.sum(1)
    assert (on_cpu.tokens[:, prompts.shape[1] :][~on_cpu.mask] == PAD).all()
    assert int(counts.max()) == on_cpu.mask.shape[1]
    if dtype == torch.float32:
        assert_matches_uncached(model.cpu(), on_cpu, prompts, 8, tol=tol, temperature=0.9, top_k=10)
    else:  # top-k may keep other tokens on the edge, so the full softmax is compared with the full softmax
        full = Sampler(model, pad_id=PAD, eos_id=EOS, dtype=dtype).sample(
            prompts, max_new_tokens=40, group_size=8, generator=seeded(30)
        )
        assert_matches_uncached(model.cpu(), Rollout(*(part.cpu() for part in full)), prompts, 8, tol=tol)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_under_a_grammar() -> None:
    prompts = torch.tensor([[PAD, PAD, BOS], [PAD, *opening("TimeSig_3/4")], opening("TimeSig_3/8", "Position_35")])
    musician = make_model(6, vocab_size=len(NAMES)).cuda()
    sampler = Sampler(musician, pad_id=PAD, eos_id=EOS)
    options: dict[str, Any] = {"max_new_tokens": 50, "group_size": 8, "generator": seeded(34), "grammar": GRAMMAR}
    rollout = sampler.sample(prompts, **options)
    assert not unplayable(rollout.tokens, 3, rollout.mask, GRAMMAR).any()
    grammar = GRAMMAR.to("cuda")
    stand = grammar.read(rollout.tokens[:, :3])
    torch.cuda.set_sync_debug_mode("error")
    try:
        grammar.playable(grammar.step(stand, rollout.tokens[:, 3]))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_share_of_a_batch_is_drawn_as_in_the_whole(tiny_model: Any) -> None:
    """Shares of unequal size, whose rows end at other times, put together give the batch that one process draws."""
    sampler = Sampler(tiny_model, pad_id=0, eos_id=2)
    prompts = torch.randint(3, 413, (5, 4), generator=torch.Generator().manual_seed(1))
    whole = sampler.sample(prompts, max_new_tokens=24, group_size=3, generator=torch.Generator().manual_seed(2))
    for first, last in ((0, 2), (2, 5)):
        generator = torch.Generator().manual_seed(2)
        part = sampler.sample(
            prompts[first:last], max_new_tokens=24, group_size=3, generator=generator, share=(3 * first, 15)
        )
        rows = slice(3 * first, 3 * last)
        length = part.mask.shape[1]
        assert torch.equal(part.tokens, whole.tokens[rows, : 4 + length])
        assert torch.equal(part.mask, whole.mask[rows, :length]) and not whole.mask[rows, length:].any()
        torch.testing.assert_close(part.logprobs, whole.logprobs[rows, :length], atol=1e-5, rtol=1e-5)
        after = torch.Generator().manual_seed(2)
        sampler.sample(prompts, max_new_tokens=24, group_size=3, generator=after)
        assert torch.equal(generator.get_state(), after.get_state())
    with pytest.raises(ValueError, match="share: expected 15 rows within the whole batch, got rows from 3 of 15"):
        sampler.sample(prompts, max_new_tokens=2, group_size=3, share=(3, 15))
