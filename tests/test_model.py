import os
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

import lora
import loss as losses
import model as model_module
import recompute
from model import GPT, GPT2_SHAPES, Block, ChunkedLoss, CrossEntropy, GPTConfig, Linear
from sampling import sample_token

def make_pair(tmp_path, safe=True, **shape):
    """ the same random weights in transformers' model and, read from its directory, in ours """
    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_head=4, n_embd=32, n_positions=24, vocab_size=101, initializer_range=0.2,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shape)
    theirs = GPT2LMHeadModel(config).eval()
    for p in theirs.parameters(): # biases and layer norms are random, too
        p.data += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path)
    if not safe: # the older format, which other tools still write
        os.remove(tmp_path / 'model.safetensors')
        torch.save(theirs.state_dict(), tmp_path / 'pytorch_model.bin')
    return theirs, GPT.from_pretrained(str(tmp_path)).eval()

@pytest.mark.parametrize('safe', [True, False])
def test_logits_and_every_gradient_equal_transformers(tmp_path, safe):
    theirs, ours = make_pair(tmp_path, safe)
    idx = torch.randint(101, (3, 24))
    targets = torch.randint(101, (3, 24))
    logits, (_, loss) = ours.lm_head(ours.hidden(idx)), ours(idx, targets)
    reference = theirs(idx).logits
    assert (logits - reference).abs().max() < 1e-4
    reference_loss = torch.nn.functional.cross_entropy(reference.view(-1, 101), targets.view(-1))
    assert abs(loss - reference_loss) < 1e-5
    loss.backward()
    reference_loss.backward()
    reference_grads = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        grad = reference_grads[name].grad
        grad = grad if grad.shape == p.shape and not name.endswith('attn.c_proj.weight') else grad.t()
        assert (p.grad - grad).abs().max() < 1e-4, name
    assert len(list(ours.parameters())) == len(reference_grads)

@pytest.mark.parametrize('name, count', [('gpt2', 124_439_808), ('gpt2-medium', 354_823_168),
                                         ('gpt2-large', 774_030_080), ('gpt2-xl', 1_557_611_200)])
def test_sizes_have_openai_s_parameter_counts(name, count):
    with torch.device('meta'):
        assert GPT(GPTConfig(**GPT2_SHAPES[name])).num_params() == count

@pytest.mark.parametrize('change', [dict(activation_function='gelu'), dict(scale_attn_by_inverse_layer_idx=True),
                                    dict(n_inner=64), dict(layer_norm_epsilon=1e-6)])
def test_a_variant_that_computes_otherwise_is_refused(tmp_path, change):
    with pytest.raises(ValueError, match=f"its {next(iter(change))} is .*GPT-2's is"):
        make_pair(tmp_path, **change)

def uncached_greedy(model, idx, n):
    """ nanoGPT's loop, which runs the whole window again for every token """
    for _ in range(n):
        logits, _ = model(idx[:, -model.config.block_size:])
        idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx

@pytest.mark.parametrize('fixed', [False, True])
@torch.no_grad()
def test_cached_greedy_tokens_equal_uncached_ones_up_to_block_size(tmp_path, fixed):
    theirs, ours = make_pair(tmp_path)
    for length in range(1, 25):
        idx = torch.randint(101, (5, length))
        n = 25 - length # the last token is predicted from a full window
        assert ours.generate(idx, n, temperature=0, fixed=fixed).equal(uncached_greedy(ours, idx, n))

@pytest.mark.parametrize('fixed', [False, True])
@torch.no_grad()
def test_past_block_size_the_window_restarts_from_its_second_half(tmp_path, fixed):
    _, ours = make_pair(tmp_path)
    idx = torch.randint(101, (2, 30)) # longer than block_size, too
    got = ours.generate(idx, 40, temperature=0, fixed=fixed)
    window, expected = idx[:, -24:], idx
    for _ in range(40):
        if window.size(1) > 24:
            window = window[:, -12:]
        token = ours(window)[0][:, -1].argmax(-1, keepdim=True)
        window, expected = torch.cat([window, token], 1), torch.cat([expected, token], 1)
    assert got.equal(expected)

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
        with torch.autocast('cpu', dtype), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = linear(x)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape))
        outs.append([y, x.grad, *(p.grad for p in linear.parameters())])
        sizes = [(t.numel(), t.dtype) for t in kept if t.data_ptr() != linear.weight.data_ptr()]
        assert ((96 * 160, dtype) in sizes) == (linear is theirs and 'x' in learns), sizes
        kept.clear()
    for a, b in zip(*outs):
        assert a is b is None or torch.equal(a, b) and a.dtype == b.dtype

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

@pytest.fixture
def compiler():
    """ one that has compiled nothing: after other shapes, it would take sizes for variable, and round otherwise """
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradient_are_torch_s_whatever_stands_in_padding(dtype, compiled, compiler):
    torch.manual_seed(0)
    module, scale = CrossEntropy(), 0.1
    if compiled: # traced, but run by torch's own kernels, so that no C++ compiler is needed
        module.compile(backend='eager', fullgraph=True)
    padded, targets = (4 * torch.randn(6, 64)).to(dtype), torch.tensor([3, -1, 49, 0, 3, -1])
    logits = padded[:, :50].float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction='sum')
    gradient, = torch.autograd.grad(scale * expected, logits)
    wide = None if dtype == torch.float32 else torch.empty(4, 64)
    total = module(padded, targets[:, None], scale, 50, True, 4, wide)
    assert abs(total / expected - 1) < 1e-6
    assert (padded[:, :50] - gradient).abs().max() < (1e-8 if dtype == torch.float32 else 4e-4) # a half's last bit
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
    expected = torch.nn.functional.cross_entropy(logits.view(-1, 11), targets.view(-1), reduction='none')[5:].sum()
    assert torch.isclose(model(idx, masked, scale=1.0)[1], expected)

def test_weights_start_at_gpt2_s_scale():
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 1000, 8, 4, 64))
    assert abs(model.transformer.wte.weight.std() - 0.02) < 1e-3
    assert abs(model.transformer.h[3].mlp.c_proj.weight.std() - 0.02 / 16 ** 0.5) < 1e-3
    assert model.lm_head.weight is model.transformer.wte.weight

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
    loss = torch.nn.functional.cross_entropy(x @ w.t(), targets, ignore_index=-1, reduction='sum') / 256
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
    loss = torch.nn.functional.cross_entropy(x @ w.t(), targets)
    expected = loss, *torch.autograd.grad(loss, (x, w))
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(got, expected))

def test_the_loss_never_holds_a_matrix_of_tokens_by_vocabulary():
    from torch.utils._python_dispatch import TorchDispatchMode
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
        made.append(ctx.head[0].data_ptr())
        return out
    monkeypatch.setattr(ChunkedLoss, 'backward', watch)
    gpt, idx = GPT(GPTConfig(8, 500, 1, 1, 8)), torch.arange(8)[None]
    gpt(idx, idx)[1].backward()
    assert made == [gpt.transformer.wte.weight.grad.data_ptr()]

@pytest.mark.parametrize('vocab_size, dropout, half', [(5000, 0.0, False), (5000, 0.1, True), (65, 0.1, False), (65, 0.1, True)])
def test_several_threads_make_the_same_gradients_in_every_run(vocab_size, dropout, half):
    torch.manual_seed(0)
    gpt, idx = GPT(GPTConfig(128, vocab_size, 2, 2, 128, dropout)), torch.randint(20, (8, 128)) # each token many times
    before, runs = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        for _ in range(4):
            runs.append(grads_in('device', gpt, idx, half))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))

@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_a_compiled_block_keeps_no_copies_of_its_weights_and_a_selective_one_two_thirds_of_it_with_the_same_gradients(dropout, compiler):
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
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast('cpu', torch.bfloat16):
            y = block(x)
        kept.append(sum(size for place, size in storages.items() if place not in {p.data_ptr() for p in block.parameters()}))
        y.square().sum().backward()
        grads.append([p.grad for p in block.parameters()])
    assert 20 * x.numel() < kept[1] < 26 * x.numel() and 30 * x.numel() < kept[0] < 40 * x.numel() # which the copies alone would fill
    assert all(torch.allclose(a, b, rtol=0, atol=1e-2 * b.abs().max()) for a, b in zip(*grads))

def test_a_selective_block_of_which_nothing_learns_is_not_made_ready_for_backward(monkeypatch):
    block, used = Block(GPTConfig(8, 50, 1, 1, 8, 0.2)).requires_grad_(False), []
    monkeypatch.setattr(recompute, 'checkpoint', lambda layers, x, **options: used.append(x.requires_grad) or layers(x))
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
    gpt, idx, made, grads = GPT(GPTConfig(16, 50, 3, 2, 32, dropout)), torch.zeros(2, 16, dtype=torch.long), {}, {}
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
    first, second = (torch.autograd.grad(loss, gpt.transformer.wpe.weight, retain_graph=True)[0] for _ in range(2))
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
    monkeypatch.setattr(model_module, 'attend', lambda q, k, v, *rest: F.scaled_dot_product_attention(q, k, v * draw(v.detach()), is_causal=True))
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
    monkeypatch.setattr(recompute, 'checkpoint', partial(recompute.checkpoint, preserve_rng_state=False)) # torch's own repeating is off
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
    for block in gpt.transformer.h: # traced, but run by torch's own kernels, so that no C++ compiler is needed
        block.compile(backend='aot_eager_decomp_partition')
    expected = grads_in('device', gpt, idx, half=True)
    for plan in ('selective', 'recompute'):
        assert all(map(torch.equal, expected, grads_in(plan, gpt, idx, half=True))), plan

def test_dropout_is_applied_where_gpt_2_has_it_and_only_in_training():
    torch.manual_seed(0)
    gpt, called = GPT(GPTConfig(8, 20, 2, 2, 16, dropout=0.5)), set()
    drops = [module for module in gpt.modules() if isinstance(module, torch.nn.Dropout)]
    for drop in drops:
        drop.register_forward_hook(lambda module, *_: called.add(module))
    idx = torch.arange(16).view(2, 8)
    gpt(idx, idx)
    assert len(drops) == 5 and called == set(drops)
    assert gpt.eval()(idx, idx)[1] == gpt(idx, idx)[1]

def test_flops_are_those_of_palm_s_formula_less_what_frozen_parts_save():
    gpt = GPT(GPTConfig(8, 20, 2, 2, 16))
    n, frozen = gpt.num_params() - 8 * 16, sum(p.numel() for p in gpt.transformer.h[0].parameters())
    assert gpt.flops_per_token(8) == 6 * n + 12 * 2 * 16 * 8
    gpt.transformer.h[0].requires_grad_(False)
    assert gpt.flops_per_token(8) == 6 * n - 2 * frozen + 12 * 2 * 16 * 8

def test_the_chunked_loss_passes_on_the_gradient_it_is_given():
    torch.manual_seed(0)
    gpt, idx, grads = GPT(GPTConfig(8, 20, 1, 2, 16)), torch.arange(16).view(2, 8), []
    for factor in (1, 3):
        gpt.zero_grad()
        (factor * gpt(idx, idx)[1]).backward()
        grads.append([p.grad.clone() for p in gpt.parameters()])
    assert all((3 * one - three).norm() <= 1e-5 * three.norm() for one, three in zip(*grads))
