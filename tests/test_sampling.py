""" the draw of a token, and the pass over one that CUDA records: what holds of it anywhere """
import contextlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

import model
from loss import mean_row
from model import GPT, GPTConfig
from sampling import FixedStep, KVCache, sample_token, warm_up_stream

def test_top_k_and_top_p_keep_the_tokens_that_transformers_keeps():
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 20)
    kept = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(8)(None, logits.clone())).isfinite()
    drawn = torch.zeros(4, 20, dtype=torch.bool)
    for _ in range(2000):
        drawn[torch.arange(4), sample_token(logits, 1.0, top_k=8, top_p=0.7)] = True
    assert drawn.equal(kept) and kept.sum() < 32

def test_a_draw_is_multinomial_s_and_none_where_there_are_no_probabilities():
    logits = 3 * torch.randn(4, 200)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = logits.softmax(-1).multinomial(1)[:, 0]
        torch.manual_seed(seed)
        assert sample_token(logits).equal(expected)
    logits[1, 7], logits[2, 9] = float('nan'), float('inf')
    assert (sample_token(logits) >= 0).tolist() == [True, False, False, True]

class Graph(TorchDispatchMode):
    """ a CUDA graph's semantics on a CPU: keeps the operations that run under it, with their very tensors,
    and runs these again, whatever Python's variables are by then """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        assert function is not torch.ops.aten._local_scalar_dense.default, 'a graph cannot wait for a value'
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out, tensors))
        return out

    def replay(self):
        for function, args, kwargs, out, _ in self.calls:
            again = function(*args, **kwargs)
            if not (function.is_view or function._schema.is_mutable): # these are the tensors that they were
                for old, new in zip(tree_iter(out), tree_iter(again)):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)

@pytest.fixture
def recorded(monkeypatch):
    """ FixedStep as on CUDA, with a Graph; the list of those made """
    made, aside = [], lambda *args: contextlib.nullcontext()
    class Stream:
        def __init__(self, device=None):
            pass
        def wait_stream(self, other):
            pass
    for name, value in {'device': aside, 'stream': aside, 'graph': lambda graph, stream: graph,
                        'CUDAGraph': Graph, 'Stream': Stream, 'current_stream': Stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    begin = FixedStep.__init__
    def record(step, model, cache, token):
        begin(step, model, cache, token)
        step.record(cache[0].size)
        made.append(step)
    monkeypatch.setattr(FixedStep, '__init__', record)
    yield made
    warm_up_stream.cache_clear()

def random_model(block_size=24):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, 50, 2, 2, 16)).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model

@pytest.mark.parametrize('T', [1, 7, 23, 24, 30])
def test_a_recorded_pass_gives_the_same_tokens_whatever_was_in_the_cache_when_it_was_recorded(recorded, T):
    model, idx = random_model(), torch.randint(50, (3, T))
    expected = model.generate(idx, 60, temperature=0, fixed=False) # restarts twice and more
    assert recorded == []
    assert model.generate(idx, 60, temperature=0, fixed=True).equal(expected)
    assert len(recorded) == 1 and recorded[0].graph.calls

@torch.no_grad()
def test_a_recorded_pass_s_logits_are_the_uncached_model_s(recorded):
    model, idx = random_model(), torch.randint(50, (2, 20))
    cache = [KVCache(24) for _ in range(2)]
    model(idx[:, :5], cache=cache)
    step = FixedStep(model, cache, idx[:, 5])
    for T in range(5, 20):
        assert torch.allclose(step(idx[:, T])[:, 0], model(idx[:, :T + 1])[0][:, 0], atol=1e-5)

@torch.no_grad()
def test_what_lies_behind_the_token_in_the_cache_is_not_seen():
    model, idx = random_model(), torch.randint(50, (1, 6))
    logits = []
    for junk in (0.0, 1e4):
        cache = [KVCache(24) for _ in range(2)]
        model(idx, cache=cache)
        for layer in cache:
            layer.k[:, :, 7:], layer.v[:, :, 7:] = junk, junk
        logits.append(FixedStep(model, cache, idx[:, 0])(idx[:, 0]))
    assert logits[0].equal(logits[1])

@pytest.mark.parametrize('temperature', [0.0, 0.8])
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_there_is_no_token_to_draw_where_logits_are_not_finite(temperature, bad):
    logits = torch.zeros(2, 5)
    logits[0, 3] = 1e4
    logits[1, 2] = bad
    assert sample_token(logits, temperature).tolist() == [3, -1]

@pytest.mark.parametrize('B, dtype, itself', [
    (1, torch.bfloat16, True), (2, torch.bfloat16, False), (1, torch.float32, False)])
def test_one_sequence_in_bfloat16_on_a_cpu_goes_on_with_torch_s_own_products(B, dtype, itself, monkeypatch):
    gpt, used, forward = GPT(GPTConfig(8, 11, 1, 1, 8)).to(dtype), [], GPT.forward
    def watch(self, idx, **options):
        used.append((idx.size(1), torch._C._get_mkldnn_enabled()))
        return forward(self, idx, **options)
    before = torch._C._get_mkldnn_enabled()
    monkeypatch.setattr(GPT, 'forward', watch)
    gpt.generate(torch.zeros(B, 3, dtype=torch.int64), 4)
    assert (used == [(3, before), *[(1, before and not itself)] * 3]
            and torch._C._get_mkldnn_enabled() == before)

def test_temperature_and_top_p_are_the_hand_worked_ones():
    torch.manual_seed(0)
    share = (sample_token(torch.tensor([[2.0, 0.0]]).repeat(2000, 1), temperature=0.5)
             == 0).float().mean().item()
    assert share == pytest.approx(1 / (1 + math.exp(-4)), abs=0.02)
    assert len(sample_token(torch.zeros(640, 4), top_p=0.5).unique()) == 2 # twice a quarter is enough
    assert sample_token(torch.arange(8.0).repeat(640, 1), top_k=3).unique().tolist() == [5, 6, 7]

@pytest.mark.parametrize('fixed', [False, True])
def test_a_repetition_penalty_is_transformers(hf_dir, fixed):
    from transformers import GPT2LMHeadModel
    theirs, ours = GPT2LMHeadModel.from_pretrained(hf_dir).eval(), GPT.from_pretrained(str(hf_dir)).eval()
    prompt, distinct = torch.tensor([[11, 12, 11, 13], [7, 7, 7, 7]]), []
    for penalty in (0.9, 1.0, 1.05, 2.0):
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                   max_new_tokens=20, min_new_tokens=20, repetition_penalty=penalty,
                                   pad_token_id=50256, eos_token_id=None)
        found = ours.generate(prompt, 20, temperature=0, fixed=fixed, repetition_penalty=penalty)
        assert found.equal(expected), penalty
        distinct.append(len(set(found.flatten().tolist())))
    assert distinct[-1] > max(distinct[:2])

def test_a_head_in_half_precision_is_made_ready_before_each_text():
    gpt, idx = GPT(GPTConfig(8, 11, 1, 1, 8)).bfloat16(), torch.zeros(1, 3, dtype=torch.int64)
    for _ in range(2):
        with torch.no_grad():
            gpt.transformer.wte.weight += 1
        list(gpt.stream(idx, 1))
        assert gpt.lm_head.mean.equal(mean_row(gpt.lm_head.weight.detach()))

def test_tokens_are_drawn_in_float32_also_where_logits_are_in_half_precision(monkeypatch):
    gpt, seen = GPT(GPTConfig(8, 11, 1, 1, 8)).bfloat16(), []
    monkeypatch.setattr(model, 'sample_token',
                        lambda logits, *options: seen.append(logits.dtype) or logits.argmax(-1))
    list(gpt.stream(torch.zeros(1, 3, dtype=torch.int64), 3))
    assert seen == [torch.float32] * 3

@pytest.mark.parametrize('temperature', [1e-9, 1e-38])
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature):
    assert sample_token(torch.tensor([[-90.0, 3.0, 50.0]]), temperature).tolist() == [2]

def test_a_model_of_one_position_goes_on():
    gpt = GPT(GPTConfig(1, 11, 1, 1, 8)).eval()
    text = gpt.generate(torch.zeros(2, 1, dtype=torch.int64), 3, temperature=0)
    for i in range(3):
        assert text[:, i + 1].equal(gpt(text[:, i:i + 1])[0][:, -1].argmax(-1))

@pytest.mark.parametrize('fixed', [False, True])
def test_a_text_goes_on_past_a_token_that_could_not_be_drawn(fixed):
    gpt = GPT(GPTConfig(8, 11, 1, 1, 8))
    with torch.no_grad():
        gpt.transformer.ln_f.weight[0] = float('nan')
    idx = torch.zeros(2, 3, dtype=torch.int64)
    assert torch.stack([*gpt.stream(idx, 3, fixed=fixed)]).tolist() == [[-1, -1]] * 3
    assert gpt.generate(idx, 3, fixed=fixed).equal(torch.zeros(2, 6, dtype=torch.int64))
