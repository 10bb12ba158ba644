"""
What a run tells of itself: the best so far, its speed, and what to type next.
"""
import os

import pytest
import torch

from configurator import quote
from log import Best, Clock, epoch_times, start_wandb

def test_the_best_that_could_not_be_saved_is_not_the_best(tmp_path):
    saved, is_best = Best().after(0, 3.0)
    missed, is_best = saved.after(10, 2.0)
    now = missed.without(saved)
    assert is_best and (now.best_val_loss, now.best_iter, now.n_worse) == (3.0, 0, 0)
    assert now.after(20, 2.5)[1] and not missed.after(20, 2.5)[1]
    for at, better in ((now, True), (now.after(20, 3.5)[0], True), (now.after(20, 2.5)[0], True), (now.after(20, 1.5)[0], False)):
        told = at.describe('out', 20, 20, ended=True)
        assert ('a better model, of val loss 2.0000, could not be saved' in told) == better and 'no evaluation was better' not in told

@pytest.mark.parametrize('evaluated, iter_num, file, says', [
    ((0,), 9, '/last.pt', 'nothing was evaluated since iteration 0: what was learned is in last.pt alone'),
    ((0, 10), 12, '', 'no evaluation was better than that of the model it started from'), ((0,), 0, '', '')])
def test_a_run_that_stops_names_the_file_that_holds_what_it_learned(evaluated, iter_num, file, says):
    best = Best()
    for at in evaluated:
        best, _ = best.after(at, 3.0 + at)
    told = best.describe('my out', iter_num, 99, ended=False)
    assert says in told and ('evaluat' in told) == bool(says)
    assert f"next: python sample.py --out_dir={quote('my out' + file.replace('/', os.sep))}\nto go on: python train.py --init_from=resume --out_dir={quote('my out')}" in told
    nanogpt_s = Best.of({'iter_num': 5, 'best_val_loss': torch.tensor(1.0)}).describe('out', 7, 99, ended=False)
    assert nanogpt_s.endswith('--out_dir=out\nto go on: python train.py --init_from=resume --out_dir=out') and 'alone' not in nanogpt_s

def test_patience_is_said_to_end_a_run_only_where_it_did():
    best = Best(1.0, 80, 3, 100)
    assert 'so it ended' in best.describe('out', 100, 200, ended=True) and '--patience=0' in best.describe('out', 100, 200, ended=True)
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
    clock = Clock(2048, 1.0, None, last=100)
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
