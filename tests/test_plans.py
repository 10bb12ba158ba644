"""
What a run does in each plan: the same losses, an update that overlaps, and another try where memory runs out.
"""
import os
import re
import shutil
import threading
import time

import pytest
import torch

import memory
from device import is_out_of_memory
from model import GPT, GPTConfig
from optim import OffloadedAdamW, clip_gradients, load_optimizer, make_optimizer, set_lr, weights

def test_a_plan_is_told_before_weights_are_fetched(run, clone, hf_dir, tmp_path):
    shutil.copy(hf_dir / 'config.json', tmp_path) # the weights are somewhere else
    shutil.copytree(clone / 'data' / 'chars', tmp_path / 'bpe', ignore=shutil.ignore_patterns('meta.pkl'))
    def start(*options):
        return run('train.py', f"--dataset={tmp_path / 'bpe'}", '--device=cpu', f'--init_from={tmp_path}',
                   '--block_size=32', *options, status=2)
    assert 'error: no plan fits' in start('--memory_gb=0.0001').err
    there = start()
    assert 'plan device' in there.out and 'cannot load' in there.err

def test_offloaded_adamw_equals_adamw_with_clipping_and_accumulation():
    models, losses, norms = [], [], []
    for offload in (False, True):
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(16, 50, 2, 2, 16))
        options = dict(offload_to=('cpu', torch.float32)) if offload else {}
        opt = make_optimizer('adamw', gpt, 1e-2, 0.0, 0.1, (0.9, 0.95), **options)
        params = [p for group in opt.param_groups for p in group['params']]
        losses.append([])
        for i in range(10):
            set_lr(opt, 0.8 ** i)
            for _ in range(3):
                idx = torch.randint(50, (2, 16))
                loss = gpt(idx, idx)[1]
                loss.backward()
            if offload:
                assert isinstance(opt, OffloadedAdamW) and all(p.grad is None for p in gpt.parameters())
                opt.collect()
                # the next forward is faster
                opt.updater.step = lambda: (time.sleep(0.01), torch.optim.AdamW.step(opt.updater))
                norms.append(clip_gradients(opt, 0.1))
            else:
                norms.append(torch.nn.utils.clip_grad_norm_(params, 0.1))
            opt.step()
            opt.zero_grad()
            losses[-1].append(loss.item())
        models.append((weights(gpt, opt), opt.state_dict()))
    assert losses[0] == losses[1] and norms[:10] == norms[10:] and min(norms) > 0.1
    (a, a_opt), (b, b_opt) = models
    assert list(a) == list(b) and all(a[name].equal(b[name]) for name in a)
    assert all(a_opt['state'][i]['exp_avg'].equal(b_opt['state'][i]['exp_avg']) for i in a_opt['state'])

def test_offload_clips_no_update_by_the_norm_of_one_that_was_left_out():
    trained, idx = [], torch.arange(32).view(2, 16)
    for scales in ((1e20, 1e-3), (1e-3,)):
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(16, 50, 2, 2, 16))
        opt = make_optimizer('adamw', gpt, 1e-2, 0.0, 0.1, (0.9, 0.95), offload_to=('cpu', torch.float32))
        for scale in scales:
            gpt(idx, idx, scale=scale)[1].backward()
            opt.collect()
            if clip_gradients(opt, 1.0) < 1: # as train.py leaves out an update that is not finite
                opt.step()
            opt.zero_grad()
        trained.append(weights(gpt, opt))
    assert all(trained[0][name].equal(weight) for name, weight in trained[1].items())

def test_each_plan_s_losses_are_bit_for_bit_those_of_the_device_s(train, tmp_path):
    train('--max_iters=20', '--lr_decay_iters=1000', out_dir='start')
    losses = {}
    for plan in memory.PLANS:
        run = train(f"--init_from={tmp_path / 'start'}", f'--plan={plan}', '--dtype=bfloat16',
                    '--max_iters=200', '--eval_interval=200', '--learning_rate=1e-3', out_dir=plan)
        assert f'plan {plan}, ' in run.out and ('in RAM: weights' in run.out) == (plan == 'offload')
        losses[plan] = run.column('loss')[:-1]
    assert len(losses['device']) == 200 and all(losses[plan] == losses['device'] for plan in memory.PLANS)

def test_an_offloaded_update_overlaps_with_the_next_forward():
    gpt, idx = GPT(GPTConfig(16, 50, 3, 2, 16)), torch.randint(50, (2, 16))
    opt = make_optimizer('adamw', gpt, 1e-2, 0.0, 0.1, (0.9, 0.95), ('cpu', torch.float32))
    def iteration():
        gpt(idx, idx)[1].backward()
        opt.step()
        opt.zero_grad()
    iteration()
    assert not opt.updates # the first makes the moments, and is waited for
    reached, step, second = threading.Event(), opt.updater.step, opt.masters[gpt.transformer.h[1].ln_1.weight]
    def update():
        its = [p for group in opt.updater.param_groups for p in group['params']]
        assert (not any(p is second for p in its)
                or reached.wait(10)), "the second block's was not waiting for the first's forward"
        step()
    opt.updater.step = update
    iteration()
    gpt.transformer.h[0].register_forward_hook(lambda *args: reached.set())
    gpt(idx, idx)[1].backward() # waits for each part, and raises what went wrong there
    assert not opt.updates
    opt.collect()
    places = [p.grad.data_ptr() for p in opt.masters.values()]
    opt.step()
    gpt(idx, idx)[1].backward()
    opt.collect()
    assert places == [p.grad.data_ptr() for p in opt.masters.values()] # no new memory

def test_the_first_update_of_a_run_is_waited_for_also_where_it_has_its_moments():
    opts, idx = [], torch.randint(50, (2, 16))
    for _ in range(2):
        gpt = GPT(GPTConfig(16, 50, 2, 2, 16))
        opts.append(make_optimizer('adamw', gpt, 1e-2, 0.0, 0.1, (0.9, 0.95), ('cpu', torch.float32)))
        if len(opts) == 2:
            load_optimizer(opts[1], opts[0].state_dict())
        gpt(idx, idx)[1].backward()
        opts[-1].updater.step = lambda step=opts[-1].updater.step: (time.sleep(0.02), step())
        opts[-1].step()
        assert not opts[-1].updates # where there is no room for it, that is told at once

def test_gradients_that_go_take_their_errors_along():
    opt = make_optimizer('adamw', GPT(GPTConfig(8, 11, 1, 1, 8)), 1e-3, 0.0, 0.1, (0.9, 0.95),
                         ('cpu', torch.float32))
    def full():
        raise torch.OutOfMemoryError('out of memory')
    for again in range(2):
        opt.jobs.append(opt.thread.submit(full))
    with pytest.raises(torch.OutOfMemoryError):
        opt.collect()
    opt.zero_grad()
    opt.collect()

def test_an_update_without_room_in_ram_ends_the_run_and_is_no_reason_to_repeat_the_iteration():
    gpt, idx = GPT(GPTConfig(16, 50, 2, 2, 16)), torch.randint(50, (2, 16))
    opt = make_optimizer('adamw', gpt, 1e-2, 0.0, 0.1, (0.9, 0.95), ('cpu', torch.float32))
    gpt(idx, idx)[1].backward()
    def full():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    step, opt.updater.step = opt.updater.step, full
    # the first, which train.py tells with what may help
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        opt.step()
    opt.updater.step = step
    opt.updates.clear()
    opt.step()
    gpt(idx, idx)[1].backward()
    opt.updater.step = full
    opt.step()
    with pytest.raises(ValueError, match='RAM ran out for the optimizer, which offload keeps there; '
                                         'free some') as told:
        opt.finish()
    assert not is_out_of_memory(told.value)

@pytest.mark.parametrize('name', ['make_optimizer', 'load_optimizer'])
def test_an_optimizer_without_room_is_told_with_what_may_help(train, tmp_path, name):
    (tmp_path / 'full.py').write_text(
        "import optim, torch\ndef _full(*args): raise torch.OutOfMemoryError('out of memory')\n"
        f"optim.{name} = _full\n")
    train()
    error = train(tmp_path / 'full.py', '--init_from=resume', '--max_iters=9', status=2).err.splitlines()[-1]
    assert error.startswith(
        'error: out of memory in plan device, with weights, gradients and moments alone; type ')

@pytest.mark.parametrize('first, second', [('offload', 'device'), ('device', 'offload')])
def test_a_run_goes_on_in_another_plan_as_if_in_one(train, first, second):
    whole = train('--max_iters=8')
    train('--max_iters=4', '--lr_decay_iters=8', f'--plan={first}', out_dir='half')
    resumed = train('--max_iters=8', '--init_from=resume', f'--plan={second}', out_dir='half')
    assert resumed.column('loss') == whole.column('loss')

LIMIT = """
import resource, torch
_size = next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmSize'))
resource.setrlimit(resource.RLIMIT_AS, (_size + 450 * 2**20,) * 2)
"""

@pytest.mark.skipif(not os.path.exists('/proc/self/status'),
                    reason='only Linux tells the size from which to limit memory')
def test_out_of_memory_halves_the_micro_batch_and_repeats_the_iteration(train, tmp_path):
    (tmp_path / 'limit.py').write_text(LIMIT)
    options = ('--n_layer=1', '--n_embd=128', '--block_size=512', '--gradient_accumulation_steps=1',
               '--eval_iters=1', '--max_iters=1', '--plan=offload', '--batch_size=64')
    tight = train(tmp_path / 'limit.py', *options)
    assert re.search(r'iter 0: out of memory with 64 sequences at a time; again with \d+', tight.out)
    plenty = train(*options, out_dir='plenty')
    assert 'out of memory' not in plenty.out
    for name in ('loss', 'grad_norm', 'val_loss'):
        assert [float(v) for v in tight.column(name) if v] == pytest.approx(
            [float(v) for v in plenty.column(name) if v], rel=1e-5), name

def test_out_of_memory_is_told_once_with_what_to_type(train, tmp_path):
    (tmp_path / 'full.py').write_text(
        "import torch, model\ndef _full(*args, **options):\n"
        "    raise torch.OutOfMemoryError('out of memory')\nmodel.Block.forward = _full\n")
    error = train(tmp_path / 'full.py', '--plan=recompute', status=2).err.splitlines()[-1]
    assert error == ('error: out of memory in plan recompute, 1 sequence of 16 tokens at a time; '
                     'type --block_size=8'), error

def test_a_sample_without_room_costs_a_line(train, tmp_path):
    (tmp_path / 'full.py').write_text(
        "import torch, model\ndef _full(*args, **options):\n"
        "    raise torch.OutOfMemoryError('out of memory')\nmodel.GPT.generate = _full\n")
    whole, without = train(out_dir='whole'), train(tmp_path / 'full.py', '--sample_interval=4')
    assert [line for line in without.out.splitlines() if 'out of memory' in line] == [
        f'iter {i}: out of memory for a sample, so none is written' for i in (0, 4)]
    assert without.column('loss') == whole.column('loss')

def test_a_run_without_room_loses_nothing_and_goes_on_with_what_it_names(train, tmp_path):
    (tmp_path / 'full.py').write_text(
        "import torch, model\n_forward, _n = model.Block.forward, [0]\ndef _later(self, *args, **options):\n"
        "    _n[0] += self.training\n    if _n[0] > 60:\n"
        "        raise torch.OutOfMemoryError('out of memory')\n"
        "    return _forward(self, *args, **options)\nmodel.Block.forward = _later\n")
    end = ('--batch_size=1', '--gradient_accumulation_steps=8', '--max_iters=5', '--eval_interval=100',
           '--dropout=0.1')
    whole = train(*end)
    stopped = train(tmp_path / 'full.py', *end, out_dir='full', status=2)
    assert 'iter 3: saved' in stopped.out
    option, message = ('--init_from=resume --plan=selective'), stopped.err.splitlines()[-1]
    assert message == f'error: out of memory in plan device, 1 sequence of 16 tokens at a time; type {option}'
    again = train(*end, *option.split(), out_dir='full')
    assert (again.column('loss') == whole.column('loss')
            and again.column('val_loss') == whole.column('val_loss'))

def test_an_evaluation_needs_no_room_for_training(train, tmp_path):
    options = ('--n_embd=128', '--n_layer=8', '--memory_gb=0.02')
    out_dir = train('--n_embd=128', '--n_layer=8', '--max_iters=1').out_dir
    assert 'no plan fits' in train(*options, f'--init_from={out_dir}', out_dir='b', status=2).err
    told = train(*options, '--eval_only=True', '--init_from=resume').out # six times the weights would not fit
    assert 'step 1: train loss' in told and ' expected, ' not in told
    offloaded = train(*options[:2], '--eval_only=True', '--init_from=resume', '--plan=offload').out
    assert 'plan offload' in offloaded and offloaded.splitlines()[-1] == told.splitlines()[-1]

@pytest.mark.parametrize('plan, last', [('device', '--plan=offload'), ('offload', '--block_size=8')])
def test_an_evaluation_without_room_is_told_what_would_make_room_for_it(train, tmp_path, plan, last):
    """ it keeps no activations, so the plans that recompute them would not help """
    (tmp_path / 'full.py').write_text(
        "import memory, torch\nfrom loss import ChunkedLoss\n_forward = ChunkedLoss.forward\n"
        "def _full(ctx, x, *args):\n"
        "    if not x.requires_grad: raise torch.OutOfMemoryError('out of memory')\n"
        "    return _forward(ctx, x, *args)\nChunkedLoss.forward = staticmethod(_full)\n"
        "memory.plans_for = lambda *args: memory.PLANS\n")
    error = train(tmp_path / 'full.py', f'--plan={plan}', status=2).err.splitlines()[-1]
    assert (error.startswith(f'error: out of memory in plan {plan}, 1 sequence of 16')
            and error.endswith(f'type {last}'))

def test_an_evaluation_is_told_no_fewer_windows_where_they_do_not_divide():
    config = {'batch_size': 5, 'gradient_accumulation_steps': 2, 'block_size': 1024, 'eval_iters': 3} # 15
    assert memory.advice('device', 5, config).endswith(
        '--batch_size=2 --gradient_accumulation_steps=5 --eval_iters=8')
