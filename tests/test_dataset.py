import hashlib
import math
import os
import pickle
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from dataset import DATA, Split, find_dataset, open_split, read_tokenizer_state
from publish import fetch, publish, write_dataset
from text import read_text
from tokenizer import CharTokenizer, count_ids

def make_split(folder, n, block_size, **options):
    np.arange(n, dtype='<u2').tofile(folder / 'train.bin') # each token is its own position
    return Split(str(folder), 'train', block_size, vocab_size=2**16, **options)

@pytest.mark.skipif(not hasattr(os, 'fork'), reason="without fork no process can be killed amid a write here")
def test_what_a_killed_process_left_of_a_dataset_goes_the_next_time(tmp_path):
    child = os.fork()
    if child == 0:
        held = publish(str(tmp_path / 'd'))
        held.__enter__()
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    left, = (tmp_path / 'd').iterdir()
    # of a host whose name only begins alike
    another = left.with_name(left.name.replace(f'-{child}-', f'-2-{child}-'))
    another.mkdir()
    with publish(str(tmp_path / 'd')), publish(str(tmp_path / 'd')): # of two that are at work neither goes
        assert not left.exists() and another.exists() and len(list((tmp_path / 'd').iterdir())) == 3

def test_other_data_have_another_mark(tmp_path):
    mark = make_split(tmp_path, 100, 8).mark()
    assert make_split(tmp_path, 100, 4).mark() == mark != make_split(tmp_path, 101, 8).mark()
    tokens = np.arange(100, dtype='<u2')
    tokens[[3, 4]] = 4, 3
    tokens.tofile(tmp_path / 'train.bin')
    other = Split(str(tmp_path), 'train', 8, vocab_size=2**16).mark()
    np.arange(100).__ge__(50).astype(np.uint8).tofile(tmp_path / 'train_mask.bin')
    assert len({mark, other, Split(str(tmp_path), 'train', 8, vocab_size=2**16).mark()}) == 3

@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 150), block_size=st.integers(1, 40), seed=st.integers(0, 2**32 - 1),
       split=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4)), epoch=st.integers(0, 10**6))
def test_every_token_is_a_target_once_an_epoch_whoever_reads_it(
        tmp_path_factory, n, block_size, seed, split, epoch):
    """ the iterations that make up some epochs, each shared by processes in micro-batches as train.py shares
    it """
    data = make_split(tmp_path_factory.mktemp('d'), n, min(block_size, n - 1), seed=seed)
    sequences = math.prod(split) # so many epochs are as many iterations as an epoch has windows
    epochs = [[] for _ in range(sequences)]
    for i in range(data.n_windows):
        windows = data.training_windows(epoch * data.n_windows + i, sequences)
        number = np.arange(i * sequences, (i + 1) * sequences).reshape(split) # of a window, in all of them
        shares = windows.reshape(*split, 2)
        for rank, step in np.ndindex(*split[:2]):
            x, y = data.batch(shares[rank][step])
            assert np.all(x[y >= 0] == y[y >= 0] - 1) # each is predicted from the one before it
            for k, targets in zip(number[rank][step], y):
                epochs[k // data.n_windows] += targets[targets >= 0].tolist()
    assert all(sorted(targets) == list(range(1, n)) for targets in epochs) # the first has nothing before it

@settings(max_examples=30, deadline=None)
@given(n=st.integers(50, 400), block_size=st.integers(1, 9), world_size=st.integers(1, 6),
       each=st.integers(1, 4), seed=st.integers(0, 9))
def test_the_shares_of_an_iteration_are_disjoint_and_together_the_whole(
        tmp_path_factory, n, block_size, world_size, each, seed):
    data = make_split(tmp_path_factory.mktemp('d'), n, block_size, seed=seed)
    sequences = min(world_size * each, data.n_windows // world_size * world_size)
    windows = data.training_windows(0, sequences) # no more than an epoch has
    shares = [set(map(tuple, share)) for share in windows.reshape(world_size, -1, 2)]
    assert sum(map(len, shares)) == len(set.union(*shares)) == sequences
    assert set.union(*shares) == set(map(tuple, data.nth(np.arange(sequences))))

def test_windows_depend_on_seed_and_iteration_alone(tmp_path):
    data = make_split(tmp_path, 1000, 10, seed=3)
    late_first = data.training_windows(29, 12)
    stream = np.concatenate([data.training_windows(i, 12) for i in range(30)])
    assert np.array_equal(late_first, stream[-12:])
    again = make_split(tmp_path, 1000, 10, seed=3)
    assert np.array_equal(stream, np.concatenate([again.training_windows(i, 8) for i in range(45)]))
    assert not np.array_equal(stream, np.concatenate([
        make_split(tmp_path, 1000, 10, seed=4).training_windows(i, 12) for i in range(30)]))

def test_epochs_are_cut_and_shuffled_differently(tmp_path):
    data = make_split(tmp_path, 1001, 10)
    first, second = data.training_windows(0, 100), data.training_windows(1, 100)
    assert first[0, 0] % 10 != second[0, 0] % 10
    assert not np.array_equal(first, second)

def test_batch_is_the_hand_worked_one(tmp_path):
    data = make_split(tmp_path, 7, 4)
    x, y = data.batch(np.array([[1, 4], [4, 2]])) # the second runs over the end, and two targets count
    assert x.tolist() == [[1, 2, 3, 4], [4, 5, 0, 1]]
    assert y.tolist() == [[2, 3, 4, 5], [5, 6, -1, -1]]

def test_whole_evaluation_covers_each_token_once_and_a_part_is_evenly_spread(tmp_path):
    data = make_split(tmp_path, 100, 8)
    _, y = data.batch(data.evaluation_windows(10**9))
    assert sorted(y[y >= 0]) == list(range(1, 100))
    assert data.evaluation_windows(4)[:, 0].tolist() == [0, 24, 48, 72]

def test_batches_are_filled_up_with_windows_that_do_not_count(tmp_path):
    data = make_split(tmp_path, 100, 8)
    batches = list(data.batches(data.evaluation_windows(10**9), 5))
    assert [len(b) for b in batches] == [5, 5, 5]
    assert (data.batch(batches[-1])[1][3:] == -1).all()

def test_the_order_of_an_epoch_is_drawn_once_for_each_of_many_datasets(tmp_path, monkeypatch):
    drawn, draw = [], dataset.epoch_order
    monkeypatch.setattr(dataset, 'epoch_order', lambda *args: drawn.append(args) or draw(*args))
    for name in 'abc':
        (tmp_path / name).mkdir()
        make_split(tmp_path / name, 50 + len(drawn), 4)
    mixed = open_split({str(tmp_path / name): 1.0 for name in 'abc'}, 'train', 4, 2**16)
    for it in range(3):
        mixed.training_windows(it, 9)
    assert len(drawn) == 3

def test_an_evaluation_of_windows_in_which_nothing_counts_takes_all_of_them(tmp_path):
    mask = np.zeros(101, np.uint8)
    mask[95] = 1
    mask.tofile(tmp_path / 'train_mask.bin')
    (_, windows, n), = make_split(tmp_path, 101, 10).evaluation_parts(2)
    assert (len(windows), n) == (10, 1)

def test_an_id_beyond_the_vocabulary_is_refused(tmp_path):
    np.array([1, 2, 70, 3], dtype='<u2').tofile(tmp_path / 'train.bin')
    with pytest.raises(ValueError, match='token id 70, but the vocabulary has only 65'):
        Split(str(tmp_path), 'train', 2, vocab_size=65)

class Hostile:
    def __init__(self, marker):
        self.marker = marker
    def __reduce__(self):
        return os.mkdir, (self.marker,)

def test_a_hostile_meta_pkl_runs_nothing(tmp_path):
    marker = str(tmp_path / 'ran')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': Hostile(marker)}))
    with pytest.raises(ValueError, match='could run code'):
        read_tokenizer_state(str(tmp_path))
    assert not os.path.exists(marker)

@pytest.mark.parametrize('meta, state', [
    ({'vocab_size': 3}, {'name': 'numbers', 'n_vocab': 3}),
    ({'vocab_size': 2, 'stoi': {'ab': 0, 'c': 1}, 'itos': {0: 'ab', 1: 'c'}},
     {'name': 'numbers', 'n_vocab': 2}),
    ({'vocab_size': 2, 'itos': ['b', 'a']}, {'name': 'char', 'chars': ['b', 'a']})])
def test_a_meta_pkl_of_other_tokens_than_characters_gives_their_number(tmp_path, meta, state):
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    assert read_tokenizer_state(str(tmp_path)) == state and count_ids(state) == meta['vocab_size']

@pytest.mark.parametrize('n_vocab', [0, 2**16 + 1, '3', 90.0, True, None])
def test_a_meta_pkl_of_no_possible_number_of_tokens_is_refused(tmp_path, n_vocab):
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': n_vocab}))
    with pytest.raises(ValueError, match='vocab_size is'):
        read_tokenizer_state(str(tmp_path))

def test_written_characters_are_nanogpt_s_format(tmp_path):
    write_dataset(str(tmp_path), 'hello world', CharTokenizer(sorted(set('hello world'))))
    with open(tmp_path / 'meta.pkl', 'rb') as file:
        meta = pickle.load(file)
    assert meta['vocab_size'] == 8 and meta['stoi']['h'] == 3 and meta['itos'][3] == 'h'
    train, val = (np.fromfile(tmp_path / f'{name}.bin', dtype=np.uint16) for name in ('train', 'val'))
    assert ''.join(meta['itos'][i] for i in [*train, *val]) == 'hello world' and len(train) == 9
    assert read_tokenizer_state(str(tmp_path)) == {'name': 'char', 'chars': list(' dehlorw')}
    assert sorted(os.listdir(tmp_path)) == ['meta.pkl', 'train.bin', 'val.bin']

def test_text_is_read_without_a_byte_order_mark_and_bad_utf8_is_placed(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfhi\r\n\rho\n')
    with open(tmp_path / 'a.txt', encoding='utf-8-sig') as file:
        assert read_text(str(tmp_path / 'a.txt')) == file.read() == 'hi\n\nho\n'
    (tmp_path / 'b.txt').write_bytes(b'good\xff')
    with pytest.raises(ValueError, match='b.txt is not UTF-8 at byte 4; .* Windows-1252'):
        read_text(str(tmp_path / 'b.txt'))

@pytest.mark.skipif(os.name == 'nt', reason="its shells quote otherwise")
@pytest.mark.parametrize('encoding, name', [
    ('cp1252', 'rows.csv'), ('utf-16', 'my old text.txt'), ('utf-16-le', "it's.txt"),
    ('cp1252', 'a "b" $HOME.txt'), ('cp1252', '`touch ran`.txt'), ('cp1252', 'x-utf8.txt')])
def test_a_text_that_is_not_utf8_is_converted_by_the_command_in_its_error(tmp_path, encoding, name):
    text, path = '\u201eM\xf6we\u201c \u2013 it\u2019s\r\nfine\r\n' * 9, tmp_path / name
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match='UTF-8') as error:
        read_text(str(path))
    command = str(error.value).partition(': ')[2].replace('python', sys.executable, 1)
    subprocess.run(['sh', '-c', command], cwd=tmp_path, check=True)
    assert read_text(str(tmp_path / f'{path.stem}-utf8{path.suffix}')) == text.replace('\r\n', '\n')
    assert path.read_bytes() == text.encode(encoding) and len(list(tmp_path.iterdir())) == 2

@pytest.fixture
def server():
    """ serves b'the text' at /text, and nothing else """
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == '/text' else 404)
            self.end_headers()
            self.wfile.write(b'the text')
        def log_message(self, *args):
            pass
    with HTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()

def test_fetch_checks_what_it_fetched_and_keeps_what_is_there(tmp_path, server):
    path = str(tmp_path / 'input.txt')
    with pytest.raises(ValueError, match='sent another file'):
        fetch(f'{server}/text', path, '0' * 64)
    with pytest.raises(OSError, match=f'put the file at .*input.txt yourself'):
        fetch(f'{server}/none', path, '0' * 64)
    with pytest.raises(OSError, match=f'put the file at .*input.txt yourself'):
        fetch('http://127.0.0.1:9/text', path, '0' * 64)
    assert not os.listdir(tmp_path)
    assert fetch(f'{server}/text', path, hashlib.sha256(b'the text').hexdigest()) == 'the text'
    (tmp_path / 'input.txt').write_text('mine')
    assert fetch(f'{server}/text', path, '0' * 64) == 'mine'

def make_mask(folder, n, hidden):
    """ every token counts, less those whose position `hidden` says do not """
    np.array([not hidden(i) for i in range(n)], dtype=np.uint8).tofile(folder / 'train_mask.bin')

def test_a_masked_token_is_read_and_not_predicted(tmp_path):
    make_mask(tmp_path, 7, hidden=lambda i: i in (2, 6))
    data = make_split(tmp_path, 7, 4)
    windows = np.array([[1, 4], [4, 2]])
    x, y = data.batch(windows)
    assert x.tolist() == [[1, 2, 3, 4], [4, 5, 0, 1]]
    assert y.tolist() == [[-1, 3, 4, 5], [5, -1, -1, -1]]
    assert data.count(windows) == 4

@settings(max_examples=30, deadline=None)
@given(n=st.integers(3, 200), block_size=st.integers(1, 40), every=st.integers(1, 5), seed=st.integers(0, 3))
def test_the_counted_targets_are_those_of_the_batch(tmp_path_factory, n, block_size, every, seed):
    folder, block_size = tmp_path_factory.mktemp('d'), min(block_size, n - 1)
    make_mask(folder, n, hidden=lambda i: i % every == 0)
    data = make_split(folder, n, block_size, seed=seed)
    windows = data.training_windows(1, 5)
    assert data.count(windows) == (data.batch(windows)[1] >= 0).sum()

def make_items(folder, lengths, n_prompt=1):
    """ items of these lengths, whose first n_prompt tokens, or all but the last, are not targets """
    mask = [byte for n in lengths
            for byte in [0] * min(n_prompt, n - 1) + [1] * (n - 1 - min(n_prompt, n - 1)) + [2]]
    np.array(mask, dtype=np.uint8).tofile(folder / 'train_mask.bin')
    return len(mask)

def test_windows_hold_whole_items_as_many_as_fit(tmp_path):
    data = make_split(tmp_path, make_items(tmp_path, [3, 4, 2, 12, 3]), 6)
    # 3 and 4 fill the first, since its last token is only a target; 12 are too many for one
    assert data.cut(np.arange(data.n_windows)).tolist() == [[0, 6], [7, 1], [9, 6], [15, 5], [21, 2]]
    # an epoch, in an order of its own
    assert sorted(data.training_windows(3, 5).tolist()) == sorted(data.items.tolist())
    assert data.training_windows(3, 5).tolist() != data.training_windows(4, 5).tolist()
    x, y = data.batch(np.array([[7, 1], [15, 5]]))
    assert x[0, 0] == 7 and y.tolist() == [[8, -1, -1, -1, -1, -1], [16, 17, 18, 19, 20, -1]]

@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 30), min_size=2, max_size=40), block_size=st.integers(1, 20),
       n_prompt=st.integers(1, 5))
def test_every_answer_is_a_target_once_an_epoch_after_as_much_of_its_item_as_fits(
        tmp_path_factory, lengths, block_size, n_prompt):
    folder, seen = tmp_path_factory.mktemp('d'), []
    n = make_items(folder, lengths, n_prompt)
    data = make_split(folder, n, min(block_size, n - 1))
    starts = np.cumsum([0, *lengths])
    for start, length in data.training_windows(7, data.n_windows).tolist():
        (x,), (y,) = data.batch(np.array([[start, length]]))
        seen += y[y >= 0].tolist()
        for target in y[y >= 0]:
            its = starts[np.searchsorted(starts, target, side='right') - 1] # where the target's item begins
            size = starts[np.searchsorted(starts, target, side='right')] - its
            assert start <= its or size > block_size + 1
    assert sorted(seen) == np.flatnonzero(data.mask).tolist() and data.count(data.items) == len(seen)

def test_items_may_be_fewer_than_a_window_holds(tmp_path):
    data = make_split(tmp_path, make_items(tmp_path, [3, 4]), 20)
    assert data.items.tolist() == [[0, 6]] and data.n_tokens == 7 and data.mark().endswith(':items')
    x, y = data.batch(data.training_windows(5, 3))
    assert x[:, :7].tolist() == [[*range(6), 0]] * 3 and y.tolist() == [[1, 2, -1, 4, 5, 6] + [-1] * 14] * 3
    assert data.count(data.items) == 5 == data.evaluation_parts(9)[0][2]
    (tmp_path / 'train_mask.bin').unlink()
    with pytest.raises(ValueError, match='7 tokens, too few for block_size = 20'):
        make_split(tmp_path, 7, 20)

def test_a_mask_of_another_length_is_an_error(tmp_path):
    make_mask(tmp_path, 6, hidden=lambda i: False)
    with pytest.raises(ValueError, match='6 bytes for 7 tokens'):
        make_split(tmp_path, 7, 4)

def test_a_split_of_which_no_target_counts_is_not_evaluated(tmp_path):
    make_mask(tmp_path, 7, hidden=lambda i: True)
    with pytest.raises(ValueError, match='no token that is evaluated counts'):
        make_split(tmp_path, 7, 4).evaluation_parts(10)

def test_the_mark_of_a_dataset_tells_changes_at_both_ends(tmp_path):
    marks = set()
    for changed in (None, 0, -1):
        ids = np.zeros(2**21 + 100, '<u2')
        ids[changed] = 0 if changed is None else 1
        ids.tofile(tmp_path / 'train.bin')
        marks.add(Split(str(tmp_path), 'train', 8, 50).mark())
    assert len(marks) == 3

def test_an_id_that_the_vocabulary_lacks_is_told_when_it_is_opened_or_read(tmp_path):
    np.array([1, 2, 65, 3], '<u2').tofile(tmp_path / 'train.bin')
    with pytest.raises(ValueError, match='token id 65'):
        Split(str(tmp_path), 'train', 2, vocab_size=65)
    np.zeros(100, '<u2').tofile(tmp_path / 'train.bin')
    split = Split(str(tmp_path), 'train', 4, vocab_size=65)
    with open(tmp_path / 'train.bin', 'r+b') as file: # as if they lay beyond those that opening checks
        file.write(np.full(100, 70, '<u2').tobytes())
    with pytest.raises(ValueError, match='token id 70'):
        split.batch(split.training_windows(0, 4))

def test_the_last_token_which_is_a_target_alone_is_checked_too(tmp_path):
    np.zeros(100, '<u2').tofile(tmp_path / 'train.bin')
    split = Split(str(tmp_path), 'train', 4, vocab_size=65)
    with open(tmp_path / 'train.bin', 'r+b') as file: # as if it lay beyond those that opening checks
        file.seek(2 * 99)
        file.write(np.array([70], '<u2').tobytes())
    with pytest.raises(ValueError, match='token id 70'):
        split.batch(split.evaluation_windows(10**9))

def test_a_folder_here_does_not_take_the_place_of_the_dataset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'novel').mkdir()
    assert find_dataset('novel') == os.path.join(DATA, 'novel')
    assert find_dataset(os.path.join('.', 'novel')) == os.path.join('.', 'novel')

@pytest.mark.parametrize('n', [2, 3, 7, 8, 50])
def test_a_block_size_for_which_a_split_is_too_short_is_refused_and_the_one_named_fits(tmp_path, n):
    np.zeros(400, '<u2').tofile(tmp_path / 'train.bin')
    np.zeros(n, '<u2').tofile(tmp_path / 'val.bin')
    with pytest.raises(ValueError, match=f'has {n} tokens, too few for block_size = {n};') as error:
        Split(str(tmp_path), 'val', n, 50)
    named = int(re.search(r'type --block_size=(\d+)', str(error.value))[1])
    for name in ('train', 'val'):
        assert Split(str(tmp_path), name, named, 50).n_windows >= 1

def test_a_part_of_an_epoch_is_told_by_its_tenth(tmp_path):
    split = make_split(tmp_path, 101, 10)
    assert [split.describe_epochs(n) for n in (3, 0.5, 0.4)] == [
        '0.3 epochs', '0.1 epochs', 'less than 0.1 epochs']
