"""
Fixtures: a copy of the project to run scripts in as a user does, and small datasets and models for them.
"""
import json
import os
import pickle
import random
import shutil
import signal
import string
import subprocess
import sys
import time

import numpy as np
import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1') # the tests' own workers keep the cores busy
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: # as in `make test &`; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

def some_text():
    """ the licence's words, and characters that it lacks, in a random order: a text that stays the same """
    with open(os.path.join(ROOT, 'LICENSE'), encoding='utf-8') as file:
        words = [*file.read().split(), *string.punctuation, *string.ascii_letters, *string.digits, '\n']
    return ' '.join(random.Random(0).choices(words, k=4000))

TEXT = some_text()
CHARS = sorted(set(TEXT))
TINY = ('--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=4', '--max_iters=6',
        '--gradient_accumulation_steps=2', '--eval_interval=4', '--eval_iters=2', '--warmup_iters=2',
        '--learning_rate=1e-2', '--min_lr=1e-3', '--device=cpu', '--dtype=float32', '--log_interval=1')

@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """ a copy of the scripts for one file's tests, which write nothing into the project, with characters in
    data/chars """
    root = tmp_path_factory.mktemp('clone')
    for name in os.listdir(ROOT):
        if name.endswith('.py'):
            shutil.copy(os.path.join(ROOT, name), root)
    for folder in ('config', 'data'):
        shutil.copytree(os.path.join(ROOT, folder), root / folder,
                        ignore=shutil.ignore_patterns('*.bin', '*.pkl', '*.txt'))
    write_chars(root / 'data' / 'chars')
    return root

def write_chars(folder):
    """ TEXT as a nanoGPT data folder, by nanoGPT's own few lines """
    stoi = {char: i for i, char in enumerate(CHARS)}
    itos = {i: char for i, char in enumerate(CHARS)}
    ids = np.array([stoi[char] for char in TEXT], dtype=np.uint16)
    folder.mkdir(exist_ok=True)
    ids[:int(len(ids) * 0.9)].tofile(folder / 'train.bin')
    ids[int(len(ids) * 0.9):].tofile(folder / 'val.bin')
    with open(folder / 'meta.pkl', 'wb') as file:
        pickle.dump({'vocab_size': len(CHARS), 'itos': itos, 'stoi': stoi}, file)

class Result:
    """ what a script printed and left: its status, its text, and the rows of its log.csv """
    def __init__(self, status, out, err, out_dir):
        self.status, self.out, self.err, self.out_dir = status, out, err, out_dir

    def column(self, name):
        import csv
        with open(self.out_dir / 'log.csv', newline='') as file:
            return [row[name] for row in csv.DictReader(file)]

class Started:
    """ a script in a fork that goes on, with what subprocess.Popen has of it; its output and errors are in
    one pipe """
    def __init__(self, forks, script, args, cwd, pipe):
        os.mkfifo(pipe)
        self.ask, self.returncode = forks.ask, None
        self.pid = self.ask({'script': script, 'args': args, 'cwd': str(cwd), 'stdout': str(pipe),
                             'stderr': str(pipe)})
        self.stdout = open(pipe, encoding='utf-8')

    def poll(self):
        if self.returncode is None:
            self.returncode = self.ask({'pid': self.pid})
        return self.returncode

    def wait(self, timeout=60):
        end = time.time() + timeout
        while self.poll() is None:
            assert time.time() < end, f'{self.pid} did not end'
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout=60):
        end = time.time() + timeout
        out = self.stdout.read()
        self.wait(max(end - time.time(), 0.1))
        assert time.time() < end, f'{self.pid} took too long'
        return out, ''

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

def alone(script, args, cwd, timeout, launch=(), env={}):
    """ run a script in a Python of its own: (status, its output, its errors) """
    done = subprocess.run([sys.executable, *launch, script, *args], cwd=cwd, capture_output=True,
                          encoding='utf-8', timeout=timeout,
                          env={**os.environ, 'PYTHONIOENCODING': 'utf-8', **env})
    return done.returncode, done.stdout, done.stderr

@pytest.fixture(scope='session')
def forks(tmp_path_factory):
    """ the same in a fork of a process that has imported torch, or in several as torchrun starts them """
    if not hasattr(os, 'fork'):
        yield lambda script, args, cwd, timeout, processes: alone(script, args, cwd, timeout)
        return
    server = subprocess.Popen([sys.executable, os.path.join(ROOT, 'tests', 'forks.py')],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding='utf-8')
    out, err = (tmp_path_factory.mktemp('printed') / name for name in ('out', 'err'))
    def ask(job):
        server.stdin.write(json.dumps(job) + '\n')
        server.stdin.flush()
        return json.loads(server.stdout.readline())['status']
    def run(script, args, cwd, timeout, processes):
        job = {'script': script, 'args': args, 'cwd': str(cwd), 'timeout': timeout,
               'stdout': str(out), 'stderr': str(err), 'processes': processes,
               'transformers': script == 'export.py' or 'hf' in ' '.join(args)} # such as hf_dir
        return ask(job), *(path.read_bytes().decode('utf-8') for path in (out, err))
    run.ask = ask
    yield run
    server.stdin.close()
    server.wait()

@pytest.fixture
def run(clone, tmp_path, forks):
    """ run a script of the clone as a user would: run('sample.py', '--top_k=0').out

    In forks, which take a third of the time; in a Python of its own where `launch` or `env` asks for more.
    """
    def run(script, *args, launch=(), env=None, processes=1, out_dir='out', status=0, timeout=120):
        out_dir = tmp_path / out_dir
        if script in ('train.py', 'sample.py') and not any(str(a).startswith('--out_dir') for a in args):
            args = (*args, f'--out_dir={out_dir}')
        command = script, [*map(str, args)], clone, timeout
        done = (forks(*command, processes) if not launch and env is None
                else alone(*command, launch, env or {}))
        result = Result(*done, out_dir)
        assert status is None or result.status == status, f"{script} {args}\n{result.out}\n{result.err}"
        return result
    return run

@pytest.fixture
def train(run):
    """ run train.py on the character dataset with a tiny model; later options win """
    def train(*args, **kwargs):
        return run('train.py', '--dataset=chars', *TINY, *args, **kwargs)
    return train

@pytest.fixture(scope='session')
def hf_dir(tmp_path_factory):
    """ a tiny GPT-2 with random weights and GPT-2's vocabulary, as transformers saves it """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('models') / 'hf'
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32)).save_pretrained(folder)
    return folder

@pytest.fixture
def compiler():
    """ one that has compiled nothing: after other shapes, it would take sizes for variable, and round
    otherwise """
    import torch
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
