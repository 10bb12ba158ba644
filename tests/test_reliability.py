"""
What kills a run, a process of it or a node costs no more than the iterations since the last save.
"""
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import checkpoint as checkpoints
from conftest import ROOT, Result, TINY
from jobs import Job
from parallel import launch_id

@pytest.mark.parametrize('options', [('--kills=3', '--runs=accumulation'), ('--kills=1', '--nodes=2')],
                         ids=['a run', 'a node'])
def test_what_is_killed_goes_on_as_if_nothing_had_been(options):
    """ a short form of `python tests/stress_kill.py`, which compares log.csv, weights and moments """
    done = subprocess.run([sys.executable, 'tests/stress_kill.py', *options], cwd=ROOT, capture_output=True,
                          encoding='utf-8', timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    n = options[0].removeprefix('--kills=')
    assert re.search(rf'^{n} kills .* 0 corrupt checkpoints, 0 lost saves, 0 differences$', done.stdout, re.M)

def test_torchrun_s_processes_save_on_sigusr1_outlive_sigkill_and_end_with_a_checkpoint_on_sigterm(
        clone, train, tmp_path):
    options = ['--eval_interval=1000000', '--decay_lr=False', '--learning_rate=1e-3', '--min_lr=1e-4']
    command = ['train.py', '--dataset=chars', *TINY, *options, '--max_iters=1000000',
               f"--out_dir={tmp_path / 'two'}"]
    launcher = ['--standalone', '--nproc_per_node=2', '--max-restarts=3', '--monitor-interval=0.1']
    with Job(launcher, command, clone, tmp_path / 'printed') as job:
        job.wait_for('^iter 3:')
        os.kill(job.workers()[1], signal.SIGUSR1) # any of them
        saved = int(job.wait_for(r'^iter (\d+): saved \S+last.pt, ').group(1))
        job.wait_for(rf'^iter {saved + 5}:') # it goes on
        os.kill(job.workers()[0], signal.SIGKILL)
        assert int(job.wait_for(r'^resuming at iteration (\d+)').group(1)) == saved
        job.wait_for(rf'^iter {saved + 5}:', count=2)
        job.agent.terminate()
        job.ended()
        stopped = int(job.wait_for(r'^stopped at iteration (\d+)').group(1))
    assert checkpoints.load(str(tmp_path / 'two' / 'last.pt'))['iter_num'] == stopped > saved
    one = train(*options, f'--max_iters={stopped}')
    losses = [[float(x) for x in Result(0, '', '', folder).column('loss')[:stopped]]
              for folder in (one.out_dir, tmp_path / 'two')]
    assert len(losses[1]) == stopped and losses[1] == pytest.approx(losses[0], abs=1e-5)

def test_processes_whose_torchrun_is_killed_save_and_leave(clone, tmp_path):
    command = ['train.py', '--dataset=chars', *TINY, '--eval_interval=1000000', '--max_iters=1000000',
               '--decay_lr=False', f"--out_dir={tmp_path / 'two'}"]
    with Job(['--standalone', '--nproc_per_node=2'], command, clone, tmp_path / 'printed') as job:
        job.wait_for('^iter 3:')
        workers = job.workers()
        job.agent.kill()
        job.ended()
        end = time.time() + 60
        while any(os.path.exists(f'/proc/{pid}') for pid in workers) and time.time() < end:
            time.sleep(0.05)
        assert not any(os.path.exists(f'/proc/{pid}') for pid in workers)
        stopped = int(re.search(r'^stopped at iteration (\d+)', job.text(), re.MULTILINE).group(1))
    assert checkpoints.load(str(tmp_path / 'two' / 'last.pt'))['iter_num'] == stopped > 0

def test_an_error_of_all_processes_is_told_once_under_torchrun(clone, tmp_path):
    (tmp_path / 'full.py').write_text(
        "import torch\ndef step(self, *a, **k): raise torch.OutOfMemoryError('CUDA out of memory.')\n"
        "torch.optim.AdamW.step = step\n")
    command = ['train.py', str(tmp_path / 'full.py'), '--dataset=chars', *TINY,
               f"--out_dir={tmp_path / 'two'}"]
    with Job(['--standalone', '--nproc_per_node=2'], command, clone, tmp_path / 'printed') as job:
        assert job.ended() == 1
        assert re.findall(r'^error: .*', job.text(), re.MULTILINE) == [
            'error: out of memory in plan device, with weights, gradients and moments alone; '
            'type --init_from=resume --shard=True']

def test_sigusr1_does_not_end_a_run_that_only_starts(train, tmp_path):
    (tmp_path / 'early.py').write_text('import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)\n')
    train(tmp_path / 'early.py', '--max_iters=1')

def test_a_folder_that_cannot_be_written_is_told_once_under_torchrun(clone, tmp_path):
    (tmp_path / 'file').write_text('')
    command = ['train.py', '--dataset=chars', *TINY, f"--out_dir={tmp_path / 'file' / 'out'}"]
    with Job(['--standalone', '--nproc_per_node=2'], command, clone, tmp_path / 'printed') as job:
        assert job.ended() == 1
        errors = [line for line in job.text().splitlines()
                  if line.startswith(('error: ', 'Traceback', 'RuntimeError'))]
        assert (len([line for line in errors if line.startswith('error: ')]) == 1
                and errors[0].startswith('error: cannot write to')), errors

def test_only_the_same_command_in_the_same_job_goes_on_by_itself(train, monkeypatch):
    """ as when Slurm queues a job again, whose id is torchrun's """
    out_dir = str(train('--eval_interval=6', env={'TORCHELASTIC_RUN_ID': '7'}).out_dir)
    other_job = train('--eval_interval=6', env={'TORCHELASTIC_RUN_ID': '8'}, status=2)
    assert 'already holds a run' in other_job.err
    _, *command = checkpoints.load(os.path.join(out_dir, 'last.pt'))['launch'].split()
    for run_id, argv, goes_on in (('7', command, True), ('7', [*command, '--seed=1'], False),
                                  ('8', command, False)):
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', run_id)
        monkeypatch.setattr(sys, 'argv', argv)
        assert checkpoints.is_of(out_dir, launch_id()) == goes_on
    monkeypatch.delenv('TORCHELASTIC_RUN_ID') # without torchrun
    assert launch_id() is None and not checkpoints.is_of(out_dir, launch_id())

def test_the_batch_script_for_slurm_is_a_script():
    with open(os.path.join(ROOT, 'docs', 'multi-gpu.md'), encoding='utf-8') as file:
        script, = re.findall(r'```\n(#!/bin/bash\n.*?)```', file.read(), re.DOTALL)
    done = subprocess.run(['bash', '-n'], input=script, capture_output=True, encoding='utf-8')
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert '#SBATCH --requeue' in script and '--rdzv_id="$SLURM_JOB_ID"' in script

def test_the_troubleshooting_of_several_processes_is_headed_by_messages_that_the_code_has():
    with open(os.path.join(ROOT, 'docs', 'multi-gpu.md'), encoding='utf-8') as file:
        headings = re.findall(r'^\*\*`error: (.+?)`\*\*:', file.read(), re.MULTILINE)
    code = ''.join(open(os.path.join(ROOT, name), encoding='utf-8').read()
                   for name in ('train.py', 'parallel.py', 'checkpoint.py'))
    code = re.sub(r'"\s*\n\s*f?"', '', code) # texts over several lines, joined
    code = re.sub(r'\{.*?\}', '…', code) # values
    assert len(headings) == 8
    for heading in headings:
        for part in heading.split('…'):
            assert part.strip() in code, heading

@pytest.mark.skipif(os.name == 'nt', reason="Windows ends a process that is sent SIGTERM")
def test_an_evaluation_that_is_told_to_end_is_left_at_once(train, tmp_path):
    (tmp_path / 'ends.py').write_text( # told within the evaluation of iteration 4
        "import os, signal, dataset\n_batches, _n = dataset.Split.batches, [0]\n"
        "def _end(self, *args):\n    _n[0] += 1\n"
        "    os.kill(os.getpid(), signal.SIGTERM) if _n[0] == 3 else None\n    return _batches(self, *args)\n"
        "dataset.Split.batches = _end\n")
    out = train(tmp_path / 'ends.py').out
    assert 'stopped at iteration 4' in out and 'step 4' not in out
