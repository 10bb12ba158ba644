"""
train.py as a user runs it, on a tiny model and a character dataset.
"""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import matplotlib.pyplot as plt
import pytest
import torch

from conftest import CHARS, TEXT, TINY
from model import GPT, GPTConfig

TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')

def load(path):
    return torch.load(path, weights_only=True)

@pytest.fixture(scope='module')
def whole(clone, forks, tmp_path_factory):
    """ the log and the last checkpoint of a run with dropout that nothing interrupted """
    out_dir = tmp_path_factory.mktemp('whole') / 'out'
    status, out, err = forks('train.py', ['--dataset=chars', *TINY, '--dropout=0.2', f'--out_dir={out_dir}'],
                             clone, 120, 1)
    assert status == 0, err
    import csv
    with open(out_dir / 'log.csv', newline='') as file:
        return {'rows': list(csv.DictReader(file)), 'out_dir': out_dir, 'out': out}

def test_a_run_leaves_what_it_promises(whole):
    assert sorted(os.listdir(whole['out_dir'])) == [
        '.lock', 'ckpt.pt', 'config.json', 'last.pt', 'log.csv', 'loss.png', 'report.md']
    assert list(whole['rows'][0]) == (
        'iter,epoch,loss,lr,grad_norm,time_ms,tokens_per_sec,mfu,memory_mb,train_loss,val_loss').split(',')
    assert [row['iter'] for row in whole['rows']] == list('0123456')
    assert [row['iter'] for row in whole['rows'] if row['val_loss']] == ['0', '4', '6']
    assert whole['rows'][6]['loss'] == '' # six updates, 0 to 5, and an evaluation after them
    assert all(float(row['loss']) < 5 for row in whole['rows'][:6])
    last = load(whole['out_dir'] / 'last.pt')
    assert last['iter_num'] == 6 and last['tokenizer'] == {'name': 'char', 'chars': CHARS}
    assert last['best_val_loss'] == min(float(row['val_loss']) for row in whole['rows'] if row['val_loss'])
    assert json.load(open(whole['out_dir'] / 'config.json'))['model_args'] == last['model_args']
    assert (whole['out_dir'] / 'loss.png').read_bytes()[:4] == b'\x89PNG'

# the longest here, so that no other process waits for it
def test_two_thousand_iterations_leave_memory_flat(train):
    result = train('--max_iters=2000', '--eval_interval=250', '--log_interval=50', '--sample_interval=500',
                   '--n_layer=1', '--gradient_accumulation_steps=1')
    most = {int(i): float(mb) for i, mb in zip(result.column('iter'), result.column('memory_mb')) if mb}
    assert most[1950] <= 1.02 * most[500] # after two pictures

def test_it_learns(train):
    result = train('--max_iters=60', '--eval_interval=60', '--eval_iters=0', '--log_interval=60')
    first, last = (float(v) for v in result.column('val_loss') if v)
    assert abs(first - math.log(len(CHARS))) < 0.1 # knows nothing
    n = int(len(TEXT) * 0.9)
    seen = Counter(TEXT[:n])
    # knows more than how common each is
    assert last < sum(-math.log(seen[char] / n) for char in TEXT[n:]) / len(TEXT[n:]) - 0.1

@pytest.mark.parametrize('options', [('--dropout=0.2',), ('--optimizer=muon',), ('--dtype=float16',)])
def test_a_resumed_run_has_its_options_again_and_equals_an_uninterrupted_one(train, run, options):
    whole = train(*options, '--max_iters=8')
    train(*options, '--max_iters=4', '--lr_decay_iters=8', out_dir='half')
    resumed = run('train.py', '--init_from=resume', '--max_iters=8', out_dir='half')
    for name in ('loss', 'lr', 'grad_norm', 'train_loss', 'val_loss'):
        assert resumed.column(name) == whole.column(name), name
    a, b = load(whole.out_dir / 'last.pt'), load(resumed.out_dir / 'last.pt')
    assert all(torch.equal(a['model'][name], b['model'][name]) for name in a['model'])
    assert 'resuming at iteration 4, with max_iters 4 -> 8\n' in resumed.out
    before, now = resumed.err.splitlines()
    assert (before.startswith("as before: eval_interval = 4; ") and "dataset = 'chars'" in before
            and 'max_iters' not in before)
    assert now == f"init_from = 'resume'; out_dir = '{resumed.out_dir}'; max_iters = 8"

def test_a_best_that_was_not_linked_before_the_end_is_linked_on_resuming(train):
    result = train('--max_iters=4', '--lr_decay_iters=6')
    stale = result.out_dir / 'ckpt.pt'
    stale.unlink()
    stale.write_bytes(b'of an earlier iteration')
    train('--init_from=resume', '--lr_decay_iters=6', '--max_iters=5', '--eval_interval=4')
    assert load(stale)['iter_num'] in (4, 5)

def test_an_error_is_told_once_by_several_processes(train):
    done = train('--batch_size=3', '--gradient_accumulation_steps=1', launch=TORCHRUN, status=None)
    lines = [line for line in done.err.splitlines() if line.startswith('error: ')]
    assert done.status != 0 and len(lines) == 1 and 'make it 2 or 4' in lines[0]

def test_a_finished_run_has_nothing_to_resume(whole, run):
    before = (whole['out_dir'] / 'log.csv').read_bytes()
    done = run('train.py', '--dataset=chars', *TINY, '--init_from=resume', f"--out_dir={whole['out_dir']}")
    assert 'is trained to iteration 6 already' in done.out
    assert (whole['out_dir'] / 'log.csv').read_bytes() == before

def test_a_resumed_run_keeps_what_was_typed_when_it_was_last_resumed(train, run):
    train('--num_epochs=1e-9') # one iteration
    assert 'trained to iteration 1 already; type --num_epochs=N' in run('train.py', '--init_from=resume').out
    run('train.py', '--init_from=resume', '--num_epochs=0', '--max_iters=2', '--keep_checkpoints=True')
    settings = json.loads((run('train.py', '--init_from=resume', '--max_iters=3').out_dir
                           / 'config.json').read_text())
    assert settings['init_from'] == 'scratch' and settings['keep_checkpoints'] and settings['max_iters'] == 3
    assert settings['given'] == {'lr_decay_iters': 0, 'plan': 'auto'} and settings['lr_decay_iters'] == 3

def test_evaluation_leaves_the_training_order_and_dropout_alone(whole, train):
    other = train('--dropout=0.2', '--eval_interval=1', '--eval_iters=3')
    assert other.column('loss') == [row['loss'] for row in whole['rows']]

def test_a_smaller_micro_batch_gives_the_same_losses(train):
    one = train('--batch_size=8', '--gradient_accumulation_steps=1').column('loss')[:-1]
    two = train('--batch_size=1', '--gradient_accumulation_steps=8', out_dir='b').column('loss')[:-1]
    assert [float(x) for x in one] == pytest.approx([float(x) for x in two], abs=1e-5)

def test_two_processes_give_one_process_s_losses(train):
    one = train()
    two = train(processes=2, out_dir='two')
    assert [float(x) for x in two.column('loss')[:-1]] == pytest.approx(
        [float(x) for x in one.column('loss')[:-1]], abs=1e-5)
    for name in ('train_loss', 'val_loss'):
        assert float(two.column(name)[-1]) == pytest.approx(float(one.column(name)[-1]), abs=1e-5)
    assert two.out.count('step 6:') == 1 # one process speaks
    done = train('--init_from=resume', '--max_iters=8', processes=2, out_dir='two')
    assert 'resuming at iteration 6' in done.out

@pytest.mark.parametrize('options', [
    ('--dtype=bfloat16',), ('--dtype=float16',), ('--optimizer=muon',), ('--bias=True',),
    ('--grad_clip=0', '--decay_lr=False')])
def test_each_way_of_training_learns_and_resumes(train, options):
    train('--max_iters=20', '--eval_interval=10', *options)
    result = train('--max_iters=30', '--eval_interval=10', '--init_from=resume', *options)
    losses = [float(v) for v in result.column('val_loss') if v]
    assert losses[-1] < losses[0] - 0.5 and 'resuming at iteration 20' in result.out
    assert result.column('iter') == [str(i) for i in range(31)]

@pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))),
                    reason="torch.compile wants a C++ compiler on a CPU")
def test_a_compiled_run_has_the_eager_losses(train):
    options = '--plan=selective', '--max_iters=4'
    result = train('--compile=True', *options, out_dir='compiled', timeout=280)
    assert ', compiled' in result.out and 'warning' not in result.err
    for name in ('loss', 'val_loss'):
        eager = [float(v) for v in train(*options, '--overwrite=True').column(name) if v]
        assert [float(v) for v in result.column(name) if v] == pytest.approx(eager, abs=1e-4)

def test_finetuning_starts_from_hugging_face_s_weights_and_keeps_the_best(run, clone, hf_dir):
    run('data/custom/prepare.py', f'--input={clone}/model.py', '--name=pieces')
    result = run('train.py', '--dataset=pieces', *TINY, f'--init_from={hf_dir}', '--learning_rate=100.0')
    first = load(result.out_dir / 'ckpt.pt')
    assert first['tokenizer'] == {'name': 'gpt2'} and first['model_args']['n_layer'] == 2
    assert first['model_args']['block_size'] == 32 # the model's own, though it trains on 16
    losses = [float(v) for v in result.column('val_loss') if v]
    assert first['best_val_loss'] == min(losses) == losses[0] # such a learning rate spoils it
    assert torch.equal(first['model']['transformer.wte.weight'],
                       GPT.from_pretrained(str(hf_dir)).transformer.wte.weight)

def test_another_run_s_weights_start_a_new_run(whole, train):
    result = train(f"--init_from={whole['out_dir']}", '--max_iters=2', '--eval_iters=0')
    assert result.column('iter') == ['0', '1', '2'] # fresh counters
    best = train(f"--init_from={whole['out_dir']}/ckpt.pt", '--eval_only=True', '--eval_iters=0',
                 out_dir='none')
    assert f"val loss {float(result.column('val_loss')[0]):.4f}" in best.out
    assert not best.out_dir.exists() # eval_only writes nothing

@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_a_nanogpt_checkpoint_resumes_with_its_optimizer(train, tmp_path, prefix):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, len(CHARS), 2, 2, 16, bias=False))
    decay = [p for p in model.parameters() if p.dim() >= 2]
    other = [p for p in model.parameters() if p.dim() < 2]
    adamw = torch.optim.AdamW([{'params': decay, 'weight_decay': 0.1},
                               {'params': other, 'weight_decay': 0.0}], lr=1e-3)
    idx = torch.arange(16)[None]
    model(idx, idx)[1].backward()
    adamw.step()
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=len(CHARS), dropout=0.0)
    (tmp_path / 'out').mkdir()
    torch.save({'model': {prefix + k: v for k, v in model.state_dict().items()},
                'optimizer': adamw.state_dict(), 'model_args': args, 'iter_num': 3,
                'best_val_loss': torch.tensor(9.0), 'config': {'dataset': 'chars'}},
               tmp_path / 'out' / 'ckpt.pt')
    result = train('--init_from=resume')
    assert result.column('iter') == list('3456') and 'resuming at iteration 3' in result.out
    ours = load(tmp_path / 'out' / 'last.pt')
    assert ours['model_args'] == args # so nanoGPT's sample.py can rebuild it
    assert list(ours['model']) == list(model.state_dict())
    step = {float(s['step']) for s in ours['optimizer']['state'].values()}
    assert step == {4.0} # the one it came with and three here

def start(clone, out_dir, *options):
    """ a run that goes on until it is told to stop, once it has begun to train """
    process = subprocess.Popen([sys.executable, 'train.py', '--dataset=chars', *TINY, '--max_iters=1000000',
                                '--eval_interval=1000000', f'--out_dir={out_dir}', *options], cwd=clone,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8')
    for line in process.stdout:
        if line.startswith('iter 3'):
            return process
    raise AssertionError(process.stderr.read())

@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_run_told_to_stop_saves_and_says_how_to_go_on(clone, tmp_path, number, status):
    process = start(clone, tmp_path / 'out')
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert '--init_from=resume' in out and 'Traceback' not in err
    assert f"stopped at iteration {load(tmp_path / 'out' / 'last.pt')['iter_num']}" in out

def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(clone, train, tmp_path):
    process = start(clone, tmp_path / 'out', '--decay_lr=False', '--dropout=0.2')
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM) # as torchrun and a scheduler may do together
    process.communicate(timeout=60)
    at = load(tmp_path / 'out' / 'last.pt')['iter_num']
    options = ('--decay_lr=False', '--dropout=0.2', '--eval_interval=1000000', f'--max_iters={at + 3}')
    resumed, whole = train(*options, '--init_from=resume'), train(*options, out_dir='whole')
    assert at > 0 and resumed.column('loss') == whole.column('loss')

def test_a_gradient_that_is_not_finite_makes_no_update_and_five_end_the_run(run, clone, tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, len(CHARS), 1, 2, 16))
    with torch.no_grad():
        model.transformer.wpe.weight[3] = math.nan
    torch.save({'model': model.state_dict(), 'model_args': model.config.__dict__}, tmp_path / 'broken.pt')
    done = run('train.py', '--dataset=chars', *TINY, f"--init_from={tmp_path / 'broken.pt'}",
               '--max_iters=20', status=2)
    assert done.out.count('no update') == 5 and done.err.count('error: five iterations in a row') == 1
    assert 'the weights are not finite' in done.err and not list((tmp_path / 'out').glob('*.pt'))

def test_a_run_is_not_overwritten_unless_asked(whole, train, tmp_path):
    shutil.copytree(whole['out_dir'], tmp_path / 'out')
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    assert 'already holds a run' in train(status=2).err
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == before
    assert train('--overwrite=True', '--max_iters=1').column('iter') == ['0', '1']

def test_an_evaluation_that_ended_a_run_stays_where_it_goes_on(train):
    ended = train('--max_iters=5', '--eval_interval=4')
    best = ended.column('val_loss')[5]
    longer = train('--max_iters=8', '--eval_interval=4', '--init_from=resume')
    assert best and longer.column('iter') == list('012345678') and longer.column('val_loss')[5] == best
    assert all(longer.column('loss')[:8])
    # iteration 8 is not logged
    later = train('--max_iters=10', '--eval_interval=5', '--init_from=resume', '--log_interval=3')
    assert (later.column('val_loss')[5] == best and later.column('iter') == [*'012345678', '9', '10']
            and later.column('val_loss')[8])

def test_a_resumed_iteration_has_as_many_sequences_as_before(train):
    train('--max_iters=2')
    done = train('--init_from=resume', '--max_iters=4', '--batch_size=8', status=2)
    assert 'an iteration of this run is 4 x 2 sequences' in done.err and 'not 8 x 2' in done.err
    train('--init_from=resume', '--eval_only=True', '--batch_size=8')
    train('--init_from=resume', '--max_iters=4', '--batch_size=8', '--gradient_accumulation_steps=1')

def test_num_epochs_sets_the_iterations_and_caps_the_warm_up(train):
    windows = math.ceil((int(len(TEXT) * 0.9) - 1) / 16)
    result = train('--num_epochs=0.1', '--warmup_iters=1000', '--max_iters=1000')
    assert int(result.column('iter')[-1]) == round(0.1 * windows / 8)
    # the peak, after a tenth
    assert float(result.column('lr')[round(0.1 * windows / 8) // 10]) == pytest.approx(1e-2)
    assert train('--num_epochs=0.1', '--max_iters=2', out_dir='b').column('iter') == ['0', '1', '2']

def test_kept_checkpoints_are_of_each_evaluation(train):
    result = train('--keep_checkpoints=True')
    assert sorted(p.name for p in result.out_dir.glob('iter_*')) == [
        'iter_000000.pt', 'iter_000004.pt', 'iter_000006.pt']
    assert load(result.out_dir / 'iter_000004.pt')['iter_num'] == 4
    result = train('--keep_checkpoints=True', '--always_save_checkpoint=False', '--learning_rate=0.9',
                   out_dir='worse')
    assert float(result.column('val_loss')[4]) > float(result.column('val_loss')[0]) # no best
    assert len(list(result.out_dir.glob('iter_*'))) == 3

def test_wandb_logs_offline_where_it_is_asked_to(train, tmp_path):
    pytest.importorskip('wandb')
    train('--wandb_log=True', env={'WANDB_MODE': 'offline', 'WANDB_DIR': str(tmp_path),
                                   'WANDB_SILENT': 'true'})
    assert list((tmp_path / 'wandb').glob('offline-run-*/*.wandb'))

def test_help_takes_less_than_three_seconds(run):
    begin = time.time()
    text = run('train.py', '--help', env={}).out # in a Python of its own
    assert time.time() - begin < 3
    assert '--gradient_accumulation_steps=40' in text and 'learning rate schedule' in text

def test_an_evaluation_whose_iteration_is_not_made_is_in_the_log(clone, train, tmp_path):
    (tmp_path / 'ends.py').write_text( # told to end within an iteration whose evaluation was made
        "import os, signal, dataset\n_windows = dataset.Split.training_windows\ndef _end(self, it, n):\n"
        "    os.kill(os.getpid(), signal.SIGTERM) if it == 4 else None\n    return _windows(self, it, n)\n"
        "dataset.Split.training_windows = _end\n")
    whole = train('--max_iters=8')
    ended = train(tmp_path / 'ends.py', '--max_iters=8', out_dir='ended')
    assert 'stopped at iteration 4' in ended.out
    assert ended.column('val_loss')[4] == whole.column('val_loss')[4] and ended.column('iter')[-1] == '4'
    report = (ended.out_dir / 'report.md').read_text()
    assert f"loss is {float(whole.column('val_loss')[4]):.4f}, at iteration 4" in report
    again = train('--max_iters=8', '--init_from=resume', out_dir='ended')
    assert (again.column('loss') == whole.column('loss')
            and again.column('val_loss') == whole.column('val_loss'))

@pytest.mark.parametrize('scale', [1e-4, 1.0, 1e5])
def test_a_picture_holds_its_labels(run, tmp_path, scale):
    rows = [f'{i * 20_000_000},{scale * (3 - i)},{scale * (3 - i)},{scale * (3 - i)}' for i in range(3)]
    (tmp_path / 'log.csv').write_text('\n'.join(['iter,loss,train_loss,val_loss', *rows, '']))
    run('plot.py', tmp_path)
    picture = plt.imread(tmp_path / 'loss.png')
    assert (picture.min() < 0.5
            and all(edge.min() == 1 for edge in (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:])))
