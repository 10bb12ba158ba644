"""
Token files, and the order in which training reads them.

A dataset is a folder with train.bin and val.bin, raw little-endian uint16 token ids and nothing else, and
for character data meta.pkl, a dict with vocab_size, stoi and itos. This is nanoGPT's format.

A window is block_size tokens to read and the token after each to predict. An epoch cuts the split into
windows from a random offset, round the end of the file and on from its beginning, and shuffles them, so
that every token is a target once an epoch. Both are drawn from (seed, epoch), and iteration i takes
windows [i*S, (i+1)*S) of the endless row of epochs: what an iteration trains on follows from (seed, i).
"""
import codecs
import difflib
import functools
import glob
import hashlib
import os
import pickle

import numpy as np

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data')

# -----------------------------------------------------------------------------
# reading

class Split:
    """ the tokens of one split of a dataset (`name` is train or val), cut into windows of block_size """

    def __init__(self, folder: str, name: str, block_size: int, vocab_size: int, seed: int = 0):
        self.path = os.path.join(folder, f'{name}.bin')
        self.tokens = open_tokens(self.path, block_size)
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        self.targets = len(self.tokens) - 1 # every token but the first has one before it
        self.windows = -(-self.targets // block_size) # an epoch; the last may be short
        self.check_ids(self.tokens[:2**28]) # tells within a second; `batch` checks what lies beyond

    def check_ids(self, ids) -> None:
        if ids.max() >= self.vocab_size:
            raise ValueError(f"{shorten(self.path)} holds token id {ids.max()}, but the vocabulary has only "
                             f"{self.vocab_size} ids; prepare the data with this model's tokenizer")

    def training_windows(self, iter_num: int, sequences: int) -> np.ndarray:
        """ the windows of an iteration: (sequences, 2), each a start and how many of its targets count """
        number = np.arange(iter_num * sequences, (iter_num + 1) * sequences)
        out = np.empty((sequences, 2), np.int64)
        for epoch in np.unique(number // self.windows):
            offset, order = epoch_order(self.seed, int(epoch), self.targets, self.windows)
            here = number // self.windows == epoch
            out[here] = self.cut(order[number[here] % self.windows], offset)
        return out

    def evaluation_windows(self, limit: int) -> np.ndarray:
        """ at most `limit` windows (n, 2), evenly spread over the split, the same at every call """
        n = min(limit, self.windows)
        return self.cut(np.arange(n) * self.windows // n)

    def cut(self, index: np.ndarray, offset: int = 0) -> np.ndarray:
        """ the start of window `index`, and its length, which is short of block_size only for the last """
        start = index * self.block_size
        length = np.minimum(self.block_size, self.targets - start)
        return np.stack([(start + offset) % self.targets, length], axis=1)

    def batches(self, windows: np.ndarray, size: int):
        """ the windows, `size` at a time; the last are filled up with windows of which no target counts """
        filled = np.concatenate([windows, np.zeros((-len(windows) % size, 2), windows.dtype)])
        yield from filled.reshape(-1, size, 2)

    def batch(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ inputs and targets (B, T), int64; a target that does not count is -1 """
        T = self.block_size
        ids = np.empty((2, len(windows), T), np.uint16)
        for row, start in enumerate(windows[:, 0].tolist()):
            if start + T <= self.targets:
                ids[0, row], ids[1, row] = self.tokens[start:start + T], self.tokens[start + 1:start + T + 1]
            else: # over the end of the file and on from its beginning
                at = np.arange(start, start + T) % self.targets
                ids[0, row], ids[1, row] = self.tokens[at], self.tokens[at + 1]
        self.check_ids(ids)
        x, y = ids.astype(np.int64)
        for row in np.flatnonzero(windows[:, 1] < T):
            y[row, windows[row, 1]:] = -1
        return x, y

@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, targets: int, windows: int) -> tuple[int, np.ndarray]:
    """ where an epoch's first window starts, and the order in which its windows come """
    rng = np.random.default_rng([seed, epoch])
    return int(rng.integers(targets)), rng.permutation(windows)

def find_dataset(dataset: str) -> str:
    """ the folder of a dataset: one in data/ by its name, any other by its path """
    is_path = os.path.isdir(dataset) and os.path.basename(dataset) != dataset
    return dataset if is_path else os.path.join(DATA, dataset)

def split_batch(sequences: int, fits: int) -> tuple[int, int]:
    """ the largest micro-batch that fits and divides evenly, and how many of them: (480, 25) -> (24, 20) """
    batch_size = max(n for n in range(1, fits + 1) if sequences % n == 0)
    return batch_size, sequences // batch_size

def open_tokens(path: str, block_size: int) -> np.ndarray:
    """ the file as an array of uint16, mapped and not read; raises where it cannot be a split """
    folder = shorten(os.path.dirname(path))
    if not os.path.isfile(path):
        scripts = glob.glob(os.path.join(DATA, '*', 'prepare.py'))
        known = sorted(os.path.basename(os.path.dirname(script)) for script in scripts)
        name = os.path.basename(folder)
        near = difflib.get_close_matches(name, known, n=1)
        how = (f"run python data/{name}/prepare.py first" if name in known
               else f"did you mean --dataset={near[0]}?" if near
               else f"type --dataset=NAME with one of {', '.join(known)}, or make it with "
                    "data/custom/prepare.py")
        raise FileNotFoundError(f"there is no {shorten(path)}; {how}")
    size = os.path.getsize(path)
    script = os.path.join(folder, 'prepare.py')
    again = f"run python {script} again" if os.path.exists(script) else "prepare it again"
    if size == 0:
        raise ValueError(f"{shorten(path)} is empty; {again}")
    if size % 2:
        raise ValueError(f"{shorten(path)} has {size} bytes, an odd number, but a token takes two; {again}")
    if size // 2 <= block_size:
        raise ValueError(f"{shorten(path)} has {size // 2} tokens, too few for block_size = {block_size}; "
                         f"type --block_size={max(1, size // 4)}, or add text")
    return np.asarray(np.memmap(path, dtype='<u2', mode='r')) # a plain array of it is sliced faster

def shorten(path: str) -> str:
    """ a path as a user would type it from here """
    relative = os.path.relpath(path)
    return path if relative.startswith('..') else relative

class PlainUnpickler(pickle.Unpickler):
    """ reads dicts, lists, numbers and text, and refuses all that could run code """
    def find_class(self, module, name):
        raise ValueError(f"it names {module}.{name}, and could run code")

def read_tokenizer_state(folder: str) -> dict:
    """ what a dataset is encoded with: characters where there is a meta.pkl, else GPT-2's BPE """
    path = os.path.join(folder, 'meta.pkl')
    if not os.path.exists(path):
        return {'name': 'gpt2'}
    try:
        with open(path, 'rb') as file:
            meta = PlainUnpickler(file).load()
        return {'name': 'char', 'chars': [meta['itos'][i] for i in range(meta['vocab_size'])]}
    except Exception as error: # a broken pickle may raise anything
        raise ValueError(f"cannot use {shorten(path)} ({error}); expected a plain dict with vocab_size, stoi "
                         "and itos; prepare the dataset again") from None

# -----------------------------------------------------------------------------
# writing

def write_dataset(folder: str, documents: list[str], tokenizer, val_fraction: float = 0.1,
                  close: bool = False, allow_special: bool = False) -> None:
    """ write train.bin, val.bin and for characters meta.pkl; the last val_fraction of the characters is val

    `close` ends each document with end-of-text, or with a newline where the tokenizer has none. Files appear
    under their final names only when all of them are whole.
    """
    total = sum(map(len, documents))
    end = [] if not close else [tokenizer.eot] if tokenizer.eot is not None else tokenizer.encode('\n')
    parts = split_documents(documents, int(total * (1 - val_fraction)))
    if not (parts[0] and parts[1]):
        raise ValueError(f"{total} characters are too few to keep {val_fraction} of them to validate on; add "
                         "text")
    written = []
    os.makedirs(folder, exist_ok=True)
    print(f"{total:,} characters, a vocabulary of {tokenizer.n_vocab:,}")
    for name, texts in zip(('train', 'val'), parts):
        path = os.path.join(folder, f'{name}.bin')
        n_chars = sum(len(text) for text, _ in texts)
        n = write_tokens(path + '.tmp', encode_all(texts, tokenizer, end, allow_special, n_chars, name))
        written.append(path)
        print(f"{shorten(path)}: {n:,} tokens of {n_chars:,} characters")
    meta_path = os.path.join(folder, 'meta.pkl')
    if tokenizer.state['name'] == 'char':
        itos = dict(enumerate(tokenizer.chars))
        meta = {'vocab_size': tokenizer.n_vocab, 'stoi': tokenizer.ids, 'itos': itos}
        with open(meta_path + '.tmp', 'wb') as file:
            pickle.dump(meta, file)
        written.append(meta_path)
    for path in written: # all of them are whole now
        os.replace(path + '.tmp', path)
    if meta_path not in written and os.path.exists(meta_path):
        os.remove(meta_path) # of an earlier, character dataset

def split_documents(documents: list[str], n_train: int) -> list[list[tuple[str, bool]]]:
    """ the first n_train characters and the rest, each a list of (text, whether a document ends there) """
    parts = [], []
    for text in documents:
        head, tail = text[:n_train], text[n_train:]
        if head or not text:
            parts[0].append((head, not tail))
        if tail:
            parts[1].append((tail, True))
        n_train = max(0, n_train - len(text))
    return parts

def encode_all(texts, tokenizer, end, allow_special, n_chars, name):
    """ the ids of all texts, a list at a time, under a progress bar where it takes longer than a second """
    from tqdm import tqdm
    with tqdm(total=n_chars, desc=name, unit='char', unit_scale=True, delay=1) as progress:
        for text, ends in texts:
            for piece in tokenizer.pieces(text, 2**20):
                yield tokenizer.encode(piece, allow_special)
                progress.update(len(piece))
            if ends:
                yield end

def write_tokens(path: str, lists) -> int:
    """ write lists of ids to `path`, and return how many there were """
    n = 0
    with open(path, 'wb') as file:
        for ids in lists:
            file.write(np.array(ids, dtype='<u2').tobytes())
            n += len(ids)
    return n

def fetch(url: str, path: str, sha256: str) -> str:
    """ the text at `path`, fetched from `url` and checked if it is not there yet """
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

def read_text(path: str) -> str:
    """ a text file in UTF-8, with its line ends as they are; raises ValueError where it is not that """
    with open(path, 'rb') as file:
        data = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode('utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f"{shorten(path)} is not UTF-8 at byte {error.start:,}; "
                         "convert it first, as with iconv -f latin1 -t utf-8, if it is Latin-1") from None
