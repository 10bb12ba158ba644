"""
Tiny Shakespeare, one token per character: 1,003,854 tokens to train on and 111,540 to validate on.
"""
# where the text comes from, unless input.txt is in this folder or in ../shakespeare already
url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt' # the text
sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed' # checksum of that file

import os
import sys

_folder = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(_folder, '..', '..')) # for the project's modules

from configurator import configure
configure(globals())

from publish import fetch, write_dataset
from tokenizer import CharTokenizer

_paths = [os.path.join(_folder, *place, 'input.txt') for place in ((), ('..', 'shakespeare'))]
text = fetch(url, next(filter(os.path.exists, _paths), _paths[0]), sha256)
write_dataset(_folder, text, CharTokenizer(sorted(set(text))))
