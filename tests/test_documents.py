import io
import json
import os
import sys
import types

import pytest

import documents
from documents import Documents, csv_rows, json_rows, read_blocks

ODD = "\ufeffnaïve café — 東京 🙂\r\n\n\t x\u3000y\u2028\x85 'll I'D\n\nno end"

def texts(*args, **kwargs):
    return [''.join(blocks) for _, blocks in Documents(*args, **kwargs)]

@pytest.mark.parametrize('size', [1, 2, 3, 5, 2**20])
def test_blocks_join_to_the_text_wherever_their_borders_fall(tmp_path, monkeypatch, size):
    monkeypatch.setattr(documents, 'BLOCK', size)
    (tmp_path / 'a.txt').write_bytes(ODD.encode())
    with open(tmp_path / 'a.txt', 'rb') as file:
        assert ''.join(read_blocks(file, 'a.txt')) == ODD[1:].replace('\r\n', '\n') # less the byte order mark

@pytest.mark.parametrize('size', [1, 2, 3, 5, 2**20])
@pytest.mark.parametrize('data, byte', [('é東'.encode() + b'\xff and on', 5), (b'\xef\xbb\xbfab\xc3(', 5),
                                        ('ab東'.encode()[:-1], 2)])
def test_bad_utf8_is_told_with_its_byte(tmp_path, monkeypatch, size, data, byte):
    monkeypatch.setattr(documents, 'BLOCK', size)
    with pytest.raises(UnicodeDecodeError) as reference:
        data.decode('utf-8')
    assert reference.value.start == byte
    for name in ('a.txt', 'a.jsonl', 'a.json', 'a.csv'):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f'{name} is not UTF-8 at byte {byte};'):
            texts(str(tmp_path / name))

def test_what_is_no_text_is_called_what_it_is_also_where_a_later_block_shows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, 'BLOCK', 4)
    for head, kind in ((b'PAR1', 'a Parquet file'), (b'%PDF', 'a PDF')):
        (tmp_path / 'a.txt').write_bytes(head + b'-1.4 and on\xff')
        with pytest.raises(ValueError, match=f'a.txt is {kind}, no text'):
            texts(str(tmp_path / 'a.txt'))
    if hasattr(os, 'mkfifo'): # Windows has none
        os.mkfifo(tmp_path / 'pipe')
    for name in ('the pipe', str(tmp_path / 'pipe')): # which cannot be read again
        with pytest.raises(ValueError, match='pipe is not UTF-8 at byte 15'):
            list(read_blocks(io.BytesIO(b'%PDF-1.4 and on\xff'), name))

def test_bad_utf8_in_a_later_line_is_told_with_its_byte(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match='a.jsonl is not UTF-8 at byte 24;'):
        texts(str(tmp_path / 'a.jsonl'))

def test_a_folder_gives_its_kinds_of_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / 'sub').mkdir()
    for name, text in {
            'd.TXT': 'four', 'a.jsonl': '\ufeff{"text": "one"}\r\n\n{"text": "two\\nlines", "n": 1}',
            'b.csv': 'n,text\n1,three\n', 'c.md': ' \n', 'e.jpg': 'no', 'sub/f.txt': 'five'}.items():
        (tmp_path / name).write_bytes(text.encode())
    found = Documents(str(tmp_path))
    assert [(place.rpartition(str(tmp_path) + '/')[2], ''.join(blocks)) for place, blocks in found] == [
        ('a.jsonl, line 1', 'one'), ('a.jsonl, line 3', 'two\nlines'), ('b.csv, line 2', 'three'),
        ('d.TXT', 'four'), ('sub/f.txt', 'five')] # c.md is blank
    assert found.count == 5 and found.characters == len('onetwo\nlinesthreefourfive')

def test_csv_is_read_as_it_is_quoted(tmp_path):
    (tmp_path / 'a.csv').write_bytes(
        '\ufefftext,n\r\n"a, ""b""\r\n\nc",1\r\n\r\n,2\n'.encode() + b'x' * 200_000 + b',3')
    rows = [(place[-6:], row['text'], row['n']) for place, row in csv_rows(str(tmp_path / 'a.csv'))]
    assert rows == [('line 2', 'a, "b"\n\nc', '1'), ('line 6', '', '2'), ('line 7', 'x' * 200_000, '3')]

@pytest.mark.parametrize('text', [
    'text,"a;b;c"\nhello,1', 'width 5";text\n1;hello', '"Name, first";text\n1;hello',
    '"a;b, c;d"\ttext\n1\thello', 'text\nhello'])
def test_what_is_quoted_in_a_csv_s_header_separates_nothing(tmp_path, text):
    (tmp_path / 'a.csv').write_text(text)
    assert [row['text'] for _, row in csv_rows(str(tmp_path / 'a.csv'))] == ['hello']

@pytest.mark.parametrize('comma', [';', '\t'])
def test_csv_with_other_separators_is_read_too(tmp_path, comma):
    (tmp_path / 'a.csv').write_text(f' \n\nid{comma}text\n1{comma}one, two\n2{comma}"three{comma} four"\n')
    assert [row['text'] for _, row in csv_rows(str(tmp_path / 'a.csv'))] == ['one, two', f'three{comma} four']

BROKEN = [('a.jsonl', '{"text": "a"}\n{"text": "b"', 'line 2 is not JSON'),
          ('a.jsonl', '[1]', 'line 1 is no JSON object'),
          ('a.jsonl', '\n{"body": "a", "n": 1}',
           "line 2 has no field 'text'; its fields are body, n; type --text_field"),
          ('a.jsonl', '{"prompt": "a"}', 'type --text_field=NAME with one of these$'),
          ('a.jsonl', '{"query": "a", "answer": "b"}', 'these, or run data/instruct/prepare.py'),
          ('a.jsonl', '{"conversations": []}', 'these, or run data/instruct/prepare.py'),
          ('a.jsonl', '{"text": [1]}', r'line 1 has \[1\] as its text'),
          ('a.jsonl', '{"text": null}', 'there is no text'),
          ('a.jsonl', '[' * 10**5, 'line 1 is not JSON'),
          ('a.json', '[{"text": "a"}\n{"text": "b"}]', 'a.json is not one JSON value .* to end in .txt to'),
          ('a.json', '{\n"text": "a"}', 'a.json, line 1 is not JSON .*expected one object a line'),
          ('a.json', '["a"]', 'a.json is no list of objects'),
          ('a.json', '[' * 10**5, 'a.json is no list of objects'), ('a.json', '[]', 'there is no text'),
          ('a.json', '[{"text": "a"}, {"body": "b"}]',
           "item 2 has no field 'text'; its fields are body; type --text_field"),
          ('a.csv', 'id,body\n1,a\n',
           "line 2 has no field 'text'; its fields, as the header names them, are id, body"),
          ('a.csv', 'text,n\na,1\nb, c,2\n', 'line 3 has 3 fields, but the header has 2'),
          ('a.csv', 'text\na\n"b\nc', 'line 3 is not CSV'), ('a.csv', 'text\n', 'there is no text')]

@pytest.mark.parametrize('name, content, message', BROKEN)
def test_a_broken_row_is_told_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        texts(str(tmp_path / name))

def test_a_folder_s_links_are_followed_and_what_is_hidden_is_left_out(tmp_path):
    for name in ('in/a.txt', 'in/.ipynb_checkpoints/a.txt', 'in/._a.txt', 'other/b.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / 'in' / 'linked').symlink_to(tmp_path / 'other')
    (tmp_path / 'other' / 'back').symlink_to(tmp_path / 'in')
    assert texts(str(tmp_path / 'in')) == ['in/a.txt', 'other/b.txt']
    (tmp_path / 'in' / 'z').mkdir()
    (tmp_path / 'in' / 'z' / 'c.txt').write_text('c')
    (tmp_path / 'in' / 'b').symlink_to(tmp_path / 'in' / 'z') # the folder itself comes first
    assert [place for place, _ in Documents(str(tmp_path / 'in'))][-1].endswith(os.path.join('z', 'c.txt'))

def test_a_folder_s_files_of_other_kinds_are_told(tmp_path, capsys):
    for name in ('a.html', 'b.text', 'c.HTML', '.hidden', 'd'):
        (tmp_path / name).write_text('x')
    with pytest.raises(ValueError, match=r'\(not read: 4, \.HTML, \.html, \.text, no suffix\); '
                                         r'expected files that end in \.txt.*; convert them, or'):
        texts(str(tmp_path))
    (tmp_path / 'e.txt').write_text('x')
    assert texts(str(tmp_path)) == ['x'] and '(not read: 4, .HTML' in capsys.readouterr().out

@pytest.mark.parametrize('block', [2**20, 3])
def test_each_line_is_a_document_if_asked_for(tmp_path, monkeypatch, block):
    monkeypatch.setattr(documents, 'BLOCK', block)
    (tmp_path / 'a.txt').write_bytes(b'one, two\r\n\r\n  three\n \nfour\x0bfive')
    (tmp_path / 'b.jsonl').write_text('{"text": "a\\nb"}') # a row stays one
    read = Documents(str(tmp_path), lines=True)
    assert [(os.path.basename(place), ''.join(blocks)) for place, blocks in read] == [
        ('a.txt, line 1', 'one, two'), ('a.txt, line 3', '  three'), ('a.txt, line 5', 'four\x0bfive'),
        ('b.jsonl, line 1', 'a\nb')]

def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('a')
    (tmp_path / 'private').mkdir()
    scandir = os.scandir
    def refuse(path):
        if str(path).endswith('private'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', refuse) # a test of root's may read everything
    with pytest.raises(PermissionError):
        texts(str(tmp_path))

def test_a_list_in_json_is_read_as_rows(tmp_path):
    (tmp_path / 'a.json').write_text(json.dumps([{'body': 'one'}, {'body': 'two\nlines', 'n': 1}], indent=2))
    assert texts(str(tmp_path / 'a.json'), 'body') == ['one', 'two\nlines']
    (tmp_path / 'a.json').write_text('{"body": "one"}\n{"body": "two\\nlines"}\n') # as datasets' to_json
    assert texts(str(tmp_path / 'a.json'), 'body') == ['one', 'two\nlines']

@pytest.mark.parametrize('size', [40, 2**20])
@pytest.mark.parametrize('text, warned', [
    ('{"text": "a"}\n{"text": "b"}\n', True), (' [\n  {"text": "a"},\n {"text": "b"}]', True),
    ('{"body": "a"}\n', False), ('{text} is a word.', False), ('["text"]', False),
    ('{"text": "never ends', False), ('"text" is a word.', False),
    ('[' * 10**5, False), ('{"a":' * 10**5, False)], ids=lambda value: repr(value)[:20])
def test_rows_that_are_read_as_plain_text_are_told(tmp_path, monkeypatch, capsys, text, warned, size):
    monkeypatch.setattr(documents, 'BLOCK', size)
    (tmp_path / 'a.txt').write_text(text)
    monkeypatch.setattr(sys, 'stdin', open(tmp_path / 'a.txt'))
    for name, place in (('-', 'the pipe'), (str(tmp_path / 'a.txt'), 'a.txt')):
        assert texts(name) == [text] # all the same
        told = capsys.readouterr().err
        assert ('type --input=FILE.jsonl' in told and f'{place} begins with a JSON object' in told) == warned
        assert told.count('\n') == warned

def test_half_a_surrogate_pair_is_replaced_as_tiktoken_replaces_it(tmp_path):
    (tmp_path / 'a.jsonl').write_text(r'{"text": "a\ud83db \ud83d\ude42"}')
    assert texts(str(tmp_path / 'a.jsonl')) == ['a\ufffdb 🙂']

def test_a_long_field_comes_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, 'BLOCK', 4)
    (tmp_path / 'a.jsonl').write_text(json.dumps({'body': 'abcdefghij'}))
    assert [list(blocks) for _, blocks in Documents(str(tmp_path / 'a.jsonl'), 'body')] == [
        ['abcd', 'efgh', 'ij']]

def test_only_white_space_is_no_text_however_long(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, 'BLOCK', 4)
    (tmp_path / 'a.txt').write_text(' \n' * 10)
    with pytest.raises(ValueError, match='there is no text in'):
        texts(str(tmp_path / 'a.txt'))
    (tmp_path / 'a.txt').write_text(' \n' * 10 + 'x')
    assert texts(str(tmp_path / 'a.txt')) == [' \n' * 10 + 'x']

def test_a_dataset_of_the_hub_is_streamed(monkeypatch):
    monkeypatch.delenv('HF_DATASETS_TRUST_REMOTE_CODE', raising=False)
    def load_dataset(name, subset, split, streaming):
        assert (name, subset, split, streaming) == ('owner/name', 'small', 'train', True)
        assert os.environ['HF_DATASETS_TRUST_REMOTE_CODE'] == '0' # for versions that would run a script of it
        yield {'text': 'one'}
        yield {'text': 'two'}
        raise ConnectionError('gone')
    fake = types.ModuleType('datasets')
    fake.load_dataset, fake.__spec__ = load_dataset, True
    monkeypatch.setitem(sys.modules, 'datasets', fake)
    rows = iter(Documents('owner/name', subset='small'))
    assert [''.join(next(rows)[1]) for _ in range(2)] == ['one', 'two']
    with pytest.raises(OSError, match=r'cannot read the dataset owner/name \(ConnectionError: gone\)'):
        next(rows)

def test_a_path_may_begin_in_the_home_of_the_user(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('one')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path)) # Windows'
    assert texts(os.path.join('~', 'a.txt')) == ['one']

def test_what_is_nowhere_is_told_so(monkeypatch):
    monkeypatch.setattr(documents.importlib.util, 'find_spec', lambda name: None)
    for name in ('owner/name', 'name'):
        with pytest.raises(FileNotFoundError, match='there is no .*pip install datasets if it is'):
            Documents(name)
    for name in ('texts/a.txt', '/tmp/none/x', 'a.csv', 'a.json', '../name'):
        with pytest.raises(FileNotFoundError, match='of a folder of them$'):
            Documents(name)

def test_rows_of_jsonl_are_read_one_at_a_time(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"n": 1}\nbroken')
    assert next(json_rows(str(tmp_path / 'a.jsonl')))[1] == {'n': 1} # the second line is not looked at yet

def test_a_field_ends_with_its_last_character_wherever_blocks_end(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, 'BLOCK', 4)
    (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n{"text": "abcde"}\n{"text": "abcd"}\n')
    assert texts(str(tmp_path / 'a.jsonl')) == ['a', 'abcde', 'abcd']

def test_a_tsv_is_rows_and_the_end_of_text_that_a_text_spells_out_is_seen(tmp_path, monkeypatch):
    (tmp_path / 'a.tsv').write_text('text, by whom; when\ttext\n1\tone, two\n2\tthree\n')
    read = Documents(str(tmp_path))
    assert [''.join(blocks) for _, blocks in read] == ['one, two', 'three'] and not read.has_eot
    (tmp_path / 'b.txt').write_text('a\n<|endoftext|>\nb')
    for block in (2**20, 5):
        monkeypatch.setattr(documents, 'BLOCK', block)
        read = Documents(str(tmp_path))
        assert [''.join(blocks) for _, blocks in read][2:] == ['a\n<|endoftext|>\nb'] and read.has_eot

@pytest.mark.parametrize('block', range(1, 15))
def test_end_of_text_is_seen_wherever_blocks_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr(documents, 'BLOCK', block)
    (tmp_path / 'a.txt').write_text('a<|endoftext|>')
    read = Documents(str(tmp_path / 'a.txt'))
    assert [''.join(blocks) for _, blocks in read] == ['a<|endoftext|>'] and read.has_eot

def test_a_list_in_json_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / 'a.json').write_text(json.dumps([{'text': 'one'}, {'text': 'two'}]), encoding='utf-8-sig')
    assert [''.join(blocks) for _, blocks in Documents(str(tmp_path / 'a.json'))] == ['one', 'two']
