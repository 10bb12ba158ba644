"""
Makes datasets: fetches the text, checks the name, and writes all files or none. dataset.py reads them.
"""
import contextlib
import errno
import glob
import hashlib
import os
import pickle
import re
import shutil
import socket
import tempfile

import numpy as np
import psutil

from dataset import DATA
from text import read_text, shorten

FILES = ('train.bin', 'val.bin', 'meta.pkl', 'template.txt', 'train_mask.bin', 'val_mask.bin')
BLOCK = 2**20 # tokens at a time
FULL = errno.ENOSPC, getattr(errno, 'EDQUOT', errno.ENOSPC) # the disk, or what a user may take of it

@contextlib.contextmanager
def publish(folder: str):
    """ yield a temporary folder, and move the dataset written there to `folder` once it is complete

    After an error or Ctrl-C, everything is as it was; or, if that comes while the files are exchanged, the
    earlier dataset is gone, and there is no train.bin: never files of two datasets. What a killed process
    left behind is removed the next time. Raises OSError if nothing can be written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        mine = f'unfinished-{socket.gethostname()}-{os.getpid()}-'
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=mine)
    except OSError as error:
        raise OSError(f"cannot write to {shorten(folder)} ({error.strerror}); type --name=ANOTHER, or mend "
                      "that folder") from None
    clear(folder)
    try:
        with temporary as place:
            try:
                yield place
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise OSError(f"cannot write to {shorten(folder)} ({error.strerror}); make room on the disk, "
                              "and type this again") from None
            is_masked = os.path.exists(os.path.join(folder, 'train_mask.bin'))
            made = [name for name in FILES if os.path.exists(os.path.join(place, name))]
            for name in FILES: # of the earlier dataset; another template.txt is the user's
                path = os.path.join(folder, name)
                if os.path.exists(path) and (name in made or name != 'template.txt' or is_masked):
                    os.remove(path)
            for name in reversed(made): # train.bin, without which there is no dataset, comes last
                os.replace(os.path.join(place, name), os.path.join(folder, name))
    finally:
        if not os.listdir(folder) and not os.path.islink(folder):
            os.rmdir(folder)

def clear(folder: str) -> None:
    """ remove the unfinished datasets of processes on this machine that are gone """
    ours = re.compile(rf'unfinished-{re.escape(socket.gethostname())}-(\d+)-\w+')
    for place in glob.glob(os.path.join(glob.escape(folder), 'unfinished-*')):
        mine = ours.fullmatch(os.path.basename(place))
        with contextlib.suppress(OSError): # an unusual /proc
            if mine and not psutil.pid_exists(int(mine[1])):
                shutil.rmtree(place, ignore_errors=True)

def write_dataset(folder: str, text: str, tokenizer) -> None:
    """ write a text held in memory as a dataset; the last tenth of its characters is the val split """
    cut = int(len(text) * 0.9)
    if not 1 < cut < len(text) - 1: # a target needs a token before it
        raise ValueError(f"{len(text)} characters are too few to keep 0.1 of them to validate on; add text")
    print(f"{len(text):,} characters, a vocabulary of {tokenizer.n_vocab:,}")
    with publish(folder) as place:
        for name, part in (('train.bin', text[:cut]), ('val.bin', text[cut:])):
            ids = np.array(tokenizer.encode(part), dtype='<u2')
            with open(os.path.join(place, name), 'wb') as file:
                file.write(ids.tobytes())
            print(f"{shorten(os.path.join(folder, name))}: {len(ids):,} tokens of {len(part):,} characters")
        if tokenizer.state['name'] == 'char':
            write_meta(place, tokenizer.chars)

def write_meta(folder: str, chars: list[str]) -> None:
    """ write meta.pkl, the mapping between characters and ids """
    meta = {'vocab_size': len(chars), 'stoi': {char: i for i, char in enumerate(chars)},
            'itos': dict(enumerate(chars))}
    with open(os.path.join(folder, 'meta.pkl'), 'wb') as file:
        pickle.dump(meta, file)

def claim(name: str, own: str, val_fraction: float, input: str, val_input: str) -> str:
    """ the folder for a dataset made by data/OWN/prepare.py; raises ValueError for a bad name or fraction, or
    for a val_input that would be trained on, too """
    paths = [os.path.realpath(os.path.expanduser(path)) + os.sep for path in (input, val_input)]
    if val_input and (paths[0].startswith(paths[1]) or paths[1].startswith(paths[0])):
        raise ValueError(f"of val_input, {val_input}, and input, {input}, one is in the other; move it out, "
                         "or leave val_input out to validate on a part of input")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; type a share between 0 and 1, such as "
                         "--val_fraction=0.1")
    if not name or os.path.basename(name) != name or name[0] in '. ' or set(',:') & set(name):
        raise ValueError(f"name is {name!r}; type a plain name for the folder in data/, such as --name=novel")
    if name != own and os.path.exists(os.path.join(DATA, name, 'prepare.py')):
        raise ValueError(f"data/{name} is a dataset of the project's own; type another --name")
    return os.path.join(DATA, name)

def choose_val(ends: np.ndarray, fraction: float, whole: bool = False) -> np.ndarray:
    """ what to validate on: pieces (n, 2) of a text, as starts and ends in tokens; `ends` is where its
    documents end

    One document is drawn of each stretch of 1 / fraction of them, the same at every call. Where these, being
    few or uneven, are not about this share of the text, its end is taken, of `whole` documents or not.
    """
    n, rng = int(ends[-1]), np.random.default_rng(0)
    stretches = np.arange(int(np.ceil(len(ends) * fraction)))
    drawn = np.unique(((stretches + rng.random(len(stretches))) / fraction).astype(np.int64))
    drawn = drawn[drawn < len(ends)]
    pieces = np.stack([np.where(drawn > 0, ends[drawn - 1], 0), ends[drawn]], axis=1)
    share = np.diff(pieces).sum() / n
    if len(ends) > 1 and fraction / 2 <= share <= min(2 * fraction, (1 + fraction) / 2):
        return pieces
    last = max(1, int(len(ends) * fraction))
    start = (ends[-last - 1] if last < len(ends) else 0) if whole else n - int(n * fraction)
    return np.array([[start, n]])

def tell_place(pieces: np.ndarray, ends: np.ndarray) -> str:
    """ of what documents the pieces are, for a line about a text that has several """
    if len(ends) == 1:
        return ''
    if len(pieces) == 1 and pieces[0, 1] == ends[-1]:
        return ', the end of the text'
    return (f", {len(pieces):,} documents from all parts of the text" if len(pieces) > 1 else
            ', one of the documents')

def checksums(path: str, ends: np.ndarray) -> np.ndarray:
    """ a checksum of each document of a token file, (n,); `ends` is where they end """
    tokens = np.memmap(path, '<u2', 'r')
    starts = np.append(0, ends[:-1])
    return np.fromiter((hash(tokens[a:b].tobytes()) for a, b in zip(starts, ends)), np.int64, len(ends))

def tell_repeats(sums: np.ndarray, ends: np.ndarray, pieces: np.ndarray) -> str:
    """ a warning if one in a hundred documents to validate on, or more, is also trained on; '' otherwise """
    starts = np.append(0, ends[:-1])
    chosen = np.searchsorted(pieces.ravel(), starts, side='right') % 2 == 1
    n = np.count_nonzero(np.isin(sums[chosen], sums[~chosen]))
    if n == 0 or 100 * n < chosen.sum():
        return ''
    return (f"\nwarning: {n:,} of the {chosen.sum():,} to validate on are also trained on, to the last "
            "token, which makes the validation loss too low; leave repeats out")

def split_off(folder: str, stem: str, pieces: np.ndarray, dtype: str) -> None:
    """ move the `pieces` that `choose_val` returns from trainSTEM to valSTEM, a block at a time """
    edges, size = pieces.ravel(), np.dtype(dtype).itemsize
    done = kept = int(edges[0]) # how far train is read, and how far it is rewritten
    with (open(os.path.join(folder, f'train{stem}'), 'r+b') as train,
          open(os.path.join(folder, f'val{stem}'), 'wb') as val):
        while True:
            train.seek(done * size)
            block = np.frombuffer(train.read(BLOCK * size), dtype)
            if not len(block):
                break
            in_piece = np.searchsorted(edges, np.arange(done, done + len(block)), side='right') % 2 == 1
            val.write(block[in_piece])
            train.seek(kept * size)
            train.write(block[~in_piece])
            done, kept = done + len(block), kept + np.count_nonzero(~in_piece)
        train.truncate(kept * size)

def fetch(url: str, path: str, sha256: str) -> str:
    """ the text at `path`, fetched from `url` if missing; raises OSError, or ValueError for a wrong text """
    if not os.path.exists(path):
        import requests
        try:
            answer = requests.get(url, timeout=30)
            answer.raise_for_status()
        except requests.RequestException as error:
            raise OSError(f"cannot fetch {url} ({type(error).__name__}); put the file at {shorten(path)} "
                          "yourself and run this again") from None
        found = hashlib.sha256(answer.content).hexdigest()
        if found != sha256:
            raise ValueError(f"{url} sent another file (SHA-256 {found}, expected {sha256}); "
                             f"put the right one at {shorten(path)} yourself and run this again")
        with open(path + '.tmp', 'wb') as file:
            file.write(answer.content)
        os.replace(path + '.tmp', path)
    return read_text(path)
