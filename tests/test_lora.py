"""
What of a model learns: frozen parts, and LoRA beside a frozen model.
"""
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import lora
import memory
from model import GPT, GPT2_SHAPES, GPTConfig
from optim import make_optimizer

ALL = ','.join(lora.TARGETS)

def small():
    torch.manual_seed(0)
    return GPT(GPTConfig(16, 50, 2, 2, 16))

def trained(model):
    """ a model after a few updates of what of it learns """
    optimizer = make_optimizer('adamw', model, 1e-2, 0.0, 0.1, (0.9, 0.95))
    torch.manual_seed(1)
    idx = torch.randint(50, (4, 17))
    for _ in range(3):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model

def logits(model):
    return model.lm_head(model.hidden(torch.arange(16)[None])).detach()

def test_a_target_is_named_whole_or_by_its_end_as_in_peft():
    assert lora.read_targets('c_proj, mlp.c_fc') == ['attn.c_proj', 'mlp.c_fc', 'mlp.c_proj']
    assert lora.read_targets('c_attn') == ['attn.c_attn'] and lora.read_targets(ALL) == ALL.split(',')
    for wrong in ('attn', 'proj', '', 'c_fc,', 'c_fc,x'):
        with pytest.raises(ValueError, match="there is no '(attn|proj||x)' to adapt; type --lora_targets"):
            lora.read_targets(wrong)

@pytest.mark.parametrize('targets', [ALL, 'attn.c_attn'])
def test_an_adapter_changes_nothing_at_first_and_merged_computes_what_it_did(targets):
    model, plain = small(), small()
    lora.add(model, 4, 8.0, 0.0, targets)
    assert torch.equal(logits(model), logits(plain))
    trained(model)
    before = logits(model)
    assert (before - logits(plain)).abs().max() > 1e-3
    lora.merge(model)
    assert not lora.layers(model) and list(model.state_dict()) == list(plain.state_dict())
    assert (logits(model) - before).abs().max() < 1e-5

def test_an_adapted_layer_is_the_paper_s_formula():
    model = small()
    lora.add(model, 4, 8.0, 0.0, ALL)
    linear = model.transformer.h[1].mlp.c_fc
    torch.nn.init.normal_(linear.lora_B)
    x = torch.randn(3, 16)
    by_hand = x @ linear.weight.t() + linear.bias + 8.0 / 4 * (x @ linear.lora_A.t() @ linear.lora_B.t())
    assert torch.allclose(linear(x), by_hand, atol=1e-6)

def test_only_the_adapter_learns_and_it_is_a_small_part_of_gpt2():
    model, plain = small(), small()
    lora.add(model, 4, 8.0, 0.1, ALL)
    state = trained(model).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    assert all((tensor != 0).any() for tensor in lora.adapter(model).values())
    with torch.device('meta'):
        gpt2 = GPT(GPTConfig(**GPT2_SHAPES['gpt2']))
        lora.add(gpt2, 16, 32.0, 0.0, ALL)
    assert gpt2.num_params(trained=True) == 12 * 16 * 16 * 768 # 3 + 1, 1 + 1, 1 + 4 and 4 + 1 widths a block
    assert gpt2.num_params(trained=True) < 0.02 * gpt2.num_params()

def test_a_shrunk_base_has_the_losses_of_autocast():
    losses = []
    for shrink in (False, True):
        model = small()
        lora.add(model, 4, 8.0, 0.0, ALL)
        if shrink:
            lora.shrink(model, torch.bfloat16)
            assert model.transformer.wte.weight.dtype == torch.bfloat16
        with torch.autocast('cpu', torch.bfloat16):
            losses.append(model(torch.arange(16)[None], torch.arange(16)[None])[1].item())
    # the embeddings alone are rounded where they were not
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

def test_recomputed_blocks_have_the_gradients_of_kept_ones_under_lora_s_dropout():
    grads = []
    for plan in ('device', 'selective', 'recompute'):
        model = small()
        lora.add(model, 4, 8.0, 0.5, ALL)
        for linear in lora.layers(model):
            torch.nn.init.ones_(linear.lora_B)
        model.follow(plan)
        torch.manual_seed(5)
        model(torch.arange(16)[None], torch.arange(16)[None])[1].backward()
        grads.append(torch.cat([linear.lora_A.grad.flatten() for linear in lora.layers(model)]))
    assert grads[0].equal(grads[1]) and grads[0].equal(grads[2])

@pytest.mark.parametrize('rank, alpha', [(11, 100.0), (49, 32.0)])
def test_settings_are_those_that_were_given(rank, alpha):
    model = small()
    lora.add(model, rank, alpha, 0.0, ALL) # alpha / rank * rank is not alpha
    assert lora.settings(model) == {'rank': rank, 'alpha': alpha, 'dropout': 0.0, 'targets': ALL}

def test_a_changed_base_has_another_fingerprint():
    model = small()
    before = lora.fingerprint(model.parameters())
    assert before == lora.fingerprint(small().parameters())
    with torch.no_grad():
        model.transformer.h[1].ln_2.bias[3] += 1e-6
    assert lora.fingerprint(model.parameters()) != before

def test_frozen_parts_stay_and_the_rest_learns():
    model, plain = small(), small()
    lora.freeze_parts(model, 'wte, wpe,h.0-0,h.1.mlp')
    state, was = trained(model).state_dict(), plain.state_dict()
    changed = {name for name in state if not torch.equal(state[name], was[name])}
    assert changed == {n for n in state
                       if n.startswith(('transformer.h.1.ln', 'transformer.h.1.attn', 'transformer.ln_f'))}

def test_the_gradients_beside_a_frozen_head_are_those_of_cross_entropy():
    model = small()
    lora.freeze_parts(model, 'wte')
    idx, targets = torch.arange(16)[None], torch.arange(1, 17)[None]
    model(idx, targets)[1].backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    F.cross_entropy(model.lm_head(model.hidden(idx))[0], targets[0]).backward()
    assert 'transformer.wte.weight' not in ours
    assert all(torch.allclose(p.grad, ours[n], atol=1e-6) for n, p in model.named_parameters() if n in ours)

@pytest.mark.parametrize('names', ['h.2', 'h.0-2', 'h.1-0', 'wt', '', 'wte,,h.0', 'wte,wpe,h.0-1,ln_f'])
def test_a_part_that_is_not_there_and_nothing_left_are_errors(names):
    with pytest.raises(ValueError, match='freeze'):
        lora.freeze_parts(small(), names)

def restricted(seed):
    config = dict(lora_rank=2, lora_alpha=4.0, lora_dropout=0.0, lora_targets='attn.c_attn', freeze='',
                  dropout=0.0, seed=seed, optimizer='adamw')
    model = small()
    lora.restrict(model, config)
    return model, config

def test_an_adapter_begins_as_its_seed_says():
    first, again, other = (restricted(seed)[0].transformer.h[0].attn.c_attn.lora_A for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)

def test_an_adapter_that_goes_on_takes_the_dropout_that_is_typed_now():
    model, config = restricted(1)
    assert all(linear.lora_dropout == 0.0 for linear in lora.layers(model))
    lora.restrict(model, config | {'lora_dropout': 0.5})
    assert all(linear.lora_dropout == 0.5 for linear in lora.layers(model))

def test_an_adapter_that_goes_on_may_have_its_targets_named_in_another_way():
    model, config = restricted(1)
    lora.restrict(model, config | {'lora_targets': ' c_attn'})
    with pytest.raises(ValueError, match='type --lora_targets=attn.c_attn'):
        lora.restrict(model, config | {'lora_targets': 'c_proj'})

def test_what_learns_and_vectors_stay_in_float32_beside_a_shrunk_base():
    gpt = GPT(GPTConfig(16, 50, 2, 2, 16))
    lora.add(gpt, 4, 8.0, 0.0, 'attn.c_attn')
    lora.shrink(gpt, torch.bfloat16)
    wide = {name for name, p in gpt.named_parameters() if p.dtype == torch.float32}
    assert wide == {name for name, p in gpt.named_parameters() if p.requires_grad or p.dim() == 1}

def test_the_residual_stream_is_in_float32_beside_a_shrunk_base():
    gpt, seen = GPT(GPTConfig(16, 50, 2, 2, 16)), []
    lora.add(gpt, 4, 8.0, 0.0, 'attn.c_attn')
    lora.shrink(gpt, torch.bfloat16)
    for block in gpt.transformer.h:
        block.register_forward_hook(lambda module, args, x: seen.append((args[0].dtype, x.dtype)))
    with torch.autocast('cpu', torch.bfloat16):
        gpt.hidden(torch.arange(16)[None])
    assert seen == [(torch.float32, torch.float32)] * 2

def test_an_adapter_of_other_matrices_is_not_loaded_in_part():
    narrow, wide = (GPT(GPTConfig(8, 11, 1, 1, 8)) for _ in range(2))
    lora.add(narrow, 2, 4.0, 0.0, 'attn.c_attn')
    lora.add(wide, 2, 4.0, 0.0, 'attn.c_attn,mlp.c_fc')
    for gpt, other in ((narrow, wide), (wide, narrow)):
        with pytest.raises(RuntimeError, match='not those that its rank and targets say'):
            lora.load(gpt, lora.adapter(other))

def test_an_adapter_that_does_not_fit_is_not_told_to_take_an_adapter():
    with torch.device('meta'):
        gpt = GPT(GPTConfig(64, 500, 3, 2, 32))
        lora.add(gpt, 4, 32.0, 0.0, 'attn.c_attn')
    shape = memory.shape_of(gpt, 64, 0.0, True, lora=True, adapts=True)
    assert 'lora_rank' not in memory.tell_leaner('recompute', shape, 2**40)
    assert 'lora_rank' in memory.tell_leaner('recompute', replace(shape, adapts=True), 2**40)
