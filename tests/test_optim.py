import re
import threading

import pytest
import torch

import lora
from model import GPT, GPT2_SHAPES, GPTConfig
from optim import (check_options, clip_gradients, doubts, get_lr, load_optimizer, make_optimizer, set_lr,
                   weights)

def make(name, model, lr=1e-2):
    return make_optimizer(name, model, lr, 0.02, 0.1, (0.9, 0.95))

def test_learning_rate_is_the_hand_worked_one():
    rates = [get_lr(it, 1.0, 0.1, 4, 10) for it in (0, 3, 4, 7, 10, 99)]
    assert rates == pytest.approx([0.2, 0.8, 1.0, 0.55, 0.1, 0.1])

def test_gpt2_medium_decays_its_matrices_and_nothing_else():
    with torch.device('meta'):
        decay, no_decay = make('adamw', GPT(GPTConfig(**GPT2_SHAPES['gpt2-medium']))).param_groups
    assert (len(decay['params']), sum(p.numel() for p in decay['params'])) == (98, 354_501_632)
    assert (len(no_decay['params']), sum(p.numel() for p in no_decay['params'])) == (194, 321_536)
    assert (decay['weight_decay'], no_decay['weight_decay']) == (0.1, 0.0)

def test_muon_takes_the_matrices_of_the_blocks():
    model = GPT(GPTConfig(8, 11, 2, 1, 8))
    muon, decay, no_decay = make('muon', model).param_groups
    assert len(muon['params']) == 2 * 4 and all(p.dim() == 2 for p in muon['params'])
    assert {id(p) for p in decay['params']} == {id(model.transformer.wte.weight),
                                                id(model.transformer.wpe.weight)}
    everything = [id(p) for g in (muon, decay, no_decay) for p in g['params']]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())

def newton_schulz(G):
    """ Muon's orthogonalization by its published formula, in float64:
    https://kellerjordan.github.io/posts/muon/ """
    X = G.double() / G.double().norm()
    X = X.T if G.size(0) > G.size(1) else X
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if G.size(0) > G.size(1) else X

@pytest.mark.parametrize('wide, tolerance', [(True, 1e-5), (False, 0.2)]) # the second in bfloat16
def test_a_first_update_by_muon_is_the_published_one(wide, tolerance):
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 11, 1, 1, 8))
    optimizer = make_optimizer('muon', model, 1e-2, 0.02, 0.0, (0.9, 0.95), wide=wide)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(idx := torch.arange(8)[None], idx)[1].backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        if '.h.' in name and p.dim() == 2:
            rows, columns = p.shape
            expected = 0.02 * max(1, rows / columns)**0.5 * newton_schulz(grads[name]).float()
            assert (before[name] - p.detach() - expected).norm() < tolerance * expected.norm(), name
            assert p.grad.equal(grads[name]) # and so is what clipping reports

def step(model, optimizer):
    model(idx := torch.arange(8)[None], idx)[1].backward()
    optimizer.step()
    optimizer.zero_grad()

@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_saved_optimizer_goes_on_as_if_never_saved(name):
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 11, 2, 1, 8))
    optimizer = make(name, model)
    step(model, optimizer)
    state, weights = optimizer.state_dict(), {n: p.clone() for n, p in model.state_dict().items()}
    other = GPT(model.config)
    other.load_state_dict(weights)
    resumed = make(name, other)
    load_optimizer(resumed, torch.load(as_file(state), weights_only=True))
    step(model, optimizer)
    step(other, resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))

def as_file(state):
    import io
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file

def test_loading_keeps_this_run_s_settings():
    model = GPT(GPTConfig(8, 11, 1, 1, 8))
    old = make('adamw', model, lr=1e-2)
    step(model, old)
    new = make_optimizer('adamw', model, 5e-3, 0.02, 0.3, (0.8, 0.9))
    load_optimizer(new, old.state_dict())
    set_lr(new, 0.5)
    group = new.param_groups[0]
    assert (group['lr'], group['weight_decay'], group['betas']) == (2.5e-3, 0.3, (0.8, 0.9))

def test_a_loaded_pair_still_follows_the_learning_rate():
    model = GPT(GPTConfig(8, 11, 1, 1, 8))
    muon = make('muon', model)
    step(model, muon)
    load_optimizer(muon, muon.state_dict())
    set_lr(muon, 0.5)
    assert [group['lr'] for one in muon.both for group in one.param_groups] == [0.01, 5e-3, 5e-3]

def test_another_optimizer_s_state_is_refused():
    model = GPT(GPTConfig(8, 11, 1, 1, 8))
    adamw, muon = make('adamw', model), make('muon', model)
    step(model, adamw)
    with pytest.raises(ValueError, match='of another optimizer'):
        load_optimizer(muon, adamw.state_dict())
    with pytest.raises(ValueError, match='of another optimizer'):
        load_optimizer(adamw, muon.state_dict())
    with pytest.raises(ValueError, match='of another optimizer'):
        load_optimizer(adamw, {**adamw.state_dict(), 'state': {0: 3}})
    for i in (99, 'a'):
        with pytest.raises(ValueError, match='of another optimizer'):
            load_optimizer(adamw, {**adamw.state_dict(), 'state': {i: {'step': torch.tensor(1.0)}}})

def test_offload_saves_the_weights_in_float32_whatever_the_device_has():
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 20, 2, 2, 16))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    optimizer = make_optimizer('adamw', model, 1e-3, 0.0, 0.1, (0.9, 0.95),
                               offload_to=('cpu', torch.bfloat16))
    assert model.lm_head.weight.dtype == torch.bfloat16
    saved = weights(model, optimizer)
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in before)

def test_a_run_that_can_hardly_be_meant_is_warned_of(train):
    config = {'init_from': 'gpt2', 'num_epochs': 0.0, 'decay_lr': True, 'learning_rate': 6e-4,
              'eval_only': False}
    long = doubts(config, 600_000, 2000, 94_612.4)
    assert long.startswith('\nwarning: 600,000 iterations are 94,612 epochs, and a finetuning takes 3 to 20; '
                           'type config/')
    assert not any(doubts({**config, **other}, 600_000, 2000, 94_612.4) for other in (
        {'init_from': 'scratch'}, {'init_from': 'resume'}, {'num_epochs': 200.0}, {'eval_only': True}))
    assert doubts(config, 300, 10, 101.0) and not doubts(config, 300, 10, 99.0)
    assert 'warms up for 10 iterations, of which this run has 10: ' in doubts(config, 10, 10, 20.0)
    assert doubts(config, 11, 10, 20.0) == doubts({**config, 'decay_lr': False}, 10, 10, 20.0) == ''
    result = train('--max_iters=3', '--warmup_iters=200', '--learning_rate=1e-2')
    told = re.search(r'\nwarning: the learning rate warms up for 200 iterations, of which this run has 3: '
                     r'it reaches (\S+);', result.out)
    assert float(told[1]) == pytest.approx(float(result.column('lr')[2]), rel=0.05)

def test_a_warm_up_that_lasts_until_the_decay_ends_leaves_the_least_rate():
    assert [get_lr(it, 1.0, 0.1, 4, 4) for it in (3, 4, 5)] == [0.8, 0.1, 0.1]

def test_muon_and_adamw_decay_matrices_alike():
    groups = make_optimizer('muon', GPT(GPTConfig(8, 11, 1, 1, 8)), 1e-2, 0.02, 0.3, (0.9, 0.95)).param_groups
    assert [group['weight_decay'] for group in groups] == [0.3, 0.3, 0.0]

ADAM, IN_RAM = (1e-2, 0.0, 0.1, (0.9, 0.95)), ('cpu', torch.float32)

def test_the_moments_of_fewer_trained_parts_are_refused():
    part, whole = (GPT(GPTConfig(8, 11, 2, 1, 8)) for _ in range(2))
    lora.freeze_parts(part, 'h.0')
    old, new = (make_optimizer('adamw', gpt, *ADAM) for gpt in (part, whole))
    part(idx := torch.arange(8)[None], idx)[1].backward()
    old.step()
    with pytest.raises(ValueError, match='of other trained parameters'):
        load_optimizer(new, old.state_dict())

def test_gradients_on_their_way_to_ram_are_those_of_two_blocks_at_most():
    opt = make_optimizer('adamw', GPT(GPTConfig(8, 11, 1, 1, 8)), *ADAM, IN_RAM)
    master, waits, most = next(iter(opt.copies)), threading.Event(), []
    opt.thread.submit(waits.wait, 10)
    threading.Timer(0.5, waits.set).start()
    for _ in range(40):
        opt.send(master, torch.ones_like(master))
        most.append(len(opt.jobs))
    assert waits.is_set() # it was waited for
    opt.collect()
    assert max(most) == 24 and master.grad.eq(40).all()

def test_buffers_of_gradients_are_freed_once_all_is_updated():
    gpt, idx = GPT(GPTConfig(8, 11, 1, 1, 8)), torch.arange(8)[None]
    opt = make_optimizer('adamw', gpt, *ADAM, IN_RAM)
    for _ in range(2):
        gpt(idx, idx)[1].backward()
        opt.step()
    opt.zero_grad()
    opt.finish()
    assert not opt.room and all(p.grad is None for p in opt.masters.values())

def test_a_least_learning_rate_is_not_asked_for_without_decay():
    config = dict(optimizer='adamw', beta1=0.9, beta2=0.95, decay_lr=False, min_lr=6e-5, learning_rate=1e-5)
    check_options(config)
    with pytest.raises(ValueError, match='type --min_lr=1e-06'):
        check_options({**config, 'decay_lr': True})

@pytest.mark.parametrize('offload', [False, True])
@pytest.mark.parametrize('share', [0.9, 1.1, 3.0]) # of the limit
def test_gradients_are_clipped_as_torch_clips_them_only_above_the_limit(share, offload):
    gpt = GPT(GPTConfig(8, 11, 1, 1, 8))
    opt = make_optimizer('adamw', gpt, *ADAM, IN_RAM if offload else None)
    gpt(idx := torch.arange(8)[None], idx)[1].backward()
    if offload:
        opt.collect()
    params = [p for group in opt.param_groups for p in group['params']]
    grads = [p.grad.clone() for p in params]
    limit = torch.nn.utils.get_total_norm(grads).item() / share
    assert clip_gradients(opt, limit) == pytest.approx(share * limit)
    if offload:
        assert (opt.limit is not None) == (share > 1)
    else:
        for p, grad in zip(params, grads):
            assert torch.allclose(p.grad, grad / max(share, 1), atol=1e-5 * grad.abs().max(), rtol=1e-4)
