import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import lora
from model import GPT, GPT2_SHAPES, GPTConfig

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

@pytest.mark.parametrize('change', [
    dict(activation_function='gelu'), dict(scale_attn_by_inverse_layer_idx=True), dict(n_inner=64),
    dict(layer_norm_epsilon=1e-6), dict(scale_attn_weights=False)])
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

def test_weights_start_at_gpt2_s_scale():
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 1000, 8, 4, 64))
    assert abs(model.transformer.wte.weight.std() - 0.02) < 1e-3
    assert abs(model.transformer.h[3].mlp.c_proj.weight.std() - 0.02 / 16 ** 0.5) < 1e-3
    assert model.lm_head.weight is model.transformer.wte.weight

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

@pytest.mark.parametrize('frozen', ['wte,wpe', 'wte,wpe,h.0-2', 'wte,wpe,h.0-3', 'wte,wpe,h.2'])
def test_flops_of_a_partly_frozen_model_are_those_that_torch_counts(frozen):
    gpt, idx = GPT(GPTConfig(16, 200, 4, 2, 64)), torch.zeros(4, 16, dtype=torch.long)
    lora.freeze_parts(gpt, frozen)
    with FlopCounterMode(display=False) as counter: # which has no count for attention on a CPU
        gpt(idx, idx)[1].backward()
    assert gpt.flops_per_token(0) == pytest.approx(counter.get_total_flops() / idx.numel(), rel=0.02)
    assert gpt.flops_per_token(16) - gpt.flops_per_token(0) == (12 * 4 - 8 * gpt.n_idle()) * 64 * 16

def test_weights_that_are_read_in_half_precision_are_trained_in_float32():
    gpt = GPT(GPTConfig(8, 11, 1, 1, 8))
    halves = {name: tensor.half() for name, tensor in gpt.state_dict().items()}
    assert {p.dtype for p in GPT.from_weights(gpt.config, halves).parameters()} == {torch.float32}

def test_biases_start_at_zero():
    gpt = GPT(GPTConfig(8, 20, 2, 2, 16))
    assert not any(p.any() for name, p in gpt.named_parameters() if name.endswith('bias'))
