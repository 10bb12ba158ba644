"""
Measures how good a model is, next to its base; docs/evaluation.md defines each figure:

$ python evaluate.py --out_dir=out-novel
$ python evaluate.py --out_dir=out-novel --task=lambada --file=lambada_test.jsonl
"""
# -----------------------------------------------------------------------------
# options

# which models
init_from = 'resume' # resume (the model in out_dir), gpt2, gpt2-medium, -large, -xl, a hub id, a path
out_dir = 'out' # a run's folder, to use its ckpt.pt (else last.pt), or a checkpoint's path
base = '' # a model to compare with, such as gpt2; '' for the one it was trained from; none for no comparison
# on what
task = 'perplexity' # perplexity, lambada or hellaswag
dataset = '' # for perplexity: a dataset's name or path; '' for the one the model was trained on
split = 'val' # of the dataset: val or train
file = '' # a text to use instead of a dataset; for lambada and hellaswag, their .jsonl as published
limit = 0 # use only the first `limit` tokens of each file, or items of a task; 0 for all
# how
block_size = 0 # tokens that the model sees at once; 0 for its maximum
stride = 0 # tokens by which the window advances; 0 for half of block_size; smaller is slower
batch_size = 8 # windows per forward pass
json = False # print a line of JSON instead of the table; for lambada and hellaswag with each item's score
# machine
device = 'auto' # auto, cpu, cuda, cuda:1, mps
dtype = 'auto' # auto, float32, bfloat16, float16; the logits are always in float32

from configurator import configure, quote
configure(globals(), at_least_1=('batch_size',), choices={
    'task': ('perplexity', 'lambada', 'hellaswag'), 'split': ('val', 'train')})

if task != 'perplexity' and not file:
    raise ValueError(f"{task} has no file; type --file=PATH of its .jsonl, as it was published")

# -----------------------------------------------------------------------------
# set-up

import itertools
import json as json_module
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import checkpoint as checkpoints
import lora
from dataset import find_datasets, item_ends, open_mask, open_tokens, read_shared_state
from device import DTYPES, autocast, pick_device, pick_dtype
from recompute import Linear
from text import read_text, shorten
from tokenizer import from_state

device = pick_device(device)
dtype = pick_dtype(dtype, device)
if file and not os.path.isfile(file):
    raise FileNotFoundError(f"there is no file {file}; type --file=PATH of a text, or of a task's .jsonl")
if task == 'perplexity' and file.lower().endswith(('.jsonl', '.json', '.csv', '.tsv')):
    raise ValueError(f"{file} has rows, of which the names and marks would be scored, too; prepare it by "
                     "data/custom/prepare.py or data/instruct/prepare.py, and type --dataset=NAME")
content = read_text(file) if file else ''

# -----------------------------------------------------------------------------
# what is scored
# An item is (line number, context, answers, index of the right answer). A text is (ids, counts), two arrays
# of equal length, with counts above 0 where a token is scored; the first token never is.

PUBLISHED = {'lambada': '{"text": "..."}, of two words or more',
             'hellaswag': '{"ctx": "...", "endings": ["...", "...", "...", "..."], "label": 0 to 3}'}

def lambada(item):
    """ (context, answers, right index); the only answer is the last word, with the white space before it """
    words = re.findall(r'\s*\S+', item['text'])
    if len(words) < 2:
        raise ValueError("no two words")
    return ''.join(words[:-1]), [words[-1]], 0

def hellaswag(item):
    context = item['ctx'] if 'ctx' in item else f"{item['ctx_a']} {item['ctx_b']}"
    endings, label = item['endings'], int(item['label'])
    if not (context.strip() and isinstance(endings, list) and len(endings) == 4 and all(endings)
            and label in range(4)):
        raise ValueError("no context, not four endings, or a label beyond them")
    return context.rstrip(), [' ' + ending for ending in endings], label

def read_items(parse):
    items = []
    for n, line in enumerate(content.split('\n'), 1):
        if line.strip() and (len(items) < limit or not limit):
            try:
                items.append((n, *parse(json_module.loads(line))))
            except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
                why = f'no {error}' if isinstance(error, KeyError) else getattr(error, 'msg', error)
                raise ValueError(f"{file}, line {n}: {why}; expected {PUBLISHED[task]}; mend it") from None
    if not items:
        raise ValueError(f"{file} is empty; expected lines of {PUBLISHED[task]}; type another --file")
    return items

def read_dataset(name, one):
    """ the split of a dataset, or of each dataset of a mixture, as texts; and their names """
    if not name:
        raise ValueError(f"{one.name} names no dataset; type --dataset=NAME, or --file=PATH of a text")
    folders, most = find_datasets(name), limit or None
    paths = [os.path.join(folder, f'{split}.bin') for folder in folders]
    ids = [open_tokens(path) for path in paths]
    masks = [open_mask(os.path.join(folder, f'{split}_mask.bin'), len(its))
             for folder, its in zip(folders, ids)]
    texts, n = [], one.tokenizer.n_vocab
    for its, mask in zip(ids, masks):
        counts = np.broadcast_to(1, len(its)) if mask is None else mask
        edges = [] if mask is None else item_ends(mask[:most])[:-1] # each item is a text of its own
        texts += zip(np.split(its[:most], edges), np.split(counts[:most], edges))
    if read_shared_state(folders) != one.tokenizer.state or any(its.max() >= n for its, _ in texts):
        raise ValueError(f"{name} is not in the {n:,} tokens that {one.name} reads; type another --dataset, "
                         "or --file=PATH of a text")
    masked = any(mask is not None for mask in masks)
    return texts, (', '.join(map(shorten, paths))
                   + (', less the tokens that its mask leaves out' if masked else ''))

def encode_file(one):
    ids = np.array(one.tokenizer.encode(content)[:limit or None])
    return [(ids, np.broadcast_to(1, len(ids)))]

def encode_items(one):
    """ a text per answer, preceded by as much of its context as fits; and how many items were cut """
    texts, cut = [], set()
    for n, context, answers, _ in items:
        for answer in answers:
            try:
                before, after = map(one.tokenizer.encode, (context, answer))
            except ValueError as error: # a character that is not in the vocabulary
                raise ValueError(f"{file}, line {n}: {error}") from None
            room = one.T if len(after) > one.T else one.T + 1 - len(after) # the last token is not read
            cut |= {n} if len(before) > room else set()
            ids = np.array(before[-room:] + after)
            texts.append((ids, np.arange(len(ids)) >= len(ids) - len(after)))
    return texts, len(cut)

# -----------------------------------------------------------------------------
# models

def load(source):
    """ a model, its tokenizer, its window, and where it comes from """
    name = checkpoints.source_of(source, out_dir)
    model, loaded = checkpoints.load_model(name)
    tokenizer = from_state(checkpoints.find_tokenizer(loaded, model.config.vocab_size))
    config, most = loaded.get('config', {}), model.config.block_size
    T = block_size or most
    if T > most:
        raise ValueError(f"block_size is {T}, but {name} reads {most} tokens at most; type "
                         f"--block_size={most} or less")
    if stride > T:
        raise ValueError(f"stride is {stride}, which would skip tokens between windows of {T}; type "
                         f"--stride={T} or less")
    return SimpleNamespace(name=name, model=model.eval(), tokenizer=tokenizer, loaded=loaded, T=T,
                           origin=loaded.get('base') or config.get('init_from') or 'scratch',
                           trained_on=config.get('dataset') or '', stride=stride or max(1, T // 2))

def load_base(origin):
    """ the model to compare with one from `origin`, or None; unless `base` asks for it, it may be missing """
    if base or origin in ('scratch', 'resume'):
        return load(base) if base not in ('', 'none') else None
    try:
        if checkpoints.find(origin) and os.path.samefile(*map(checkpoints.find, (origin, first.name))):
            raise ValueError(f"what {first.name} was trained from lay in the same place")
        one = load(origin)
        one.name = shorten(origin) if os.path.exists(origin) else origin
        if not lora.is_base(one.model, one.loaded, first.loaded):
            raise ValueError(f"{one.name} is no longer the model that {first.name} was trained from; type "
                             f"--base={quote(one.name)} to compare them all the same")
        return one
    except (OSError, ValueError, ImportError) as error:
        moved = '; if it has moved, type --base=ITS_FOLDER' if isinstance(error, FileNotFoundError) else ''
        print(f"no comparison with its base: {' '.join(str(error).split())}{moved}", file=sys.stderr)

items = [] if task == 'perplexity' else read_items(lambada if task == 'lambada' else hellaswag)
first = load(init_from)
models = [one for one in (first, load_base(first.origin)) if one]
alike = first.tokenizer.state == models[-1].tokenizer.state
shortest = min(one.T for one in models)
for one in models if alike else []: # more context would favor one of them
    one.T, one.stride = shortest, stride or max(1, shortest // 2)
has_bytes = all(one.tokenizer.state['name'] != 'numbers' for one in models) # else nobody knows of what text
if task == 'perplexity' and not alike and (limit or not file or not has_bytes):
    how = ('and can be compared on a whole text only; type --file=PATH of one, without --limit, or'
           if has_bytes else 'some of them known by number alone; type')
    raise ValueError(f"{first.name} and {models[-1].name} have different tokens, {how} --base=none")
plain = ', as plain text, without its template' if first.loaded.get('template') else ''
split_texts, source = (None, file + plain) if file else read_dataset(dataset or first.trained_on, first)

# -----------------------------------------------------------------------------
# scores

def windows(texts, T, stride):
    """ yield (index of the text, inputs, targets), at most T tokens each; targets not scored here are -1 """
    for i, (ids, counts) in enumerate(texts):
        start = done = 0
        while done < len(ids) - 1:
            end = min(start + T, len(ids) - 1)
            piece = torch.from_numpy(ids[start:end + 1].astype(np.int64)) # the last is only a target
            scored = torch.from_numpy(counts[start + 1:end + 1] > 0)
            scored[:done - start] = False
            yield i, piece[:-1], piece[1:].where(scored, -1)
            start, done = start + stride, end

@torch.inference_mode()
def score(one, texts):
    """ (4, len(texts)) sums over scored tokens: nats, number, how many are not the likeliest, and bytes """
    sums, coder = torch.zeros(4, len(texts), dtype=torch.float64), one.tokenizer
    sizes = torch.tensor([len(coder.token_bytes(i)) * (i != coder.eot) for i in range(coder.n_vocab)])
    for linear in (m for m in one.model.transformer.h.modules() if isinstance(m, Linear)):
        linear.to(DTYPES[dtype]) # in which it is multiplied anyway
    rows, model = windows(texts, one.T, one.stride), one.model.to(device)
    total = sum(np.count_nonzero(counts[1:]) for _, counts in texts)
    bar = tqdm(total=total, desc=one.name, unit='tok', delay=1, leave=False)
    with autocast(device, dtype), bar:
        while batch := list(itertools.islice(rows, batch_size)):
            text, x, y = zip(*batch)
            x, y = pad_sequence(x, True).to(device), pad_sequence(y, True, -1) # (B, T), padded at the end
            scored = y >= 0
            hidden, targets = model.hidden(x)[scored.to(device)], y[scored] # (N, C), (N,)
            nats, missed = token_scores(model, hidden, targets.to(device))
            found = torch.stack([nats, torch.ones_like(nats), missed, sizes[targets]])
            sums.index_add_(1, torch.tensor(text)[scored.nonzero()[:, 0]], found.double())
            bar.update(len(targets))
    model.cpu() # make room for the next model
    return sums

def token_scores(model, hidden, targets):
    """ (2, N): the nats of each target (N,) given hidden (N, C), and whether another token is likelier """
    rows, found = max(1, 2**24 // model.config.vocab_size), [] # rows of logits at once
    with torch.autocast(hidden.device.type, enabled=False): # half-precision logits would round the most
        for h, t in zip(hidden.float().split(rows), targets.split(rows)):
            logits = model.lm_head(h)
            found.append(torch.stack([F.cross_entropy(logits, t, reduction='none'), logits.argmax(-1) != t]))
    return torch.cat(found, dim=1).cpu()

def measure(one):
    """ a model's figures, by name """
    texts, cut = encode_items(one) if items else (split_texts or encode_file(one), 0)
    nats, n, missed, size = score(one, texts)
    figures = {'context': one.T, 'items': len(items), 'cut': cut, 'scores': -nats}
    if task == 'lambada':
        return {**figures, 'accuracy': (missed == 0).double().mean(), 'perplexity': nats.mean().exp()}
    if task == 'hellaswag':
        nats, labels = nats.view(-1, 4), torch.tensor([label for *_, label in items])
        lengths = torch.tensor([[len(ending) - 1 for ending in endings] for _, _, endings, _ in items])
        acc, acc_norm = ((loss.argmin(dim=1) == labels).double().mean() for loss in (nats, nats / lengths))
        return {**figures, 'acc': acc, 'acc_norm': acc_norm, 'scores': -nats}
    nats, n, size = nats.sum(), int(n.sum()), int(size.sum())
    if not (size if has_bytes else n):
        more = f'--limit with more than {limit}' if limit else '--file or --dataset of a longer text'
        raise ValueError(f"there is nothing to score in {source}; type {more}")
    figures = {'context': one.T, 'stride': one.stride, 'tokens': n, 'bytes': size, 'nats/token': nats / n,
               'perplexity': (nats / n).exp(), 'bits/byte': nats / np.log(2) / size}
    return {key: value for key, value in figures.items() if has_bytes or 'byte' not in key}

results = [{'model': one.name, **measure(one)} for one in models] # values: text, ints and tensors
columns = [key for key in results[0] if key != 'scores']
if len(models) > 1:
    shared = [key for key in columns if torch.is_tensor(results[0][key])] if alike or items else ['bits/byte']
    results.append({'model': 'difference', **{key: results[0][key] - results[1][key] for key in shared}})
if json:
    print(json_module.dumps({'task': task, 'source': source, 'dtype': dtype, 'results': results},
                            default=torch.Tensor.tolist))
    sys.exit()

def show(value, sign):
    return f'{value:{sign},.4f}' if torch.is_tensor(value) else f'{value:,}' if type(value) is int else value

lines = [columns] + [[show(result.get(key, ''), '+' if n == 2 else '') for key in columns]
                     for n, result in enumerate(results)]
widths = [max(map(len, column)) for column in zip(*lines)]
print(f"{task} of {source}, in {dtype} on {device}")
for name, *cells in lines:
    print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep='  ')
