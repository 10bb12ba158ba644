"""
Reads texts in UTF-8, and says what a file is that is none.
"""
import os

from configurator import quote

def shorten(path: str) -> str:
    """ a path as a user would type it from here """
    try:
        relative = os.path.relpath(path)
    except ValueError: # another drive of Windows
        return path
    return path if relative.startswith('..') else relative

def read_text(path: str) -> str:
    """ a UTF-8 text, line ends as \\n like open, no byte order mark; raises ValueError if not UTF-8 """
    with open(path, 'rb') as file:
        data = file.read()
    try:
        return data.decode('utf-8').removeprefix('\ufeff').replace('\r\n', '\n').replace('\r', '\n')
    except UnicodeDecodeError as error:
        raise bad_utf8(path, error) from None

NO_TEXT = {b'\x1f\x8b': 'compressed by gzip', b'PK\3\4': 'a zip file, as .docx, .odt and .epub are',
           b'%PDF': 'a PDF', b'PAR1': 'a Parquet file'} # what files begin with that are often taken for texts

def bad_utf8(path: str, error: UnicodeDecodeError, before: int = 0) -> ValueError:
    """ the error for a file that is not UTF-8, found in the bytes after the first `before` ones """
    byte = before + error.start
    head = error.object[:4]
    if before and os.path.isfile(path): # a pipe cannot be opened again
        with open(path, 'rb') as file:
            head = file.read(4)
    for start, what in NO_TEXT.items():
        if head.startswith(start):
            return ValueError(f"{shorten(path)} is {what}, no text; convert it first, to text in UTF-8 "
                              "or, if it has rows, to .jsonl")
    wide = byte == 0 and error.object[:2] in (b'\xff\xfe', b'\xfe\xff')
    if b'\0' in error.object and not wide:
        return ValueError(f"{shorten(path)} holds zero bytes, which no text in UTF-8 does; take another "
                          f"file, or, if it is UTF-16, convert it first{to_utf8(path, 'utf-16-le')}")
    kind = 'it is UTF-16' if wide else 'if it is Windows-1252, as old Western European texts are'
    return ValueError(f"{shorten(path)} is not UTF-8 at byte {byte:,}; {kind}, convert it first"
                      + to_utf8(path, 'utf-16' if wide else 'cp1252'))

def to_utf8(path: str, encoding: str) -> str:
    """ the command that converts a file, with what there is on every system; '' for a pipe """
    if not os.path.isfile(path):
        return ''
    root, end = os.path.splitext(os.path.basename(path))
    return (f""": python -c "import sys; text = open(sys.argv[1], encoding='{encoding}').read(); """
            f"""open(sys.argv[2], 'wb').write(text.encode())" {quote(shorten(path))} """
            f"{quote(f'{root}-utf8{end}')}")
