"""
Makes a dataset from your own text, of any size. A document is a text file (with --lines=True each of its
lines), a line of .jsonl or .json, an item of a list in .json, a row of .csv or of a Hugging Face dataset, or
all that comes through a pipe; a folder may hold many. Each document is ended by end-of-text, or by a newline
if the tokens are characters.

$ python data/custom/prepare.py --input=novel.txt --name=novel
$ python train.py config/finetune/gpt2_small.py --dataset=novel
"""
# options
input = '' # a file, a folder (its .txt, .md, .jsonl, .csv, .tsv), a dataset id of the hub, or - for a pipe
name = 'custom' # the dataset is written to data/NAME
text_field = 'text' # the field of a row that holds the text
subset = '' # which subset of a hub dataset, if it has several
lines = False # each line of a plain text is a document, as each row of .csv and .jsonl is anyway
tokenizer = 'gpt2' # gpt2, char (the text's own characters), or a dataset whose characters to reuse
val_fraction = 0.1 # share to validate on: documents from all parts of the text or, of few, its end
val_input = '' # validate on another file, folder, ... than input, instead of a share of it
allow_special = False # read <|endoftext|> in the text as that token, rather than as text
workers = 0 # processes that encode GPT-2's tokens, 0 for one per core; characters take one

import os
import signal
import sys

_folder = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(_folder, '..', '..')) # for the project's modules

from configurator import configure

def known_characters():
    """ the characters of the dataset that `tokenizer` names """
    from dataset import find_dataset, read_tokenizer_state
    chars = read_tokenizer_state(find_dataset(tokenizer)).get('chars')
    if not chars:
        raise ValueError(f"there is no tokenizer {tokenizer!r}; type --tokenizer=gpt2, --tokenizer=char, or "
                         "--tokenizer=NAME of a dataset in characters, which has a meta.pkl")
    if '\n' not in chars:
        raise ValueError(f"the characters of {tokenizer} are without a newline, which closes each document; "
                         "type --tokenizer with another")
    return chars

def main():
    import numpy as np
    from advice import tell_run
    from documents import Documents
    from encode import write_characters, write_tokens
    from publish import (checksums, choose_val, claim, publish, split_off, tell_place, tell_repeats,
                         write_meta)
    from text import shorten
    from tokenizer import BPETokenizer
    if not input:
        raise ValueError("there is no input; type --input=PATH of a text file or of a folder of them")
    folder = claim(name, 'custom', val_fraction, input, val_input)
    chars = None if tokenizer in ('gpt2', 'char') else known_characters()
    texts = [Documents(its, text_field, subset, lines) for its in (input, val_input) if its]
    with publish(folder) as place:
        parts = dict(zip((os.path.join(place, f'{split}.bin') for split in ('train', 'val')), texts))
        if tokenizer == 'gpt2':
            bpe = BPETokenizer()
            ends = [write_tokens(*part, bpe, workers, allow_special) for part in parts.items()]
        else:
            chars, ends = write_characters(parts, chars)
            write_meta(place, chars)
        n = sum(int(its[-1]) for its in ends)
        pieces = np.array([[ends[0][-1], n]]) if val_input else choose_val(ends[0], val_fraction)
        n_val = int(np.diff(pieces).sum())
        if not 1 < n_val < n - 1: # a target needs a token before it
            kept = f'the {n_val} of {val_input}' if val_input else f'{val_fraction} of them'
            raise ValueError(f"{n} tokens are too few to keep {kept} to validate on; add text")
        sums = np.concatenate([checksums(*part) for part in zip(parts, ends)])
        all_ends = np.concatenate([ends[0], *(its + ends[0][-1] for its in ends[1:])])
        repeats = tell_repeats(sums, all_ends, pieces)
        if not val_input:
            split_off(place, '.bin', pieces, '<u2')
    count, characters = sum(map(len, ends)), sum(its.characters for its in texts)
    print(f"{count:,} document{'s' if count > 1 else ''}, {characters:,} characters, {n:,} tokens of a "
          f"vocabulary of {len(chars) if chars else BPETokenizer.n_vocab:,}")
    if any(its.has_eot for its in texts) and tokenizer == 'gpt2' and not allow_special:
        print("warning: <|endoftext|> in the text was read as text; --allow_special=True reads it as the "
              "token that ends a document")
    held = characters / (n - count)
    if tokenizer == 'gpt2' and held < 2.1:
        print(f"warning: a token holds {held:.1f} characters here, and more than 3 in English, which GPT-2 "
              "was trained on: it hardly knows such a language, or such codes or numbers; --tokenizer=char "
              "is for a small model that learns from them alone")
    where = f', all of {val_input}' if val_input else tell_place(pieces, ends[0])
    print(f"{shorten(folder)}: {n - n_val:,} tokens to train on, {n_val:,} to validate on{where}{repeats}")
    config = f"config/{'train_shakespeare_char_cpu' if chars else 'finetune/gpt2_small'}.py"
    tell_run(config, name, n - n_val, n_val)
    if tokenizer not in ('gpt2', 'char'):
        print("that is a new model; to finetune one that has these characters, add --init_from=ITS_FOLDER")

if __name__ == '__main__': # not in the worker processes, which import this file too
    configure(globals())
    signal.signal(signal.SIGTERM, signal.default_int_handler) # end as on Ctrl-C, leaving nothing behind
    main()
