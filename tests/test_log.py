"""
What a run tells of itself: the best so far, its speed, and what to type next.
"""
import io
import json
import os
import types

import pytest
import torch
from matplotlib.axes import Axes

import log
import plot
from checkpoint import DEFAULTS, check_new
from configurator import quote
from log import Best, Clock, epoch_times, start_wandb

def test_the_best_that_could_not_be_saved_is_not_the_best(tmp_path):
    saved, is_best = Best().after(0, 3.0)
    missed, is_best = saved.after(10, 2.0)
    now = missed.without(saved)
    assert is_best and (now.best_val_loss, now.best_iter, now.n_worse) == (3.0, 0, 0)
    assert now.after(20, 2.5)[1] and not missed.after(20, 2.5)[1]
    for at, better in ((now, True), (now.after(20, 3.5)[0], True), (now.after(20, 2.5)[0], True),
                       (now.after(20, 1.5)[0], False)):
        told = at.describe('out', 20, 20, ended=True)
        assert (('a better model, of val loss 2.0000, could not be saved' in told) == better
                and 'no evaluation was better' not in told)

@pytest.mark.parametrize('n', [1, 2])
def test_a_start_that_is_killed_before_its_nth_file_is_in_place_can_be_typed_again(tmp_path, monkeypatch, n):
    replace, config = os.replace, {'init_from': 'scratch', 'sample_interval': 0}
    def killed(*paths):
        if len(os.listdir(tmp_path)) == n: # with the one that is not in place yet
            raise KeyboardInterrupt
        replace(*paths)
    monkeypatch.setattr(os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        log.start_log(str(tmp_path), config, {'model_args': dict.fromkeys(DEFAULTS, 1)}, None)
    check_new(str(tmp_path), 'scratch', False)
    assert len(list(tmp_path.iterdir())) == n - 1

@pytest.mark.parametrize('end', ['', '\n'])
def test_a_row_of_log_csv_that_was_cut_short_is_left_out_of_a_resumed_run_s(tmp_path, end):
    rows = [f'{i},' + ','.join(['1.25'] * (len(log.COLUMNS) - 1)) for i in range(3)]
    cut = rows[2][:-1] if not end else rows[2][:-9] # in the last cell, which looks whole, or before it
    (tmp_path / 'log.csv').write_text('\n'.join([','.join(log.COLUMNS), *rows[:2], cut]) + end)
    config = {'init_from': 'resume', 'sample_interval': 0}
    log.start_log(str(tmp_path), config, {'model_args': dict.fromkeys(DEFAULTS, 1)}, 9)
    assert (tmp_path / 'log.csv').read_text().splitlines()[1:] == rows[:2]

@pytest.mark.parametrize('evaluated, iter_num, file, says', [
    ((0,), 9, '/last.pt', 'nothing was evaluated since iteration 0: what was learned is in last.pt alone'),
    ((0, 10), 12, '', 'no evaluation was better than that of the model it started from'), ((0,), 0, '', '')])
def test_a_run_that_stops_names_the_file_that_holds_what_it_learned(evaluated, iter_num, file, says):
    best = Best()
    for at in evaluated:
        best, _ = best.after(at, 3.0 + at)
    told = best.describe('my out', iter_num, 99, ended=False)
    assert says in told and ('evaluat' in told) == bool(says)
    assert (f"next: python sample.py --out_dir={quote('my out' + file.replace('/', os.sep))}\n"
            f"to go on: python train.py --init_from=resume --out_dir={quote('my out')}") in told
    nanogpt_s = Best.of({'iter_num': 5, 'best_val_loss': torch.tensor(1.0)}).describe(
        'out', 7, 99, ended=False)
    assert (nanogpt_s.endswith('--out_dir=out\nto go on: python train.py --init_from=resume --out_dir=out')
            and 'alone' not in nanogpt_s)

def test_patience_is_said_to_end_a_run_only_where_it_did():
    best = Best(1.0, 80, 3, 100)
    assert ('so it ended' in best.describe('out', 100, 200, ended=True)
            and '--patience=0' in best.describe('out', 100, 200, ended=True))
    for max_iters, ended in ((200, False), (100, True)):
        told = best.describe('out', 100, max_iters, ended)
        assert 'so it ended' not in told and '--patience' not in told

def test_another_program_s_config_json_is_no_earlier_run(tmp_path):
    (tmp_path / 'config.json').write_text('[]')
    (tmp_path / 'log.csv').write_text('time_ms\n1\n')
    assert start_wandb({'out_dir': str(tmp_path), 'wandb_log': False}, True) is None
    assert epoch_times(str(tmp_path), {'device': 'cpu'}) == {}

def test_what_is_left_of_a_run_is_told_without_what_came_before_it(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr('time.perf_counter', lambda: now[0])
    clock = Clock(2048, 1.0, 0, last=100)
    now[0] += 500 + 2 # an evaluation, and an iteration of 2 seconds
    assert clock.lap(40, 0.1, 2.0)[1].endswith('eta 0:01:58')
    now[0] += 10 * 2 + 20 # ten more, and an evaluation between them
    assert clock.lap(50, 0.1, 2.0)[1].endswith('eta 0:03:07') # 49 more at 42 / 11 seconds

def test_the_best_is_the_best_again_after_a_resume_that_rounds_otherwise():
    best = Best(2.0, 10, 0, 10) # killed before ckpt.pt was linked
    again, is_best = best.after(10, 2.0000001)
    assert is_best and again.best_iter == 10 and again.n_worse == 0
    assert not Best().after(0, float('nan'))[1]

def test_an_evaluation_that_is_no_better_than_the_best_counts_for_patience():
    best, is_best = Best().after(0, 3.0)[0].after(10, 3.0)
    assert not is_best and best.n_worse == 1 and best.best_iter == 0

def test_mfu_is_the_share_of_the_peak():
    clock = Clock(tokens=100, flops=1e9, peak=1e12, last=10)
    row, text = clock.lap(0, 0.0, 0.5) # 1e9 FLOPs in half a second, of 1e12 a second
    assert row['mfu'] == pytest.approx(0.002) and 'mfu 0.20%' in text

def test_a_lap_is_told_in_ms_tokens_and_share_of_the_peak():
    cells, _ = Clock(2048, 1e6, 1e7, 100).lap(3, 0.1, 0.5)
    assert cells == {'time_ms': 500.0, 'tokens_per_sec': 4096.0, 'mfu': pytest.approx(0.2)}

def test_a_long_run_s_report_ends_with_its_last_evaluation(train):
    out_dir = train('--max_iters=1').out_dir
    lines = (out_dir / 'log.csv').read_text().splitlines()
    rest = lines[1].partition(',')[2]
    (out_dir / 'log.csv').write_text('\n'.join([lines[0], *(f'{i},{rest}' for i in range(45)), '']))
    log.write_report(str(out_dir))
    told = [int(line.split()[1]) for line in (out_dir / 'report.md').read_text().splitlines()
            if line[:2] == '| ' and line[2].isdigit()]
    assert told[-1] == 44 and 10 <= len(told) <= 21

def test_a_row_that_was_cut_short_goes_when_a_run_is_resumed(train):
    out_dir = train('--max_iters=4').out_dir
    with open(out_dir / 'log.csv', 'a') as file:
        file.write('1') # of iteration 10
    assert train('--init_from=resume', '--max_iters=6').column('iter') == list('0123456')

def test_what_the_disk_did_not_take_is_tried_again_at_the_end_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(log, 'waiting', {str(tmp_path / 'log.csv'): 'row 9\n'})
    (tmp_path / 'log.csv').write_text('row 8\n')
    log.finish_log(False)
    assert (tmp_path / 'log.csv').read_text() == 'row 8\nrow 9\n' and not log.waiting

def test_what_a_signal_s_handler_prints_amid_another_line_comes_with_the_next():
    written, steady = [], None
    class Pipe(io.RawIOBase):
        def writable(self):
            return True
        def write(self, data):
            written.append(bytes(data))
            if len(written) == 1:
                print('stopping', file=steady)
            return len(data)
    steady = log.Steady(io.TextIOWrapper(io.BufferedWriter(Pipe())))
    for line in ('iter 1', 'iter 2'):
        print(line, file=steady)
    steady.flush()
    assert b''.join(written).splitlines() == [b'iter 1', b'stopping', b'iter 2'] and not steady.held

def test_a_picture_is_drawn_in_a_notebook_whose_matplotlib_has_parts_that_ours_lacks(run, tmp_path):
    (tmp_path / 'log.csv').write_text('iter,loss,train_loss,val_loss\n0,4,4,4.5\n10,2,2,2.5\n')
    run('plot.py', tmp_path, env={'MPLBACKEND': 'inline_missing'})
    assert (tmp_path / 'loss.png').read_bytes()[:4] == b'\x89PNG'

def test_a_loss_that_is_no_number_is_not_the_lowest(train, tmp_path):
    out = train('--max_iters=4', '--eval_interval=2').out_dir
    rows = [line.split(',') for line in (out / 'log.csv').read_text().splitlines()]
    rows[1][-1] = 'nan'
    (out / 'log.csv').write_text(''.join(','.join(row) + '\n' for row in rows))
    log.write_report(str(out))
    best = min(float(row[-1]) for row in rows[2:] if row[-1])
    assert f'The best validation loss is {best:.4f}, at iteration 4' in (out / 'report.md').read_text()
    assert min(plot.read_log(str(out))['val_loss'][1]) == best

def test_a_picture_tells_the_lowest_loss_and_leaves_out_a_row_that_was_cut(tmp_path, monkeypatch):
    labels, draw = [], Axes.plot
    monkeypatch.setattr(Axes, 'plot', lambda self, *args, **options:
                        (labels.append(options.get('label')), draw(self, *args, **options))[1])
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'log.csv').write_text(
        'iter,loss,train_loss,val_loss\n0,4,4,4.5\n10,2,2,2.5\n20,1,1,3.5\n30,1,1,1')
    plot.plot_run(str(tmp_path))
    plot.plot_runs([str(tmp_path)])
    assert ('val split, best 2.5000 at iteration 10' in labels
            and any(str(label).endswith(', best 2.5000') for label in labels))

def test_a_wandb_that_is_gone_costs_warnings_and_not_the_run(tmp_path, monkeypatch, capsys):
    def gone(*args):
        raise ConnectionResetError('Connection lost')
    monkeypatch.setattr(log, 'need_wandb', lambda: types.SimpleNamespace(log=gone, finish=gone))
    log.append_row(str(tmp_path), {'iter': 3, 'loss': 2.5}, True)
    log.finish_log(True)
    assert (tmp_path / 'log.csv').read_text().startswith('3,')
    assert capsys.readouterr().err.count('warning: wandb does not take this (ConnectionResetError: ') == 2

def test_of_several_that_could_not_be_saved_the_lowest_loss_is_told():
    best, _ = Best().after(0, 3.0)
    for at, loss in ((10, 2.0), (20, 2.5)):
        best = best.after(at, loss)[0].without(best)
    assert (best.best_val_loss, best.best_iter, best.lost) == (3.0, 0, 2.0)

def test_a_row_of_which_the_disk_took_a_part_is_whole_with_the_next(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file): self.file = file
        def __enter__(self): return self
        def __exit__(self, *args): self.file.close()
        def write(self, text):
            self.file.write(text[:3])
            self.file.flush()
            raise OSError(28, 'No space left on device')
    path = str(tmp_path / 'log.csv')
    log.append(path, 'first\n')
    with monkeypatch.context() as patch:
        patch.setattr(log, 'open', lambda *args, **options: Full(open(*args, **options)), raising=False)
        log.append(path, 'second\n')
    log.append(path, 'third\n')
    assert (tmp_path / 'log.csv').read_text() == 'first\nsecond\nthird\n'

def test_an_iteration_is_logged_once_its_evaluation_is(tmp_path):
    row = {**dict.fromkeys(log.COLUMNS, ''), 'iter': 4, 'loss': 2.0}
    for val_loss, logged in (('', False), (3.0, True)):
        (tmp_path / 'log.csv').write_text('\n'.join([','.join(log.COLUMNS), ','.join(
            str(value) for value in {**row, 'val_loss': val_loss}.values()), '']))
        assert log.is_logged(str(tmp_path), 4) == logged and not log.is_logged(str(tmp_path), 5)

def test_a_run_of_several_processes_goes_on_by_torchrun(monkeypatch):
    best, _ = Best().after(0, 3.0)
    for size, launch in (('1', 'python train.py'), ('2', 'torchrun ... train.py')):
        monkeypatch.setenv('WORLD_SIZE', size)
        assert f'\nto go on: {launch} --init_from=resume' in best.describe('out', 5, 9, ended=False)

def test_a_model_that_was_trained_on_instructions_is_sampled_with_one():
    best, _ = Best().after(5, 3.0)
    for asked in (True, False):
        told = best.describe('out', 5, 5, ended=True, asked=asked)
        assert told.endswith(f"next: python sample.py --out_dir=out{' --instruction=TEXT' * asked}")

def test_a_sample_that_is_not_written_again_stays(tmp_path):
    path = tmp_path / 'samples.txt'
    for interval, stay in ((4, [0, 3, 6]), (3, [0, 3]), (0, [0, 3, 6])): # iteration 6 writes one of every 3
        path.write_text(''.join(f'{log.RULE}iteration {i}\ntext {i}\n' for i in (0, 3, 6)))
        log.start_log(str(tmp_path), {'init_from': 'resume', 'sample_interval': interval},
                      {'model_args': dict.fromkeys(DEFAULTS, 1)}, 6)
        assert [int(line[5:]) for line in path.read_text().splitlines() if line.startswith('text ')] == stay

def test_what_waits_to_be_written_comes_before_what_is_new(tmp_path, monkeypatch):
    path = str(tmp_path / 'log.csv')
    monkeypatch.setattr(log, 'waiting', {path: '1\n'})
    log.append(path, '2\n')
    assert (tmp_path / 'log.csv').read_text() == '1\n2\n'

def test_a_report_tells_the_last_iteration_the_median_speed_and_what_was_trained(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({
        'init_from': 'scratch', 'dataset': 'novel', 'max_iters': 100, 'parameters': 2000, 'trained': 1000,
        'machine': 'a machine', 'device': 'cpu', 'dtype': 'float32'}))
    rows = [{**dict.fromkeys(log.COLUMNS, ''), 'iter': i, 'epoch': i / 10, 'tokens_per_sec': speed,
             'train_loss': loss, 'val_loss': loss}
            for i, speed, loss in ((0, 10, 4.0), (10, 3000, 2.0), (20, 1000, 3.0))]
    lines = [log.COLUMNS, *([str(row[key]) for key in log.COLUMNS] for row in rows), []]
    (tmp_path / 'log.csv').write_text('\n'.join(map(','.join, lines)))
    log.write_report(str(tmp_path))
    text = (tmp_path / 'report.md').read_text()
    assert 'trained on novel to iteration 20 of 100, epoch 2.00.' in text
    assert 'The best validation loss is 2.0000, at iteration 10. Of 2,000 parameters, 1,000 were' in text
    assert 'cpu in float32, 1,000 tokens/s.' in text
