"""
Makes a dataset of instructions and answers, of which only the answers are learned. Each line of .jsonl, item
of a list in .json, or row of .csv or of a Hugging Face dataset has either instruction, output and optionally
input (Alpaca's fields), or messages with role and content; the readme has other names that are taken.

$ python data/instruct/prepare.py --input=questions.jsonl --name=questions
$ python train.py config/finetune/gpt2_small.py --dataset=questions
"""
# options
input = '' # a file, a folder (its .jsonl, .csv, .tsv), or a dataset id of the hub
name = 'instruct' # the dataset is written to data/NAME
subset = '' # which subset of a hub dataset, if it has several
template = '' # text with {instruction}, {input}, and \n for a line end, or FILE:PATH; '' for the readme's
val_fraction = 0.1 # share to validate on: items from all parts of the data or, of few, the last ones
val_input = '' # validate on another file, folder, ... than input, instead of a share of it

import os
import re
import signal
import sys

_folder = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(_folder, '..', '..')) # for the project's modules

from configurator import configure
configure(globals())

import numpy as np
from tqdm import tqdm

from advice import tell_run
from documents import csv_rows, find_source, hub_rows, json_items, json_rows
from instruct import TEMPLATE, encode, read_turns, render
from publish import checksums, choose_val, claim, publish, split_off, tell_repeats
from text import read_text, shorten
from tokenizer import BPETokenizer

LONGEST = 1024 # tokens that GPT-2 reads at once
ITEM = '{"instruction": "...", "output": "..."}' # an example item, for messages

def read_template():
    """ the text that `template` names; raises an error if there is none, or no {instruction} in it """
    if template.startswith('FILE:'):
        path = template.removeprefix('FILE:')
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no {path}; type --template=FILE:PATH of a text")
        text = read_text(path)
    else:
        text = re.sub('\r\n?', '\n', template).replace('\\n', '\n') or TEMPLATE
    render(text, 'a question')
    return text

def read_items(source, paths, progress):
    """ yield (place, item) of all files or, if there are none, of the hub dataset `source` """
    if not paths:
        yield from hub_rows(source, subset, progress)
    for path in paths:
        if path.lower().endswith(('.csv', '.tsv')):
            yield from csv_rows(path, progress)
        else:
            yield from (json_rows if path.lower().endswith('.jsonl') else json_items)(path, progress, ITEM)

def write_items(place, text, source):
    """ append all items of a source, in the template `text`, to the train files; return for each its tokens,
    how many of them count, and whether an answer is blank, (items, 3) """
    facts, tokenizer, paths = [], BPETokenizer(), find_source(source, ('.jsonl', '.csv', '.tsv'))
    size = sum(map(os.path.getsize, paths)) or None # unknown for the hub
    with (open(os.path.join(place, 'train.bin'), 'ab') as tokens,
          open(os.path.join(place, 'train_mask.bin'), 'ab') as masks,
          tqdm(total=size, unit='B', unit_scale=True, delay=1) as progress):
        for where, item in read_items(source, paths, progress.update):
            try:
                turns = read_turns(item)
                ids, mask = encode(turns, text, tokenizer)
            except ValueError as error:
                raise ValueError(f"{where} {error}") from None
            tokens.write(np.array(ids, '<u2').tobytes())
            masks.write(bytes(mask))
            facts.append((len(ids), np.count_nonzero(mask), not all(answer.strip() for *_, answer in turns)))
    if len(facts) < 2 - bool(val_input):
        raise ValueError(f"{source} has {'1 item' if facts else 'no items'}; expected "
                         f"{'one or more' if val_input else 'two or more, to validate on one'}")
    return np.array(facts)

signal.signal(signal.SIGTERM, signal.default_int_handler) # end as on Ctrl-C, leaving nothing behind
if not input:
    raise ValueError("there is no input; type --input=PATH of a .jsonl, .json or .csv file, or of a folder")
folder, text = claim(name, 'instruct', val_fraction, input, val_input), read_template()
with publish(folder) as place:
    facts = [write_items(place, text, source) for source in (input, val_input) if source]
    lengths, counted, blank = np.concatenate(facts).T
    ends = np.cumsum(lengths)
    pieces = (np.array([[facts[0][:, 0].sum(), ends[-1]]]) if val_input
              else choose_val(ends, val_fraction, whole=True))
    repeats = tell_repeats(checksums(os.path.join(place, 'train.bin'), ends), ends, pieces)
    split_off(place, '.bin', pieces, '<u2')
    split_off(place, '_mask.bin', pieces, 'u1')
    with open(os.path.join(place, 'template.txt'), 'w', encoding='utf-8', newline='') as file:
        file.write(text)
n, n_val = ends[-1], np.diff(pieces).sum() # tokens
val_items = np.diff(np.searchsorted(ends, pieces, side='right')).sum()
print(f"{len(lengths):,} items, {n:,} tokens, of which {counted.sum() / n:.1%} are answers and count")
print(f"{shorten(folder)}: {len(lengths) - val_items:,} items of {n - n_val:,} tokens to train on, "
      f"{val_items:,} of {n_val:,} to validate on{repeats}")
print(f"the longest item has {lengths.max():,} tokens")
n_long = np.count_nonzero(lengths > LONGEST + 1) # the last is only a target
if n_long:
    print(f"warning: items longer than the {LONGEST:,} tokens that GPT-2 reads at once: {n_long:,}; it "
          "learns their ends without the question; shorten them or leave them out")
if blank.any():
    print(f"warning: items with a blank answer: {blank.sum():,}; the model learns from them to say nothing; "
          "write one, or leave them out")
tell_run('config/finetune/gpt2_small.py', name, int(n - n_val), int(n_val), int(lengths.max()))
