import itertools
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import encode
from conftest import ROOT, TEXT
from tokenizer import BPETokenizer

BPE = BPETokenizer()
ALPHABET = "ab1.'sé東🙂<|> \n\r\t\x0b\x1c\x85\xa0\u2003\u2028\u3000"

def cut(text, size):
    return (text[i:i + size] for i in range(0, len(text), size))

def written(tmp_path, texts, size, **options):
    documents = [('a.txt', cut(text, size)) for text in texts]
    ends = encode.write_tokens(str(tmp_path / 'a.bin'), documents, BPE, **options).tolist()
    ids = np.fromfile(tmp_path / 'a.bin', '<u2').tolist()
    assert ends == [i for i, token in enumerate(ids, 1) if token == BPE.eot and ids[i:i + 1] != [BPE.eot]
                    and (i > 1 or len(set(ids)) == 1)] # no empty ones
    return ids

@pytest.mark.skipif(not hasattr(encode.os, 'sched_getaffinity'),
                    reason="only Linux tells which cores a process may use")
def test_a_process_with_one_core_starts_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, 'JOB', 10)
    monkeypatch.setattr(encode.os, 'sched_getaffinity', lambda pid: {3})
    monkeypatch.setattr(encode, 'encode_in_processes', None)
    assert written(tmp_path, ['a b ' * 100], 10) == [*BPE.encode('a b ' * 100), 50256]

def test_no_more_processes_are_started_than_windows_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, 'JOB', 10)
    monkeypatch.setattr(encode.os, 'name', 'nt')
    started = []
    monkeypatch.setattr(encode, 'encode_in_processes', lambda jobs, tokenizer, special, workers:
                        started.append(workers) or (job for job in ()))
    encode.write_tokens(str(tmp_path / 'a.bin'), [('a.txt', cut('a b ' * 100, 10))], BPE, workers=96)
    assert started == [61]

@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(ALPHABET, min_size=1, max_size=60), max_size=4), st.integers(1, 9),
       st.integers(1, 20), st.booleans())
def test_ids_equal_tiktoken_s_of_each_whole_document(tmp_path_factory, texts, size, job, special):
    if special:
        texts = [text + '<|endoftext|> ' for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, 'JOB', job)
        ids = written(tmp_path_factory.getbasetemp(), texts, size, workers=1)
    assert ids == [i for text in texts for i in [*BPE.encoding.encode_ordinary(text), 50256]]

@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab1.'é東🙂 \n\t\x1c\x85\u3000", max_size=80), st.integers(1, 20))
def test_pieces_have_the_ids_of_the_whole(text, size):
    pieces = list(encode.cut_text(cut(text, size), BPE))
    assert ''.join(pieces) == text
    assert sum(map(BPE.encode, pieces), []) == BPE.encode(text)

PARTS = ["a", "'", "s", "'s", "'re", "'ll", "l", "|", "<|endoftext|>", "<|", "|>", "1", "²", "Ⅷ", "三", "東京",
         "。", "，", "é", "e\u0301", "\u0301", "ไทย", "ี้", "🙂", "👩\u200d💻", "_", "'\u0301", "\u0378", "\ua7cb",
         "\U00010d40", " ", "\u3000", "\n"]

@settings(max_examples=600, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=30).map(''.join),
                min_size=1, max_size=3), st.integers(2, 9), st.integers(1, 20), st.booleans())
def test_ids_equal_tiktoken_s_where_cuts_are_between_kinds_of_characters(
        tmp_path_factory, texts, size, job, allow):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, 'JOB', job)
        ids = written(tmp_path_factory.getbasetemp(), texts, size, workers=1, allow_special=allow)
    assert ids == [i for text in texts for i in [*BPE.encode(text, allow_special=allow), 50256]]

def test_text_without_white_space_is_not_held_but_for_a_run_of_one_kind():
    text = ('漢字仮名交じり文' * 20 + '。') * 50
    pieces = list(encode.cut_text(cut(text, 400), BPE))
    assert ''.join(pieces) == text and max(map(len, pieces)) <= 2 * 400
    assert [len(piece) for piece in encode.cut_text(cut('漢' * 2000, 400), BPE)] == [2000]

def test_a_character_is_of_the_kind_that_tiktoken_sees_in_it():
    every = ''.join(map(chr, [*range(0xd800), *range(0xe000, 0x30000)]))
    kinds = [encode.kind(char) for char in every]
    for kind, pattern in (('letter', r'\p{L}'), ('number', r'\p{N}'), ('other', r'[^\s\p{L}\p{N}]')):
        bytes_only = tiktoken.Encoding( # it leaves out what the pattern does not match
            'x', pat_str=pattern, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
        found = {*bytes(bytes_only.encode_ordinary(every)).decode()}
        mine = {char for char, k in zip(every, kinds) if k == kind}
        assert mine <= found and len(mine) > 500

def test_end_of_text_is_a_token_where_it_is_allowed(tmp_path):
    text = 'one <|endoftext|> two<|endoftext|>'
    assert written(tmp_path, [text], 5, allow_special=True) == [*BPE.encode(text, allow_special=True), 50256]

def test_processes_write_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, 'JOB', 2000)
    ids = written(tmp_path, [TEXT, 'x', TEXT], 1000, workers=2)
    assert ids == [*BPE.encode(TEXT), 50256, *BPE.encode('x'), 50256, *BPE.encode(TEXT), 50256]

def test_endless_text_is_read_no_faster_than_it_is_encoded():
    n_read = itertools.count()
    jobs = ([f'text {next(n_read)}', None] for _ in itertools.count())
    results = encode.encode_in_processes(jobs, BPE, False, 2)
    assert [BPE.decode(np.frombuffer(next(results), '<u2')) for _ in range(9)] == [
        f'text {i}<|endoftext|>' for i in range(9)]
    assert next(n_read) <= 9 + 2 * 2
    results.close()
    assert not multiprocessing.active_children()

def test_a_process_that_was_killed_is_told_in_one_line():
    results = encode.encode_in_processes((['text', None] for _ in itertools.count()), BPE, False, 1)
    next(results)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(OSError, match='type --workers=1'):
        list(itertools.islice(results, 100))

def test_characters_are_numbered_in_the_order_of_their_code_points(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, 'JOB', 3)
    chars, (ends, others) = encode.write_characters({
        str(tmp_path / 'a.bin'): [('a', ['b🙂', 'a']), ('b', ['é'])],
        str(tmp_path / 'b.bin'): [('c', ['ä'])]})
    assert (chars, ends.tolist(), others.tolist()) == (['\n', 'a', 'b', 'ä', 'é', '🙂'], [4, 6], [2])
    assert np.fromfile(tmp_path / 'a.bin', '<u2').tolist() == [2, 5, 1, 0, 4, 0]
    assert np.fromfile(tmp_path / 'b.bin', '<u2').tolist() == [3, 0]

def test_known_characters_keep_their_ids_and_another_is_placed(tmp_path):
    known = ['b', '\n', 'a']
    path = str(tmp_path / 'a.bin')
    chars, (ends,) = encode.write_characters({path: [('x.txt', ['ab', 'a'])]}, known)
    assert chars == known and ends.tolist() == [4]
    assert np.fromfile(path, '<u2').tolist() == [2, 0, 2, 1]
    with pytest.raises(ValueError, match="character 4 of x.txt is 'é', not one of the 3"):
        encode.write_characters({path: [('x.txt', ['ab', 'aé'])]}, known)

def test_more_characters_than_ids_are_refused(tmp_path):
    text = ''.join(chr(0x10000 + i) for i in range(2**16))
    with pytest.raises(ValueError, match='65,537 different characters'):
        encode.write_characters({str(tmp_path / 'a.bin'): [('x', [text])]})

ENCODES = """
import itertools, multiprocessing, time
import encode
from tokenizer import BPETokenizer
if __name__ == '__main__':
    jobs = (['text', None] for _ in itertools.count())
    results = encode.encode_in_processes(jobs, BPETokenizer(), False, 2)
    next(results)
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    time.sleep(600)
"""

def runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE # where nothing reaps what has lost its parent
    except psutil.NoSuchProcess:
        return False

def test_the_processes_that_encode_end_with_one_that_was_killed(tmp_path):
    (tmp_path / 'encodes.py').write_text(ENCODES)
    with subprocess.Popen([sys.executable, tmp_path / 'encodes.py'], stdout=subprocess.PIPE, encoding='utf-8',
                          env={**os.environ, 'PYTHONPATH': ROOT}) as parent:
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    end = time.time() + 30
    while any(map(runs, workers)) and time.time() < end:
        time.sleep(0.05)
    left = list(filter(runs, workers))
    for process in left:
        process.kill()
    assert workers and not left
