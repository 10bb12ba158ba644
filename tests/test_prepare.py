"""
data/*/prepare.py as a user runs them.
"""
import pickle

import numpy as np
import pytest

from tokenizer import BPETokenizer

def read(folder, split):
    return np.fromfile(folder / f'{split}.bin', dtype='<u2')

def test_quickstart_builds_the_same_prose_every_time(run, clone):
    folder = clone / 'data' / 'quickstart'
    run('data/quickstart/prepare.py')
    first = [(folder / name).read_bytes() for name in ('train.bin', 'val.bin', 'meta.pkl')]
    run('data/quickstart/prepare.py')
    assert first == [(folder / name).read_bytes() for name in ('train.bin', 'val.bin', 'meta.pkl')]
    train, val = read(folder, 'train'), read(folder, 'val')
    assert 1_000_000 <= len(train) + len(val) <= 3_000_000 and abs(len(val) / len(train) - 1 / 9) < 0.001
    itos = pickle.loads(first[2])['itos']
    assert ''.join(itos[i] for i in train).count(' the ') > 2000

def test_shakespeare_uses_the_text_that_is_there(run, clone):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20
    for name in ('shakespeare', 'shakespeare_char'):
        (clone / 'data' / name / 'input.txt').write_text(text)
        run(f'data/{name}/prepare.py')
    cut = int(len(text) * 0.9)
    bpe = clone / 'data' / 'shakespeare'
    assert read(bpe, 'train').tolist() == BPETokenizer().encode(text[:cut])
    assert read(bpe, 'val').tolist() == BPETokenizer().encode(text[cut:])
    assert len(read(clone / 'data' / 'shakespeare_char', 'train')) == cut

def test_a_text_that_cannot_be_fetched_says_which_file_to_put_where(run, clone):
    (clone / 'data' / 'shakespeare' / 'input.txt').unlink(missing_ok=True)
    done = run('data/shakespeare/prepare.py', '--url=http://127.0.0.1:9/input.txt', status=2)
    assert done.err.count('\n') == 2 and 'put the file at data/shakespeare/input.txt yourself' in done.err

@pytest.mark.parametrize('tokenizer', ['gpt2', 'char'])
def test_a_folder_of_texts_becomes_documents_that_end(run, clone, tmp_path, tokenizer):
    texts = {'a.txt': 'One. <|endoftext|> is text here.', 'b.md': 'Two, naïve.', 'sub/c.txt': 'Three. ' * 40, 'd.jpg': 'no'}
    (tmp_path / 'in' / 'sub').mkdir(parents=True)
    for name, text in texts.items():
        (tmp_path / 'in' / name).write_text(text, encoding='utf-8')
    done = run('data/custom/prepare.py', f"--input={tmp_path / 'in'}", f'--name=mine_{tokenizer}', f'--tokenizer={tokenizer}')
    folder = clone / 'data' / f'mine_{tokenizer}'
    ids = [*read(folder, 'train').tolist(), *read(folder, 'val').tolist()]
    if tokenizer == 'gpt2':
        assert ids.count(50256) == 3 and ids[-1] == 50256
        whole = BPETokenizer().decode(ids)
        assert whole == ''.join(texts[name] + '<|endoftext|>' for name in ('a.txt', 'b.md', 'sub/c.txt'))
        assert not (folder / 'meta.pkl').exists()
    else:
        itos = pickle.loads((folder / 'meta.pkl').read_bytes())['itos']
        assert ''.join(itos[i] for i in ids) == ''.join(texts[n] + '\n' for n in ('a.txt', 'b.md', 'sub/c.txt'))
    assert f'--dataset=mine_{tokenizer}' in done.out

def test_end_of_text_is_a_token_where_it_is_allowed(run, clone, tmp_path):
    (tmp_path / 'a.txt').write_text('one<|endoftext|>two ' * 10)
    run('data/custom/prepare.py', f"--input={tmp_path / 'a.txt'}", '--name=allowed', '--allow_special=True', '--val_fraction=0.5')
    assert (read(clone / 'data' / 'allowed', 'train') == 50256).sum() == 5
