"""
What memory.py predicts, beside the peak of a real iteration, and what a run and a dry run make of it.
"""
import json
import re
import shutil
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from conftest import CHARS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import lora
import loss as losses
import memory
import model
import recompute
from model import GPT, GPT2_SHAPES, GPTConfig
from optim import make_optimizer
from peak import Peak

class AtOnce:
    """ an executor that does what it is given before it returns, since fake tensors are for one thread; what
    it makes is in RAM, and not counted """

    def __init__(self, peak):
        self.peak = peak

    def submit(self, job, *args):
        self.peak.watches, done = False, Future()
        done.set_result(job(*args))
        self.peak.watches = True
        return done

def measure(name, plan, B, n_micro_steps, monkeypatch, rank=0, freeze='', dropout=0.0, device='cuda',
            targets=','.join(lora.TARGETS), lora_dropout=0.0, half=True, muon=False):
    """ the peak of an iteration, not the first, in its last micro-batch, as a device would hold it, on fake
    tensors; name is one of GPT2_SHAPES, or a GPTConfig whose positions are all in use """
    config = name if isinstance(name, GPTConfig) else GPTConfig(**GPT2_SHAPES[name], dropout=dropout)
    monkeypatch.setattr(torch.nn.init, 'normal_', lambda tensor, **options: tensor)
    if device == 'cuda':
        # as it is compiled, and as CUDA's kernels are: masks of bytes, no matrix of scores
        monkeypatch.setattr(recompute, 'is_kept', lambda draws, *args, kept=recompute.is_kept, **options:
                            kept(False, *args, **options))
        monkeypatch.setattr(F, 'dropout', lambda x, p, training, inplace=False:
                            torch.native_dropout(x, p, training)[0] if p else x)
        monkeypatch.setattr(losses, 'MIXED_ADD_COPIES_ON', None)
        monkeypatch.setattr(model, 'attend', lambda q, k, v, dropout, mask:
                            F.scaled_dot_product_attention(q, k, v, is_causal=True))
    with FakeTensorMode(), Peak() as peak:
        gpt = GPT(config)
        gpt.follow(plan)
        if freeze:
            lora.freeze_parts(gpt, freeze)
        if rank:
            monkeypatch.setattr(torch.nn.init, 'kaiming_uniform_', lambda tensor, **options: tensor)
            lora.add(gpt, rank, 32.0, lora_dropout, targets)
            lora.shrink(gpt, torch.bfloat16)
        offload_to = ('cpu', torch.bfloat16 if half else torch.float32) if plan == 'offload' else None
        optimizer = make_optimizer('muon' if muon else 'adamw', gpt, 1e-3, 0.02, 0.1, (0.9, 0.95), offload_to)
        params = [p for group in optimizer.param_groups for p in group['params']]
        if offload_to:
            optimizer.thread = AtOnce(peak)
            peak.leave_out(params)
        idx = torch.zeros(B, config.block_size, dtype=torch.int64)
        for p in params: # the moments come with the first step
            p.grad = torch.zeros_like(p)
        optimizer.step()
        if n_micro_steps == 1 or offload_to: # else these are the gradients of earlier micro-batches
            optimizer.zero_grad()
        peak.most = peak.alive
        with torch.autocast('cpu', torch.bfloat16, enabled=half, cache_enabled=False):
            loss = gpt(idx, idx, scale=1.0)[1]
        loss.backward()
        del loss
        if offload_to:
            assert all(p.grad is None for p in gpt.parameters())
            optimizer.collect()
        optimizer.step()
        optimizer.zero_grad()
    return peak.most

def shape(name, **changes):
    c = GPTConfig(**GPT2_SHAPES[name])
    with torch.device('meta'):
        n_params = GPT(c).num_params()
    return memory.Shape(n_params, c.n_layer, c.n_head, c.n_embd, c.vocab_size,
                        **{'block_size': 1024, **changes})

@pytest.mark.parametrize('plan', memory.PLANS)
@pytest.mark.parametrize('name', GPT2_SHAPES)
def test_the_predicted_peak_is_within_a_tenth_of_a_real_iteration_s(name, plan, monkeypatch):
    small = name == 'gpt2' # the others take long
    more = [(1, 1)] if plan == 'recompute' or plan == 'device' and small else []
    for B, n_micro_steps in [(1, 2), *more, *[(4, 1)][:small]]:
        measured = measure(name, plan, B, n_micro_steps, monkeypatch)
        predicted = memory.peak(plan, shape(name), B, accumulates=n_micro_steps > 1)
        print(f'{name} {plan} {B} x {n_micro_steps}: {measured / memory.GiB:.2f} GiB, '
              f'{predicted / measured - 1:+.1%} predicted')
        assert abs(predicted / measured - 1) < 0.1, (B, predicted / memory.GiB, measured / memory.GiB)

ALL = ','.join(lora.TARGETS)

@pytest.mark.parametrize('name, plan, B, rank, targets, dropout, device', [
    *[('gpt2', plan, 1, 16, ALL, 0.0, 'cuda') for plan in memory.PLANS[:3]],
    ('gpt2-xl', 'recompute', 1, 16, ALL, 0.0, 'cuda'),
    *[('gpt2', 'device', 4, 8, target, 0.0, 'cuda') for target in lora.TARGETS],
    ('gpt2', 'device', 4, 8, ALL, 0.05, 'cpu'), ('gpt2', 'selective', 4, 256, ALL, 0.0, 'cuda')])
def test_the_predicted_peak_of_lora_is_within_a_tenth_of_a_real_iteration_s(
        name, plan, B, rank, targets, dropout, device, monkeypatch):
    measured = measure(name, plan, B, 2, monkeypatch, rank=rank, targets=targets, lora_dropout=dropout,
                       device=device)
    with torch.device('meta'):
        gpt = GPT(GPTConfig(**GPT2_SHAPES[name]))
        lora.add(gpt, rank, 32.0, dropout, targets)
    predicted = memory.peak(plan, memory.shape_of(gpt, 1024, 0.0, True, lora=True, device=device), B)
    print(f'{name} {plan} {B} x 2 with LoRA of {targets} at {rank}, dropout {dropout}: '
          f'{measured / memory.GiB:.2f} GiB, {predicted / measured - 1:+.1%} predicted')
    assert abs(predicted / measured - 1) < 0.1

@pytest.mark.parametrize('plan', memory.PLANS[:3])
@pytest.mark.parametrize('config, B', [
    (GPTConfig(256, 65, 6, 6, 384), 64), (GPTConfig(256, 65, 6, 6, 384, dropout=0.2), 64),
    (GPTConfig(128, 96, 4, 4, 128), 16), (GPTConfig(256, 50304, 12, 12, 768, bias=False), 16)])
def test_the_predicted_peak_of_other_shapes_is_within_a_tenth_of_a_real_iteration_s(
        config, B, plan, monkeypatch):
    measured = measure(config, plan, B, 2, monkeypatch)
    with torch.device('meta'):
        predicted = memory.peak(
            plan, memory.shape_of(GPT(config), config.block_size, config.dropout, True), B)
    print(f'{config.n_layer} x {config.n_embd}, {config.vocab_size} ids, dropout {config.dropout}, {plan} '
          f'{B} x 2: {measured / 2**20:.0f} MiB, {predicted / measured - 1:+.1%} predicted')
    assert abs(predicted / measured - 1) < 0.1

@pytest.mark.parametrize('plan, B, freeze, dropout', [
    *[(plan, 8, '', 0.1) for plan in memory.PLANS],
    *[(plan, 8, 'wte,wpe,h.0-5', 0.0) for plan in memory.PLANS[:3]], ('device', 8, 'wte,wpe', 0.0),
    ('device', 8, 'h.3-8', 0.0), ('device', 8, 'wte,wpe,h.0-5,h.8,h.9.mlp', 0.0)])
def test_the_predicted_peak_with_dropout_or_frozen_parts_is_within_a_tenth_of_a_real_iteration_s(
        plan, B, freeze, dropout, monkeypatch):
    measured = measure('gpt2', plan, B, 2, monkeypatch, freeze=freeze, dropout=dropout)
    with torch.device('meta'):
        gpt = GPT(GPTConfig(**GPT2_SHAPES['gpt2']))
        if freeze:
            lora.freeze_parts(gpt, freeze)
    predicted = memory.peak(plan, memory.shape_of(gpt, 1024, dropout, True), B)
    print(f'gpt2 {plan} {B} x 2, {freeze or "nothing"} frozen, dropout {dropout}: '
          f'{measured / memory.GiB:.2f} GiB, {predicted / measured - 1:+.1%} predicted')
    assert abs(predicted / measured - 1) < 0.1

@pytest.mark.parametrize('dropout, half', [(0.0, True), (0.1, True), (0.1, False)])
@pytest.mark.parametrize('plan', memory.PLANS[:3])
def test_the_predicted_peak_on_a_cpu_counts_what_its_attention_and_its_masks_keep(
        plan, dropout, half, monkeypatch):
    measured = measure('gpt2', plan, 4, 2, monkeypatch, dropout=dropout, device='cpu', half=half)
    predicted = memory.peak(plan, shape('gpt2', dropout=dropout, device='cpu', half=half), 4)
    print(f'gpt2 {plan} 4 x 2 on a CPU, dropout {dropout}, {"bfloat16" if half else "float32"}: '
          f'{measured / memory.GiB:.2f} GiB, {predicted / measured - 1:+.1%} predicted')
    assert abs(predicted / measured - 1) < 0.05

@pytest.mark.parametrize('freeze', ['', 'wte,wpe,h.0-5'])
def test_the_predicted_peak_of_muon_counts_one_moment_of_the_matrices_that_learn(freeze, monkeypatch):
    measured = measure('gpt2', 'recompute', 2, 2, monkeypatch, freeze=freeze, muon=True)
    with torch.device('meta'):
        gpt = GPT(GPTConfig(**GPT2_SHAPES['gpt2']))
        if freeze:
            lora.freeze_parts(gpt, freeze)
    predicted = memory.peak('recompute', memory.shape_of(gpt, 1024, 0.0, True, muon=True), 2)
    print(f'gpt2 recompute 2 x 2 with Muon, {freeze or "nothing"} frozen: {measured / memory.GiB:.2f} GiB, '
          f'{predicted / measured - 1:+.1%} predicted')
    assert abs(predicted / measured - 1) < 0.05

def test_large_and_xl_fit_where_they_should_without_accumulation():
    def GiB(name, plan, accumulates=False):
        return memory.peak(plan, shape(name), 1, accumulates) / memory.GiB
    assert GiB('gpt2-large', 'recompute') < 12.5 and GiB('gpt2-large', 'offload') < 3.3
    assert GiB('gpt2-xl', 'recompute') < 24 and GiB('gpt2-xl', 'offload') < 3.8

@pytest.mark.parametrize('device, dropout', [('cuda', 0.0), ('cpu', 0.1), ('mps', 0.0)])
@pytest.mark.parametrize('freeze', ['', 'wte,wpe,h.0-1', 'wte,wpe,h.0-3'])
@pytest.mark.parametrize('half', [True, False])
def test_a_leaner_plan_is_never_predicted_to_take_more(device, dropout, freeze, half):
    with torch.device('meta'):
        gpt = GPT(GPTConfig(n_layer=4))
    if freeze:
        lora.freeze_parts(gpt, freeze)
    for B in (1, 8):
        peaks = [memory.peak(plan, memory.shape_of(gpt, 1024, dropout, half, device=device), B)
                 for plan in memory.PLANS[:3]]
        assert peaks == sorted(peaks, reverse=True)

def test_a_limit_on_a_cpu_leaves_the_prediction_and_a_dry_run_s_is_a_card_s(run, tmp_path):
    (tmp_path / 'ends.py').write_text( # once it is told
        "import dataset, sys\ndataset.open_split = lambda *args, **options: sys.exit(0)\n")
    def expected(*options): # with dropout, attention is kept on a CPU alone
        out = run('train.py', tmp_path / 'ends.py', '--dataset=chars', '--device=cpu', '--n_layer=8',
                  '--n_head=4', '--n_embd=32', '--block_size=512', '--batch_size=64',
                  '--gradient_accumulation_steps=1', '--dropout=0.1', '--max_iters=0', '--eval_iters=1',
                  '--dtype=float32', '--plan=selective', *options).out
        return re.search(r'([\d.]+) GiB expected|selective +64 +([\d.]+)', out).group(1, 2)
    assert expected() == expected('--memory_gb=2') == ('0.40', None)
    assert expected('--memory_gb=2', '--dry_run=True') == (None, '0.37')

def test_the_fastest_plan_that_fits_is_chosen_with_the_largest_micro_batch():
    small, xl = shape('gpt2'), shape('gpt2-xl')
    assert memory.choose('auto', small, 16, 8, 80 * memory.GiB) == ('device', 8)
    assert memory.choose('auto', small, 10, 8, 80 * memory.GiB) == ('device', 5) # which divides 10
    assert memory.choose('auto', small, 16, 8, 2.4 * memory.GiB) == ('selective', 1)
    assert memory.choose('auto', small, 16, 8, 2.3 * memory.GiB) == ('recompute', 2)
    assert memory.choose('auto', xl, 8, 8, 6 * memory.GiB) == ('offload', 4)
    assert memory.choose('recompute', xl, 8, 8, 5 * memory.GiB) == ('recompute', 1) # as was asked
    # 16 bytes a parameter, and 0.75 GiB to cross the bus
    with pytest.raises(ValueError, match=r'needs 24.5 GiB of RAM, and 16.0 are free; take a smaller'):
        memory.choose('auto', xl, 8, 8, 6 * memory.GiB, ram_free=16 * memory.GiB)
    with pytest.raises(ValueError, match='are free; type --lora_rank=16 --learning_rate=3e-4, '
                                         'take a smaller'): # which needs no RAM
        memory.choose('auto', replace(xl, adapts=True), 8, 8, 6 * memory.GiB, ram_free=16 * memory.GiB)
    assert (memory.choose('auto', memory.with_lora(xl, 16), 8, 8, 6 * memory.GiB, memory.PLANS[:3])[0]
            == 'device')

@pytest.mark.parametrize('sequences, fits, expected', [(480, 25, (24, 20)), (7, 3, (1, 7)), (8, 8, (8, 1)),
                                                       (6, 9, (6, 1))])
def test_split_batch_takes_the_largest_even_share(sequences, fits, expected):
    assert memory.split_batch(sequences, fits) == expected

@pytest.mark.parametrize('budget, changes, plans, advice', [
    (2, {}, memory.PLANS, 'take a smaller model'),
    (3.6, {'adapts': False}, memory.PLANS, 'type --block_size=512, take'),
    (3.6, {}, memory.PLANS, 'type --block_size=512, type --lora_rank=16 --learning_rate=3e-4, take'),
    (12, {'muon': True}, memory.PLANS[:3],
     'type --lora_rank=16 --learning_rate=3e-4 --optimizer=adamw, take'),
    (5, {'buckets': 2}, memory.PLANS[:3], 'type --lora_rank=16 --learning_rate=3e-4, take'),
    (5, {'shards': 2}, memory.PLANS[:3], 'type --lora_rank=16 --learning_rate=3e-4 --shard=False, take'),
    (7.5, {'buckets': 4}, memory.PLANS[:3], # where several processes may share
     'type --shard=True, type --lora_rank=16 --learning_rate=3e-4, take')])
def test_what_is_advised_where_no_plan_fits_would_fit(budget, changes, plans, advice):
    xl = shape('gpt2-xl', **{'adapts': True, **changes})
    with pytest.raises(ValueError, match=f'no plan fits: {plans[-1]}.*{budget:.1f} GiB are free to fill; '
                                         f'{advice}'):
        memory.choose('auto', xl, 8, 8, budget * memory.GiB, plans)
    smaller = {'--lora_rank=16': memory.with_lora(xl, 16), '--block_size=512': replace(xl, block_size=512),
               '--shard=True': replace(xl, shards=xl.buckets, buckets=0)}
    for option in re.findall(r'type (--\w+=\w+)', advice):
        lean = plans if 'block' in option else memory.PLANS[:3]
        assert memory.choose('auto', smaller[option], 8, 8, budget * memory.GiB, lean)[1] >= 1

@pytest.mark.parametrize('rank', [1, 16])
def test_lora_s_shape_is_worked_out_as_its_model_has_it(rank):
    with torch.device('meta'):
        plain, adapted = (GPT(GPTConfig(64, 500, 3, 2, 32)) for _ in range(2))
        lora.add(adapted, rank, 32.0, 0.0, ALL)
    assert (memory.with_lora(memory.shape_of(plain, 64, 0.1, True, muon=True), rank)
            == memory.shape_of(adapted, 64, 0.1, True, lora=True))

@pytest.mark.parametrize('free, enough', [(24.4, False), (24.6, True)])
def test_a_dry_run_finds_ram_short_where_the_run_itself_would(free, enough):
    xl = shape('gpt2-xl') # 24.0 GiB in RAM, and 0.5 to spare
    said = memory.table(xl, 8, 8, 6 * memory.GiB, {}, ram_free=free * memory.GiB)
    assert ('more RAM than is free here' in said) == (not enough)
    choice = lambda: memory.choose('auto', xl, 8, 8, 6 * memory.GiB, ram_free=free * memory.GiB)
    if enough:
        assert choice()[0] == 'offload'
    else:
        with pytest.raises(ValueError, match='of RAM'):
            choice()

def test_ram_is_found_short_before_a_checkpoint_is_read(train, tmp_path):
    P = sum(p.numel() for p in GPT(GPTConfig(4, len(CHARS), 2, 2, 64, bias=False)).parameters())
    needed = memory.ram('offload', memory.Shape(P, 2, 2, 64, len(CHARS), 4, half=False))
    def offloaded(free, *options, **kwargs):
        (tmp_path / 'small.py').write_text(
            f"import checkpoint, memory, device\nmemory.plans_for = lambda *args: ('offload',)\n"
            f"device.free_memory = lambda device: {free}\ndevice.memory_to_fill = lambda *args: 2**30\n"
            "_load = checkpoint.load\ncheckpoint.load = lambda *args: (print('reading'), _load(*args))[1]\n")
        return train(tmp_path / 'small.py', '--n_embd=64', '--block_size=4', '--batch_size=1', *options,
                     **kwargs)
    free = needed + memory.RAM_SPARE
    assert 'of RAM' in offloaded(free - 1, out_dir='b', status=2).err
    assert f'in RAM {needed / 2**30:.1f} expected, {free / 2**30:.1f} free' in offloaded(free).out
    for start in ('--init_from=resume', f"--init_from={tmp_path / 'out'}"):
        short = offloaded(free - 1, start, '--max_iters=8', status=2,
                          out_dir='out' if 'resume' in start else 'b')
        assert 'of RAM' in short.err and 'reading' not in short.out
    again = offloaded(free, '--init_from=resume', '--max_iters=8').out
    assert again.index('plan offload') < again.index('reading') < again.index('resuming at iteration 6')

@pytest.mark.parametrize('plan, device, options, last', [
    ('auto', 'cuda', {}, 'offload'), ('auto', 'cpu', {}, 'recompute'), ('offload', 'cpu', {}, 'offload'),
    ('recompute', 'cpu', {}, 'recompute'), ('auto', 'cuda', {'optimizer': 'muon'}, 'recompute'),
    ('auto', 'cuda', {'lora_rank': 4}, 'recompute'), ('auto', 'mps', {}, 'recompute'),
    ('auto', 'cuda', {'freeze': 'wte'}, 'recompute')])
def test_offload_is_offered_where_it_works_and_helps(plan, device, options, last):
    config = {'plan': plan, 'optimizer': 'adamw', 'lora_rank': 0, 'freeze': '', **options}
    assert memory.plans_for(config, device)[-1] == last
    assert memory.plans_for({**config, 'plan': 'auto'}, device, processes=2)[-1] == 'recompute'

def test_out_of_memory_with_one_sequence_names_the_next_plan():
    config = {'batch_size': 1, 'gradient_accumulation_steps': 8, 'block_size': 1024, 'eval_iters': 0}
    said = [memory.advice(plan, 1, config).rpartition('type ')[2] for plan in memory.PLANS]
    assert said == ['--plan=selective', '--plan=recompute', '--plan=offload', '--block_size=512']
    saved = [memory.advice(plan, 1, config, plans, works, saved=True).rpartition('type ')[2]
             for plan, plans, works in (('device', memory.PLANS, True),
                                        ('recompute', memory.PLANS[:3], False))]
    assert saved == ['--init_from=resume --plan=selective',
                     '--lora_rank=16 --learning_rate=3e-4 --out_dir=ANOTHER, or take a smaller model']
    alone = [memory.advice(plan, 6, config, plans, works=False).partition('; ')[2] for plan, plans in (
        ('device', memory.PLANS), ('recompute', memory.PLANS[:3]))]
    assert alone == ['type --plan=offload', # no sequences were there
                     'type --lora_rank=16 --learning_rate=3e-4, or take a smaller model']
    for works in (True, False): # several processes may share weights and moments, which changes no loss
        assert memory.advice('recompute', 1, config, memory.PLANS[:3], works, shards=True).endswith(
            '; type --shard=True')

def test_out_of_memory_with_several_sequences_keeps_what_an_iteration_and_an_evaluation_read():
    config = {'batch_size': 12, 'gradient_accumulation_steps': 2, 'block_size': 1024, 'eval_iters': 0}
    assert memory.advice('device', 6, config).endswith(
        '6 sequences of 1024 tokens at a time; type --batch_size=3 --gradient_accumulation_steps=8')
    assert memory.advice('device', 6, {**config, 'eval_iters': 200}, saved=True).endswith( # 2,400 windows
        'type --init_from=resume --batch_size=3 --gradient_accumulation_steps=8 --eval_iters=800')

def test_a_dry_run_tells_every_plan_and_touches_nothing(run):
    done = run('train.py', 'config/finetune/gpt2_xl.py', '--dry_run=True', '--memory_gb=8')
    table = [line.split() for line in done.out.splitlines() if line.startswith(memory.PLANS)]
    assert ([row[0] for row in table] == list(memory.PLANS)
            and [row[4] for row in table] == ['no', 'no', 'no', 'yes'])
    assert done.out.splitlines()[-1] == (
        '--plan=auto takes offload, 8 sequences at a time, and needs 24.5 GiB of free RAM')
    assert not done.out_dir.exists()
    assert run('train.py', 'config/finetune/gpt2_small.py', '--dry_run=True',
               '--memory_gb=0.7').out.splitlines()[-1].startswith(
                   'no plan fits: offload, the leanest here, takes 0.5 GiB')

@pytest.mark.parametrize('option, message', [('--block_size=2048', 'the model has 1024 positions'),
                                             ('--plan=x', "there is no plan 'x'")])
def test_a_dry_run_refuses_what_the_run_would(run, option, message):
    assert message in run('train.py', 'config/finetune/gpt2_xl.py', '--dry_run=True', '--memory_gb=8',
                          option, status=2).err

def test_a_dry_run_without_its_data_says_what_it_assumes(run):
    told = [run('train.py', '--dry_run=True', '--memory_gb=8', f'--dataset={name}').out
            for name in ('chars', 'none')]
    assumed = "there is no data/none/train.bin; a vocabulary of GPT-2's 50,257 ids is assumed"
    assert [assumed in out for out in told] == [False, True]
    assert assumed not in run('train.py', '--dry_run=True', '--memory_gb=8', '--dataset=none',
                              '--init_from=gpt2').out

def test_a_dry_run_of_a_hugging_face_model_needs_its_config_alone(run, hf_dir, tmp_path):
    shutil.copy(hf_dir / 'config.json', tmp_path)
    def table(source):
        return run('train.py', '--dataset=chars', '--dry_run=True', f'--init_from={source}', '--memory_gb=1',
                   '--block_size=32').out
    assert table(tmp_path) == table(hf_dir) != table('scratch')

def test_a_dry_run_tells_the_epoch_of_an_earlier_run_of_the_same_model_and_data(train, tmp_path):
    settings = json.loads((train('--max_iters=1', out_dir='out').out_dir / 'config.json').read_text())
    (tmp_path / 'out' / 'log.csv').write_text(
        'iter,epoch,time_ms\n0,0.0,100\n5,0.25,\n10,0.5,200\n20,1.0,900\n')
    assert settings['plan'] == 'device'
    def epoch(*options):
        out = train('--dry_run=True', *options, out_dir='out').out
        head, row = (next(line for line in out.splitlines() if line.startswith(name))
                     for name in ('plan', 'device'))
        return row.split()[4:6] if 'epoch' in head else None
    assert epoch() == ['4', 's'] # 20 iterations of 200 ms
    for other in ('--block_size=8', '--dropout=0.2', '--optimizer=muon', '--memory_gb=8'): # the last is a GPU
        assert epoch(other) is None, other
    assert epoch(f'--out_dir={tmp_path}/none') is None

def test_what_is_told_of_a_plan_is_of_that_run():
    shape = memory.Shape(124_000_000, 12, 12, 768, 50257, 1024)
    lines = memory.table(shape, 1, 1, 80 * memory.GiB, {'device': 90.0}).splitlines()
    row = next(line for line in lines if line.startswith('device'))
    assert ' 90 s ' in row and str(lines).count('unknown') == len(memory.PLANS) - 1
    assert lines[-1] == '--plan=auto takes device, 1 sequence at a time' # and no RAM
    assert 'no plan fits: recompute' in memory.table(
        shape, 1, 1, memory.GiB, {}, ('device', 'recompute')) # though offload would
    assert float(row.split()[2]) == pytest.approx(
        memory.peak('device', shape, 1, accumulates=False) / memory.GiB, abs=0.006)
    assert memory.choose('auto', shape, 8, 8, 80 * memory.GiB, learns=False) == ('device', 8)
    xl = memory.Shape(1_557_611_200, 48, 25, 1600, 50257, 1024) # 5.8 GiB of weights
    assert memory.choose('auto', xl, 8, 8, 5 * memory.GiB, learns=False)[0] == 'offload'
    assert 'on cuda: a share of weights' in memory.describe('device', replace(shape, shards=2), 1, True,
                                                            memory.GiB)

def test_gradients_in_ddp_s_buckets_are_there_also_without_accumulation():
    shape = memory.Shape(124_439_808, 12, 12, 768, 50257, 1024)
    alone, in_buckets = (memory.peak('recompute', replace(shape, buckets=n), 1, accumulates=False)
                         for n in (0, 2))
    assert in_buckets == memory.peak('recompute', shape, 1, accumulates=True) > alone
