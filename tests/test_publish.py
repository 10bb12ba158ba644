import hashlib
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import publish
from publish import choose_val, split_off, tell_place, tell_repeats

def test_a_few_documents_or_one_that_is_most_of_them_are_validated_on_at_their_end():
    def choose_of(lengths, **options):
        ends = np.cumsum(lengths)
        pieces = choose_val(ends, 0.1, **options)
        return pieces.tolist(), tell_place(pieces, ends)
    assert choose_of([100]) == ([[90, 100]], '')
    assert choose_of([10, 10, 10]) == ([[27, 30]], ', the end of the text')
    assert choose_val(np.array([10, 20]), 0.7).tolist() == [[6, 20]] # else both, and none to train on
    assert choose_of([10, 10, 10], whole=True) == ([[20, 30]], ', the end of the text')
    (piece,), told = choose_of([10] * 10)
    assert np.diff(piece) == 10 and told == ', one of the documents'
    n = piece[0] // 10 # which one is drawn
    # it would be nearly all
    assert choose_of([10] * n + [1000] + [10] * (9 - n)) == ([[981, 1090]], ', the end of the text')
    # and here nearly nothing
    assert choose_of([100] * n + [1] + [100] * (9 - n), whole=True) == ([[801, 901]], ', the end of the text')

@pytest.mark.parametrize('period', [8, 10, 21, 34, 50, 55, 89, 100])
def test_kinds_that_take_turns_are_validated_on_as_random_rows_would_be(period):
    pieces = choose_val(np.arange(1, 10**5 + 1), 0.1)
    assert len(pieces) == 10**4 and (np.diff(pieces) == 1).all()
    share = np.bincount(pieces[:, 0] % period, minlength=period) / (10**4 / period)
    assert 0.6 < share.min() and share.max() < 1.4
    assert all(len(part) == 10**3
               for part in np.split(pieces, np.searchsorted(pieces[:, 0], range(10**4, 10**5, 10**4))))

@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=40), fraction=st.floats(0.01, 0.99),
       block=st.integers(1, 20), dtype=st.sampled_from(['u1', '<u2']))
def test_what_is_validated_on_is_moved_and_the_rest_stays_in_order(
        tmp_path_factory, lengths, fraction, block, dtype):
    folder, ids = tmp_path_factory.mktemp('d'), np.arange(sum(lengths)).astype(dtype)
    ids.tofile(folder / 'train.bin')
    pieces = choose_val(np.cumsum(lengths), fraction)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, 'BLOCK', block)
        split_off(str(folder), '.bin', pieces, dtype)
    val = np.concatenate([ids[start:end] for start, end in pieces]).tolist()
    assert np.fromfile(folder / 'val.bin', dtype).tolist() == val
    assert np.fromfile(folder / 'train.bin', dtype).tolist() == [i for i in ids.tolist() if i not in val]

def test_what_is_drawn_is_validated_on_from_half_of_the_share_on():
    (piece,) = choose_val(np.arange(10, 101, 10), 0.1) # one of ten
    n = piece[0] // 10
    for length, start in ((4, 94 - 9), (6, 10 * n)): # of 94 or 96 tokens
        ends = np.cumsum([10] * n + [length] + [10] * (9 - n))
        assert choose_val(ends, 0.1)[0, 0] == start

@pytest.mark.parametrize('n, warned', [(0, False), (9, False), (10, True), (1000, True)])
def test_repeats_are_warned_of_from_one_in_a_hundred_on(n, warned):
    sums, ends = np.arange(2000), np.arange(1, 2001)
    sums[1000:1000 + n] = sums[:n]
    told = tell_repeats(sums, ends, np.array([[1000, 2000]]))
    assert (f'warning: {n:,} of the 1,000 to validate on are also trained on' in told) == warned == bool(told)

def test_a_text_that_was_fetched_in_part_is_not_taken_for_whole(tmp_path, monkeypatch):
    path, text = tmp_path / 'input.txt', b'the text'
    answer = types.SimpleNamespace(content=text, raise_for_status=lambda: None)
    monkeypatch.setitem(sys.modules, 'requests', types.SimpleNamespace(
        get=lambda *args, **options: answer, RequestException=OSError))
    def killed(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(publish.os, 'replace', killed)
        with pytest.raises(KeyboardInterrupt):
            publish.fetch('http://x/input.txt', str(path), hashlib.sha256(text).hexdigest())
    assert not path.exists()
    assert publish.fetch('http://x/input.txt', str(path), hashlib.sha256(text).hexdigest()) == 'the text'
