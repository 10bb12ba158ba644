"""
Encodes text of any size into a file of token ids, with one process per core.

The text is split into jobs of about a million characters, at most two per process at a time, so memory use
does not grow with the text, except by some bytes a document. GPT-2's ids are exactly those of each document
encoded as a whole.
"""
import array
import collections
import concurrent.futures
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import signal
import threading
import unicodedata

import numpy as np

JOB = 2**20 # characters
END = '<|endoftext|>'

def write_tokens(path: str, documents, tokenizer, workers: int = 0, allow_special: bool = False):
    """ write the GPT-2 ids of all documents, each ended by end-of-text; return where each ends, (n,) """
    # a scheduler may give this process only some of the machine's cores; only Linux can tell
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    workers = min(workers or cores, 61 if os.name == 'nt' else math.inf) # Windows allows no more
    jobs = cut_jobs(documents, tokenizer)
    first = list(itertools.islice(jobs, 4)) # if that is all, starting processes takes longer
    alone = workers == 1 or len(first) < 4
    jobs = itertools.chain(first, jobs)
    results = ((encode_job(job, tokenizer, allow_special) for job in jobs) if alone else
               encode_in_processes(jobs, tokenizer, allow_special, workers))
    n, ends = 0, [np.zeros(0, np.int64)]
    with open(path, 'wb') as file, contextlib.closing(results):
        for written in results:
            file.write(written)
            ids = np.frombuffer(written, '<u2')
            ends.append(n + 1 + np.flatnonzero(ids == tokenizer.eot))
            n += len(ids)
    ends = np.concatenate(ends)
    ends = ends[np.append(np.diff(ends) > 1, True)[:len(ends)]] # one that is empty belongs to that before it
    return ends[1:] if len(ends) > 1 and ends[0] == 1 else ends # or, if it is the first, to that after it

def cut_jobs(documents, tokenizer):
    """ yield jobs: lists of pieces of text, None where a document ends, of JOB characters or a few more """
    job, size = [], 0
    for _, blocks in documents:
        for piece in itertools.chain(cut_text(blocks, tokenizer), [None]):
            job.append(piece)
            size += len(END if piece is None else piece)
            if size >= JOB:
                yield job
                job, size = [], 0
    if job:
        yield job

def cut_text(blocks, tokenizer):
    """ recut the blocks of one text into pieces of similar length, whose joined ids are the whole text's

    GPT-2 splits text into words before it merges bytes, and white space after anything else starts a new
    word, so a cut before it changes nothing. A block without any is cut where the kind of character changes.
    """
    held, before = [], '' # the blocks since the last cut, and the character before this block
    for block in blocks:
        found = tokenizer.boundary.search(before + block)
        cut = found.start() - len(before) if found else find_change(block)
        if found or cut:
            yield ''.join([*held, block[:cut]])
            held, block = [], block[cut:]
        held.append(block)
        before = block[-1:] or before
    yield ''.join(held)

def find_change(text: str) -> int:
    """ the first index where letters, numbers and other characters meet, or 0: 'ab,c' -> 2

    Of GPT-2's words only contractions ('s, 'll) span such a place; none looks back across one, and only white
    space looks ahead across one. So a cut there changes nothing.
    """
    kinds = map(kind, text)
    return next((i for i, (a, b) in enumerate(itertools.pairwise(kinds), 1) if a and b and a != b), 0)

@functools.lru_cache(2**16)
def kind(char: str) -> str:
    """ letter, number or other, as GPT-2's words distinguish them; '' if no cut may be next to `char`

    '' is for white space, the apostrophe, the bar of <|endoftext|>, and what Unicode has changed or added
    since version 3.2, since tiktoken's tables may be older or newer than Python's.
    """
    now, then = unicodedata.category(char)[0], unicodedata.ucd_3_2_0.category(char)[0]
    kinds = [{'L': 'letter', 'N': 'number', 'Z': '', 'C': ''}.get(c, 'other') for c in (now, then)]
    return kinds[0] if kinds[0] == kinds[1] and char not in "'|" else ''

def encode_job(job: list[str | None], tokenizer, allow_special: bool) -> bytes:
    """ the ids of a job, as bytes for the file """
    if allow_special or not any(END in piece for piece in job if piece): # one call does it all
        text = ''.join(END if piece is None else piece for piece in job)
        return tokenizer.encode_array(text).astype('<u2').tobytes()
    ids = ([tokenizer.eot] if piece is None else tokenizer.encode(piece) for piece in job)
    return np.fromiter(itertools.chain.from_iterable(ids), '<u2').tobytes()

def encode_in_processes(jobs, tokenizer, allow_special: bool, workers: int):
    """ yield encode_job's result for each job, in order """
    waiting = collections.deque()
    context = multiprocessing.get_context('spawn') # the same on every platform, and safe with threads
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, start_worker, (tokenizer, allow_special))
    try:
        for job in jobs:
            waiting.append(submit(pool, job))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise OSError("a process that encodes was ended from outside, perhaps for want of memory; type "
                      "--workers=1") from None
    finally:
        pool.shutdown(cancel_futures=True)

def submit(pool, job):
    """ submit a job to the pool; a process that this starts inherits that Ctrl-C is ignored """
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return pool.submit(work, job)
    finally:
        signal.signal(signal.SIGINT, handler)

def start_worker(*settings) -> None:
    """ initialize a process of the pool """
    global _settings
    _settings = settings
    signal.signal(signal.SIGINT, signal.SIG_IGN) # not inherited on Windows
    threading.Thread(target=leave_with_parent, daemon=True).start()

def leave_with_parent() -> None:
    """ end this process once its parent is gone, even if the parent was killed """
    multiprocessing.parent_process().join()
    os._exit(1)

def work(job) -> bytes:
    return encode_job(job, *_settings)

# -----------------------------------------------------------------------------
# characters

def write_characters(parts: dict, known: list[str] | None = None) -> tuple[list[str], list[np.ndarray]]:
    """ write the character ids of each {path: documents}, each document ended by a newline

    Returns the vocabulary (`known`, or else the texts' own characters, sorted) and, for each path, where its
    documents end.
    """
    ends, seen = [], np.zeros(0x110000, bool)
    for path, documents in parts.items():
        ends.append(write_code_points(path + '.codes', documents, known)) # 4 bytes per character
        for codes in read_code_points(path + '.codes'):
            seen[codes] = True
    chars = known or [chr(code) for code in np.flatnonzero(seen)]
    if len(chars) > 2**16:
        raise ValueError(f"the text has {len(chars):,} different characters, but a dataset holds at most "
                         "65,536; type --tokenizer=gpt2")
    ids = np.zeros(0x110000, '<u2')
    ids[[ord(char) for char in chars]] = range(len(chars))
    for path in parts:
        with open(path, 'wb') as file:
            for codes in read_code_points(path + '.codes'):
                file.write(ids[codes])
    return chars, ends

def write_code_points(path: str, documents, known: list[str] | None) -> np.ndarray:
    """ write the code points of all characters; return where each document ends; raises ValueError for a
    character not in `known`, if given """
    allowed, ends = np.full(0x110000, known is None), array.array('q')
    allowed[[ord(char) for char in known or []]] = True
    with open(path, 'wb') as file:
        for place, blocks in documents:
            before = 0
            for block in itertools.chain(blocks, '\n'):
                codes = np.frombuffer(block.encode('utf-32-le'), '<u4')
                if not allowed[codes].all():
                    at = int(allowed[codes].argmin())
                    raise ValueError(f"character {before + at + 1:,} of {place} is {block[at]!r}, not one of "
                                     f"the {len(known)} of the dataset that --tokenizer names; remove it")
                file.write(codes)
                before += len(codes)
            ends.append(file.tell() // 4)
    return np.array(ends)

def read_code_points(path: str):
    """ yield what write_code_points wrote, a block at a time """
    with open(path, 'rb') as file:
        while len(codes := np.fromfile(file, '<u4', JOB)):
            yield codes
