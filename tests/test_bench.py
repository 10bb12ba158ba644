""" bench.py as a user runs it, on models that take no time """
import json
import runpy
import sys
import time

import pytest

SMALL = ('--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=32', '--batch_size=2', '--iters=2',
         '--skip=1', '--gradient_accumulation_steps=2', '--device=cpu', '--json=True')

def figures(result):
    return json.loads(result.out.splitlines()[-1])

@pytest.mark.parametrize('options', [(), ('--plan=recompute',), ('--plan=offload',), ('--optimizer=muon',),
                                     ('--data=real', '--dataset=chars'), ('--data=real', '--dataset=chars:2'),
                                     ('--way=nanogpt', '--dtype=float32')])
def test_training_is_measured_for(run, options):
    found = figures(run('bench.py', *SMALL, *options))
    assert found['tokens_per_sec'] == pytest.approx(2 * 2 * 32 / found['ms'] * 1000)
    assert found['memory_mb'] > 0
    assert found['plan'] == next((o.partition('=')[2] for o in options if o.startswith('--plan')), 'device')

@pytest.mark.parametrize('option', ['--lora_rank=4', '--freeze=wte,wpe'])
def test_what_does_not_learn_is_not_counted(run, option):
    whole, part = (figures(run('bench.py', *SMALL, *options)) for options in ((), (option,)))
    assert part['predicted_mb'] < 0.7 * whole['predicted_mb'] and part['plan'] == 'device'

def test_the_model_is_the_one_that_train_would_make(run, train):
    bench = figures(run('bench.py', *SMALL, '--dataset=chars', '--dtype=float32'))
    absent = run('bench.py', *SMALL, '--dataset=none')
    assert "there is no data/none/train.bin; a vocabulary of GPT-2's 50,257 ids is assumed" in absent.err
    assert bench['predicted_mb'] < 1 < 10 < figures(absent)['predicted_mb']

def test_a_config_of_train_is_taken(run):
    run('bench.py', 'config/train_shakespeare_char_cpu.py', *SMALL)

def test_sampling_counts_every_token_of_every_sample(run):
    found = figures(run('bench.py', *SMALL, '--work=sample', '--num_samples=3', '--block_size=64'))
    assert found['tokens_per_sec'] == pytest.approx(3 * 128 / found['ms'] * 1000)

def test_fetching_is_measured(run):
    assert figures(run('bench.py', *SMALL, '--work=batch'))['ms'] > 0

def test_a_profile_is_a_trace_with_our_products(run, clone):
    run('bench.py', *SMALL, '--profile=True')
    events = json.loads((clone / 'trace.json').read_text())['traceEvents']
    assert any(event.get('name') in ('aten::mm', 'aten::addmm') for event in events)

@pytest.mark.parametrize('option', [
    '--data=x', '--way=transformers', '--work=x', '--iters=0', '--init_from=out', '--suite=x', '--plan=x',
    '--shard=True', '--work=cards', '--lora_rank=4 --plan=offload', '--work=batch --way=nanogpt'])
def test_one_line_says_what_is_wrong_with(run, option):
    result = run('bench.py', *SMALL, *option.split(), status=2)
    assert result.err.splitlines()[-1].startswith('error: ') and 'Traceback' not in result.err

def test_warm_up_is_not_timed_and_a_ratio_is_ours_to_theirs(clone, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['bench.py', '--work=batch', '--iters=1', '--skip=0', '--batch_size=1',
                                      '--block_size=8', '--device=cpu'])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    bench = runpy.run_path(str(clone / 'bench.py'), run_name='__main__')
    assert bench['seconds'](lambda i: time.sleep(0.2 * (i < 3)), 2, 3) < 0.1
    speeds = {'ours': {'tokens_per_sec': 30, 'memory_mb': 1},
              'theirs': {'tokens_per_sec': 10, 'memory_mb': 2}}
    monkeypatch.setitem(bench['compare'].__globals__, 'spawn', lambda name: speeds[name])
    capsys.readouterr()
    bench['compare']('work', ['ours'], ['theirs'])
    assert capsys.readouterr().out == '| work | 30.0 | 10.0 | 3.00 | 1 | 2 |\n'
