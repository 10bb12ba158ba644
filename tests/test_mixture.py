import os
import re

import numpy as np
import pytest

from dataset import find_datasets, open_split
from test_dataset import make_split

@pytest.fixture
def mix(tmp_path):
    """ two datasets, of tokens below and from 1000, in shares of 3 to 1 """
    for name, n, base in (('a', 500, 0), ('b', 80, 1000)):
        (tmp_path / name).mkdir()
        for split in ('train', 'val'):
            np.arange(base, base + n, dtype='<u2').tofile(tmp_path / name / f'{split}.bin')
    return open_split({str(tmp_path / 'a'): 3.0, str(tmp_path / 'b'): 1.0}, 'train', 10, 2000, seed=3)

def test_a_mixture_reads_its_datasets_in_their_shares_and_each_in_its_own_order(mix):
    x, y = mix.batch(mix.training_windows(0, 2000))
    from_b = x[:, 0] >= 1000
    assert from_b[:1000].sum() == from_b[1000:].sum() == 250
    assert from_b[:40].sum() not in (0, 40) # and not one after the other
    own = mix.splits[1].batch(mix.splits[1].training_windows(0, 500))
    assert np.array_equal(x[from_b], own[0]) and np.array_equal(y[from_b], own[1])

def test_a_mixture_s_order_depends_on_seed_and_iteration_alone(mix):
    stream = np.concatenate([mix.training_windows(i, 12) for i in range(200)])
    assert np.array_equal(stream[-12:], mix.training_windows(199, 12))
    assert np.array_equal(stream, mix.training_windows(0, 2400))
    assert mix.count(stream[:12]) == (mix.batch(stream[:12])[1] >= 0).sum()

def test_a_mixture_s_parts_are_evaluated_whole_or_in_their_shares_and_count_by_weight(mix):
    (a, its, n_a), (b, others, n_b) = mix.evaluation_parts(mix.n_windows)
    assert (a, b) == (0.75, 0.25) and (n_a, n_b) == (499, 79)
    for windows, targets in ((its, range(1, 500)), (others, range(1001, 1080))):
        _, y = mix.batch(windows)
        assert sorted(y[y >= 0]) == list(targets)
    assert [len(windows) for _, windows, _ in mix.evaluation_parts(12)] == [9, 3]
    assert mix.describe_epochs(1000).startswith('15.0 epochs of ') # 750 of 50 windows

def test_a_weight_of_less_than_a_window_in_a_round_is_an_error(mix):
    folders = {os.path.dirname(split.path): weight for split, weight in zip(mix.splits, (0.9996, 0.0004))}
    with pytest.raises(ValueError, match='less than a window in 1000'):
        open_split(folders, 'train', 10, 2000)

def test_datasets_are_named_with_weights_or_without(tmp_path):
    assert list(find_datasets('a:0.7, b:3').values()) == [0.7, 3.0]
    assert [os.path.basename(folder) for folder in find_datasets('a,b:2')] == ['a', 'b']
    assert list(find_datasets('C:\\texts\\novel').values()) == [1.0] # a drive is no weight
    for wrong in ('a:0', 'a:-1,b', 'a,,b', 'a:1e999', 'a:.', f'{tmp_path},{tmp_path}/'):
        with pytest.raises(ValueError, match='type --dataset=NAME'):
            find_datasets(wrong)

def test_a_mixture_s_order_is_drawn_from_the_seed(tmp_path):
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        make_split(tmp_path / name, 500, 10)
    def owners(seed):
        mix = open_split({str(tmp_path / 'a'): 1.0, str(tmp_path / 'b'): 1.0}, 'train', 10, 2000, seed=seed)
        return (mix.training_windows(0, 100)[:, 0] >= mix.bases[1]).tolist()
    assert owners(3) == owners(3) != owners(4)

def test_the_smallest_part_of_a_mixture_is_evaluated_by_one_window_and_not_by_all_of_its_own(mix):
    folders = {os.path.dirname(split.path): weight for split, weight in zip(mix.splits, (0.98, 0.02))}
    parts = open_split(folders, 'train', 10, 2000).evaluation_parts(12)
    assert [len(windows) for _, windows, _ in parts] == [12, 1]

def test_the_mark_of_a_mixture_tells_a_change_of_any_of_its_datasets(mix):
    folders = {os.path.dirname(split.path): 1.0 for split in mix.splits}
    marks = {mix.mark()}
    for folder, n in zip(folders, (501, 81)):
        np.arange(n, dtype='<u2').tofile(os.path.join(folder, 'train.bin'))
        marks.add(open_split(folders, 'train', 10, 2000).mark())
    assert len(marks) == 3

def test_the_epochs_of_each_dataset_of_a_mixture_are_told(mix):
    # 750 of 50 windows, and 250 of 8
    assert re.findall(r'[\d.]+ epochs', mix.describe_epochs(1000)) == ['15.0 epochs', '31.2 epochs']
