"""
Kills training by SIGKILL again and again, resumes it each time, and holds what is left against a run that
nothing interrupted; exits with 1 where anything differs:

$ python tests/stress_kill.py --kills=50
Before each use of a file, one after the other, instead of at random moments:
$ python tests/stress_kill.py --each=True --runs=samples,lora
A worker of torchrun's, which starts all of them again; an agent and its worker of two, as on two machines:
$ python tests/stress_kill.py --kills=4 --procs=2
$ python tests/stress_kill.py --kills=2 --nodes=2
"""
# -----------------------------------------------------------------------------
# options

kills = 50 # how often, at least
each = False # kill one process before its first use of a file, the next before its second, ...; not by kills
runs = '' # which of RUNS below, such as dropout,muon; empty for all
procs = 1 # processes of a job of torchrun's, one of which is killed
nodes = 1 # agents of torchrun's with a process each, one of which is killed with its process
shard = False # let the processes of a job share the weights
seed = 0 # of the moments; 0 for others each time

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # for the project's modules

from configurator import ROOT, configure
configure(globals(), at_least_1=('kills', 'procs', 'nodes'))

# -----------------------------------------------------------------------------
# set-up

import csv
import itertools
import random
import select
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from conftest import TINY, write_chars # before torch, which is to take one thread
import matplotlib.pyplot, numpy.random, torch._dynamo, tqdm # noqa: so that no fork has to import them
import torch

import checkpoint as checkpoints
from forks import become
from jobs import Job, free_port

RUNS = { # name: options, and how far a cell of log.csv or a weight may be from the uninterrupted run's
    'dropout': ('--dropout=0.2', 0),
    'patience': ('--patience=8 --learning_rate=3.0 --eval_interval=2 --max_iters=60', 0),
    'float16': ('--dtype=float16 --dropout=0.1', 1e-5),
    'bfloat16': ('--dtype=bfloat16', 1e-5),
    'muon': ('--optimizer=muon --bias=True', 0),
    'lora': ('--init_from=BASE --lora_rank=2 --lora_dropout=0.1', 0),
    'samples': ('--sample_interval=2 --sample_tokens=20 --keep_checkpoints=True', 0),
    'accumulation': ('--gradient_accumulation_steps=6 --batch_size=2 --dropout=0.2 --grad_clip=0.5', 0),
}
COLUMNS = 'iter', 'epoch', 'loss', 'lr', 'grad_norm', 'train_loss', 'val_loss' # those that do not tell time
TRAIN = os.path.join(ROOT, 'train.py')
FILE_EVENTS = {'open', 'os.rename', 'os.link', 'os.remove', 'os.truncate', 'os.mkdir'}

seed = seed or random.SystemRandom().randrange(1, 2**32)
moments = random.Random(seed)
work = Path(tempfile.mkdtemp(prefix='stress-'))

class Differs(Exception):
    """ what a killed run has lost or spoiled """

# -----------------------------------------------------------------------------
# one life of a run

def count_down(out_dir, kind, n, pipe):
    """ in a run's process: be killed just before the nth use of a file in out_dir ('file'), or tell the
    parent at the nth start of a write of last.pt ('write') """
    left = n
    def hook(event, args):
        nonlocal left
        if event not in FILE_EVENTS or not str(args[0]).startswith(out_dir):
            return
        if kind == 'file' or event == 'open' and args[0].endswith('last.pt.tmp'):
            left -= 1
            if left == 0 and kind == 'file':
                os.kill(os.getpid(), signal.SIGKILL)
            elif left == 0:
                os.write(pipe, b'.')
    sys.addaudithook(hook)

def live(args, out_dir, kind=None, n=0, delay=60.0):
    """ train.py in a fork of this process, until it is killed or ends: (seconds, its exit status or None)

    It is killed after `delay` seconds ('time'), before its nth use of a file ('file'), or `delay` seconds
    after the beginning of its nth write of last.pt ('write').
    """
    printed = str(work / 'printed')
    job = {'script': TRAIN, 'args': [*args, f'--out_dir={out_dir}'], 'cwd': str(work), 'stdout': printed,
           'stderr': printed + '.err'}
    begin, (ours, its) = time.time(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        if kind in ('file', 'write'):
            count_down(str(out_dir), kind, n, its)
        become(job)
    os.close(its)
    try:
        told = select.select([ours], [], [], delay if kind == 'time' else 60)[0]
        if told and os.read(ours, 1): # else it has ended
            time.sleep(delay)
    finally:
        os.close(ours)
        with_time = time.time() - begin
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise Differs(f"train.py {' '.join(job['args'])} ended with {status}: "
                      f"{Path(printed + '.err').read_text()[-2000:]}")
    return with_time, None if status else 0

def resuming(args, out_dir):
    """ the command for a run that may have a checkpoint """
    return [*args, '--init_from=resume'] if checkpoints.find(str(out_dir)) else args

# -----------------------------------------------------------------------------
# what is left

def rows_of(out_dir):
    with open(out_dir / 'log.csv', newline='') as file:
        return [{name: row[name] for name in COLUMNS}
                for row in csv.DictReader(file) if None not in row.values()] # whole rows

def check_whole(out_dir, before):
    """ the iteration of last.pt, after a kill; raises Differs where a checkpoint is damaged, older than it
    was, or older than what log.csv tells of """
    held = {}
    for path in sorted(out_dir.glob('*.pt')):
        try:
            held[path.name] = checkpoints.load(str(path), moments=True)['iter_num']
        except ValueError as error:
            raise Differs(f"corrupt checkpoint: {error}") from None
    rows = rows_of(out_dir) if (out_dir / 'log.csv').exists() else []
    told = max((int(row['iter']) for row in rows if row['val_loss']), default=-1)
    at = held.get('last.pt', -1)
    if at < max(before, told):
        raise Differs(f"lost save: last.pt is of iteration {at}, and was of {before}; log.csv tells of "
                      f"{told}")
    return at

def apart(a, b):
    """ how far two states or texts of numbers are apart; infinity where they are not alike """
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max((apart(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return max(map(apart, a, b), default=0.0)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape:
        return 0.0 if torch.equal(a, b) else number((a.double() - b.double()).abs().max().item())
    try:
        return 0.0 if a == b else number(abs(float(a) - float(b)))
    except (TypeError, ValueError):
        return float('inf')

def number(distance):
    return distance if distance == distance else float('inf')

def state_of(path):
    """ of a checkpoint what a run goes on from: not its command, nor the learning rate, which is set anew """
    held = checkpoints.load(str(path), moments=True)
    parts = held['optimizer'].get('pair', [held['optimizer']])
    return {**{key: value for key, value in held.items() if key not in ('config', 'launch')},
            'optimizer': [part['state'] for part in parts]}

def compare(out_dir, whole, tolerance, states=True):
    """ the largest difference from the uninterrupted run; raises Differs where it is above the tolerance """
    parts = {'log.csv': (rows_of(out_dir), rows_of(whole))}
    for path in whole.glob('*.pt') if states else ():
        parts[path.name] = state_of(out_dir / path.name), state_of(path)
    if (whole / 'samples.txt').exists():
        parts['samples.txt'] = (out_dir / 'samples.txt').read_text(), (whole / 'samples.txt').read_text()
    most = {name: apart(*pair) for name, pair in parts.items()}
    for name, distance in most.items():
        if distance > tolerance:
            raise Differs(f"{out_dir / name} differs from that of {whole} by {distance}")
    return max(most.values())

# -----------------------------------------------------------------------------
# one process

def options_of(name):
    own = RUNS[name][0].replace('BASE', str(work / 'base')).split()
    return [f"--dataset={work / 'chars'}", *TINY, f'--max_iters={9 if each else 24}', '--eval_interval=3',
            *own]

def pick(length):
    """ how a run of so many seconds is killed next, and in words """
    kind = moments.choice(('time', 'file', 'write'))
    if kind == 'time':
        delay = moments.uniform(0, length)
        return {'kind': kind, 'delay': delay}, f'after {delay:.2f} s'
    if kind == 'file':
        n = moments.randrange(1, 60)
        return {'kind': kind, 'n': n}, f'before use {n} of a file'
    n, delay = moments.randrange(1, 4), moments.uniform(0, 0.004)
    return {'kind': kind, 'n': n, 'delay': delay}, f'{delay * 1000:.1f} ms into write {n} of last.pt'

def killed_run(name, number, whole, length, most):
    """ run `name` from its beginning to its end, with at most so many kills in between """
    args, out_dir, at, n = options_of(name), work / f'{name}-{number}', -1, 0
    while True:
        (moment, words), since = pick(length) if n < most else ({}, 'never'), time.time()
        _, status = live(resuming(args, out_dir), out_dir, **moment)
        if status == 0:
            distance = compare(out_dir, whole, RUNS[name][1])
            print(f"     {name}: ended, at iteration {rows_of(out_dir)[-1]['iter']}, after {n} kills; "
                  f"largest difference {distance}")
            shutil.rmtree(out_dir)
            return
        n, at = n + 1, check_whole(out_dir, at)
        unfinished = sorted(path.name for path in out_dir.glob('*.tmp') if path.stat().st_mtime > since)
        killed[name] += 1
        amid.update(unfinished)
        print(f"kill {killed.total()}, {name}: {words}; last.pt of iteration {at}"
              f"{', left ' + ', '.join(unfinished) if unfinished else ''}")

def whole_run(name):
    """ run `name` without kills: its folder, and how many seconds it took """
    length, status = live(options_of(name), work / name)
    if status is None:
        raise Differs(f"{name} did not end by itself")
    return work / name, length

def stress(names):
    """ kill runs of these names in turn until there were `kills` """
    wholes = {}
    for number, name in enumerate(itertools.cycle(names)):
        if killed.total() >= kills:
            break
        wholes[name] = wholes.get(name) or whole_run(name)
        killed_run(name, number, *wholes[name], min(kills - killed.total(), -(-kills // len(names))))

def stress_each(name):
    """ kill run `name` before its nth use of a file and let it end, for n = 1, 2, ... up to its last use """
    whole, args = whole_run(name)[0], options_of(name)
    for n in itertools.count(1):
        out_dir = work / f'{name}-{n}'
        _, status = live(args, out_dir, 'file', n)
        if status == 0:
            return
        check_whole(out_dir, -1)
        killed[name] += 1
        amid.update(path.name for path in out_dir.glob('*.tmp'))
        live(resuming(args, out_dir), out_dir)
        print(f"{name}: before use {n} of a file; "
              f"largest difference {compare(out_dir, whole, RUNS[name][1])}")
        shutil.rmtree(out_dir)

# -----------------------------------------------------------------------------
# several

def launchers():
    """ torchrun's options for each job: one for all processes, or one for each of the nodes """
    shared = ['--monitor_interval=0.1', f'--max_restarts={kills}']
    if nodes == 1:
        return [['--standalone', f'--nproc_per_node={procs}', *shared]]
    os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1' # else no agent can come back
    store = f'--rdzv_endpoint=127.0.0.1:{free_port()}'
    # a heartbeat may come as late as at every other interval, so that two of them would be too few
    quick = 'last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=4'
    shared += [f'--nnodes={nodes}', f'--nproc_per_node={procs}', '--rdzv_backend=c10d', store, '--rdzv_id=s']
    return [[*shared, f'--rdzv_conf={quick},is_host={int(node == 0)}', f'--local_addr=127.0.0.{1 + node}']
            for node in range(nodes)]

def kill_one(jobs, command):
    """ kill a worker of the only job, or the last job, which then starts again: what was killed, in words """
    if len(jobs) == 1:
        rank = moments.randrange(procs)
        os.kill(jobs[0].workers()[rank], signal.SIGKILL)
        return f'process {rank} of {procs}'
    jobs[-1].kill()
    jobs[-1] = Job(launches[-1], command, work, work / 'node-again')
    return 'the last node'

def stress_jobs():
    """ one run of several processes, killed in part `kills` times """
    out_dir, at, began = work / 'out', -1, time.time()
    args = [f"--dataset={work / 'chars'}", *TINY, f'--max_iters={40 * kills + 20}', '--eval_interval=10',
            '--learning_rate=1e-3', '--min_lr=1e-4'] # TINY's rate makes rounding grow, however it is split
    live(args, work / 'whole')
    command = [TRAIN, *args, f'--shard={shard}', f'--out_dir={out_dir}']
    jobs = [Job(options, command, work, work / f'node-{node}') for node, options in enumerate(launches)]
    try:
        for n in range(kills):
            jobs[0].wait_for(rf'^iter {40 * n + moments.randrange(5, 35)}:')
            time.sleep(moments.uniform(0, 0.1))
            what, since = kill_one(jobs, command), time.time()
            at = check_whole(out_dir, at)
            # torchrun gives a process that does not notice 30 seconds
            jobs[0].wait_for('^resuming at iteration', n + 1, timeout=120)
            killed[f'{nodes} x {procs}'] += 1
            print(f"kill {n + 1}: {what}; last.pt of iteration {at}; resumed after "
                  f"{time.time() - since:.1f} s")
        if any([job.ended() for job in jobs]):
            raise Differs('\n'.join(job.text() for job in jobs))
    except AssertionError as error:
        raise Differs(str(error)) from None
    finally:
        for job in jobs:
            job.kill()
    distance = compare(out_dir, work / 'whole', 1e-4 if shard else 1e-5, states=False)
    print(f"     ended after {time.time() - began:.0f} s; largest difference {distance:.2g}")

# -----------------------------------------------------------------------------
# work

killed, amid, begin = Counter(), Counter(), time.time() # by run; what was being written
names, launches = runs.split(',') if runs else list(RUNS), launchers()
if set(names) - set(RUNS):
    raise ValueError(f"runs is {runs}; type --runs with some of {','.join(RUNS)}")
sys.stdout.reconfigure(line_buffering=True)
write_chars(work / 'chars')
try:
    if 'lora' in names and procs == nodes == 1:
        live(options_of('dropout'), work / 'base')
    if each:
        for name in names:
            stress_each(name)
    else:
        stress(names) if procs == nodes == 1 else stress_jobs()
except Differs as difference:
    sys.exit(f"{difference}\nseed {seed}; what is left is in {work}")
print(f"{killed.total()} kills in {time.time() - begin:.0f} s "
      f"({', '.join(f'{name} {n}' for name, n in killed.items())}; {amid['last.pt.tmp']} amid a write of "
      f"last.pt, {amid.total() - amid['last.pt.tmp']} of another file): 0 corrupt checkpoints, 0 lost saves, "
      "0 differences")
shutil.rmtree(work)
