import json

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import loss as losses
from loss import ChunkedLoss, CrossEntropy, Head, mean_row
from model import GPT, GPTConfig

@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradient_are_torch_s_whatever_stands_in_padding(dtype, compiled, compiler):
    torch.manual_seed(0)
    module, scale = CrossEntropy(), 0.1
    if compiled: # traced, but run by torch's own kernels, so that no C++ compiler is needed
        module.compile(backend='eager', fullgraph=True)
    padded, targets = (4 * torch.randn(6, 64)).to(dtype), torch.tensor([3, -1, 49, 0, 3, -1])
    logits = padded[:, :50].float().requires_grad_()
    expected = F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum')
    gradient, = torch.autograd.grad(scale * expected, logits)
    wide = None if dtype == torch.float32 else torch.empty(4, 64)
    total = module(padded, targets[:, None], scale, 50, True, 4, wide)
    assert abs(total / expected - 1) < 1e-6
    # a half's last bit
    assert (padded[:, :50] - gradient).abs().max() < (1e-8 if dtype == torch.float32 else 4e-4)
    assert not padded[:, 50:].any()

def test_an_evaluation_makes_no_gradients(monkeypatch):
    asked, forward = [], CrossEntropy.forward
    def watch(self, logits, targets, scale, V, grads, few, wide):
        asked.append(grads)
        return forward(self, logits, targets, scale, V, grads, few, wide)
    monkeypatch.setattr(CrossEntropy, 'forward', watch)
    model, idx = GPT(GPTConfig(8, 11, 1, 1, 8)), torch.zeros(1, 8, dtype=torch.int64)
    loss = model(idx, idx)[1]
    with torch.no_grad():
        assert model(idx, idx)[1].equal(loss)
    assert asked and asked == [True] * (len(asked) // 2) + [False] * (len(asked) // 2)

def test_loss_leaves_out_masked_targets():
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 11, 1, 1, 8))
    idx, targets = torch.randint(11, (2, 8)), torch.randint(11, (2, 8))
    masked = targets.clone()
    masked[0, :5] = -1
    logits = model.lm_head(model.hidden(idx))
    expected = F.cross_entropy(logits.view(-1, 11), targets.view(-1), reduction='none')[5:].sum()
    assert torch.isclose(model(idx, masked, scale=1.0)[1], expected)

def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()

def test_the_chunked_loss_and_its_gradients_equal_torch_s_cross_entropy():
    torch.manual_seed(0)
    N, C, V = 300, 64, 50257 # in chunks of 83 rows, and one of 51
    x, w = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    targets = torch.randint(V, (N,))
    targets[::7] = -1
    loss = ChunkedLoss.apply(x, w, targets, 1 / 256)
    got = loss, *torch.autograd.grad(loss, (x, w))
    loss = F.cross_entropy(x @ w.t(), targets, ignore_index=-1, reduction='sum') / 256
    expected = loss, *torch.autograd.grad(loss, (x, w))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(got, expected))

@pytest.mark.parametrize('copies', ['cpu', None]) # as on a CPU, and as on other devices
@pytest.mark.parametrize('N, V, C', [(1, 65, 384), (40, 65, 384), (200, 50257, 96)]) # in 65, 3 x 2 parts
def test_the_chunked_loss_in_half_precision_is_torch_s_but_for_rounding(N, V, C, copies, monkeypatch):
    monkeypatch.setattr(losses, 'MIXED_ADD_COPIES_ON', copies)
    torch.manual_seed(0)
    x, w = ((torch.randn(n, C) * std).bfloat16().float().requires_grad_() for n, std in ((N, 1), (V, 0.02)))
    targets = torch.randint(V, (N,))
    with torch.autocast('cpu', torch.bfloat16):
        loss = ChunkedLoss.apply(x, w, targets, 1 / N)
    got = loss, *torch.autograd.grad(loss, (x, w))
    loss = F.cross_entropy(x @ w.t(), targets)
    expected = loss, *torch.autograd.grad(loss, (x, w))
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(got, expected))

def test_the_chunked_loss_passes_on_the_gradient_it_is_given():
    torch.manual_seed(0)
    gpt, idx, grads = GPT(GPTConfig(8, 20, 1, 2, 16)), torch.arange(16).view(2, 8), []
    for factor in (1, 3):
        gpt.zero_grad()
        (factor * gpt(idx, idx)[1]).backward()
        grads.append([p.grad.clone() for p in gpt.parameters()])
    assert all((3 * one - three).norm() <= 1e-5 * three.norm() for one, three in zip(*grads))

def test_the_loss_never_holds_a_matrix_of_tokens_by_vocabulary():
    largest = []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.append(max((t.numel() for t in (out if isinstance(out, tuple) else (out,))
                                if isinstance(t, torch.Tensor)), default=0))
            return out
    model, idx = GPT(GPTConfig(512, 50257, 1, 1, 8)), torch.randint(50257, (2, 512))
    with Watch():
        model(idx, idx)[1].backward()
        with torch.no_grad():
            model(idx, idx)
    assert max(largest) <= 1024 // 6 * 50257

def test_backward_adds_the_embedding_s_gradient_to_the_head_s_in_place(monkeypatch):
    made, backward = [], ChunkedLoss.backward
    def watch(ctx, grad):
        out = backward(ctx, grad)
        made.append(ctx.head_grad[0].data_ptr())
        return out
    monkeypatch.setattr(ChunkedLoss, 'backward', watch)
    gpt, idx = GPT(GPTConfig(8, 500, 1, 1, 8)), torch.arange(8)[None]
    gpt(idx, idx)[1].backward()
    assert made == [gpt.transformer.wte.weight.grad.data_ptr()]

@pytest.mark.parametrize('vocab_size, dropout, half', [(5000, 0.0, False), (5000, 0.1, True),
                                                       (65, 0.1, False), (65, 0.1, True)])
def test_several_threads_make_the_same_gradients_in_every_run(vocab_size, dropout, half):
    torch.manual_seed(0)
    # each token many times
    gpt, idx = GPT(GPTConfig(128, vocab_size, 2, 2, 128, dropout)), torch.randint(20, (8, 128))
    before, runs = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        for _ in range(4):
            gpt.zero_grad()
            torch.manual_seed(1)
            with torch.autocast('cpu', torch.bfloat16, enabled=half):
                gpt(idx, idx)[1].backward()
            runs.append([p.grad for p in gpt.parameters()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))

def far_from_zero(N=2048, C=64, V=1000):
    """ x and w, exact in bfloat16, whose logits are near -100, as GPT-2's are, and spread by about 5 """
    torch.manual_seed(0)
    x, w = torch.randn(N, C), torch.randn(V, C) * 0.6
    x[:, 0], w[:, 0] = 20, -5
    return x.bfloat16().float(), w.bfloat16().float()

def test_the_loss_of_logits_that_are_all_far_from_zero_is_exact_in_half_precision():
    x, w = (tensor.requires_grad_() for tensor in far_from_zero())
    targets = (x @ w.t()).detach().softmax(-1).multinomial(1)[:, 0]
    with torch.autocast('cpu', torch.bfloat16):
        loss = ChunkedLoss.apply(x, w, targets, 1 / len(x))
    expected = F.cross_entropy(x @ w.t(), targets)
    assert abs(loss - expected) < 1e-3 # bfloat16 rounds such logits to halves
    got, grads = torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w))
    assert all(relative_error(a, b) < 2e-2 for a, b in zip(got, grads))

@torch.no_grad()
def test_the_likeliest_token_is_known_among_logits_far_from_zero_in_half_precision():
    x, w = far_from_zero()
    head = Head(64, 1000, bias=False)
    head.weight = torch.nn.Parameter(w)
    expected = head(x[:, None])[:, 0].argmax(-1)
    head.bfloat16().ready()
    logits = head(x[:, None].bfloat16())[:, 0]
    assert (logits.argmax(-1) != expected).float().mean() < 0.03
    assert (logits.float().softmax(-1) - (x @ w.t()).softmax(-1)).abs().max() < 0.04

def test_the_mean_of_a_head_in_half_precision_takes_no_copy_of_the_head(tmp_path):
    weight = torch.randn(20_000, 64).bfloat16()
    with torch.profiler.profile(profile_memory=True) as profile:
        mean = mean_row(weight)
    assert mean.dtype == weight.dtype and relative_error(mean, weight.float().mean(0)) < 1e-2
    profile.export_chrome_trace(str(tmp_path / 'trace.json'))
    events = json.loads((tmp_path / 'trace.json').read_text())['traceEvents']
    taken = [event['args']['Bytes'] for event in events if event['name'] == '[memory]']
    assert 0 < max(taken) < weight.nbytes / 2

@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('away', [-200, 200])
def test_cross_entropy_is_torch_s_for_float32_logits_far_from_zero(away, compiled, compiler):
    torch.manual_seed(0)
    module, logits, targets = CrossEntropy(), torch.randn(3, 10) + away, torch.tensor([3, 0, 9])
    if compiled:
        module.compile(backend='eager', fullgraph=True)
    expected = F.cross_entropy(logits, targets, reduction='sum')
    assert torch.isclose(module(logits.clone(), targets[:, None], 1.0, 10, True, 3), expected)

def test_a_head_in_float32_keeps_its_precision_under_autocast():
    torch.manual_seed(0)
    head, x = Head(64, 1000, bias=False), torch.randn(2, 1, 64)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.allclose(head(x).double(), F.linear(x.double(), head.weight.double()), atol=1e-5)

def test_without_a_scale_the_loss_is_the_mean_over_the_targets_that_count():
    torch.manual_seed(0)
    gpt, idx = GPT(GPTConfig(8, 11, 1, 1, 8)), torch.randint(11, (2, 8))
    targets = idx.masked_fill(torch.arange(16).view(2, 8) < 5, -1)
    expected = F.cross_entropy(gpt.lm_head(gpt.hidden(idx)).view(-1, 11), targets.view(-1), ignore_index=-1)
    assert torch.isclose(gpt(idx, targets)[1], expected)
