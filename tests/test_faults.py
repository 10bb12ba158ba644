"""
Faults put in on purpose: full disks, damaged checkpoints, losses that are no number, signals at a bad moment.
"""
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from checkpoint import load
from saver import Saver, save
from conftest import Started, TINY
from log import append

resource = pytest.importorskip('resource', reason="Windows has neither such signals nor such limits")

ENDLESS = ('--max_iters=1000000', '--eval_interval=20', '--eval_iters=1', '--decay_lr=False',
           '--log_interval=10')

@contextlib.contextmanager
def ending(process):
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

@pytest.fixture
def started(forks):
    """ a run in a fork, with its lines as they come """
    def started(clone, out_dir, *options, script='train.py'):
        args = ['--dataset=chars', *TINY, f'--out_dir={out_dir}', *options]
        return ending(Started(forks, script, args, clone, f'{out_dir}.pipe'))
    return started

def started_alone(clone, out_dir, *options):
    """ the same in a Python of its own, with what that does to signals and to a pipe """
    command = [sys.executable, '-u', 'train.py', '--dataset=chars', *TINY, f'--out_dir={out_dir}', *options]
    return ending(subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   encoding='utf-8'))

def wait_for(process, *texts):
    """ read on to a line that has one of the texts, and return it """
    lines = []
    for line in process.stdout:
        lines.append(line)
        if any(text in line for text in texts):
            return line
    raise AssertionError(''.join(lines))

def limit_files(process, size):
    """ let no file of the process grow beyond `size` bytes, as a full disk does """
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

# -----------------------------------------------------------------------------
# disks

@pytest.mark.skipif(not hasattr(resource, 'prlimit'),
                    reason="only Linux limits the files of a process that runs")
def test_a_run_outlives_a_disk_that_is_full_for_a_while(clone, started, tmp_path):
    out = tmp_path / 'out'
    with started(clone, out, *ENDLESS) as run:
        wait_for(run, 'iter 10:')
        before = (out / 'last.pt').read_bytes()
        limit_files(run, 10000)
        assert 'what it held before is whole; the next save is another' in wait_for(run, 'warning: iter')
        assert (out / 'last.pt').read_bytes() == before and not (out / 'last.pt.tmp').exists()
        wait_for(run, 'warning: iter') # it tries again
        limit_files(run, resource.RLIM_INFINITY)
        at = int(wait_for(run, 'step ').split()[1].rstrip(':'))
        wait_for(run, f'step {at + 20}') # so that the save of the first has ended
        run.send_signal(signal.SIGTERM)
        end = wait_for(run, 'stopped at iteration')
        rest = run.communicate(timeout=60)[0]
    assert run.returncode == 0 and 'error' not in rest
    last, best = load(out / 'last.pt'), load(out / 'ckpt.pt')
    assert last['iter_num'] == int(end.split()[3]) >= at + 20
    assert last['best_iter'] == best['iter_num'] # of what was saved, it is the best

@pytest.mark.skipif(not hasattr(resource, 'prlimit'),
                    reason="only Linux limits the files of a process that runs")
def test_a_run_that_could_save_nothing_ends_with_an_error(clone, tmp_path):
    with started_alone(clone, tmp_path / 'out', '--max_iters=200', '--eval_interval=100') as run:
        limit_files(run, 10000)
        out = run.communicate(timeout=60)[0]
    lines = out.splitlines()
    assert run.returncode == 2 and 'iter 199:' in out and out.count('warning: iter') == 3
    assert lines[-1].startswith('error: cannot save') and 'nothing of this run was saved' in lines[-1]
    assert 'Traceback' not in out and not list((tmp_path / 'out').glob('*.pt*'))

def test_a_small_disk_that_fills_up_loses_no_line_of_the_log(tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if os.system(f'mount -t tmpfs -o size=64k tmpfs {disk} 2>/dev/null'):
        pytest.skip('only root may mount a small disk')
    try:
        path = str(disk / 'log.csv')
        append(path, 'first\n')
        (disk / 'other').write_bytes(b'x' * 60000)
        for i in range(3):
            append(path, f'{i}' * 8000 + '\n')
        assert not Saver(str(disk), False)({'iter_num': 1, 'model': {'w': torch.zeros(100000)}}, is_best=True)
        assert not list(disk.glob('*.pt*'))
        (disk / 'other').unlink()
        append(path, 'last\n')
        assert [line[:1] for line in open(path)] == list('f012l')
    finally:
        os.system(f'umount {disk}')

def test_weights_that_are_no_numbers_replace_no_checkpoint(tmp_path, capsys):
    saver = Saver(str(tmp_path), False)
    assert saver({'iter_num': 1, 'model': {'w': torch.ones(2)}}, is_best=True)
    assert not saver({'iter_num': 2, 'model': {'w': torch.tensor([1.0, float('nan')])}}, is_best=True)
    assert 'the weights are not finite' in capsys.readouterr().err and saver.saved == 1
    assert all(torch.load(tmp_path / name)['iter_num'] == 1 for name in ('last.pt', 'ckpt.pt'))

def test_a_full_disk_under_the_terminal_s_output_ends_no_run(clone, tmp_path):
    """ as under `> train.log` or `| tee`; /dev/full takes nothing """
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            [sys.executable, 'train.py', '--dataset=chars', *TINY, f"--out_dir={tmp_path / 'out'}"],
            cwd=clone, stdout=full, stderr=subprocess.PIPE, encoding='utf-8')
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    assert load(tmp_path / 'out' / 'last.pt')['iter_num'] == 6

def test_a_run_whose_reader_is_gone_saves_on_ctrl_c(clone, tmp_path):
    """ as in `train.py | tee log`, where Ctrl-C ends tee first """
    with started_alone(clone, tmp_path / 'out', *ENDLESS, '--eval_interval=1000000') as run:
        wait_for(run, 'iter 10:')
        run.stdout.close()
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=60) == 130
    assert load(tmp_path / 'out' / 'last.pt')['iter_num'] > 10

# -----------------------------------------------------------------------------
# damaged checkpoints

def spoil(path, how):
    content = bytearray(path.read_bytes())
    if how == 'cut':
        content = content[:len(content) * 2 // 3]
    elif how == 'empty':
        content = b''
    else: # a byte of a tensor
        content[len(content) // 2] ^= 1
    path.unlink() # ckpt.pt may be the same file
    path.write_bytes(content)

@pytest.mark.parametrize('how', ['cut', 'empty', 'a byte'])
def test_a_damaged_last_pt_falls_back_to_the_best(train, how):
    options = ('--max_iters=8', '--lr_decay_iters=8', '--eval_interval=3')
    whole = train(*options)
    half = train(*options, '--max_iters=6', out_dir='half')
    spoil(half.out_dir / 'last.pt', how)
    best = load(half.out_dir / 'ckpt.pt')['iter_num']
    resumed = train(*options, '--init_from=resume', out_dir='half')
    assert resumed.out.count('warning: ') == 1 and f'resuming at iteration {best}' in resumed.out
    assert 'going on from' in resumed.out and resumed.column('loss') == whole.column('loss')

def test_two_damaged_checkpoints_are_told_with_what_was_expected(train):
    half = train('--max_iters=4')
    for name in ('last.pt', 'ckpt.pt'):
        spoil(half.out_dir / name, 'a byte')
    before = {path.name: path.read_bytes() for path in half.out_dir.iterdir()}
    error = train('--init_from=resume', status=2).err.splitlines()[-1]
    assert (error.startswith('error: ') and 'ckpt.pt is damaged: of its bytes the' in error
            and 'expected the CRC-32' in error)
    assert {path.name: path.read_bytes() for path in half.out_dir.iterdir()} == before

def test_no_flipped_byte_of_a_tensor_goes_unnoticed(tmp_path):
    path, rng = tmp_path / 'last.pt', random.Random(0)
    save({'model': {'w': torch.randn(50, 50)}, 'model_args': {}, 'x': torch.randn(500)}, str(path))
    content, noticed = path.read_bytes(), 0
    whole = load(str(path))
    for _ in range(200):
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:])
        try:
            other = load(str(path)) # a byte between the tensors may change nothing
            assert (torch.equal(other['model']['w'], whole['model']['w'])
                    and torch.equal(other['x'], whole['x']))
        except ValueError:
            noticed += 1
    assert noticed > 150

# -----------------------------------------------------------------------------
# losses and gradients that are no number

INJECT = """
    import math, os, runpy, sys
    import torch
    from model import GPT

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()
        @staticmethod
        def backward(ctx, grad):
            return grad * math.nan

    forward, calls = GPT.forward, [0]
    def wrong(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        if loss is not None and self.training: # two a micro-batch
            number, calls[0] = calls[0] // 2, calls[0] + 1
            loss = (loss * math.nan if number in LOSSES else Poison.apply(loss) if number in GRADIENTS
                    else loss)
        return logits, loss
    GPT.forward = wrong
    runpy.run_path('train.py', run_name='__main__')
"""

@pytest.fixture
def inject(clone, run, tmp_path):
    """ train with iterations whose loss, or gradient, is no number """
    def inject(losses, gradients, *options, **kwargs):
        name = f'inject_{os.getpid()}.py'
        (clone / name).write_text(textwrap.dedent(INJECT).replace('LOSSES', repr(losses))
                                  .replace('GRADIENTS', repr(gradients)))
        return run(name, '--dataset=chars', *TINY, '--keep_checkpoints=True', *options,
                   f"--out_dir={tmp_path / 'out'}", **kwargs)
    return inject

def tensors(value):
    if isinstance(value, dict):
        return [t for inner in value.values() for t in tensors(inner)]
    return [value] if isinstance(value, torch.Tensor) else []

def all_finite(out_dir):
    paths = list(out_dir.glob('*.pt'))
    return paths and all(t.isfinite().all() for path in paths for t in tensors(load(path, moments=True)))

@pytest.mark.parametrize('options', [(), ('--dtype=float16',), ('--optimizer=muon',)])
def test_what_is_no_number_makes_no_update_and_is_in_no_checkpoint(inject, options):
    done = inject([3, 4, 5, 6], [1, 8, 9], *options, '--max_iters=12', '--eval_interval=1')
    assert done.out.count('no update') == 7 and all_finite(done.out_dir)
    weights = [load(done.out_dir / f'iter_{i:06d}.pt')['model']['transformer.wte.weight'] for i in range(13)]
    same = [i for i in range(12) if torch.equal(weights[i], weights[i + 1])]
    assert same == [1, 3, 4, 5, 6, 8, 9]

@pytest.mark.parametrize('losses, gradients', [([2, 3, 4, 5, 6], []), ([2, 4, 6], [3, 5])])
def test_the_fifth_in_a_row_that_is_no_number_ends_the_run(inject, losses, gradients):
    done = inject(losses, gradients, '--max_iters=12', status=2)
    assert done.err.splitlines()[-1].startswith(
        'error: five iterations in a row were not finite, the last being 6;')
    assert done.err.endswith(
        f"type --init_from={done.out_dir / 'ckpt.pt'} --out_dir=ANOTHER and the run's other options "
        "with a lower --learning_rate\n")
    last = load(done.out_dir / 'last.pt')
    assert all_finite(done.out_dir) and last['iter_num'] == 6 and last['n_bad'] == 0
    assert (inject([], [], '--init_from=resume', '--max_iters=12').column('iter')
            == [str(i) for i in range(13)])

# -----------------------------------------------------------------------------
# signals

def test_sigusr1_saves_and_goes_on(clone, started, tmp_path):
    with started(clone, tmp_path / 'out', *ENDLESS, '--eval_interval=1000000') as run:
        wait_for(run, 'iter 10:')
        run.send_signal(signal.SIGUSR1)
        line = wait_for(run, 'saved')
        assert load(tmp_path / 'out' / 'last.pt')['iter_num'] == int(line.split()[1].rstrip(':')) >= 10
        wait_for(run, 'iter ')
        assert run.poll() is None

@pytest.mark.parametrize('options, at', [
    (('--gradient_accumulation_steps=30000',), 'step 0:'),
    (('--eval_interval=30', '--eval_iters=0', '--batch_size=1'), 'iter 20:')])
def test_an_end_waits_for_no_long_iteration_or_evaluation(clone, started, tmp_path, options, at):
    with started(clone, tmp_path / 'out', *ENDLESS, *options) as run:
        wait_for(run, at)
        time.sleep(0.3)
        run.send_signal(signal.SIGTERM)
        begun = time.time()
        out = run.communicate(timeout=60)[0]
    assert run.returncode == 0 and time.time() - begun < 10
    assert 'saved' in out and '--init_from=resume' in out
    assert (load(tmp_path / 'out' / 'last.pt')['iter_num']
            == int(out.split('stopped at iteration ')[1].split()[0]))

def test_a_terminal_that_goes_ends_a_run_in_order_unless_nohup_is_there(clone, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL) # where these tests run under nohup, too
    try:
        with started_alone(clone, tmp_path / 'out', *ENDLESS) as run:
            wait_for(run, 'iter 10:')
            run.send_signal(signal.SIGHUP)
            out = run.communicate(timeout=60)[0]
        assert run.returncode == 0
        assert (load(tmp_path / 'out' / 'last.pt')['iter_num']
                == int(out.split('stopped at iteration ')[1].split()[0]))
        signal.signal(signal.SIGHUP, signal.SIG_IGN) # as nohup leaves it to what it starts
        with started_alone(clone, tmp_path / 'nohup', *ENDLESS) as run:
            wait_for(run, 'iter 10:')
            run.send_signal(signal.SIGHUP)
            wait_for(run, 'iter 60:')
    finally:
        signal.signal(signal.SIGHUP, before)

def test_a_folder_that_a_run_writes_to_is_no_other_s(clone, started, train, tmp_path):
    with started(clone, tmp_path / 'out', *ENDLESS) as run:
        wait_for(run, 'iter 30:') # saved at 20
        rows = len((tmp_path / 'out' / 'log.csv').read_bytes())
        error = train(*ENDLESS, '--init_from=resume', out_dir='out', status=2).err.splitlines()[-1]
        assert error == (f"error: another run is writing to {tmp_path / 'out'}; end it, "
                         "or type --out_dir=ANOTHER")
        train(*ENDLESS, '--init_from=resume', '--eval_only=True', out_dir='out') # writes nothing
        run.send_signal(signal.SIGTERM)
        assert 'stopped at' in run.communicate(timeout=60)[0] and run.returncode == 0
    iters = [line.split(',')[0] for line in (tmp_path / 'out' / 'log.csv').read_text().splitlines()[1:]]
    assert len(iters) == len(set(iters)) and (tmp_path / 'out' / 'log.csv').stat().st_size > rows
    # its lock has gone with it
    train(*ENDLESS, '--init_from=resume', f'--max_iters={int(iters[-1]) + 5}', out_dir='out')

def test_a_run_that_was_overtaken_is_refused(train, tmp_path):
    first = train()
    (tmp_path / 'overtaken.py').write_text( # another run saves while this one reads its data
        "import dataset, os, shutil\n_open = dataset.open_split\ndef _late(*args, **options):\n"
        f"    shutil.copy({str(first.out_dir / 'last.pt')!r}, "
        f"os.path.join({str(tmp_path / 'b')!r}, 'last.pt'))\n"
        "    return _open(*args, **options)\ndataset.open_split = _late\n")
    (tmp_path / 'b').mkdir()
    error = train(tmp_path / 'overtaken.py', out_dir='b', status=2).err.splitlines()[-1]
    assert (error.startswith('error: another run has just saved to')
            and sorted(os.listdir(tmp_path / 'b')) == ['.lock', 'last.pt'])
    shutil.copy(first.out_dir / 'last.pt', tmp_path / 'b' / 'ckpt.pt')
    again = train(tmp_path / 'overtaken.py', '--init_from=resume', '--max_iters=8', out_dir='b', status=2)
    assert 'another run has just saved to' in again.err and 'resuming at iteration 6' in again.out

def test_a_run_of_another_user_s_is_gone_on_with(train):
    out_dir = train().out_dir
    (out_dir / '.lock').chmod(0o444)
    train('--init_from=resume', '--max_iters=8')

def test_a_second_ctrl_c_leaves_at_once(clone, started, tmp_path):
    slow = clone / f'slow_{os.getpid()}.py' # saves for a minute
    slow.write_text("import runpy, time, saver\nsave = saver.save\n"
                    "saver.save = lambda c, path: (save(c, path), time.sleep(60 * (c['iter_num'] > 0)))\n"
                    "runpy.run_path('train.py', run_name='__main__')\n")
    with started(clone, tmp_path / 'out', *ENDLESS, '--eval_interval=1000000', script=slow.name) as run:
        wait_for(run, 'iter 10:')
        run.send_signal(signal.SIGINT)
        wait_for(run, 'a second Ctrl-C leaves without saving')
        time.sleep(1.2)
        run.send_signal(signal.SIGINT)
        out = run.communicate(timeout=10)[0]
    assert run.returncode == 130 and 'Traceback' not in out and load(tmp_path / 'out' / 'last.pt')

def test_a_new_run_in_an_old_one_s_place_leaves_none_of_its_checkpoints(train):
    old = train('--keep_checkpoints=True')
    (old.out_dir / 'last.pt.tmp').write_bytes(b'of a save that was killed')
    for name in ('last.pt', 'ckpt.pt'): # without these it holds no run, and its other files stay
        (old.out_dir / name).rename(old.out_dir / f'my_{name}')
    train('--max_iters=2', '--learning_rate=1', '--min_lr=1')
    assert (old.out_dir / 'iter_000004.pt').exists()
    for path in old.out_dir.glob('my_*'):
        path.unlink()
    train('--overwrite=True', '--max_iters=2', '--learning_rate=1', '--min_lr=1')
    assert {p.name: load(p)['iter_num'] for p in old.out_dir.glob('*.pt*')} == {'last.pt': 2, 'ckpt.pt': 0}

def test_a_resume_with_fewer_iterations_than_were_made_ends(clone, started, train, tmp_path):
    with started(clone, tmp_path / 'out', *ENDLESS, '--eval_interval=1000000') as run:
        wait_for(run, 'iter 10:')
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=60)
    at = load(tmp_path / 'out' / 'last.pt')['iter_num']
    done = train('--max_iters=5', '--decay_lr=False', '--init_from=resume')
    assert f'step {at}:' in done.out and f'finished at iteration {at}' in done.out

def test_gradients_that_stay_no_number_end_a_run_in_float16_too(inject):
    done = inject([], range(1000), '--dtype=float16', '--max_iters=60', status=2)
    # after 16 halvings of 65536
    assert 'five iterations in a row were not finite, the last being 20;' in done.err
    assert done.err.endswith('with a lower --learning_rate, or --dtype=float32\n')

def test_sigusr1_saves_once(clone, started, tmp_path):
    with started(clone, tmp_path / 'out', *ENDLESS, '--eval_interval=1000000',
                 '--keep_checkpoints=True') as run:
        wait_for(run, 'iter 10:')
        run.send_signal(signal.SIGUSR1)
        wait_for(run, 'saved')
        # of evaluations alone
        assert [path.name for path in (tmp_path / 'out').glob('iter_*')] == ['iter_000000.pt']
        assert 'iter' in wait_for(run, 'saved', 'tok/s') and 'saved' not in wait_for(run, 'saved', 'tok/s')
