"""
One curve: the losses of a run do not depend on how many processes share it, how it is cut, or what is
sharded.
"""
import os
import re
import shutil
import socket
import textwrap

import numpy as np
import pytest
import torch

import parallel
from checkpoint import load
from conftest import Result, TINY

LONG = ('--max_iters=50', '--eval_interval=25', '--eval_iters=0', '--warmup_iters=5', '--learning_rate=3e-3',
        '--min_lr=3e-4') # at higher rates such a small model magnifies the last bits

@pytest.fixture(scope='module')
def masked(clone):
    """ data/chars with a mask that keeps most tokens out of the loss, some windows whole """
    folder = clone / 'data' / 'half'
    shutil.copytree(clone / 'data' / 'chars', folder)
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        n = os.path.getsize(folder / f'{split}.bin') // 2
        counts = np.repeat(rng.random(n // 40 + 1) < 0.5, 40)[:n] & (rng.random(n) < 0.5)
        counts.astype(np.uint8).tofile(folder / f'{split}_mask.bin')
    return folder.name

@pytest.fixture(scope='module')
def references(clone, masked, forks, tmp_path_factory):
    """ {dataset: the columns of an uninterrupted run of one process, all 8 sequences at once} """
    made = {}
    for dataset in ('chars', masked):
        out_dir = tmp_path_factory.mktemp('reference') / dataset
        args = (f'--dataset={dataset}', *TINY, *LONG, '--batch_size=8', '--gradient_accumulation_steps=1',
                f'--out_dir={out_dir}')
        status, out, err = forks('train.py', args, clone, 120, 1)
        assert status == 0, err
        made[dataset] = losses(Result(status, out, err, out_dir))
    return made

def losses(result):
    return {name: [float(v) for v in result.column(name) if v] for name in ('loss', 'train_loss', 'val_loss')}

SPLITS = [('chars', 1, 1), ('chars', 1, 2), ('chars', 1, 4), ('chars', 2, 1), ('chars', 2, 2),
          ('chars', 2, 4), ('chars', 4, 1), ('chars', 4, 2), ('half', 1, 1), ('half', 2, 2), ('half', 4, 1)]

@pytest.mark.parametrize('dataset, processes, micro_batch', SPLITS)
def test_any_split_is_the_same_run(train, references, dataset, processes, micro_batch):
    result = train(f'--dataset={dataset}', *LONG, f'--batch_size={micro_batch}',
                   f'--gradient_accumulation_steps={8 // micro_batch}', processes=processes)
    got, wanted = losses(result), references[dataset]
    assert len(got['loss']) == 50 and got['loss'] == pytest.approx(wanted['loss'], abs=1e-5)
    for name in ('train_loss', 'val_loss'): # after 50 updates that differ in their last bits
        assert got[name] == pytest.approx(wanted[name], abs=1e-5)
        assert got[name][0] == pytest.approx(wanted[name][0], abs=1e-6) # of the same weights
    assert re.search(rf', {micro_batch} sequences? at a time', result.out)

@pytest.mark.parametrize('options', [('--dtype=bfloat16',), ('--dtype=bfloat16', '--shard=True'),
                                     ('--dtype=float16',)])
def test_a_split_in_half_precision_is_the_same_run_but_for_its_rounding(train, options):
    options = *LONG, '--max_iters=30', *options
    one = losses(train(*options, '--shard=False', '--batch_size=8', '--gradient_accumulation_steps=1'))
    two = losses(train(*options, processes=2, out_dir='two'))
    apart = max(abs(a - b) for name in one for a, b in zip(one[name], two[name], strict=True))
    print(f"{' '.join(options[len(LONG) + 1:])}: at most {apart:.1e} apart")
    assert apart <= 1e-3

@pytest.mark.parametrize('kinds, chosen', [(('bfloat16', 'float16'), 'float16'),
                                           (('float32', 'bfloat16'), 'float32')])
def test_processes_on_different_hardware_compute_in_what_all_of_them_have(train, tmp_path, kinds, chosen):
    (tmp_path / 'kinds.py').write_text(
        f"import os, device\ndevice.pick_dtype = lambda *_: {kinds}[int(os.environ['RANK'])]\n")
    assert f'on 2 x cpu in {chosen}\n' in train(tmp_path / 'kinds.py', '--max_iters=1', processes=2).out

def test_a_number_of_processes_that_does_not_divide_an_iteration_is_told_what_does(train):
    train()
    options = '--init_from=resume', '--max_iters=8'
    assert 'make it 6 or 9' in train(processes=3, out_dir='b', status=2).err
    assert 'start it with 1, 2, 4 or 8 of them' in train(*options, processes=3, status=2).err
    alone, three = (train(*options, '--eval_only=True', processes=n).out.splitlines()[-1]
                    for n in (1, 3)) # needs no such
    assert alone == three and 'step 6: train loss' in alone

def test_one_sequence_is_for_one_process():
    with pytest.raises(ValueError, match='cannot share evenly; start it with 1 of them'):
        parallel.share(1, 2, {'init_from': 'resume', 'shard': False, 'eval_only': False})

def test_a_dry_run_of_several_processes_counts_the_sequences_of_all(train):
    assert ('8 sequences of 16 tokens an iteration, 4 by each of 2 processes; '
            in train('--dry_run=True', processes=2).out)

def test_processes_that_read_different_data_are_told(clone, train, tmp_path):
    shutil.copytree(clone / 'data' / 'chars', tmp_path / 'other')
    tokens = np.fromfile(tmp_path / 'other' / 'train.bin', np.uint16)
    (tmp_path / 'nodes.py').write_text(
        f"import os\ndataset = 'chars' if os.environ['RANK'] == '0' else {str(tmp_path / 'other')!r}\n")
    for spoil in (lambda: tokens[:-1000], lambda: tokens[::-1]):
        spoil().tofile(tmp_path / 'other' / 'train.bin')
        error = train(tmp_path / 'nodes.py', processes=2, status=2).err
        assert 'error: the processes read different data in' in error and 'Traceback' not in error

@pytest.mark.parametrize('options', [(), ('--plan=recompute', '--freeze=wte,h.0', '--bias=True')])
def test_a_sharded_run_has_the_losses_of_one_that_is_not(train, options):
    whole = train(*LONG, *options, processes=2)
    shards = train(*LONG, *options, '--shard=True', '--sample_interval=25', '--sample_tokens=20',
                   processes=2, out_dir='shards')
    assert 'sharded' in shards.out
    for name, values in losses(whole).items():
        assert losses(shards)[name] == pytest.approx(values, abs=1e-4), name
    assert (shards.out_dir / 'samples.txt').read_text(encoding='utf-8').count('iteration') == 3

def test_processes_with_different_memory_free_choose_the_same(train, tmp_path):
    (tmp_path / 'uneven.py').write_text(
        "import os, device\n_free = {'0': 1e9, '1': 0.004e9}[os.environ['RANK']]\n"
        "device.free_memory = lambda device: _free\n")
    options = ('--batch_size=32', '--gradient_accumulation_steps=4', '--n_layer=4', '--n_embd=32',
               '--max_iters=2')
    plenty = train(*options, processes=2)
    uneven = train(tmp_path / 'uneven.py', *options, processes=2, out_dir='uneven')
    assert 'plan device, 32 sequences' in plenty.out and 'plan device, 32 sequences' not in uneven.out
    assert losses(uneven)['loss'] == pytest.approx(losses(plenty)['loss'], abs=1e-5)

def test_training_and_evaluation_ask_autocast_for_no_copies_of_the_weights(train, tmp_path):
    (tmp_path / 'watch.py').write_text(
        "import device, os, torch\n_autocast = device.autocast\ndef _watch(place, dtype, cache=False):\n"
        "    if os.environ['RANK'] == '0':\n"
        "        print('autocast', dtype, torch.is_grad_enabled(), cache)\n"
        "    return _autocast(place, dtype, cache)\ndevice.autocast = _watch\n")
    said = train(tmp_path / 'watch.py', '--shard=True', '--dtype=bfloat16', processes=2).out
    assert {line for line in said.splitlines() if 'autocast' in line} == {
        'autocast bfloat16 True False', 'autocast bfloat16 False False'}

def test_a_sharded_run_s_checkpoint_is_any_run_s(train):
    options = ('--max_iters=8', '--lr_decay_iters=8', '--eval_interval=4')
    whole = train(*options)
    train(*options, '--shard=True', '--max_iters=4', processes=2, out_dir='shards')
    a, b = (load(folder / 'last.pt', moments=True)
            for folder in (train(*options, '--max_iters=4', out_dir='four').out_dir,
                           whole.out_dir.parent / 'shards'))
    assert a.keys() == b.keys() and list(a['model']) == list(b['model'])
    assert all(type(t) is torch.Tensor for t in b['model'].values()) # no shards
    assert ([list(s) for s in a['optimizer']['state'].values()]
            == [list(s) for s in b['optimizer']['state'].values()])
    for name, tensor in a['model'].items():
        assert torch.allclose(tensor, b['model'][name], atol=1e-6), name
    shutil.copytree(whole.out_dir.parent / 'shards', whole.out_dir.parent / 'again')
    one = train(*options, '--init_from=resume', '--shard=False', out_dir='shards') # by one process
    four = train(*options, '--init_from=resume', processes=4, out_dir='again')
    for result in (one, four):
        assert losses(result)['loss'] == pytest.approx(losses(whole)['loss'], abs=1e-5)

@pytest.mark.parametrize('options, processes, says', [
    ((), 1, 'start train.py by torchrun'), (('--optimizer=muon',), 2, 'type --optimizer=adamw and no')])
def test_what_cannot_be_sharded_is_told(train, options, processes, says):
    assert says in train('--shard=True', *options, processes=processes, status=2).err

REPLICATE = """
    import torch
    import parallel
    from model import GPT, GPTConfig

    rank, world_size, device = parallel.start_processes('gloo', 'cpu')
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(16, 50, 2, 2, 32))
    gpt.transformer.wpe.weight.requires_grad_(False)
    params = [p for p in gpt.parameters() if p.requires_grad]
    storages = lambda: {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes()
                        for p in params}
    idx = torch.zeros(2, 16, dtype=torch.int64)
    model, opt = (parallel.replicate_model(gpt, device, lambda model: model(idx, idx)[1].backward()),
                  torch.optim.AdamW(params))
    buckets = storages()
    assert all(p.grad.count_nonzero() == 0 for p in params)
    for it in range(3):
        for last in (False, False, True):
            model.require_backward_grad_sync = last
            idx = torch.full((2, 16), 10 * it + rank)
            model(idx, idx)[1].backward()
            if rank == 0:
                print('gradients:', storages() == buckets,
                      sum(buckets.values()) / 4 / sum(p.numel() for p in params))
        opt.step()
        opt.zero_grad(set_to_none=False)
    parallel.stop_processes()
"""

def test_micro_batches_of_several_processes_add_up_in_one_copy_of_the_gradients(clone, run):
    (clone / 'replicate.py').write_text(textwrap.dedent(REPLICATE))
    lines = re.findall(r'^gradients: (.*)', run('replicate.py', processes=2).out, re.MULTILINE)
    assert lines == 9 * ['True 1.0']

TRACK = """
    import sys
    import torch, torch.distributed as dist
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.nn import functional as F
    from torch.utils._python_dispatch import TorchDispatchMode
    import memory, model, parallel
    from optim import make_optimizer

    # attention as a GPU has it
    model.attend = lambda q, k, v, dropout, mask: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # memory is the same, and a CPU may take long for them in half precision
    class WithoutProducts(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                return args[-2].new_empty(args[-2].size(0), args[-1].size(1))
            return kwargs['out'] if op == torch.ops.aten.mm.out else op(*args, **(kwargs or {}))
    rank, world_size, device = parallel.start_processes('gloo', 'cpu')
    for plan in ('selective', 'recompute'):
        gpt = model.GPT(model.GPTConfig(256, 4096, 4, 4, 256))
        gpt.follow(plan)
        shape = memory.shape_of(gpt, 256, 0.0, True, processes=world_size, shard=True)
        parallel.shard_model(gpt, world_size, device)
        opt = make_optimizer('adamw', gpt, 1e-3, 0.0, 0.1, (0.9, 0.95))
        tracker, idx = MemTracker(), torch.zeros(2, 256, dtype=torch.int64)
        def iterate():
            with WithoutProducts():
                with torch.autocast('cpu', torch.bfloat16, cache_enabled=False):
                    loss = gpt(idx, idx, scale=1.0)[1]
                loss.backward()
            opt.step()
            opt.zero_grad()
        iterate() # in which the moments come, and torch 2.11 tries each operation's shards
        tracker.track_external(gpt, opt)
        with tracker:
            iterate()
        most = next(iter(tracker.get_tracker_snapshot('peak').values()))['Total']
        if rank == 0:
            print('peak:', plan, most, memory.peak(plan, shape, 2, accumulates=False))
        del gpt, opt, tracker
    parallel.stop_processes()
"""

def test_the_predicted_peak_of_a_sharded_run_is_within_a_tenth_of_a_real_iteration_s(clone, run):
    (clone / 'track.py').write_text(textwrap.dedent(TRACK))
    lines = re.findall(r'^peak: (.*)', run('track.py', processes=2).out, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        plan, measured, predicted = line.split()
        print(f'{plan}: {int(measured) / 2**20:.0f} MiB, {int(predicted) / int(measured) - 1:+.1%} predicted')
        assert abs(int(predicted) / int(measured) - 1) < 0.1, line

def test_the_number_of_a_gpu_is_refused_under_torchrun(monkeypatch):
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(ValueError, match="'cuda:1', but torchrun's processes each take another GPU; "
                                         "type --device=cuda"):
        parallel.start_processes('auto', 'cuda:1')

def test_more_processes_than_gpus_to_be_seen_are_refused(monkeypatch):
    for name, value in {'RANK': '2', 'LOCAL_RANK': '2', 'LOCAL_WORLD_SIZE': '4'}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 1) # as a scheduler may show each task
    with pytest.raises(ValueError, match='has 4 processes, but each sees 1 of its GPUs; '
                                         'start one torchrun on each node'):
        parallel.start_processes('auto', 'cuda')
    for name in ('LOCAL_RANK', 'LOCAL_WORLD_SIZE'):
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match='no LOCAL_RANK; start this by torchrun'):
        parallel.start_processes('auto', 'cuda')

AGREE = """
    import parallel
    rank, world_size, device = parallel.start_processes('gloo', 'cpu')
    told = (parallel.are_same(100 * rank), parallel.are_same(7), parallel.in_any(rank == 1),
            parallel.in_any(False), parallel.least(5 - rank))
    print('told: ' + repr(told) + chr(10), end='')
    parallel.stop_processes()
"""

def test_all_processes_come_to_the_same_verdict(clone, run):
    """ also the one whose value is the mean of all """
    (clone / 'agree.py').write_text(textwrap.dedent(AGREE))
    assert re.findall(r'told: (.*)', run('agree.py', processes=3).out) == 3 * [
        '(False, True, True, False, 3.0)']

CLOSE = """
    import parallel
    rank, world_size, device = parallel.start_processes('gloo', 'cpu')
    print('told: ' + repr(parallel.are_same(2**32 - 1 - rank)) + chr(10), end='')
    parallel.stop_processes()
"""

def test_fingerprints_that_differ_in_their_last_bit_differ(clone, run):
    (clone / 'close.py').write_text(textwrap.dedent(CLOSE))
    assert re.findall(r'told: (.*)', run('close.py', processes=2).out) == ['False'] * 2

FIRST = """
    import parallel
    rank, world_size, device = parallel.start_processes('gloo', 'cpu')
    for kind in (OSError, ValueError, ImportError):
        def work():
            raise kind('no ' + kind.__name__)
        try:
            parallel.in_first(work)
        except (OSError, ValueError, ImportError) as error:
            print(f'told: {rank} {error}' + chr(10), end='')
    parallel.stop_processes()
"""

def test_what_fails_in_the_first_process_is_an_error_in_each(clone, run):
    (clone / 'first.py').write_text(textwrap.dedent(FIRST))
    assert sorted(re.findall(r'told: (.*)', run('first.py', processes=2).out)) == [
        '0 no ImportError', '0 no OSError', '0 no ValueError',
        *['1 the first process cannot start; see its error'] * 3]

def test_jobs_without_an_id_are_those_of_their_agents(monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    ids = []
    for host, agent in (('a', 1), ('a', 1), ('a', 2), ('b', 1)):
        monkeypatch.setattr(socket, 'gethostname', lambda: host)
        monkeypatch.setattr(os, 'getppid', lambda: agent)
        ids.append(parallel.launch_id())
    assert ids[0] == ids[1] and len(set(ids)) == 3
