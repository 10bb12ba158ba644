"""
Makes a dataset of your own text, of any size. Each document is closed by end-of-text, or by a newline where
the tokens are characters. A document is a text file, a line of .jsonl, an item of a list in .json, a row of
.csv or of a dataset of the Hugging Face hub, or all that comes through a pipe; a folder may hold many.

$ python data/custom/prepare.py --input=novel.txt --name=novel
$ python train.py config/finetune/gpt2_small.py --dataset=novel
"""
# options
input = '' # a file, a folder (its *.txt, *.md, *.jsonl, *.csv), a dataset id of the hub, or - for a pipe
name = 'custom' # the dataset is written to data/NAME
text_field = 'text' # which field of a row is the text
subset = '' # which one of a dataset of the hub that has several
tokenizer = 'gpt2' # gpt2, char for the text's own characters, or a dataset whose characters to use again
val_fraction = 0.1 # the share of the tokens, at the end, that is kept to validate on
allow_special = False # read <|endoftext|> in the text as that token, rather than as text
workers = 0 # processes, 0 for one a core

import os
import signal
import sys

_folder = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(_folder, '..', '..')) # for the project's modules

from configurator import configure

def known_characters():
    """ those of the dataset that `tokenizer` names """
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
    from advice import tell_run
    from dataset import shorten
    from documents import Documents
    from encode import write_characters, write_tokens
    from publish import claim, publish, split_off, write_meta
    from tokenizer import BPETokenizer
    if not input:
        raise ValueError("there is no input; type --input=PATH of a text file or of a folder of them")
    folder = claim(name, 'custom', val_fraction)
    chars = None if tokenizer in ('gpt2', 'char') else known_characters()
    documents = Documents(input, text_field, subset)
    with publish(folder) as place:
        path = os.path.join(place, 'train.bin')
        if tokenizer == 'gpt2':
            n = write_tokens(path, documents, BPETokenizer(), workers, allow_special)
        else:
            chars, n = write_characters(path, documents, chars)
            write_meta(place, chars)
        n_val = int(n * val_fraction)
        if not 1 < n_val < n - 1: # a target has a token before it
            raise ValueError(f"{n} tokens are too few to keep {val_fraction} of them to validate on; add "
                             "text")
        split_off(place, '.bin', 2 * (n - n_val))
    print(f"{documents.count:,} document(s), {documents.characters:,} characters, {n:,} tokens of a "
          f"vocabulary of {len(chars) if chars else BPETokenizer.n_vocab:,}")
    print(f"{shorten(folder)}: {n - n_val:,} tokens to train on, {n_val:,} to validate on")
    config = f"config/{'train_shakespeare_char_cpu' if chars else 'finetune/gpt2_small'}.py"
    tell_run(config, name, n - n_val, n_val)

if __name__ == '__main__': # and not in the processes that encode, which read this file too
    configure(globals())
    signal.signal(signal.SIGTERM, signal.default_int_handler) # ends as Ctrl-C does, with nothing left behind
    main()
