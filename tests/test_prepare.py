"""
data/*/prepare.py as a user runs them.
"""
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import publish
from advice import fit_block, suiting
from conftest import CHARS, TEXT
from tokenizer import BPETokenizer

BPE = BPETokenizer()

@pytest.fixture(scope='module')
def wide(tmp_path_factory):
    """ a tiny GPT-2 with random weights that reads 1024 tokens at once, as transformers saves it """
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('models') / 'wide'
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8)).save_pretrained(folder)
    return folder

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
    (clone / 'data' / 'shakespeare' / 'input.txt').write_text(text)
    for name in ('shakespeare', 'shakespeare_char'): # which takes the other's
        run(f'data/{name}/prepare.py')
    cut = int(len(text) * 0.9)
    bpe = clone / 'data' / 'shakespeare'
    assert read(bpe, 'train').tolist() == BPE.encode(text[:cut])
    assert read(bpe, 'val').tolist() == BPE.encode(text[cut:])
    assert len(read(clone / 'data' / 'shakespeare_char', 'train')) == cut

def test_a_text_that_cannot_be_fetched_says_which_file_to_put_where(run, clone):
    (clone / 'data' / 'shakespeare' / 'input.txt').unlink(missing_ok=True)
    done = run('data/shakespeare/prepare.py', '--url=http://127.0.0.1:9/input.txt', status=2)
    assert done.err.count('\n') == 2 and 'put the file at data/shakespeare/input.txt yourself' in done.err

@pytest.mark.parametrize('tokenizer', ['gpt2', 'char'])
def test_a_folder_of_texts_becomes_documents_that_end(run, clone, tmp_path, tokenizer):
    texts = {'a.txt': 'One. <|endoftext|> is text here.', 'b.md': 'Two, naïve.',
             'sub/c.txt': 'Three. ' * 40, 'd.jpg': 'no'}
    (tmp_path / 'in' / 'sub').mkdir(parents=True)
    for name, text in texts.items():
        (tmp_path / 'in' / name).write_text(text, encoding='utf-8')
    done = run('data/custom/prepare.py', f"--input={tmp_path / 'in'}", f'--name=mine_{tokenizer}',
               f'--tokenizer={tokenizer}')
    folder = clone / 'data' / f'mine_{tokenizer}'
    ids = [*read(folder, 'train').tolist(), *read(folder, 'val').tolist()]
    if tokenizer == 'gpt2':
        assert ids.count(50256) == 3 and ids[-1] == 50256
        whole = BPE.decode(ids)
        assert whole == ''.join(texts[name] + '<|endoftext|>' for name in ('a.txt', 'b.md', 'sub/c.txt'))
        assert not (folder / 'meta.pkl').exists()
    else:
        itos = pickle.loads((folder / 'meta.pkl').read_bytes())['itos']
        assert ''.join(itos[i] for i in ids) == ''.join(
            texts[n] + '\n' for n in ('a.txt', 'b.md', 'sub/c.txt'))
    assert f'--dataset=mine_{tokenizer}' in done.out

def test_end_of_text_is_a_token_where_it_is_allowed(run, clone, tmp_path):
    (tmp_path / 'a.txt').write_text('one<|endoftext|>two ' * 10)
    run('data/custom/prepare.py', f"--input={tmp_path / 'a.txt'}", '--name=allowed',
        '--allow_special=True', '--val_fraction=0.5')
    ids = {split: read(clone / 'data' / 'allowed', split).tolist() for split in ('train', 'val')}
    assert (sum(its.count(50256) for its in ids.values()) == 11
            and min(its.count(50256) for its in ids.values()) >= 4)
    assert ids['train'][-1] == ids['val'][-1] == 50256
    (tmp_path / 'a.jsonl').write_text('\n'.join(
        json.dumps({'text': f'story {i}<|endoftext|>'}) for i in range(40)))
    done = run('data/custom/prepare.py', f"--input={tmp_path / 'a.jsonl'}", '--name=ended',
               '--allow_special=True')
    assert ('40 documents, ' in done.out
            and done.out.count('to validate on, 4 documents from all parts of the text\n') == 1)
    assert BPE.decode(read(clone / 'data' / 'ended', 'val').tolist()).count('story') == 4 # none is a bare end

def kinds(folder):
    """ how many rows of each kind are in each split """
    return [{kind: BPE.decode(read(folder, split).tolist()).count(f'{kind} row') for kind in 'AB'}
            for split in ('train', 'val')]

def test_sorted_rows_are_validated_on_from_all_parts_or_on_a_file_of_their_own(run, clone, tmp_path):
    rows = [f'{kind} row {i}' for kind, n in (('A', 900), ('B', 100)) for i in range(n)]
    (tmp_path / 'sorted.csv').write_text('\n'.join(['text', *rows, '']))
    other = 'B row, and one more<|endoftext|>B row'
    (tmp_path / 'other.txt').write_text(other)
    done = run('data/custom/prepare.py', f"--input={tmp_path / 'sorted.csv'}", '--name=spread')
    assert kinds(clone / 'data' / 'spread') == [{'A': 810, 'B': 90}, {'A': 90, 'B': 10}]
    assert re.search(r'tokens to train on, [\d,]+ to validate on, 100 documents from all parts of the text\n',
                     done.out)
    given = (f"--input={tmp_path / 'sorted.csv'}", f"--val_input={tmp_path / 'other.txt'}")
    done = run('data/custom/prepare.py', *given, '--name=given', '--val_fraction=0.5')
    assert kinds(clone / 'data' / 'given') == [{'A': 900, 'B': 100}, {'A': 0, 'B': 2}]
    n, its = len('\n'.join(['', *rows])) - len(rows) + len(other), [*BPE.encode(other), 50256]
    assert (f'1,001 documents, {n:,} characters, ' in done.out
            and '<|endoftext|> in the text was read as text' in done.out)
    assert f"to train on, {len(its)} to validate on, all of {tmp_path / 'other.txt'}\n" in done.out
    run('data/custom/prepare.py', *given, '--name=given_char', '--tokenizer=char')
    itos = pickle.loads((clone / 'data' / 'given_char' / 'meta.pkl').read_bytes())['itos']
    split = {name: ''.join(itos[i] for i in read(clone / 'data' / 'given_char', name))
             for name in ('train', 'val')}
    assert split == {'train': '\n'.join([*rows, '']), 'val': other + '\n'} # 'n' is in the second alone
    error = run('data/custom/prepare.py', f"--input={tmp_path / 'sorted.csv'}", '--val_input=none.csv',
                '--name=given', status=2).err
    assert ('there is no none.csv; type the path of a file' in error
            and read(clone / 'data' / 'given', 'val').tolist() == its)

def whole(folder):
    return [*read(folder, 'train').tolist(), *read(folder, 'val').tolist()]

def test_a_large_text_goes_to_processes_and_a_pipe_gives_the_same(run, clone, tmp_path):
    text = TEXT.replace(' ', ' \u3000é', 99) * (5 * 2**20 // len(TEXT)) # more than four jobs
    (tmp_path / 'a.txt').write_text(text, encoding='utf-8')
    done = run('data/custom/prepare.py', f"--input={tmp_path / 'a.txt'}", '--name=large', '--workers=2')
    ids = whole(clone / 'data' / 'large')
    assert ids == [*BPE.encoding.encode_ordinary(text), 50256]
    assert f'1 document, {len(text):,} characters, {len(ids):,} tokens' in done.out
    assert done.err.count('name = ') == 1 # the processes do not start the script again
    command = [sys.executable, 'data/custom/prepare.py', '--input=-', '--name=piped', '--workers=1']
    subprocess.run(command, cwd=clone, input=text.encode(), check=True, capture_output=True)
    assert ((clone / 'data' / 'piped' / 'train.bin').read_bytes()
            == (clone / 'data' / 'large' / 'train.bin').read_bytes())

def test_a_row_is_a_document(run, clone, tmp_path):
    rows = ['One.', 'Two, "quoted"\nlines.', 'Three <|endoftext|>']
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'body': row}) for row in rows * 4))
    (tmp_path / 'a.csv').write_text('id,body\n' + ''.join(
        '7,"{}"\n'.format(row.replace('"', '""')) for row in rows * 4))
    for name in ('a.jsonl', 'a.csv'):
        done = run('data/custom/prepare.py', f'--input={tmp_path / name}', '--name=rows', '--text_field=body')
        assert whole(clone / 'data' / 'rows') == [i for row in rows * 4 for i in [*BPE.encode(row), 50256]]
        assert '12 documents, ' in done.out and 'to validate on, the end of the text\n' in done.out

def test_it_tells_the_epochs_of_a_default_run_and_warns_of_little_text(run, clone, tmp_path):
    (tmp_path / 'a.txt').write_text('a' + ' an' * 199_998) # with end-of-text 200,000 tokens
    done = run('data/custom/prepare.py', f"--input={tmp_path / 'a.txt'}", '--name=much')
    assert 'data/much: 180,000 tokens to train on, 20,000 to validate on' in done.out
    # 176 windows of 1024 an epoch, 64 an iteration: 20 epochs are 55 iterations
    assert '20.0 epochs of them, in 55 iterations of 65,536 tokens' in done.out and 'warning' not in done.out
    # with what suits so many, 16 an iteration: five epochs are as many iterations, with two evaluations
    # an epoch
    assert ('at most 5.0 epochs of them, in 55 iterations of 16,384 tokens, and ends after 4 evaluations'
            in done.out)
    assert done.out.endswith('--batch_size=8 --gradient_accumulation_steps=2 --num_epochs=5 '
                             '--eval_interval=5 --patience=4\n')
    (tmp_path / 'a.txt').write_text('Yes\nNo\nMaybe\n' * 300)
    done = run('data/custom/prepare.py', f"--input={tmp_path / 'a.txt'}", '--name=much', '--lines=True')
    assert 'so little text by heart' in done.out and '--patience' in done.out and 'English' not in done.out
    (tmp_path / 'a.txt').write_text('Все счастливые семьи похожи друг на друга. ' * 20)
    done = run('data/custom/prepare.py', f"--input={tmp_path / 'a.txt'}", '--name=much')
    assert ('warning: a token holds 0.9 characters here, and more than 3 in English' in done.out
            and '--tokenizer=char' in done.out)

@pytest.mark.parametrize('n_train, more', [
    (10**7, {'num_epochs': 3, 'eval_interval': 76, 'patience': 3}),
    (10**9, {'num_epochs': 1, 'eval_interval': 1525, 'eval_iters': 200})])
def test_much_text_is_given_few_evaluations(n_train, more):
    gpt2 = {'init_from': 'gpt2', 'block_size': 1024}
    assert suiting(gpt2, n_train) == {'batch_size': 8, 'gradient_accumulation_steps': 8, **more}
    assert suiting({**gpt2, 'init_from': 'scratch'}, n_train) == {}

@pytest.mark.parametrize('n, told', [
    # 43 windows of 1024, 4 an iteration: 10.75 iterations an epoch, 107.5 in ten, and 5 in half of one
    (48_760, ('43,884 tokens to train on', 'makes 19.3 epochs of them, in 13 iterations of 65,536 tokens',
              'at most 10.0 epochs of them, in 108 iterations of 4,096 tokens, and ends after 4',
              '--dataset=sized --out_dir=out-sized --lora_rank=8 --learning_rate=3e-4 --batch_size=4 '
              '--gradient_accumulation_steps=1 --num_epochs=10 --eval_interval=5 --patience=4\n')),
    (10_250, ('1,025 to validate on', 'in 25 iterations of 4,096 tokens',
              '--dataset=sized --out_dir=out-sized --lora_rank=8')),
    # a sequence of 1024 and the token after it are one more than there are; 18 windows of 512
    (10_240, ('1,024 to validate on', 'gpt2_small.py with --block_size=512 makes 21.3 epochs',
              'and 1,024 to validate on are few',
              'at most 10.0 epochs of them, in 45 iterations of 2,048 tokens',
              '--dataset=sized --out_dir=out-sized --block_size=512 --lora_rank=8')),
    (21, ('2 to validate on', 'and 2 to validate on are few', '--block_size=1 '))])
def test_little_text_is_given_a_run_that_fits_it(run, tmp_path, n, told):
    (tmp_path / 'a.txt').write_text('a' + ' a' * (n - 2))
    done = run('data/custom/prepare.py', f"--input={tmp_path / 'a.txt'}", '--name=sized')
    assert [text for text in told if text not in done.out] == [], done.out

def test_the_command_for_little_text_runs_as_told_and_ends_where_patience_says(run, tmp_path, wide):
    (tmp_path / 'a.txt').write_text('a b c d ' * 90 + 'every word is another now ' * 10)
    told = run('data/custom/prepare.py', f"--input={tmp_path / 'a.txt'}", '--name=brief').out
    command = told.rpartition('next: python train.py ')[2].split()
    made = run('train.py', *command, f'--init_from={wide}', '--device=cpu', '--dtype=float32',
               f"--out_dir={tmp_path / 'out'}")
    epochs, iters = re.search(r'at most ([\d.]+) epochs of them, in (\d+) iterations of', told).groups()
    assert f'{iters} iterations are {epochs} epochs' in made.out
    assert '4 evaluations in a row were no better than that of iteration 0, so it ended' in made.out
    evaluated = [int(i) for i, loss in zip(made.column('iter'), made.column('val_loss')) if loss]
    assert len(evaluated) == 5 and evaluated[-1] < int(iters)

def test_little_text_in_characters_is_given_a_run_that_fits_it(run, tmp_path):
    (tmp_path / 'a.txt').write_text(TEXT[:999])
    told = run('data/custom/prepare.py', f"--input={tmp_path / 'a.txt'}", '--name=brief_chars',
               '--tokenizer=char').out
    command = told.rpartition('next: python train.py ')[2].split()
    assert command[2:] == ['--out_dir=out-brief_chars', '--block_size=64', '--eval_interval=50',
                           '--patience=4']
    made = run('train.py', *command, f"--out_dir={tmp_path / 'out'}", '--max_iters=2', '--device=cpu')
    assert 'finished at iteration 2' in made.out

def test_characters_of_another_dataset_keep_their_ids(run, clone, tmp_path):
    (tmp_path / 'a.txt').write_text(TEXT[:500])
    run('data/custom/prepare.py', f"--input={tmp_path / 'a.txt'}", '--name=again', '--tokenizer=chars')
    assert whole(clone / 'data' / 'again') == [CHARS.index(char) for char in TEXT[:500] + '\n']
    assert (pickle.loads((clone / 'data' / 'again' / 'meta.pkl').read_bytes())
            == pickle.loads((clone / 'data' / 'chars' / 'meta.pkl').read_bytes()))
    (tmp_path / 'a.txt').write_text(TEXT[:500] + '東')
    done = run('data/custom/prepare.py', f"--input={tmp_path / 'a.txt'}", '--name=again',
               '--tokenizer=chars', status=2)
    assert "character 501 of" in done.err and "'東', not one of the" in done.err

@pytest.fixture
def old(clone):
    """ a dataset that is there already, with all that one may have, and what its files hold """
    folder = clone / 'data' / 'old'
    folder.mkdir(exist_ok=True)
    for name in ('train.bin', 'val.bin', 'meta.pkl', 'train_mask.bin', 'val_mask.bin', 'template.txt'):
        (folder / name).write_bytes(name.encode())
    return folder

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

def test_nothing_of_an_earlier_dataset_stays_beside_a_new_one(run, old, tmp_path):
    (tmp_path / 'a.txt').write_text(TEXT)
    run('data/custom/prepare.py', f"--input={tmp_path / 'a.txt'}", '--name=old')
    assert sorted(contents(old)) == ['train.bin', 'val.bin']

@pytest.mark.parametrize('tokenizer', ['gpt2', 'char'])
def test_an_error_leaves_the_earlier_dataset_as_it_was(run, clone, old, tmp_path, tokenizer):
    before = contents(old)
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'a.txt').write_text(TEXT)
    (tmp_path / 'in' / 'b.txt').write_bytes(b'caf\xe9')
    options = f"--input={tmp_path / 'in'}", f'--tokenizer={tokenizer}'
    done = run('data/custom/prepare.py', *options, '--name=old', status=2)
    assert 'b.txt is not UTF-8 at byte 3;' in done.err and contents(old) == before
    run('data/custom/prepare.py', *options, '--name=new', status=2)
    assert not (clone / 'data' / 'new').exists()

def test_a_full_disk_is_told_in_a_line_and_leaves_the_earlier_dataset_as_it_was(old):
    before = contents(old)
    with (pytest.raises(OSError, match='old .No space left on device.; make room on the disk'),
          publish.publish(str(old)) as place):
        pathlib.Path(place, 'train.bin').write_bytes(b'some')
        raise OSError(28, 'No space left on device')
    assert contents(old) == before

def test_files_of_two_datasets_are_never_mixed(old, monkeypatch):
    replace, moved = os.replace, []
    def once(path, to): # and then Ctrl-C
        if moved:
            raise KeyboardInterrupt
        moved.append(replace(path, to))
    monkeypatch.setattr(publish.os, 'replace', once)
    with pytest.raises(KeyboardInterrupt), publish.publish(str(old)) as place:
        for name in ('train.bin', 'val.bin', 'meta.pkl'):
            pathlib.Path(place, name).write_bytes(b'new')
    assert contents(old) == {'meta.pkl': b'new'}

@pytest.mark.parametrize('sent', [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_the_earlier_dataset_as_it_was(clone, old, sent):
    before = contents(old)
    command = [sys.executable, 'data/custom/prepare.py', '--input=-', '--name=old', '--workers=2']
    process = subprocess.Popen(command, cwd=clone, stdin=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    process.stdin.write(b'some words ' * (7 * 2**20 // 11)) # enough to have started the processes
    process.stdin.flush()
    assert any(path.name.startswith('unfinished-') for path in old.iterdir())
    os.killpg(process.pid, sent) # a terminal, too, sends it to all of them
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and 'Traceback' not in error, error
    assert contents(old) == before

@pytest.mark.parametrize('script, name', [('custom', 'a.txt'), ('instruct', 'a.jsonl')])
def test_what_is_validated_on_and_trained_on_is_warned_of(run, tmp_path, script, name):
    words = ['one two', 'three four', 'five six', 'seven eight']
    lines = [f'{words[i % 4]} {words[i // 4 % 4]} {i if i < 80 else i % 20}' for i in range(100)]
    rows = [json.dumps({'instruction': 'Go on.', 'output': line}) for line in lines]
    (tmp_path / name).write_text('\n'.join(rows if script == 'instruct' else lines))
    options = '--name=repeats', *(['--lines=True'] if script == 'custom' else [])
    out = run(f'data/{script}/prepare.py', f'--input={tmp_path / name}', *options).out
    told = re.search(r'warning: (\d+) of the 10 to validate on are also trained on', out)
    alike = {i for i in range(100) if lines.count(lines[i]) > 1}
    assert bool(told) == bool(alike) and 1 <= int(told[1]) <= 5
    (tmp_path / name).write_text('\n'.join(dict.fromkeys(rows if script == 'instruct' else lines)))
    out = run(f'data/{script}/prepare.py', f'--input={tmp_path / name}', *options).out
    assert 'also trained on' not in out

def test_a_link_to_what_is_validated_on_is_warned_of(run, tmp_path):
    (tmp_path / 'texts').mkdir()
    (tmp_path / 'val.txt').write_text('What is held back. ' * 20)
    (tmp_path / 'texts' / 'a.txt').write_text(TEXT)
    (tmp_path / 'texts' / 'b.txt').symlink_to(tmp_path / 'val.txt')
    out = run('data/custom/prepare.py', f"--input={tmp_path / 'texts'}",
              f"--val_input={tmp_path / 'val.txt'}", '--name=linked').out
    assert 'warning: 1 of the 1 to validate on are also trained on' in out

def test_a_sequence_is_shorter_than_what_is_validated_on_an_eighth_of_the_text_at_most_and_cuts_no_item():
    config = {'block_size': 1024}
    assert fit_block(config, 8192, 1025, 0) == {}
    assert fit_block(config, 8191, 1025, 0) == {'block_size': 512}
    assert fit_block(config, 8192, 1024, 0) == {'block_size': 512}
    assert fit_block(config, 4000, 4000, 600) == {} # an item of 600 would not fit into 512
    assert fit_block(config, 4000, 4000, 512) == {'block_size': 512}

@pytest.mark.parametrize('n_train, sequences, epochs', [
    (10**5 - 1, 4, 10), (10**5, 16, 5), (10**6 - 1, 16, 5), (10**6, 64, 3), (10**8 - 1, 64, 3),
    (10**8, 64, 1)])
def test_so_much_text_is_read_so_often(n_train, sequences, epochs):
    more = suiting({'init_from': 'gpt2', 'block_size': 1024}, n_train)
    assert more['batch_size'] * more['gradient_accumulation_steps'] == sequences
    assert more['num_epochs'] == epochs and ('lora_rank' in more) == (n_train < 10**5)

def test_end_of_text_that_is_read_as_a_token_is_not_said_to_be_text(run, tmp_path):
    (tmp_path / 'a.txt').write_text('one<|endoftext|>two ' * 10)
    for options, told in (((), True), (('--allow_special=True',), False)):
        out = run('data/custom/prepare.py', f"--input={tmp_path / 'a.txt'}", '--name=marked', *options).out
        assert ('<|endoftext|> in the text was read as text' in out) == told

def test_each_document_of_another_file_is_compared_with_those_to_train_on(run, tmp_path):
    lines = [f'{n}. What is said once.' for n in range(40)]
    (tmp_path / 'a.txt').write_text('\n'.join(lines))
    (tmp_path / 'b.txt').write_text('\n'.join(['not there', *lines[:3], 'nor this']))
    out = run('data/custom/prepare.py', f"--input={tmp_path / 'a.txt'}", f"--val_input={tmp_path / 'b.txt'}",
              '--lines=True', '--name=compared').out
    assert 'warning: 3 of the 5 to validate on are also trained on' in out
