"""
Makes a dataset of your own text: one file, or a folder of text files (*.txt and *.md, in the order of
their names), each a document that is closed by end-of-text.

$ python data/custom/prepare.py --input=novel.txt --name=novel
$ python train.py config/finetune/gpt2_small.py --dataset=novel
"""
# options
input = '' # a text file in UTF-8, or a folder of them
name = 'custom' # the dataset is written to data/NAME
tokenizer = 'gpt2' # gpt2, or char for a model from scratch on the text's own characters
val_fraction = 0.1 # the share of the text, at its end, that is kept to validate on
allow_special = False # read <|endoftext|> in the text as that token, rather than as text

import os
import sys

_folder = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(_folder, '..', '..')) # for the project's modules

from configurator import configure
configure(globals())

from tqdm import tqdm

from dataset import DATA, read_text, write_dataset
from tokenizer import BPETokenizer, CharTokenizer

if not input:
    raise ValueError("there is no input; type --input=PATH of a text file or of a folder of them")
if not os.path.exists(input):
    raise FileNotFoundError(f"there is no {input}; type --input=PATH of a text file or of a folder of them")
if not 0 < val_fraction < 1:
    raise ValueError(f"val_fraction is {val_fraction}; type a share between 0 and 1, such as "
                     "--val_fraction=0.1")
if tokenizer not in ('gpt2', 'char'):
    raise ValueError(f"there is no tokenizer {tokenizer!r}; type --tokenizer=gpt2 or --tokenizer=char")
if not name or os.path.basename(name) != name or name.startswith('.'):
    raise ValueError(f"name is {name!r}; type a plain name for the folder in data/, such as --name=novel")
if name != 'custom' and os.path.exists(os.path.join(DATA, name, 'prepare.py')):
    raise ValueError(f"data/{name} is a dataset of the project's own; type another --name")

paths = [input]
if os.path.isdir(input):
    paths = sorted(os.path.join(folder, file) for folder, _, files in os.walk(input) for file in files
                   if file.lower().endswith(('.txt', '.md')))
    print(f"{len(paths)} files in {input}")
documents = [text for text in map(read_text, tqdm(paths, desc='reading', unit='file', delay=1)) if text.strip()]
if not documents:
    raise ValueError(f"there is no text in {input}; expected a text file, or *.txt and *.md in a folder")
chars = sorted(set().union('\n', *documents)) # a newline closes a document
encoder = BPETokenizer() if tokenizer == 'gpt2' else CharTokenizer(chars)
folder = os.path.join(DATA, name)
write_dataset(folder, documents, encoder, val_fraction, close=True, allow_special=allow_special)
print(f"next: python train.py config/finetune/gpt2_small.py --dataset={name}" if tokenizer == 'gpt2' else
      f"next: python train.py config/train_shakespeare_char_cpu.py --dataset={name} --out_dir=out-{name}")
