import pytest
import torch

import attention

def plain(q, k, v, kept=None):
    """ causal attention as it is defined, and with what dropout makes of the probabilities, if given """
    T = q.size(2)
    scores = q @ k.mT / q.size(3) ** 0.5 + torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
    return (scores.softmax(-1) if kept is None else scores.softmax(-1) * kept) @ v

@pytest.mark.parametrize('T', [1, 2, 257])
def test_attention_in_bfloat16_is_float64_s_but_for_rounding_and_keeps_no_float32_for_backward(T):
    torch.manual_seed(0)
    qkv, dy, results, kept = (torch.randn(3, 2, 3, T, 16).bfloat16(), torch.randn(2, 3, T, 16).bfloat16(),
                              [], [])
    def pack(tensor):
        kept.append((tensor.dtype, tensor.numel()))
        return tensor
    for dtype in (torch.float64, torch.bfloat16):
        parts = [part.to(dtype, copy=True).requires_grad_() for part in qkv]
        if dtype == torch.float64:
            y = plain(*parts)
        else:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                y = attention.attend(*parts, 0.0)
        y.backward(dy.to(dtype))
        results.append([y.detach(), *(part.grad for part in parts)])
    for exact, ours in zip(*results):
        assert (ours.dtype == torch.bfloat16
                and (ours - exact).norm() <= 0.005 * exact.norm() + 1e-3 * (T == 1))
    wide = [n for dtype, n in kept if dtype == torch.float32] # one number for each of q's rows
    assert wide == [6 * T] and sum(n for _, n in kept) == 4 * 6 * T * 16 + 6 * T

# all at once, two sequences and one, 7 rows with a rest of 3
@pytest.mark.parametrize('scores', [2**20, 2 * 3 * 24 * 24, 3 * 24 * 7])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('dropout', [0.1, 0.75])
def test_dropout_leaves_out_its_share_of_the_probabilities_and_backward_leaves_out_the_same(
        dropout, dtype, scores, monkeypatch):
    monkeypatch.setattr(attention, 'SCORES', scores)
    torch.manual_seed(0)
    q, k, v, dy = torch.randn(4, 3, 3, 24, 24).to(dtype)
    same = torch.random.get_rng_state()
    with torch.autocast('cpu', torch.bfloat16):
        # probabilities, those that are left
        left = attention.attend(q, k, torch.eye(24).expand_as(v).to(dtype), dropout)
    seen = left.new_ones(24, 24).tril().bool().expand_as(left)
    assert abs((left[seen] > 0).float().mean() - (1 - dropout)) < 0.05 and not left[~seen].any()
    results = []
    for kind in (torch.float64, dtype):
        parts = [part.to(kind, copy=True).requires_grad_() for part in (q, k, v)]
        torch.random.set_rng_state(same)
        with torch.autocast('cpu', torch.bfloat16):
            y = (plain(*parts, (left > 0) / (1 - dropout)) if kind == torch.float64
                 else attention.attend(*parts, dropout))
        y.backward(dy.to(kind))
        results.append([y.detach(), *(part.grad for part in parts)])
    for exact, ours in zip(*results):
        assert (ours.dtype == dtype
                and (ours - exact).norm() <= (1e-4 if dtype == torch.float32 else 0.005) * exact.norm())

def test_dropout_on_a_cpu_keeps_no_scores_for_backward_and_draws_anew_each_time():
    torch.manual_seed(0)
    q, kept = torch.randn(1, 2, 300, 8).requires_grad_(), []
    def pack(tensor):
        kept.append(tensor.numel())
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = attention.attend(q, q, q, 0.5)
    assert sorted(kept) == [1, *[q.numel()] * 4]
    assert not y.equal(attention.attend(q, q, q, 0.5))

def test_each_of_many_draws_is_as_likely_as_the_next():
    draws = attention.draw((5, 7, 10007), torch.Generator().manual_seed(0)).double()
    assert draws.shape == (5, 7, 10007) and len(draws.unique()) > 60000
    assert (draws.min() < -32700 and draws.max() > 32700
            and abs(draws.mean()) < 5 * 2**16 / (12 * draws.numel()) ** 0.5)
    flat = draws.flatten() - draws.mean()
    for lag in (1, 2, 3, 4, 7, 10007): # no draw tells of another
        assert abs((flat[lag:] * flat[:-lag]).mean() / flat.var()) < 5 / flat.numel() ** 0.5

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('dropout', [0.0, 1e-9])
def test_the_last_token_sees_all_of_a_cache_also_where_it_could_learn(dropout, dtype):
    q, k, v = (torch.randn(1, 2, T, 8).to(dtype).requires_grad_() for T in (1, 9, 9))
    exact = (q.double() @ k.mT.double() / 8 ** 0.5).softmax(-1) @ v.double()
    assert torch.allclose(attention.attend(q, k, v, dropout).double(), exact,
                          atol=1e-5 if dtype == torch.float32 else 0.03)

def test_a_dropout_that_rounds_to_all_leaves_finite_numbers():
    q = torch.randn(1, 2, 24, 8, requires_grad=True)
    y = attention.attend(q, q, q, 1 - 1e-6)
    y.sum().backward()
    assert y.isfinite().all() and q.grad.isfinite().all()
