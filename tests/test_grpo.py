"""smart.grpo's pure functions against numbers worked by hand and an independent float64 implementation."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smart.config import Grpo
from smart.diversity import distinct_rewards
from smart.grpo import group_advantages, grpo_loss, kl_k3, token_logprobs, update
from smart.sampler import Rollout

NAN = math.nan


def test_advantages_by_hand() -> None:
    # mean 2, ddof-1 standard deviation 1; then a group without variance
    got = group_advantages(torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0]), 3)
    torch.testing.assert_close(got, torch.tensor([-1, 0, 1, 0, 0, 0]) / 1.0001)
    assert group_advantages(torch.tensor([1.0, 2.0, 4.0, 5.0]), 4, scale="none").tolist() == [-2, -1, 1, 2]


def test_unrated_members_are_left_out() -> None:
    got = group_advantages(torch.tensor([1.0, NAN, 3.0, NAN, 7.0, NAN, NAN, NAN, NAN]), 3)
    expected = torch.tensor([-1, 0, 1, 0, 0, 0, 0, 0, 0]) * (1 / (math.sqrt(2) + 1e-4))
    torch.testing.assert_close(got, expected)
    assert group_advantages(torch.tensor([math.inf, 1.0, 2.0]), 3, scale="none").tolist() == [0, -0.5, 0.5]
    assert group_advantages(torch.tensor([3.0, 4.0]), 1).tolist() == [0, 0]


@given(
    st.integers(1, 4),
    st.integers(2, 6),
    st.floats(-100, 100),
    st.sampled_from(["group", "none"]),
    st.integers(0, 99),
)
def test_advantages_ignore_a_constant_and_sum_to_zero(
    groups: int, size: int, shift: float, scale: str, seed: int
) -> None:
    rewards = torch.randn(groups * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = group_advantages(rewards, size, scale=scale)
    torch.testing.assert_close(group_advantages(rewards + shift, size, scale=scale), got)
    torch.testing.assert_close(got.view(groups, size).sum(1), torch.zeros(groups, dtype=torch.float64))


def test_advantages_refuse_a_remainder() -> None:
    with pytest.raises(ValueError, match=r"multiple of 4, got \(6,\)"):
        group_advantages(torch.zeros(6), 4)
    with pytest.raises(ValueError, match="'group' or 'none'"):
        group_advantages(torch.zeros(6), 3, scale="batch")


def test_rewards_for_what_is_unlike_its_group_by_hand() -> None:
    # the first two alike by half, the third like none; then a group of copies
    alike = torch.tensor([[[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]], [[1.0] * 3] * 3])
    got = distinct_rewards(torch.tensor([5.0, 6, 7, 1, 2, 3]), alike, weight=2)
    torch.testing.assert_close(got, torch.tensor([6.5, 7.5, 9, 1, 2, 3]))
    # one that was not rated is no neighbour: the first now shares nothing with the only other
    got = distinct_rewards(torch.tensor([5.0, NAN, 7, NAN, NAN, 3]), alike, weight=2)
    torch.testing.assert_close(got, torch.tensor([7, NAN, 9, NAN, NAN, 5]), equal_nan=True)
    with pytest.raises(ValueError, match=r"\(B, G, G\) for 5 rewards, got \(2, 3, 3\)"):
        distinct_rewards(torch.zeros(5), alike, weight=1)


@pytest.mark.parametrize("like", [0.0, 0.3, 1.0])
def test_members_that_are_equally_alike_are_plain_grpo(like: float) -> None:
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    alike = torch.full((3, 4, 4), like)
    alike.diagonal(dim1=1, dim2=2).fill_(1)
    got = group_advantages(distinct_rewards(rewards, alike, weight=5), 4)
    torch.testing.assert_close(got, group_advantages(rewards, 4), atol=1e-4, rtol=0)


def test_of_equal_rewards_copies_get_less_than_the_odd_one_out() -> None:
    alike = torch.tensor([[[1, 1, 0.0], [1, 1, 0], [0, 0, 1]]])
    got = group_advantages(distinct_rewards(torch.full((3,), 7.0), alike, weight=1), 3, scale="none")
    torch.testing.assert_close(got, torch.tensor([-1, -1, 2]) / 6)


def test_the_bonus_is_the_gradient_of_raos_quadratic_entropy() -> None:
    """Over all groups of three that a policy over four outcomes can write, by enumeration."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    kernel = torch.rand(4, 4, generator=generator, dtype=torch.float64)
    kernel = ((kernel + kernel.T) / 2).fill_diagonal_(1)
    reward = torch.randn(4, generator=generator, dtype=torch.float64)
    probs, weight = logits.softmax(0), 0.7
    (exact,) = torch.autograd.grad(
        probs @ reward + weight / 2 * (1 - probs @ kernel @ probs), logits, retain_graph=True
    )
    groups = torch.cartesian_prod(*[torch.arange(4)] * 3)  # (64, 3)
    optimised = distinct_rewards(reward[groups].flatten(), kernel[groups[:, :, None], groups[:, None]], weight=weight)
    chance = probs[groups].prod(1).detach()
    surrogate = (chance * (probs.log()[groups] * optimised.view(64, 3)).mean(1)).sum()
    torch.testing.assert_close(torch.autograd.grad(surrogate, logits)[0], exact)


def test_kl_is_zero_at_the_reference_and_unbiased() -> None:
    logp = torch.randn(3, 5).log_softmax(-1)
    assert kl_k3(logp, logp).abs().max() == 0
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    exact = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * kl_k3(p.log(), q.log())).sum(), exact)  # its mean under the policy


def reference_loss(
    logp: Any, old: Any, ref: Any, adv: Any, mask: Any, start: Any, clip: float, beta: float, average: str
) -> float:
    """The docstring's formula, token by token in plain Python."""
    rows = []
    for i in range(len(adv)):
        row = []
        for t in range(len(mask[i])):
            if mask[i][t]:
                ratio = math.exp(logp[i][t] - start[i][t])
                bounded = min(max(ratio, 1 - clip), 1 + clip)
                weight = min(math.exp(start[i][t] - old[i][t]), 2)
                k3 = math.exp(ref[i][t] - logp[i][t]) - (ref[i][t] - logp[i][t]) - 1
                row.append(-(weight * min(ratio * adv[i], bounded * adv[i]) - beta * k3))
        rows.append(row)
    total = sum(map(sum, rows))
    if average == "token":
        return total / sum(map(len, rows))
    if average == "sequence":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return total / (len(rows) * len(mask[0]))


@settings(deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 7),
    st.sampled_from(["token", "sequence", "constant"]),
    st.floats(0.05, 0.5),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_loss_and_gradient_against_the_formula(
    n: int, t: int, average: str, clip: float, beta: float, stale: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    logp, old, ref, start = (-random.exponential(1.0, (n, t)) for _ in range(4))
    start = start if stale else old
    adv = random.normal(size=n)
    mask = np.arange(t) < random.integers(1, t + 1, size=(n, 1))

    def value(x: Any) -> float:
        return reference_loss(x, old, ref, adv, mask, start, clip, beta, average)

    x = torch.tensor(logp, requires_grad=True)
    given = torch.tensor(start) if stale else None
    loss, stats = grpo_loss(
        x, *map(torch.tensor, (old, ref, adv, mask)), clip=clip, beta=beta, average=average, start_logp=given
    )
    loss.backward()
    assert loss.item() == pytest.approx(value(logp), abs=1e-9)
    gradient = np.zeros_like(logp)
    step = 1e-6
    for index in np.ndindex(n, t):
        up, down = logp.copy(), logp.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (value(up) - value(down)) / (2 * step)
    # a finite difference that straddles the clip's kink says nothing there
    ratio = np.exp(logp - start)
    smooth = np.minimum(np.abs(ratio - (1 - clip)), np.abs(ratio - (1 + clip))) > 1e-4
    np.testing.assert_allclose(x.grad.numpy()[smooth], gradient[smooth], atol=1e-5)
    assert (x.grad.numpy()[~mask] == 0).all()
    clipped = mask & (((ratio > 1 + clip) & (adv[:, None] > 0)) | ((ratio < 1 - clip) & (adv[:, None] < 0)))
    assert stats["clip_fraction"] == pytest.approx(clipped.sum() / mask.sum())
    assert stats["ratio"] == pytest.approx(np.exp(logp - old)[mask].mean())


def test_what_is_masked_cannot_be_felt() -> None:
    logp = torch.tensor([[-1.0, NAN], [-2.0, -math.inf]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, False]])
    still = torch.full((2, 2), -1.0)
    loss, stats = grpo_loss(logp, still, still, torch.tensor([1.0, -1.0]), mask)
    loss.backward()
    assert loss.isfinite() and logp.grad is not None
    assert logp.grad.isfinite().all() and (logp.grad[:, 1] == 0).all()
    assert all(math.isfinite(value) for value in stats.values())


def test_loss_refuses_shapes_and_names() -> None:
    x = torch.zeros(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"advantages \(N,\), got .*\(3,\)"):
        grpo_loss(x, x, x, torch.zeros(3), mask)
    with pytest.raises(ValueError, match="'constant', got 'mean'"):
        grpo_loss(x, x, x, torch.zeros(2), mask, average="mean")


def make_rollout(model: Any, n: int = 8, prompt: int = 4, t: int = 9) -> Rollout:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (n, prompt + t), generator=generator)
    lengths = torch.randint(1, t + 1, (n, 1), generator=generator)
    mask = torch.arange(t) < lengths
    tokens[:, prompt:][~mask] = model.config.pad_token_id
    with torch.no_grad():
        old = token_logprobs(model, tokens, prompt)
    return Rollout(tokens, mask, old + 0.3 * torch.randn(n, t, generator=generator))


def gradients(
    model: Any, world: Any = None, stale: bool = False, **settings_: Any
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradient and stats of one ``update`` that does not move the weights."""
    rollout = make_rollout(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stats = update(
        model,
        optimizer,
        rollout,
        rollout.logprobs - 0.1,
        torch.linspace(-1, 1, 8),
        Grpo(max_grad_norm=1e9, **settings_),
        autocast=torch.autocast("cpu", torch.bfloat16, enabled=False),
        stale=stale,
        world=world,
    )
    return {name: weights.grad.clone() for name, weights in model.named_parameters()}, stats


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
@pytest.mark.parametrize("stale", [False, True])
def test_micro_batches_change_nothing(tiny_model: Any, average: str, micro_batch: int, stale: bool) -> None:
    same: dict[str, Any] = {"average": average, "stale": stale, "inner_epochs": 2}
    whole, stats = gradients(tiny_model, micro_batch=64, **same)
    split, split_stats = gradients(tiny_model, micro_batch=micro_batch, **same)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-4)
    assert split_stats == pytest.approx(stats, rel=1e-4)


def test_update_is_the_gradient_of_the_loss(tiny_model: Any) -> None:
    rollout = make_rollout(tiny_model)
    _, stats = gradients(tiny_model, micro_batch=3)
    loss, parts = grpo_loss(
        token_logprobs(tiny_model, rollout.tokens, 4),
        rollout.logprobs,
        rollout.logprobs - 0.1,
        torch.linspace(-1, 1, 8),
        rollout.mask,
    )
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for key, value in parts.items():
        assert stats[key] == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize("stale", [False, True])
def test_update_against_float64(tiny_model: Any, stale: bool) -> None:
    """Gradients and stats of micro-batches against the formula on the whole batch, spelled out in float64."""
    rollout = make_rollout(tiny_model)
    got, stats = gradients(tiny_model, micro_batch=3, stale=stale)
    exact = copy.deepcopy(tiny_model).double()
    exact.zero_grad()
    mask, adv = rollout.mask, torch.linspace(-1, 1, 8).double()[:, None]
    probs = exact(input_ids=rollout.tokens).logits[:, 3:-1].softmax(-1)
    logp = probs.gather(-1, rollout.tokens[:, 4:, None])[..., 0].log()
    old = rollout.logprobs.double()
    log_ratio = old - 0.1 - logp
    ratio = (logp - old).exp()
    gain = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
    if stale:  # the first step is never clipped; tokens are weighted instead
        gain = ratio.detach().clamp(max=2) * (logp - logp.detach()).exp() * adv
    loss = ((0.04 * (log_ratio.exp() - log_ratio - 1) - gain) * mask).sum() / mask.sum()
    loss.backward()
    for name, weights in exact.named_parameters():
        torch.testing.assert_close(got[name].double(), weights.grad, atol=1e-6, rtol=1e-3)
    entropy = -(probs * probs.log()).sum(-1)
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert stats["entropy"] == pytest.approx(entropy[mask].mean().item(), rel=1e-4)
    assert stats["dlogp_mean"] == pytest.approx((logp - old)[mask].abs().mean().item(), rel=1e-4)
    assert stats["dlogp_max"] == pytest.approx((logp - old)[mask].abs().max().item(), rel=1e-4)


def test_one_tensor_over_the_vocabulary_is_kept_for_the_gradient(tiny_model: Any) -> None:
    """Of N x T x V numbers the log-softmax alone."""
    kept: set[int] = set()
    sizes = {8 * length * tiny_model.config.vocab_size for length in (9, 13)}  # of completions, and with prompts

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() in sizes:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gradients(tiny_model, micro_batch=8)
    assert len(kept) == 1


def test_micro_batches_of_logprobs(tiny_model: Any) -> None:
    tokens = torch.randint(3, 413, (5, 10), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = token_logprobs(tiny_model, tokens, 4)
        for size in (1, 2, 9):
            torch.testing.assert_close(token_logprobs(tiny_model, tokens, 4, micro_batch=size), whole)


def test_left_padding_does_not_change_logprobs(tiny_model: Any) -> None:
    tokens = torch.randint(3, 413, (3, 10), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.zeros(3, 5, dtype=torch.int64), tokens], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(
            token_logprobs(tiny_model, padded, 9),
            token_logprobs(tiny_model, tokens, 4),
            atol=1e-5,
            rtol=0,
        )


def test_temperature_divides_the_logits(tiny_model: Any) -> None:
    tokens = torch.randint(3, 413, (2, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = tiny_model(input_ids=tokens).logits
        expected = (logits[:, 2:-1] / 0.7).log_softmax(-1).gather(-1, tokens[:, 3:, None])[..., 0]
        torch.testing.assert_close(token_logprobs(tiny_model, tokens, 3, temperature=0.7), expected)


def test_update_stops_before_a_step_that_is_not_finite(tiny_model: Any) -> None:
    before = {name: weights.clone() for name, weights in tiny_model.state_dict().items()}
    rollout = make_rollout(tiny_model)
    with pytest.raises(FloatingPointError, match="gradient norm"):
        update(
            tiny_model,
            torch.optim.AdamW(tiny_model.parameters()),
            rollout,
            rollout.logprobs,
            torch.full((8,), NAN),
            Grpo(),
            autocast=torch.autocast("cpu", torch.bfloat16, enabled=False),
        )
    for name, weights in tiny_model.state_dict().items():
        assert torch.equal(weights, before[name])


def test_one_good_token_becomes_likelier(tiny_model: Any) -> None:
    """Rewarding one of two completions raises its probability, and more than the other's."""
    tokens = torch.tensor([[5, 6, 7, 100], [5, 6, 7, 200]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    with torch.no_grad():
        old = token_logprobs(tiny_model, tokens, 3)
    update(
        tiny_model,
        torch.optim.AdamW(tiny_model.parameters(), lr=1e-3),
        Rollout(tokens, mask, old),
        old,
        group_advantages(torch.tensor([7.0, 3.0]), 2),
        Grpo(inner_epochs=3),
        autocast=torch.autocast("cpu", torch.bfloat16, enabled=False),
    )
    with torch.no_grad():
        new = token_logprobs(tiny_model, tokens, 3)
    assert new[0, 0] > old[0, 0]
    assert (new - old)[0, 0] > (new - old)[1, 0] + 0.1
