"""
instruct.py, and data/instruct/prepare.py as a user runs it.
"""
import csv
import json
import os
import re

import numpy as np
import pytest
import torch

from dataset import read_template
from instruct import TEMPLATE, encode, read_turns, render
from model import GPT, GPTConfig
from tokenizer import BPETokenizer

BPE = BPETokenizer()
HEAD = 'Below is an instruction that describes a task. Write a response that completes it.\n\n'

def test_a_prompt_is_the_template_with_its_parts():
    assert render(TEMPLATE, 'Translate.', 'Bonjour') == (
        HEAD + '### Instruction:\nTranslate.\n\n### Input:\nBonjour\n\n### Response:\n')
    for nothing in ('', ' \n'):
        assert render(TEMPLATE, 'Say hi.', nothing) == HEAD + '### Instruction:\nSay hi.\n\n### Response:\n'

def test_braces_in_what_a_user_writes_are_text():
    assert render('{instruction}|{input}|{other}', '{input}{instruction}{0}', '{instruction}\\1') == (
        '{input}{instruction}{0}|{instruction}\\1|{other}')

@pytest.mark.parametrize('template', ['', 'Question:', '{input}', '{ instruction }',
                                      '{instruction} {input}\n\nAnswer: '])
def test_a_template_that_would_lose_the_instruction_is_refused(template):
    with pytest.raises(ValueError, match='no {instruction}'):
        render(template, 'Say hi.')

def test_turns_of_a_conversation_are_told_apart():
    talk = [('system', 'Be brief.'), ('user', 'Hi.'), ('assistant', 'Hello.'), ('user', 'One.'),
            ('user', 'Two.'), ('assistant', 'Three.'), ('user', 'And?')]
    item = {'messages': [{'role': role, 'content': content} for role, content in talk]}
    assert read_turns(item) == [('Be brief.\n\nHi.', '', 'Hello.'), ('One.\n\nTwo.', '', 'Three.')]
    assert read_turns({'instruction': 'a', 'input': None, 'output': ''}) == [('a', '', '')]

@pytest.mark.parametrize('item, turn', [
    ({'prompt': 'Capital?', 'completion': ' Paris.'}, ('Capital?', '', ' Paris.')), # OpenAI's and TRL's
    ({'instruction': 'Capital?', 'context': 'France', 'response': 'Paris.', 'category': 'qa'},
     ('Capital?', 'France', 'Paris.')), # Dolly
    ({'question': 'Capital?', 'answer': 'Paris.'}, ('Capital?', '', 'Paris.')),
    ({'system_prompt': 'Be brief.', 'question': 'Capital?', 'response': 'Paris.'},
     ('Be brief.\n\nCapital?', '', 'Paris.')),
    ({'system_prompt': ' ', 'query': 'Capital?', 'response': 'Paris.'}, ('Capital?', '', 'Paris.')),
    ({'prompt': 'all', 'instruction': 'Capital?', 'context': 'no', 'input': 'France', 'answer': 'no',
      'output': 'Paris.'}, ('Capital?', 'France', 'Paris.')),
    ({'instruction': None, 'prompt': 'Capital?', 'output': 'Paris.', 'messages': None},
     ('Capital?', '', 'Paris.')),
    ({'question': '2 + 2?', 'context': 2.5, 'answer': 4}, ('2 + 2?', '2.5', '4')),
    ({'query': 'True?', 'context': float('nan'), 'answer': False}, ('True?', '', 'false'))])
def test_an_item_may_have_the_names_of_other_datasets(item, turn):
    assert read_turns(item) == [turn]

def test_a_conversation_of_sharegpt_is_one_of_messages():
    told = [('system', 'Be brief.'), ('human', 'Hi.'), ('gpt', 'Hello.'), ('human', 'Bye.'),
            ('gpt', 'So long.')]
    item = {'id': 'x', 'conversations': [{'from': who, 'value': text} for who, text in told]}
    assert read_turns(item) == [('Be brief.\n\nHi.', '', 'Hello.'), ('Bye.', '', 'So long.')]
    with pytest.raises(ValueError, match='no assistant turn in its conversations'):
        read_turns({'conversations': item['conversations'][:2]})

def message(role, content):
    return {'role': role, 'content': content}

BROKEN = [{}, {'instruction': 'a'}, {'instruction': ['a'], 'output': 'b'},
          {'instruction': ' ', 'output': 'b'}, {'instruction': 'a', 'input': {}, 'output': 'b'},
          {'messages': []}, {'messages': 'hi'}, {'messages': None}, {'messages': [message('user', 'a')]},
          {'messages': [message('assistant', 'a')]}, {'messages': [{'role': 'user'}]},
          {'messages': [message('user', 'a'), message('assistant', 'b'), message('assistant', 'c')]},
          {'messages': [message('tool', 'a'), message('assistant', 'b')]},
          {'messages': [message('user', ['a'])]}, {'messages': [message(['user'], 'a')]},
          {'conversations': [{'from': 'observation', 'value': 'a'}]},
          {'conversations': [{'from': 'human', 'content': 'a'}]},
          {'prompt': [message('user', 'a')], 'completion': 'b'}, {'prompt': 'a', 'answer': ['b']},
          {'system': [3], 'question': 'a', 'answer': 'b'},
          {'messages': [message('user', ' '), message('assistant', 'b')]},
          {'prompt': 'a', 'context': ['b'], 'answer': 'c'}]

@pytest.mark.parametrize('item', BROKEN, ids=str)
def test_an_item_that_is_not_whole_is_refused(item):
    with pytest.raises(ValueError, match='^has .*expected'):
        read_turns(item)

def test_only_answers_and_their_ends_count():
    ids, mask = encode([('What is 2 + 2?', '', 'Four.')], 'Q: {instruction}\nA: ', BPE)
    assert ids == [48, 25, 1867, 318, 362, 1343, 362, 30, 198, 32, 25, 220, 15137, 13, 50256]
    assert mask == [0] * 12 + [1, 1, 2] # Four, ., end-of-text
    two = encode([('a', '', 'b'), ('c', '', 'd')], '{instruction}', BPE)[1]
    assert two == [0, 1, 1, 0, 1, 2] # an item is all of a conversation

ITEMS = [{'instruction': 'Add one to {input}.', 'input': '1', 'output': 'Two.'},
         {'instruction': 'Say hi.', 'output': ' Hi <|endoftext|>!'},
         {'messages': [message('user', 'é?'), message('assistant', 'É!'), message('user', 'Bye.'),
                       message('assistant', '')]}]

def prepare(run, tmp_path, *options, items=ITEMS, **kwargs):
    (tmp_path / 'items.jsonl').write_text('\n'.join(map(json.dumps, items)))
    return run('data/instruct/prepare.py', f"--input={tmp_path / 'items.jsonl'}", *options, **kwargs)

def read(folder, split):
    ids, mask = np.fromfile(folder / f'{split}.bin', '<u2'), np.fromfile(folder / f'{split}_mask.bin', 'u1')
    assert len(ids) == len(mask)
    return ids, mask

def test_the_script_writes_what_a_hand_would(run, clone, tmp_path):
    folder = clone / 'data' / 'asked'
    folder.mkdir()
    (folder / 'meta.pkl').write_bytes(b'of an earlier dataset')
    done = prepare(run, tmp_path, '--name=asked')
    train, val = read(folder, 'train'), read(folder, 'val') # the third item is for validation
    asked = HEAD + '### Instruction:\n%s\n\n### Response:\n'
    with_input = HEAD + '### Instruction:\nAdd one to {input}.\n\n### Input:\n1\n\n### Response:\n'
    end = '<|endoftext|>'
    assert BPE.decode(train[0]) == with_input + 'Two.' + end + asked % 'Say hi.' + ' Hi <|endoftext|>!' + end
    assert BPE.decode(val[0]) == asked % 'é?' + 'É!' + end + asked % 'Bye.' + end
    assert BPE.decode(train[0][train[1] > 0]) == 'Two.' + end + ' Hi <|endoftext|>!' + end
    assert BPE.decode(val[0][val[1] > 0]) == 'É!' + end + end
    assert (train[0] == 50256).sum() == (val[0] == 50256).sum() == 2 # a user's text is never a special token
    assert (folder / 'template.txt').read_bytes() == TEMPLATE.encode()
    assert sorted(p.name for p in folder.iterdir()) == ['template.txt', 'train.bin', 'train_mask.bin',
                                                        'val.bin', 'val_mask.bin']
    n, share = (len(train[0]) + len(val[0]),
                (np.count_nonzero(train[1]) + np.count_nonzero(val[1])) / (len(train[1]) + len(val[1])))
    assert (f'3 items, {n} tokens, of which {share:.1%} are answers' in done.out
            and 'are longer than' not in done.out)

PIPED = """
import os, runpy, sys
read, write = os.pipe()
os.write(write, open({!r}, 'rb').read()); os.close(write)
sys.argv = [*sys.argv[1:], f'--input=/dev/fd/{{read}}']
sys.path.insert(0, '.')
runpy.run_path(sys.argv[0], run_name='__main__')
"""

def test_a_list_in_json_is_the_same_as_its_lines(run, clone, tmp_path):
    prepare(run, tmp_path, '--name=lines')
    (tmp_path / 'items.json').write_text(json.dumps(ITEMS, indent=1))
    run('data/instruct/prepare.py', f"--input={tmp_path / 'items.json'}", '--name=listed')
    (tmp_path / 'dataset_infos.json').write_text('{}') # which a folder's reader leaves alone
    run('data/instruct/prepare.py', f'--input={tmp_path}', '--name=folder')
    if os.path.exists('/dev/fd'): # as of <(zcat items.jsonl.gz)
        piped = run('data/instruct/prepare.py', '--name=piped',
                    launch=('-c', PIPED.format(str(tmp_path / "items.jsonl"))), env={})
        assert '3 items' in piped.out
    (tmp_path / 'rows.json').write_text('\n'.join(map(json.dumps, ITEMS)))
    run('data/instruct/prepare.py', f"--input={tmp_path / 'rows.json'}", '--name=rows')
    for name in ('train.bin', 'val.bin', 'train_mask.bin', 'val_mask.bin'):
        for other in ('folder', 'rows'):
            assert ((clone / 'data' / other / name).read_bytes()
                    == (clone / 'data' / 'lines' / name).read_bytes())
        assert ((clone / 'data' / 'lines' / name).read_bytes()
                == (clone / 'data' / 'listed' / name).read_bytes())

def test_a_table_or_a_dataset_of_the_hub_is_the_same_as_its_lines(run, clone, tmp_path):
    items = [{'instruction': f'Say "{i}",\nthen stop.', 'input': 'now' * (i % 2), 'output': f'{i}\tTwo.'}
             for i in range(4)]
    prepare(run, tmp_path, '--name=lines', items=items)
    for name, excel in (('table.csv', csv.excel), ('table.tsv', csv.excel_tab)):
        with open(tmp_path / name, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, ['instruction', 'input', 'output'], dialect=excel)
            writer.writeheader()
            writer.writerows(items)
        run('data/instruct/prepare.py', f'--input={tmp_path / name}', f'--name={name[-3:]}')
    (tmp_path / 'datasets.py').write_text(
        'def load_dataset(name, subset, split, streaming):\n'
        '    assert (name, subset, split, streaming) == ("owner/name", "small", "train", True)\n'
        f'    return {items!r}\n')
    run('data/instruct/prepare.py', '--input=owner/name', '--subset=small', '--name=fetched',
        env={'PYTHONPATH': str(tmp_path)})
    for part in ('train.bin', 'val.bin', 'train_mask.bin', 'val_mask.bin', 'template.txt'):
        made = [(clone / 'data' / name / part).read_bytes() for name in ('lines', 'csv', 'tsv', 'fetched')]
        assert made[0] and made == made[:1] * 4

def test_items_may_be_validated_on_from_another_file(run, clone, tmp_path):
    (tmp_path / 'test.json').write_text(json.dumps([{'question': 'Bye?', 'answer': 'Bye.'}]))
    done = prepare(run, tmp_path, '--name=apart', f"--val_input={tmp_path / 'test.json'}")
    ids, mask = read(clone / 'data' / 'apart', 'val')
    assert BPE.decode(ids) == HEAD + '### Instruction:\nBye?\n\n### Response:\nBye.<|endoftext|>'
    n = len(BPE.encode('Bye.'))
    assert (mask.tolist() == [0] * (len(ids) - n - 1) + [1] * n + [2]
            and (read(clone / 'data' / 'apart', 'train')[1] == 2).sum() == len(ITEMS))
    assert re.search(r': 3 items of \d+ tokens to train on, 1 of \d+ to validate on\n', done.out)
    (tmp_path / 'test.json').write_text('[]')
    assert 'test.json has no items; expected one or more' in prepare(
        run, tmp_path, f"--val_input={tmp_path / 'test.json'}", status=2).err

def test_items_are_validated_on_from_all_parts(run, clone, tmp_path):
    prepare(run, tmp_path, '--name=many', items=[
        {'prompt': f'{"low" if i < 50 else "high"} {i}', 'answer': 'x'} for i in range(100)])
    asked = BPE.decode(read(clone / 'data' / 'many', 'val')[0])
    assert asked.count(':\nlow ') == asked.count(':\nhigh ') == 5

def test_a_template_may_be_given_as_text_or_as_a_file(run, clone, tmp_path):
    (tmp_path / 'template.txt').write_bytes('Frage: {instruction}\r\n\r\n{input}\r\n\r\nAntwort: '.encode())
    text = 'Frage: {instruction}\n\n{input}\n\nAntwort: '
    for option in (f"FILE:{tmp_path / 'template.txt'}", text.replace('\n', '\\n')):
        prepare(run, tmp_path, '--name=templated', f'--template={option}', '--val_fraction=0.5')
        folder = clone / 'data' / 'templated'
        assert (folder / 'template.txt').read_bytes() == text.encode()
        assert BPE.decode(read(folder, 'train')[0]).startswith(
            'Frage: Add one to {input}.\n\n1\n\nAntwort: Two.')

def test_a_template_without_a_place_for_inputs_does_where_there_are_none(run, clone, tmp_path):
    items = [*ITEMS[1:], {'instruction': 'Wait.', 'input': ' ', 'output': 'Yes.'}]
    prepare(run, tmp_path, '--name=plain', '--template=Q: {instruction}\\nA: ', items=items)
    assert BPE.decode(read(clone / 'data' / 'plain', 'val')[0]) == 'Q: Wait.\nA: Yes.<|endoftext|>'

@pytest.mark.parametrize('options, message', [
    (('--input=foo',), "input is 'foo', but there is no instruction that it is for; type --instruction=TEXT"),
    (('--instruction=Say hi.', '--input=foo'),
     "the model's template has no {input}, so the input would be lost; type")])
def test_an_input_that_a_sample_would_lose_is_refused(run, tmp_path, options, message):
    model = GPT(GPTConfig(16, 50257, 1, 1, 4))
    torch.save({'model': model.state_dict(), 'model_args': model.config.__dict__, 'tokenizer': BPE.state,
                'template': 'Q: {instruction}\nA: '}, tmp_path / 'ckpt.pt')
    done = run('sample.py', f"--out_dir={tmp_path / 'ckpt.pt'}", '--device=cpu', *options, status=2)
    assert message in done.err.splitlines()[-1] and 'Traceback' not in done.err

def test_items_longer_than_the_model_reads_are_told(run, tmp_path):
    done = prepare(run, tmp_path, '--name=long',
                   items=[*ITEMS, {'instruction': 'Count.', 'output': ' a' * 1024}])
    assert 'warning: items longer than the 1,024 tokens that GPT-2 reads at once: 1;' in done.out

def test_a_typed_template_s_line_ends_are_those_that_a_prompt_has_later(run, clone, tmp_path):
    prepare(run, tmp_path, '--name=ends', '--template=Q: {instruction}\r\n\r\n{input}\r\rA: ')
    ids = read(clone / 'data' / 'ends', 'train')[0]
    assert (read_template([clone / 'data' / 'ends']) == 'Q: {instruction}\n\n{input}\n\nA: '
            and '\r' not in BPE.decode(ids))

def test_blank_answers_are_told(run, tmp_path):
    chat = [{'role': role, 'content': text}
            for role, text in zip(('user', 'assistant') * 2, ('Hi.', ' ', 'Hi?', 'Hi.'))]
    done = prepare(run, tmp_path, '--name=blank',
                   items=[*ITEMS, {'instruction': 'Wait.', 'output': ''}, {'messages': chat}])
    assert 'warning: items with a blank answer: 3; the model' in done.out

WRONG = [(ITEMS, ('--template=Hello',), 'no {instruction}'),
         (ITEMS, ('--template=FILE:none.txt',), 'there is no none.txt'),
         (ITEMS, ('--val_fraction=1.0',), 'between 0 and 1'), (ITEMS[:1], (), 'has 1 item; expected two'),
         (ITEMS[1:] + ITEMS[:1], ('--template=Q: {instruction}\\nA: ',),
          'items.jsonl, line 3 has an input, but the template has no {input}'),
         ([*ITEMS, {'instruction': 'a'}], (), 'items.jsonl, line 4 has the fields instruction; expected'),
         ([*ITEMS, {'instruction': ' ', 'output': 'a'}], (),
          'items.jsonl, line 4 has a blank instruction; expected'),
         ([*ITEMS, [1]], (),
          'line 4 is no JSON object; expected one a line, such as {"instruction": "...", "output": "..."}')]

@pytest.mark.parametrize('items, options, message', WRONG, ids=[message for _, _, message in WRONG])
def test_what_is_wrong_is_told_in_one_line_and_changes_nothing(run, clone, tmp_path, items, options, message):
    folder = clone / 'data' / 'kept'
    folder.mkdir(exist_ok=True)
    (folder / 'train.bin').write_bytes(b'as it was')
    done = prepare(run, tmp_path, '--name=kept', *options, items=items, status=2)
    assert (done.err.splitlines()[-1].startswith('error: ') and message in done.err
            and 'Traceback' not in done.err)
    assert ([p.name for p in folder.iterdir()] == ['train.bin']
            and (folder / 'train.bin').read_bytes() == b'as it was')

@pytest.mark.parametrize('content', ['[{"instruction": "a", "output": "b"}, {"in', '["a"]'])
def test_a_broken_list_of_items_is_not_told_to_be_plain_text(run, tmp_path, content):
    (tmp_path / 'items.json').write_text(content)
    error = run('data/instruct/prepare.py', f"--input={tmp_path / 'items.json'}",
                status=2).err.splitlines()[-1]
    assert 'mend it' in error and '.txt' not in error

def test_few_items_are_given_a_run_that_fits_them(run, tmp_path):
    items = [{'instruction': f'Add one to {i}.', 'output': f'{i + 1}, of course.'} for i in range(40)]
    (tmp_path / 'items.jsonl').write_text('\n'.join(map(json.dumps, items)))
    lines = run('data/instruct/prepare.py', f"--input={tmp_path / 'items.jsonl'}",
                '--name=few').out.splitlines()
    assert any('so little text by heart' in line for line in lines)
    command = lines[-1].removeprefix('next: python ').split()
    shape = ('--init_from=scratch', '--n_layer=1', '--n_head=1', '--n_embd=8', '--device=cpu',
             '--compile=False', '--lora_rank=0')
    out = run(*command, *shape, f"--out_dir={tmp_path / 'out'}").out
    assert out.count('step ') > 3 # several evaluations, so that patience can count them

def test_a_command_for_items_counts_their_windows_and_cuts_none(run, tmp_path):
    long = [{'instruction': f'Count to {i}.', 'output': ' a' * 600} for i in range(40)]
    (tmp_path / 'short.json').write_text(json.dumps(ITEMS[1:2]))
    # one in each window
    for options, windows in (((), 36), ((f"--val_input={tmp_path / 'short.json'}",), 40)):
        out = prepare(run, tmp_path, '--name=long', *options, items=long).out
        assert f' --eval_interval={windows // 8} ' in out
        assert ('--block_size' not in out
                and f'makes at most 10.0 epochs of them, in {10 * windows // 4} iterations' in out)

def test_an_item_is_too_long_if_its_last_token_cannot_be_a_target(run, tmp_path):
    n_prompt = len(BPETokenizer().encode(render(TEMPLATE, 'Count.')))
    for n, told in ((1025, False), (1026, True)):
        items = [{'instruction': 'Count.', 'output': ' a' * (n - n_prompt - 1)},
                 *[{'instruction': 'Go.', 'output': 'x'}] * 9]
        (tmp_path / 'items.jsonl').write_text('\n'.join(map(json.dumps, items)))
        out = run('data/instruct/prepare.py', f"--input={tmp_path / 'items.jsonl'}", '--name=bounds').out
        assert f'the longest item has {n:,} tokens' in out
        assert ('warning: items longer than the 1,024 tokens' in out) == told
