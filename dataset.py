"""
Token files, and the order in which training reads them.

A dataset is a folder with train.bin and val.bin (raw little-endian uint16 token ids, nothing else) and, for
tokens other than GPT-2's, meta.pkl (a dict with vocab_size and, if they are characters, stoi and itos). This
is nanoGPT's format. train_mask.bin and val_mask.bin, if present, hold one byte per token: 0 for a token that
is read but is not a target, 2 for a target that ends an item, 1 for the other targets.

A window is block_size tokens to read and, as targets, the token after each. An epoch cuts the split into
windows, starting at a random offset and wrapping around the end of the file, and shuffles them: every token
is a target once per epoch. Where a mask marks items, a window begins with one instead, as a prompt does, and
holds whole ones. Offset and order are drawn from (seed, epoch), and iteration i of S windows takes
[i*S, (i+1)*S) of the endless series of epochs, so (seed, i) determines what an iteration trains on.
"""
import bisect
import difflib
import functools
import glob
import math
import os
import pickle
import re
import zlib

import numpy as np

from configurator import ROOT, quote, script
from text import read_text, shorten
from tokenizer import state_of_meta

DATA = os.path.join(ROOT, 'data')
ENDS_ITEM = 2 # the mask's byte for a target that ends an item
ANY_TEXT = {'custom', 'instruct'} # folders of data/ that make a dataset of any text

class Split:
    """ the tokens of one split of a dataset (`name` is train or val), cut into windows of block_size """

    def __init__(self, folder: str, name: str, block_size: int, vocab_size: int, seed: int = 0):
        self.path = os.path.join(folder, f'{name}.bin')
        self.tokens = open_tokens(self.path)
        self.n_tokens = len(self.tokens)
        self.mask = open_mask(os.path.join(folder, f'{name}_mask.bin'), self.n_tokens)
        self.items = None if self.mask is None else pack_items(self.mask, block_size)
        check_enough(self.path, self.n_tokens, block_size if self.items is None else 1)
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        self.epoch_order = functools.lru_cache(maxsize=2)(epoch_order) # a cache per split
        self.n_targets = self.n_tokens - 1 # all tokens but the first, which has none before it
        # per epoch; the last may be short
        self.n_windows = -(-self.n_targets // block_size) if self.items is None else len(self.items)
        self.check_ids(self.tokens[:2**28]) # takes less than a second; `batch` checks the rest

    def check_ids(self, ids) -> None:
        if ids.max() >= self.vocab_size:
            raise ValueError(f"{shorten(self.path)} holds token id {ids.max()}, but the vocabulary has only "
                             f"{self.vocab_size} ids; prepare the data with this model's tokenizer")

    def training_windows(self, iter_num: int, sequences: int) -> np.ndarray:
        """ the windows of an iteration, (sequences, 2): each a start and how many of its targets count """
        return self.nth(np.arange(iter_num * sequences, (iter_num + 1) * sequences))

    def nth(self, number: np.ndarray) -> np.ndarray:
        """ the windows (n, 2) at these positions in the endless series of epochs """
        out = np.empty((len(number), 2), np.int64)
        for epoch in np.unique(number // self.n_windows):
            offset, order = self.epoch_order(self.seed, int(epoch), self.n_targets, self.n_windows)
            here = number // self.n_windows == epoch
            out[here] = self.cut(order[number[here] % self.n_windows], offset)
        return out

    def evaluation_windows(self, limit: int) -> np.ndarray:
        """ at most `limit` windows (n, 2), evenly spread over the split, the same at every call """
        n = min(limit, self.n_windows)
        return self.cut(np.arange(n) * self.n_windows // n)

    def evaluation_parts(self, limit: int) -> list[tuple[float, np.ndarray, int]]:
        """ for each part: the weight of its mean loss, its windows, and how many of their targets count """
        windows = self.evaluation_windows(limit)
        n = self.count(windows)
        if not n: # a mask hides them: use all windows
            windows = self.evaluation_windows(self.n_windows)
            n = self.count(windows)
        if not n:
            raise ValueError(f"of {shorten(self.path)} no token that is evaluated counts, by its mask; "
                             "prepare it with more")
        return [(1.0, windows, n)]

    def mark(self) -> str:
        """ a fingerprint of the data: the number of tokens, and a checksum of the first and last ones """
        arrays = [array for array in (self.tokens, self.mask) if array is not None]
        ends = [end for array in arrays for end in (array[:2**20], array[-2**20:])]
        packed = '' if self.items is None else ':items'
        return f'{self.n_tokens}:{zlib.crc32(np.concatenate(ends)):08x}{packed}'

    def describe_epochs(self, windows: float) -> str:
        epochs = windows / self.n_windows
        return f"{epochs:.1f} epochs" if epochs >= 0.05 else "less than 0.1 epochs"

    def cut(self, index: np.ndarray, offset: int = 0) -> np.ndarray:
        """ the windows at `index`, (n, 2) starts and lengths; without items, only the last may be short """
        if self.items is not None:
            return self.items[index]
        start = index * self.block_size
        length = np.minimum(self.block_size, self.n_targets - start)
        return np.stack([(start + offset) % self.n_targets, length], axis=1)

    def batches(self, windows: np.ndarray, size: int):
        """ yield the windows, `size` at a time; the last batch is padded with windows without targets """
        filled = np.concatenate([windows, np.zeros((-len(windows) % size, 2), windows.dtype)])
        yield from filled.reshape(-1, size, 2)

    def read(self, array: np.ndarray, start: int) -> np.ndarray:
        """ block_size values from `start`, one per target, wrapping around the end of the split """
        if start + self.block_size <= self.n_targets:
            return array[start:start + self.block_size]
        return array[np.arange(start, start + self.block_size) % self.n_targets]

    def batch(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ inputs and targets (B, T), int64; a target that does not count is -1 """
        x, y = np.empty((2, len(windows), self.block_size), np.int64)
        for row, (start, n) in enumerate(windows.tolist()):
            x[row], y[row] = self.read(self.tokens, start), self.read(self.tokens[1:], start)
            y[row, n:] = -1
            if self.mask is not None:
                y[row, self.read(self.mask[1:], start) == 0] = -1
        self.check_ids(x)
        self.check_ids(y)
        return x, y

    def count(self, windows: np.ndarray) -> int:
        """ how many targets of these windows count """
        if self.mask is None:
            return int(windows[:, 1].sum())
        return int(sum(np.count_nonzero(self.read(self.mask[1:], start)[:n])
                       for start, n in windows.tolist()))

class Mix(Split):
    """ several splits read as one, in proportion to their weights: of every ROUND windows each split gives a
    fixed number, in an order drawn from (seed, round). A window's start counts the earlier splits' tokens.
    Of the methods not defined here, only training_windows and batches apply to a Mix. """
    ROUND = 1000

    def __init__(self, splits: list[Split], weights: list[float], seed: int):
        self.splits, self.block_size, self.seed = splits, splits[0].block_size, seed
        self.weights = np.array(weights) / sum(weights)
        self.n_windows, self.n_tokens = sum(s.n_windows for s in splits), sum(s.n_tokens for s in splits)
        self.bases = np.cumsum([0] + [s.n_tokens for s in splits])[:-1]
        ends = np.round(np.cumsum(self.weights) * self.ROUND).astype(int)
        self.source = np.repeat(np.arange(len(splits)), np.diff(ends, prepend=0)) # of each window in a round
        if len(set(self.source)) < len(splits):
            raise ValueError(f"one of the weights {', '.join(f'{w:.2g}' for w in self.weights)} is less than "
                             f"a window in {self.ROUND}; type --dataset with more even ones")

    def nth(self, number):
        """ as in Split; with weights of 0.7 and 0.3, round r holds the windows 700 r to 700 r + 699 of the
        first split and 300 r to 300 r + 299 of the second """
        out = np.empty((len(number), 2), np.int64)
        for turn in np.unique(number // self.ROUND):
            order = np.random.default_rng([self.seed, int(turn)]).permutation(self.source)
            here = np.flatnonzero(number // self.ROUND == turn)
            for k, split in enumerate(self.splits):
                place = np.cumsum(order == k) - 1 # of a window among k's in this round
                mine = here[order[number[here] % self.ROUND] == k]
                earlier = turn * (self.source == k).sum()
                out[mine] = split.nth(earlier + place[number[mine] % self.ROUND]) + [self.bases[k], 0]
        return out

    def evaluation_parts(self, limit):
        parts = []
        for split, weight, base in zip(self.splits, self.weights, self.bases):
            most = split.n_windows if limit >= self.n_windows else max(1, round(limit * weight))
            (_, windows, n), = split.evaluation_parts(most)
            parts.append((float(weight), windows + [base, 0], n))
        return parts

    def mark(self):
        return ','.join(split.mark() for split in self.splits)

    def describe_epochs(self, windows):
        shares = (self.source == k for k in range(len(self.splits)))
        return ', '.join(f"{split.describe_epochs(windows * share.mean())} of "
                         f"{shorten(os.path.dirname(split.path))}"
                         for split, share in zip(self.splits, shares))

    def by_split(self, windows):
        """ yield (split, its rows in `windows`, those windows with its own starts) per split with any """
        owner = np.searchsorted(self.bases, windows[:, 0], side='right') - 1
        for k in np.unique(owner):
            rows = np.flatnonzero(owner == k)
            yield self.splits[k], rows, windows[rows] - [self.bases[k], 0]

    def batch(self, windows):
        x, y = np.empty((2, len(windows), self.block_size), np.int64)
        for split, rows, its in self.by_split(windows):
            x[rows], y[rows] = split.batch(its)
        return x, y

    def count(self, windows):
        return sum(split.count(its) for split, _, its in self.by_split(windows))

def item_ends(mask: np.ndarray) -> list[int]:
    """ where the items that a mask marks end, the last at its own end """
    ends = (np.flatnonzero(mask == ENDS_ITEM) + 1).tolist()
    return ends if not ends or ends[-1] == len(mask) else [*ends, len(mask)]

def pack_items(mask: np.ndarray, block_size: int) -> np.ndarray | None:
    """ windows (n, 2), starts and lengths, of as many whole items as fit, in their order; None if the mask
    marks no items. A longer item fills windows, and what is left of it is in one with the items after it:
    items of 3, 2 and 7 tokens make (0, 4), (5, 5), (10, 1) of a block_size of 5.
    """
    ends = item_ends(mask)
    if not ends:
        return None
    windows, start = [], 0
    while start < len(mask) - 1:
        most = start + block_size + 1 # a window's last token is only a target
        end = ends[bisect.bisect(ends, most) - 1] # of the last item that fits; beyond, or earlier, if none
        fits = start < end <= most
        windows.append((start, end - 1 - start if fits else block_size))
        start = end if fits else start + block_size
    return np.array(windows)

def epoch_order(seed: int, epoch: int, targets: int, windows: int) -> tuple[int, np.ndarray]:
    """ where an epoch's first window starts, and the order of its windows """
    rng = np.random.default_rng([seed, epoch])
    return int(rng.integers(targets)), rng.permutation(windows)

def find_dataset(dataset: str) -> str:
    """ the folder of a dataset: one in data/ by its name, any other by its path """
    is_path = os.path.isdir(dataset) and os.path.basename(dataset) != dataset
    return dataset if is_path else os.path.join(DATA, dataset)

def find_datasets(dataset: str) -> dict[str, float]:
    """ {folder: weight} for 'novel' or 'novel:0.7,letters:0.3'; raises ValueError for anything else """
    folders = {}
    for part in dataset.split(','):
        name, weight = re.fullmatch(r'\s*(.*?)(?::([0-9.eE+-]+))?\s*', part, re.DOTALL).groups()
        folder = find_dataset(name)
        try:
            weight = float(weight or 1)
        except ValueError:
            weight = 0.0
        again = any(os.path.abspath(folder) == os.path.abspath(other) for other in folders)
        if not (name and 0 < weight < math.inf) or again:
            raise ValueError(f"dataset is {dataset!r}; type --dataset=NAME, or --dataset=A:0.7,B:0.3 with "
                             "weights above 0, each dataset once")
        folders[folder] = weight
    return folders

def open_split(folders: dict[str, float], *args, seed: int = 0) -> Split:
    """ a split of a dataset or of a mixture; args are Split's, after its folder """
    splits = [Split(folder, *args, seed) for folder in folders]
    return splits[0] if len(splits) == 1 else Mix(splits, list(folders.values()), seed)

def how_to_make(folder: str) -> str:
    """ what to type where a dataset's folder, or the train.bin in it, is missing """
    typed = folder.removeprefix(DATA + os.sep)
    name = os.path.basename(typed)
    if os.path.isfile(typed):
        return (f"{typed} is a text, of which python {script('data/custom/prepare.py')} "
                f"--input={quote(typed)} --name={quote(os.path.splitext(name)[0])} makes a dataset")
    made, scripts = ({os.path.basename(os.path.dirname(found)) for found in
                      glob.glob(os.path.join(DATA, '*', file))} for file in ('train.bin', 'prepare.py'))
    if name in scripts:
        of = ', with --input=PATH' if name in ANY_TEXT else ''
        return f"run python {script(f'data/{name}/prepare.py')} first{of}"
    if name in made: # but it lacks its other half
        return "prepare it again"
    known = sorted(made | scripts - ANY_TEXT)
    near = difflib.get_close_matches(name, known, n=1)
    if near and typed == name: # not a path
        return f"did you mean --dataset={near[0]}?"
    return (f"type --dataset=NAME with one of {', '.join(known)}, or make it by python "
            f"{script('data/custom/prepare.py')} --input=PATH --name={quote(name)}")

def open_tokens(path: str) -> np.ndarray:
    """ the file as a memory-mapped uint16 array; raises OSError or ValueError if it is not a split """
    folder = shorten(os.path.dirname(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no {shorten(path)}; {how_to_make(os.path.dirname(path))}")
    size = os.path.getsize(path)
    its = os.path.join(folder, 'prepare.py')
    again = f"run python {its} again" if os.path.exists(its) else "prepare it again"
    if size == 0:
        raise ValueError(f"{shorten(path)} is empty; {again}")
    if size % 2:
        raise ValueError(f"{shorten(path)} has {size} bytes, an odd number, but a token takes two; {again}")
    return np.asarray(np.memmap(path, dtype='<u2', mode='r')) # a plain array slices faster than a memmap

def check_enough(path: str, n_tokens: int, block_size: int) -> None:
    """ raise ValueError if a window does not fit into a split """
    if n_tokens <= block_size:
        both = (os.path.join(os.path.dirname(path), f'{name}.bin') for name in ('train', 'val'))
        least = min(map(os.path.getsize, filter(os.path.exists, both)))
        raise ValueError(f"{shorten(path)} has {n_tokens} tokens, too few for block_size = {block_size}; "
                         f"type --block_size={max(1, least // 4)}, or add text")

def open_mask(path: str, n_tokens: int) -> np.ndarray | None:
    """ which tokens are targets, one byte per token; None for all; raises ValueError for a wrong size """
    if not os.path.exists(path):
        return None
    if os.path.getsize(path) != n_tokens:
        raise ValueError(f"{shorten(path)} has {os.path.getsize(path)} bytes for {n_tokens} tokens, and "
                         "should have as many; prepare the dataset again")
    return np.asarray(np.memmap(path, dtype=np.uint8, mode='r'))

class PlainUnpickler(pickle.Unpickler):
    """ reads dicts, lists, numbers and text, and refuses anything that could run code """
    def find_class(self, module, name):
        raise ValueError(f"it names {module}.{name}, and could run code")

def read_tokenizer_state(folder: str) -> dict:
    """ a dataset's tokenizer state: its meta.pkl's, or GPT-2's; raises ValueError for a bad meta.pkl """
    path = os.path.join(folder, 'meta.pkl')
    if not os.path.exists(path):
        return {'name': 'gpt2'}
    try:
        with open(path, 'rb') as file:
            return state_of_meta(PlainUnpickler(file).load())
    except Exception as error: # a broken pickle may raise anything
        raise ValueError(f"cannot use {shorten(path)} ({error}); expected a plain dict with vocab_size and, "
                         "for characters, stoi and itos; prepare the dataset again") from None

def read_shared_state(folders) -> dict:
    """ the tokenizer state that all datasets of a mixture share; raises ValueError if they differ """
    folders = [folder for folder in folders if os.path.isdir(folder)] or folders # open_tokens tells who lacks
    states = [read_tokenizer_state(folder) for folder in folders]
    names = [shorten(folder) for folder in folders]
    for name, state in zip(names, states):
        if state != states[0]:
            of = names[0] if 'chars' in states[0] else 'gpt2'
            how = (f"prepare one with the other's, as data/custom/prepare.py --tokenizer={of} does"
                   if 'numbers' not in (states[0]['name'], state['name']) else 'mix those of one kind')
            raise ValueError(f"{names[0]} and {name} are in different tokens; {how}")
    return states[0]

def tell_assumed(folders) -> str:
    """ a line about the vocabulary size that is assumed if a dataset is missing; '' if none is """
    absent = [path for path in (os.path.join(folder, 'train.bin') for folder in folders)
              if not os.path.exists(path)]
    assumed = "a vocabulary of GPT-2's 50,257 ids is assumed"
    return f"there is no {shorten(absent[0])}; {assumed}\n" if absent else ''

def read_template(folders) -> str | None:
    """ the instruction template of the datasets that have one, or None; raises ValueError if one is invalid,
    or if they differ """
    paths = [os.path.join(folder, 'template.txt') for folder in folders]
    found = {path: read_text(path) for path in paths if os.path.exists(path)}
    for path, text in found.items():
        if '{instruction}' not in text:
            raise ValueError(f"{shorten(path)} has no {{instruction}}; prepare the dataset again")
    first, *others = found or [None]
    for path in others:
        if found[path] != found[first]:
            raise ValueError(f"{shorten(first)} and {shorten(path)} differ, and a model keeps one; prepare "
                             "one of the datasets with the other's, by --template=FILE:PATH")
    return found.get(first)
