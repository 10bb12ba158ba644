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
val_fraction = 0.1 # share of the items, from the end, to validate on

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
from dataset import read_text, shorten
from documents import check_hub_id, csv_rows, find_files, hub_rows, is_list, json_items, json_rows
from instruct import TEMPLATE, encode, read_turns, render
from publish import claim, publish, split_off
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

def read_items(paths, progress):
    """ yield (place, item) of all files or, if there are none, of the hub dataset `input` """
    if not paths:
        yield from hub_rows(input, subset, progress)
    for path in paths:
        if path.lower().endswith(('.csv', '.tsv')):
            yield from csv_rows(path, progress)
        else:
            is_lines = path.lower().endswith('.jsonl') or not is_list(path)
            yield from (json_rows if is_lines else json_items)(path, progress, ITEM)

def write_items(place, text):
    """ write all items, in the template `text`, to the train files; return their lengths, how many tokens
    count, and how many items have a blank answer """
    lengths, n_counted, n_blank, tokenizer = [], 0, 0, BPETokenizer()
    source = os.path.expanduser(input)
    paths = find_files(source, ('.jsonl', '.csv', '.tsv')) if os.path.exists(source) else []
    if not paths:
        check_hub_id(input)
    size = sum(map(os.path.getsize, paths)) or None # unknown for the hub
    with (open(os.path.join(place, 'train.bin'), 'wb') as tokens,
          open(os.path.join(place, 'train_mask.bin'), 'wb') as masks,
          tqdm(total=size, unit='B', unit_scale=True, delay=1) as progress):
        for where, item in read_items(paths, progress.update):
            try:
                turns = read_turns(item)
                ids, mask = encode(turns, text, tokenizer)
            except ValueError as error:
                raise ValueError(f"{where} {error}") from None
            tokens.write(np.array(ids, '<u2').tobytes())
            masks.write(bytes(mask))
            lengths.append(len(ids))
            n_counted += len(mask) - mask.count(0)
            n_blank += not all(answer.strip() for *_, answer in turns)
    return lengths, n_counted, n_blank

signal.signal(signal.SIGTERM, signal.default_int_handler) # end as on Ctrl-C, leaving nothing behind
if not input:
    raise ValueError("there is no input; type --input=PATH of a .jsonl, .json or .csv file, or of a folder")
folder, text = claim(name, 'instruct', val_fraction), read_template()
with publish(folder) as place:
    lengths, n_counted, n_blank = write_items(place, text)
    if len(lengths) < 2:
        raise ValueError(f"{input} has {'1 item' if lengths else 'no items'}; expected two or more, to "
                         "validate on one")
    n_val = max(1, int(len(lengths) * val_fraction))
    n, n_train = sum(lengths), sum(lengths[:-n_val])
    split_off(place, '.bin', 2 * n_train)
    split_off(place, '_mask.bin', n_train)
    with open(os.path.join(place, 'template.txt'), 'w', encoding='utf-8', newline='') as file:
        file.write(text)
print(f"{len(lengths):,} items, {n:,} tokens, of which {n_counted / n:.1%} are answers and count")
print(f"{shorten(folder)}: {len(lengths) - n_val:,} items of {n_train:,} tokens to train on, {n_val:,} of "
      f"{n - n_train:,} to validate on")
print(f"the longest item has {max(lengths):,} tokens")
n_long = sum(length > LONGEST for length in lengths)
if n_long:
    print(f"warning: items longer than the {LONGEST:,} tokens that GPT-2 reads at once: {n_long:,}; it "
          "learns their ends without the question; shorten them or leave them out")
if n_blank:
    print(f"warning: items with a blank answer: {n_blank:,}; the model learns from them to say nothing; "
          "write one, or leave them out")
tell_run('config/finetune/gpt2_small.py', name, n_train, n - n_train)
