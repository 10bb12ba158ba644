"""
Where text comes from: files, folders, pipes, rows of .jsonl, .json, .csv, datasets of the Hugging Face hub.

>>> for place, blocks in Documents('texts'): # a folder
...     print(place, ''.join(blocks)[:20])
texts/a.txt First Citizen: Befor
texts/b.jsonl, line 1 Once upon a time

A document is its place, for messages, and an iterator of blocks of text, to be used up before the next one.
Files are in UTF-8 and read a block or a line at a time, so their size does not matter, but for .json.
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

from dataset import bad_utf8, read_text, shorten

TEXT_ROW = '{"text": "..."}' # what a row looks like, for messages
BLOCK = 2**20 # bytes or characters at a time
csv.field_size_limit(2**31 - 1) # Python's own limit is 128 KiB

class Documents:
    """ the documents of an input, less the blank ones; `count` and `characters` tell what was read so far

    `name` is the path of a file or a folder, or - for a pipe, or the id of a dataset of the hub, whose split
    train is read. Rows have their text in text_field.
    """

    def __init__(self, name: str, text_field: str = 'text', subset: str = ''):
        self.name, self.text_field, self.subset = name, text_field, subset
        self.count = self.characters = 0
        self.paths = []
        if os.path.exists(name) and name != '-':
            self.paths = find_files(name, ('.txt', '.md', '.jsonl', '.csv'))
        elif name != '-':
            check_hub_id(name)

    def __iter__(self):
        from tqdm import tqdm
        size = sum(map(os.path.getsize, self.paths)) or None # pipes and the hub do not tell
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
        """ the same blocks, their characters counted """
        for block in blocks:
            self.characters += len(block)
            yield block

    def read(self, progress):
        """ all documents; `progress` is called with the number of bytes at each step """
        if self.name == '-':
            yield 'the pipe', self.plain(read_blocks(sys.stdin.buffer, 'the pipe', progress), 'the pipe')
        elif not self.paths:
            yield from map(self.text_of, hub_rows(self.name, self.subset, progress))
        for path in self.paths:
            rows = {'.jsonl': json_rows, '.json': json_items, '.csv': csv_rows}.get(
                os.path.splitext(path)[1].lower())
            if rows:
                yield from map(self.text_of, rows(path, progress))
            else:
                with open(path, 'rb') as file:
                    yield shorten(path), self.plain(read_blocks(file, path, progress), shorten(path))

    def plain(self, blocks, place):
        """ the same blocks, with a warning where they begin with a row rather than with text """
        for block in itertools.islice(blocks, 1):
            if self.text_field in first_object(block):
                print(f"warning: {place} begins with a JSON object that has {self.text_field!r}, but is read "
                      "as plain text, braces and all; for its rows save it under a name that ends in .jsonl, "
                      "or in .json for one list, and type --input=FILE.jsonl", file=sys.stderr)
            yield block
        yield from blocks

    def text_of(self, row):
        """ the document of a row, (place, dict); raises ValueError where it has no such text """
        place, fields = row
        text = fields.get(self.text_field)
        if self.text_field not in fields:
            raise ValueError(f"{place} has no field {self.text_field!r}, but {', '.join(fields)}; type "
                             "--text_field=NAME with one of its own")
        if not isinstance(text, str):
            raise ValueError(f"{place} has {text!r} as its {self.text_field}; expected text")
        return place, (replace_surrogates(text[i:i + BLOCK]) for i in range(0, len(text), BLOCK))

def next_text(blocks) -> list[str]:
    """ the next blocks up to the first that is not blank; none, if all are """
    head = []
    for block in blocks:
        head.append(block)
        if block and not block.isspace():
            return head
    return []

def replace_surrogates(text: str) -> str:
    """ halves of surrogate pairs, which JSON can hold and UTF-8 cannot, as U+FFFD, as tiktoken has it """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')

def find_files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """ the file itself, or the files in a folder and below it that end so and are not hidden, in the order of
    their names; raises OSError where that is not there or cannot be read, ValueError where there are none """
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no {path}; type --input=PATH of a file or of a folder of them")
    if not os.path.isdir(path):
        return [path]
    paths, seen = [], set()
    for folder, folders, files in os.walk(path, onerror=stop, followlinks=True):
        if os.path.realpath(folder) in seen: # a link in a circle
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if name[0] != '.'] # what is hidden is no text of the user's
        folders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name)) # links come last
        paths += [os.path.join(folder, file) for file in files if file.lower().endswith(suffixes)
                  and file[0] != '.']
    paths.sort()
    if not paths:
        raise ValueError(f"there is no text in {path}; expected files that end in {', '.join(suffixes)}")
    print(f"{len(paths)} files in {path}")
    return paths

def stop(error):
    raise error # or os.walk would leave out what it cannot read

def check_hub_id(name: str) -> None:
    """ raise FileNotFoundError for what is neither a path nor can be read from the hub """
    is_file = name.endswith(('.txt', '.md', '.jsonl', '.json', '.csv'))
    is_id = not is_file and re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*)?', name)
    if not is_id or importlib.util.find_spec('datasets') is None:
        hub = ", or run pip install datasets if it is a dataset of the Hugging Face hub" if is_id else ""
        raise FileNotFoundError(f"there is no {name}; type --input=PATH of a file or of a folder of them"
                                + hub)

# -----------------------------------------------------------------------------
# kinds of files

def read_blocks(file, name: str, progress=lambda n: None):
    """ the text of an open binary file, in blocks, its line ends made \\n; raises ValueError where it is not
    UTF-8 """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder('utf-8')(), translate=True)
    n_read, first = 0, True
    while True:
        data = file.read(BLOCK)
        begin = n_read - len(decoder.getstate()[0]) # of what is decoded now: a character may be half read
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

def read_lines(path: str, progress=lambda n: None):
    """ the lines of a file, with their ends """
    begin = 0 # of a line, in bytes
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
    """ the place and the dict of a .jsonl file's lines, less empty ones; raises ValueError for others, and
    tells an `example` of a row """
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
    """ whether a file of JSON is one list, and not a value a line, as a pipe is """
    if not os.path.isfile(path):
        return False
    with open(path, 'rb') as file:
        return file.read(BLOCK).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b'[')

def json_items(path: str, progress=lambda n: None, example: str = TEXT_ROW):
    """ the place and the dict of each item of a .json file, one list of objects, which memory holds whole """
    name = shorten(path)
    plain = ", or to end in .txt to take it as plain text" if example == TEXT_ROW else ""
    try:
        items = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not one JSON value ({error}); mend it, or rename it to end in .jsonl if "
                         f"each of its lines is one{plain}") from None
    except RecursionError:
        items = None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{name} is no list of objects, such as [{example}]; mend it, or rename it to end "
                         f"in .jsonl if each of its lines is one{plain}")
    for number, item in enumerate(items, 1):
        yield f'{name}, item {number}', item
    progress(os.path.getsize(path))

def first_object(text: str) -> dict:
    """ the JSON object that a text, or a list in it, begins with; {} where there is none """
    try:
        value, _ = json.JSONDecoder().raw_decode(text.lstrip().removeprefix('[').lstrip())
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

def csv_rows(path: str, progress=lambda n: None):
    """ the place and the fields, as a dict, of each row of a .csv file under its header

    Fields are separated by what the header has most of: commas, semicolons (Excel's in much of Europe), tabs.
    """
    lines = (line.replace('\r\n', '\n') for line in read_lines(path, progress)) # also within "quotes"
    first = next(lines, '')
    bare = re.sub(r'(^|[,;\t])"(?:[^"]|"")*"?', r'\1', first) # what is quoted separates nothing
    reader = csv.reader(itertools.chain([first], lines), delimiter=max(',;\t', key=bare.count), strict=True)
    name, header, begin = shorten(path), None, 1 # the line that a row begins in
    try:
        for fields in reader:
            place, begin = f'{name}, line {begin}', reader.line_num + 1
            if header and fields and len(fields) != len(header):
                raise ValueError(f"{place} has {len(fields)} fields, but the header has {len(header)}; put "
                                 'text that holds commas or line ends in "quotes"')
            if header and fields:
                yield place, dict(zip(header, fields))
            header = header or fields
    except csv.Error as error:
        raise ValueError(f"{name}, line {begin} is not CSV ({error}); mend that row") from None

def hub_rows(name: str, subset: str, progress=lambda n: None):
    """ the place and the dict of each row of a dataset's split train, fetched as it is read """
    import datasets
    try:
        rows = datasets.load_dataset(name, subset or None, split='train', streaming=True)
        for number, row in enumerate(rows):
            yield f'{name}, row {number}', row
            progress(sum(len(value.encode()) for value in row.values() if isinstance(value, str)))
    except Exception as error: # whatever the network, the hub and the files bring about
        raise OSError(f"cannot read the dataset {name} ({type(error).__name__}: {error}); check its name, "
                      "--subset and the network") from None
