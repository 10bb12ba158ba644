import os
from functools import partial

import psutil
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lora
import model
import recompute
from model import GPT, Block, GPTConfig
from recompute import Linear

@pytest.mark.parametrize('learns', ['x weight bias', 'x weight', 'x', 'weight bias'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_linear_layer_equals_torch_s_under_autocast_and_keeps_no_copy_of_its_weight(dtype, learns):
    torch.manual_seed(0)
    x, outs, kept = torch.randn(3, 17, 96), [], []
    ours, theirs = Linear(96, 160, bias='bias' in learns), torch.nn.Linear(96, 160, bias='bias' in learns)
    theirs.load_state_dict(ours.state_dict())
    for linear in (ours, theirs):
        x = x.detach().requires_grad_('x' in learns)
        linear.weight.requires_grad_('weight' in learns)
        with (torch.autocast('cpu', dtype),
              torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)):
            y = linear(x)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape))
        outs.append([y, x.grad, *(p.grad for p in linear.parameters())])
        sizes = [(t.numel(), t.dtype) for t in kept if t.data_ptr() != linear.weight.data_ptr()]
        assert ((96 * 160, dtype) in sizes) == (linear is theirs and 'x' in learns), sizes
        kept.clear()
    for a, b in zip(*outs):
        assert a is b is None or torch.equal(a, b) and a.dtype == b.dtype

@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_a_compiled_block_keeps_no_copies_of_weights_and_a_selective_one_two_thirds_of_it(dropout, compiler):
    torch.manual_seed(0)
    block, x, kept, grads = Block(GPTConfig(64, 50, 1, 4, 256)), torch.randn(2, 64, 256), [], []
    block.attn.dropout = dropout
    # traced and cut into two passes, but run by torch's own kernels, so that no C++ compiler is needed
    block.compile(backend='aot_eager_decomp_partition', fullgraph=True)
    for block.selective in (False, True):
        storages = {}
        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        block.zero_grad()
        torch.manual_seed(1)
        with (torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
              torch.autocast('cpu', torch.bfloat16)):
            y = block(x)
        kept.append(sum(size for place, size in storages.items()
                        if place not in {p.data_ptr() for p in block.parameters()}))
        y.square().sum().backward()
        grads.append([p.grad for p in block.parameters()])
    # which the copies alone would fill
    assert 20 * x.numel() < kept[1] < 26 * x.numel() and 30 * x.numel() < kept[0] < 40 * x.numel()
    assert all(torch.allclose(a, b, rtol=0, atol=1e-2 * b.abs().max()) for a, b in zip(*grads))

def test_a_selective_block_of_which_nothing_learns_is_not_made_ready_for_backward(monkeypatch):
    block, used = Block(GPTConfig(8, 50, 1, 1, 8, 0.2)).requires_grad_(False), []
    monkeypatch.setattr(recompute, 'checkpoint', lambda layers, x, **options:
                        used.append(x.requires_grad) or layers(x))
    block.selective = True
    x = torch.zeros(1, 8, 8)
    for x.requires_grad in (False, True):
        block(x)
    assert used == [True]

class Products(TorchDispatchMode):
    """ counts the products of matrices """
    n = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n += op in recompute.PRODUCTS
        return op(*args, **(kwargs or {}))

@pytest.mark.parametrize('dtype, dropout, rank', [(torch.bfloat16, 0.0, 0), (torch.bfloat16, 0.3, 0),
                                                  (torch.bfloat16, 0.3, 2), (torch.float32, 0.0, 0)])
def test_a_block_that_is_run_again_for_backward_makes_its_last_product_once(dtype, dropout, rank):
    torch.manual_seed(0)
    gpt, idx, made, grads = (GPT(GPTConfig(16, 50, 3, 2, 32, dropout)),
                             torch.zeros(2, 16, dtype=torch.long), {}, {})
    if rank:
        lora.add(gpt, rank, 4.0, 0.0, 'mlp.c_proj')
    for plan in ('device', 'selective', 'recompute'):
        gpt.follow(plan)
        gpt.zero_grad()
        torch.manual_seed(1)
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32, cache_enabled=False):
            loss = gpt(idx, idx)[1]
        with Products() as products:
            loss.backward()
        made[plan], grads[plan] = products.n, [p.grad for p in gpt.parameters() if p.grad is not None]
        assert all(block.mlp.c_proj.stand_in is None for block in gpt.transformer.h)
        assert all(torch.equal(a, b) for a, b in zip(grads[plan], grads['device'], strict=True))
    narrow = 2 * (rank > 0) # LoRA's own
    assert made['selective'] == made['device'] + 3 * narrow
    assert made['recompute'] == made['device'] + 3 * (3 + narrow) # of a block's four, all but the last

def test_backward_may_go_twice_through_a_block_that_is_run_again():
    gpt, idx = GPT(GPTConfig(16, 50, 2, 2, 32)), torch.zeros(2, 16, dtype=torch.long)
    gpt.follow('recompute')
    with torch.autocast('cpu', torch.bfloat16, cache_enabled=False):
        loss = gpt.hidden(idx).square().sum()
    first, second = (torch.autograd.grad(loss, gpt.transformer.wpe.weight, retain_graph=True)[0]
                     for _ in range(2))
    assert torch.equal(first, second)

def grads_in(plan, gpt, idx, half=False):
    """ every gradient, in that plan, with the draws of one seed """
    gpt.follow(plan)
    gpt.zero_grad()
    torch.manual_seed(1)
    with torch.autocast('cpu', torch.bfloat16, enabled=half):
        gpt(idx, idx)[1].backward()
    return [p.grad for p in gpt.parameters()]

@torch.library.custom_op('tests::draw', mutates_args=())
def draw(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x).bernoulli_(0.5)

def test_a_selective_block_drops_the_same_where_attention_has_drawn_in_a_kernel_of_its_own(monkeypatch):
    """ as on CUDA, where a kernel for attention that is kept would draw, but not a second time """
    monkeypatch.setattr(recompute, 'ATTENTION', [torch.ops.tests.draw.default])
    monkeypatch.setattr(model, 'attend', lambda q, k, v, *rest:
                        F.scaled_dot_product_attention(q, k, v * draw(v.detach()), is_causal=True))
    torch.manual_seed(0)
    gpt, idx = GPT(GPTConfig(16, 50, 3, 2, 16, 0.2)), torch.randint(50, (2, 16))
    assert all(map(torch.equal, grads_in('device', gpt, idx), grads_in('selective', gpt, idx)))

def test_a_block_that_is_run_again_drops_the_same_where_torch_does_not_repeat_a_device_s_draws(monkeypatch):
    """ as on MPS """
    monkeypatch.setattr(recompute, 'NO_RNG_RESTORED_ON', 'cpu')
    monkeypatch.setattr(torch.mps, 'get_rng_state', torch.get_rng_state)
    monkeypatch.setattr(torch.mps, 'set_rng_state', torch.set_rng_state)
    torch.manual_seed(0)
    gpt, idx = GPT(GPTConfig(16, 50, 3, 2, 16, 0.2)), torch.randint(50, (2, 16))
    # torch's own repeating is off
    monkeypatch.setattr(recompute, 'checkpoint', partial(recompute.checkpoint, preserve_rng_state=False))
    expected, then = grads_in('device', gpt, idx), torch.rand(1)
    assert all(map(torch.equal, expected, grads_in('recompute', gpt, idx)))
    assert torch.rand(1) == then # as if nothing had been drawn twice

@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('dropout', [0.0, 0.2])
def test_recomputing_the_blocks_changes_nothing(dropout, half):
    torch.manual_seed(0)
    gpt, idx = GPT(GPTConfig(16, 50, 3, 2, 16, dropout)), torch.randint(50, (2, 16))
    expected = grads_in('device', gpt, idx, half)
    for plan in ('selective', 'recompute'):
        assert all(map(torch.equal, expected, grads_in(plan, gpt, idx, half)))

@pytest.mark.parametrize('dropout', [0.0, 0.2])
def test_recomputing_compiled_blocks_changes_nothing(dropout, compiler):
    torch.manual_seed(0)
    gpt, idx = GPT(GPTConfig(16, 50, 3, 2, 16, dropout)), torch.randint(50, (2, 16))
    # traced, but run by torch's own kernels, so that no C++ compiler is needed
    for block in gpt.transformer.h:
        block.compile(backend='aot_eager_decomp_partition')
    expected = grads_in('device', gpt, idx, half=True)
    for plan in ('selective', 'recompute'):
        assert all(map(torch.equal, expected, grads_in(plan, gpt, idx, half=True))), plan

def test_a_lean_plan_closes_a_cpu_s_gaps_before_the_loss_and_each_block_s_backward(monkeypatch):
    gpt, idx, seen = GPT(GPTConfig(16, 50, 2, 2, 16)), torch.zeros(2, 16, dtype=torch.long), []
    monkeypatch.setattr(recompute, 'MALLOC_TRIM', lambda pad: seen.append('close'))
    gpt.cross_entropy.register_forward_hook(lambda *args: seen.append('loss'))
    for block in gpt.transformer.h:
        block.ln_1.weight.register_hook(lambda grad: seen.append('block')) # the last of its gradients
    for plan, expected in (('device', 'loss block block'), ('selective', 'close loss close block close block'),
                           ('recompute', 'close loss close block close block')):
        grads_in(plan, gpt, idx)
        assert ' '.join(seen) == expected, plan
        seen.clear()
        with torch.no_grad():
            gpt(idx, idx)
        assert set(seen) == {'loss'}
        seen.clear()

@pytest.mark.skipif(recompute.MALLOC_TRIM is None or any(key.startswith(('MALLOC_', 'GLIBC_', 'LD_PRELOAD'))
                                                         for key in os.environ),
                    reason='the system has no malloc_trim, or its allocator is set otherwise')
def test_memory_between_tensors_goes_back_to_the_system():
    tensors = [torch.ones(2**14) for _ in range(3000)] # 64 KiB each, too little for a mapping of its own
    kept = tensors[::50]
    del tensors
    before = psutil.Process().memory_info().rss
    recompute.close_gaps(kept[0])
    assert before - psutil.Process().memory_info().rss > 100 * 2**20
