"""
Reads text from files, folders, pipes, rows of .jsonl, .json and .csv, and Hugging Face datasets.

>>> for place, blocks in Documents('texts'): # a folder
...     print(place, ''.join(blocks)[:20])
texts/a.txt First Citizen: Befor
texts/b.jsonl, line 1 Once upon a time

A document is its place, for messages, and an iterator of text blocks, to be exhausted before the next one.
Files are UTF-8 and are read a block or a line at a time, so their size does not matter, except for .json.
"""
import codecs
import csv
import importlib.util
import io
import itertools
import json
import os
import re
import sys

from instruct import is_item
from text import bad_utf8, read_text, shorten

TEXT_ROW = '{"text": "..."}' # an example row, for messages
SUFFIXES = '.txt', '.md', '.jsonl', '.csv', '.tsv' # of the files of a folder that are read
BLOCK = 2**20 # bytes or characters at a time
csv.field_size_limit(2**31 - 1) # Python's own limit is 128 KiB

class Documents:
    """ the documents of an input, except blank ones; `count`, `characters` and `has_eot` (whether they hold
    <|endoftext|>) tell what was read so far

    `name` is the path of a file or folder, - for a pipe, or the id of a hub dataset, whose train split is
    read. Rows have their text in the field text_field. With `lines`, each line of plain text is a document.
    """

    def __init__(self, name: str, text_field: str = 'text', subset: str = '', lines: bool = False):
        self.name, self.text_field, self.subset, self.lines = name, text_field, subset, lines
        self.count, self.characters, self.has_eot = 0, 0, False
        self.paths = find_source(name, SUFFIXES) if name != '-' else []

    def __iter__(self):
        from tqdm import tqdm
        size = sum(map(os.path.getsize, self.paths)) or None # unknown for pipes and the hub
        with tqdm(total=size, unit='B', unit_scale=True, delay=1) as progress:
            for place, blocks in self.read(progress.update):
                blocks = iter(blocks)
                head = next_text(blocks)
                if head:
                    self.count += 1
                    yield place, self.counted(itertools.chain(head, blocks))
        if not self.count:
            raise ValueError(f"there is no text in {self.name}; expected more than white space")

    def counted(self, blocks):
        """ yield the same blocks, counting their characters """
        end = '' # of what came before, where the token may begin
        for block in blocks:
            self.characters += len(block)
            self.has_eot = self.has_eot or '<|endoftext|>' in end + block
            end = (end + block)[-12:]
            yield block

    def read(self, progress):
        """ yield all documents; `progress` is called with the number of bytes read at each step """
        if self.name == '-':
            yield from self.plain(sys.stdin.buffer, 'the pipe', progress)
        elif not self.paths:
            yield from map(self.text_of, hub_rows(self.name, self.subset, progress))
        for path in self.paths:
            rows = {'.jsonl': json_rows, '.json': json_items, '.csv': csv_rows, '.tsv': csv_rows}.get(
                os.path.splitext(path)[1].lower())
            if rows:
                yield from map(self.text_of, rows(path, progress))
            else:
                with open(path, 'rb') as file:
                    yield from self.plain(file, shorten(path), progress)

    def plain(self, file, place, progress):
        """ yield the one document of an open file of text, or its lines as documents """
        blocks = self.watched(read_blocks(file, place, progress), place)
        return split_lines(blocks, place) if self.lines else [(place, blocks)]

    def watched(self, blocks, place):
        """ yield the same blocks, with a warning if they begin with a JSON row rather than with text """
        first = next(blocks, '')
        if self.text_field in first_object(first):
            print(f"warning: {place} begins with a JSON object that has {self.text_field!r}, but is read "
                  "as plain text, braces and all; for its rows save it under a name that ends in .jsonl, "
                  "or in .json for one list, and type --input=FILE.jsonl", file=sys.stderr)
        yield first
        yield from blocks

    def text_of(self, row):
        """ the document of a row, (place, dict); raises ValueError if it has no text in text_field """
        place, fields = row
        text = fields.get(self.text_field)
        if self.text_field not in fields:
            also = ', or run data/instruct/prepare.py, which takes questions and answers'
            header = ', as the header names them,' if re.search(r'[.][ct]sv, line \d+$', place, re.I) else ''
            raise ValueError(f"{place} has no field {self.text_field!r}; its fields{header} are "
                             f"{', '.join(fields)}; type --text_field=NAME with one of these"
                             + (also if is_item(fields) else ''))
        if text is None: # as blank as a field of .csv that is empty
            return place, []
        if not isinstance(text, str):
            raise ValueError(f"{place} has {str(text)[:80]} as its {self.text_field}; expected text; take "
                             "that row out, or type --text_field with another field")
        return place, (replace_surrogates(text[i:i + BLOCK]) for i in range(0, len(text), BLOCK))

def split_lines(blocks, place: str):
    """ yield each line of a text as a document: its place, and the parts of the line, without its end """
    parts, number = [], 0
    for block in itertools.chain(blocks, '\n'):
        first, *others = block.split('\n')
        parts.append(first)
        for other in others:
            number += 1
            yield f'{place}, line {number}', parts
            parts = [other]

def next_text(blocks) -> list[str]:
    """ the next blocks, up to and including the first that is not blank; [] if all are blank """
    head = []
    for block in blocks:
        head.append(block)
        if block and not block.isspace():
            return head
    return []

def replace_surrogates(text: str) -> str:
    """ replace lone surrogates, which JSON can hold but UTF-8 cannot, by U+FFFD, as tiktoken does """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')

def find_source(name: str, suffixes: tuple[str, ...]) -> list[str]:
    """ the files of a source; [] for a dataset of the hub, which has none; raises as find_files does """
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return find_files(path, suffixes)
    check_hub_id(name)
    return []

def find_files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """ the file itself, or the non-hidden files with these suffixes anywhere in the folder, sorted by path;
    raises OSError if `path` cannot be read, ValueError if there are no such files """
    if not os.path.isdir(path):
        return [path]
    paths, others, seen = [], [], set()
    for folder, folders, files in os.walk(path, onerror=stop, followlinks=True):
        if os.path.realpath(folder) in seen: # a loop of symbolic links
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if name[0] != '.'] # hidden folders hold no text of the user's
        folders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name)) # links come last
        for file in files:
            if file[0] != '.':
                (paths if file.lower().endswith(suffixes) else others).append(os.path.join(folder, file))
    kinds = sorted({os.path.splitext(file)[1] or 'no suffix' for file in others})
    kinds[5:] = ['...'] if len(kinds) > 5 else []
    passed = f" (not read: {len(others)}, {', '.join(kinds)})" if others else ''
    if not paths:
        raise ValueError(f"there is no text in {path}{passed}; expected files that end in "
                         f"{', '.join(suffixes)}; {'convert them, or ' if others else ''}type --input=FILE")
    print(f"{len(paths)} file{'s' if len(paths) > 1 else ''} in {path}{passed}")
    return sorted(paths)

def stop(error):
    raise error # otherwise os.walk skips what it cannot read

def check_hub_id(name: str) -> None:
    """ raise FileNotFoundError for a name that is not a path and cannot be read from the hub """
    is_file = name.endswith((*SUFFIXES, '.json'))
    is_id = not is_file and re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*)?', name)
    if not is_id or importlib.util.find_spec('datasets') is None:
        hub = ", or run pip install datasets if it is a dataset of the Hugging Face hub" if is_id else ""
        raise FileNotFoundError(f"there is no {name}; type the path of a file or of a folder of them"
                                + hub)

# -----------------------------------------------------------------------------
# kinds of files

def read_blocks(file, name: str, progress=lambda n: None):
    """ yield the text of an open binary file in blocks, with \\n as line ends; raises ValueError if it is not
    UTF-8 """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder('utf-8')(), translate=True)
    n_read, first = 0, True
    while True:
        data = file.read(BLOCK)
        begin = n_read - len(decoder.getstate()[0]) # where this decode starts: a character may be half read
        n_read += len(data)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise bad_utf8(name, error, begin) from None
        if text:
            yield text.removeprefix('\ufeff') if first else text # the byte order mark
            first = False
        progress(len(data))
        if not data:
            return

def read_lines(path: str, progress):
    """ yield the lines of a file, with their line ends """
    begin = 0 # byte offset of the line
    with open(path, 'rb') as file:
        while lines := file.readlines(BLOCK):
            for line in lines:
                try:
                    text = line.decode('utf-8')
                except UnicodeDecodeError as error:
                    raise bad_utf8(path, error, begin) from None
                yield text if begin else text.removeprefix('\ufeff')
                begin += len(line)
            progress(sum(map(len, lines)))

def json_rows(path: str, progress=lambda n: None, example: str = TEXT_ROW):
    """ yield (place, dict) for each non-blank line of a .jsonl file; raises ValueError, showing `example`, if
    a line is not a JSON object """
    name = shorten(path)
    for number, line in enumerate(read_lines(path, progress), 1):
        place = f'{name}, line {number}'
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} is not JSON ({error}); expected one object a line, such as {example}"
                             ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{place} is no JSON object; expected one a line, such as {example}")
        yield place, row

def is_list(path: str) -> bool:
    """ whether a JSON file is one list rather than one value per line, which a pipe is taken to be """
    if not os.path.isfile(path):
        return False
    with open(path, 'rb') as file:
        return file.read(BLOCK).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b'[')

def json_items(path: str, progress=lambda n: None, example: str = TEXT_ROW):
    """ yield (place, dict) for each item of a .json file: one list of objects, which is loaded whole, or an
    object a line, as .jsonl has it """
    if not is_list(path):
        yield from json_rows(path, progress, example)
        return
    name = shorten(path)
    mend = "mend it"
    mend += ", or rename it to end in .txt to take it as plain text" if example == TEXT_ROW else ""
    try:
        items = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not one JSON value ({error}); {mend}") from None
    except RecursionError:
        items = None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{name} is no list of objects, such as [{example}]; {mend}")
    for number, item in enumerate(items, 1):
        yield f'{name}, item {number}', item
    progress(os.path.getsize(path))

def first_object(text: str) -> dict:
    """ the JSON object that a text, or a list at its start, begins with; {} if there is none """
    try:
        value, _ = json.JSONDecoder().raw_decode(text.lstrip().removeprefix('[').lstrip())
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

def csv_rows(path: str, progress=lambda n: None):
    """ yield (place, dict of fields) for each row of a .csv or .tsv file below its header

    The separator is a tab in .tsv, in .csv the most frequent in the header: comma, semicolon (Excel's in much
    of Europe) or tab.
    """
    lines = (line.replace('\r\n', '\n') for line in read_lines(path, progress)) # also within "quotes"
    head = next_text(lines) # the header, below any blank lines
    tabs = path.lower().endswith('.tsv')
    bare = re.sub(r'(^|[,;\t])"(?:[^"]|"")*"?', r'\1', ''.join(head[-1:])) # quoted separators do not count
    separator = '\t' if tabs else max(',;\t', key=bare.count)
    blank = ['\n'] * (len(head) - 1)
    reader = csv.reader(itertools.chain(blank, head[-1:], lines), delimiter=separator, strict=True)
    name, header, begin = shorten(path), None, 1 # begin is the first line of a row
    try:
        for fields in reader:
            place, begin = f'{name}, line {begin}', reader.line_num + 1
            if header and fields and len(fields) != len(header):
                raise ValueError(f"{place} has {len(fields)} fields, but the header has {len(header)}; put "
                                 f'text that holds {"tabs" if tabs else "commas"} or line ends in "quotes"')
            if header and fields:
                yield place, dict(zip(header, fields))
            header = header or fields
    except csv.Error as error:
        raise ValueError(f"{name}, line {begin} is not {'TSV' if tabs else 'CSV'} ({error}); mend that row, "
                         'where a quotation mark is written "" in a field in "quotes"') from None

def hub_rows(name: str, subset: str, progress):
    """ yield (place, dict) for each row of a hub dataset's train split, fetched as it is read """
    os.environ['HF_DATASETS_TRUST_REMOTE_CODE'] = '0' # or versions 2.16 to 3 may run a dataset's script
    import datasets
    try:
        rows = datasets.load_dataset(name, subset or None, split='train', streaming=True)
        for number, row in enumerate(rows):
            yield f'{name}, row {number}', row
            progress(len(str(row))) # its bytes, nearly
    except Exception as error: # whatever the network, the hub and the files cause
        raise OSError(f"cannot read the dataset {name} ({type(error).__name__}: {error}); check its name, "
                      "--subset and the network") from None
